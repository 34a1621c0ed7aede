"""Judge one build of the twin: its index arithmetic against formulas written here, its results against truths.

``judge.py library cases.npz`` prints the first error, or nothing. It imports no torch, so it judges hundreds of
builds in a few minutes.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_int32, c_void_p

import numpy as np
from layouts import packed_bits, packed_weights, pad16
from twin_abi import Array, Image, PathBackward, PathForward, PlanTables, load, pointer


class Wrong(Exception):
    """The first error of a build."""


def expect(holds: bool, error: str) -> None:
    if not holds:
        raise Wrong(error)


def check_geometry(twin: ctypes.CDLL) -> None:
    for channels, height, width in ((16, 9, 11), (32, 5, 8), (48, 6, 3), (64, 4, 17), (16, 1, 1)):
        image = Image(channels, height, width)
        rows, across, tiles = image.strip_rows, -(-width // 8), channels // 8
        strips = -(-height // rows) * across
        units = {16: 2, 32: 4, 48: 8, 64: 8}[channels]
        pixels = (-(-height // 8) * 8 + 2) * (width + 2)
        plane = -(-pixels * units // 8) * 128
        sizes = (c_int32 * 3)()
        twin.probe_sizes(byref(image), sizes)
        expected = [plane, strips * 32 * tiles * rows // 4, strips * rows * tiles * 64]
        expect(list(sizes) == expected, f"sizes of {channels} x {height} x {width}: {list(sizes)}")
        unit_byte = np.array(
            [[twin.probe_unit_byte(byref(image), 384, p, u) for u in range(units)] for p in range(pixels)]
        )
        unit_byte -= 384
        expect(
            np.array_equal(np.sort(unit_byte // 16, axis=1), np.arange(pixels * units).reshape(pixels, units)),
            "units outside their pixel, or in one place",
        )
        for first in range(pixels - 7):
            groups = np.sort(unit_byte[first : first + 8] // 16 % 8, axis=0)
            expect(bool((groups == np.arange(8)[:, None]).all()), "eight pixels in the same banks")
        order = [
            twin.probe_lane_order(byref(image), s, r, t, lane)
            for s in range(strips)
            for r in range(rows)
            for t in range(tiles)
            for lane in range(32)
        ]
        expect(order == list(range(0, expected[2], 2)), "the order of y")
        bits = np.zeros((1, channels, height, width), bool)
        for c, y, x in np.ndindex(channels, height, width):
            bits[:] = False
            bits[0, c, y, x] = True
            if (c * 7 + y * 3 + x) % 11:
                continue
            place = np.flatnonzero(np.unpackbits(packed_bits(bits)[0], bitorder="little"))
            expect(twin.probe_bit_index(byref(image), c, y, x) == place[0], f"bit of {c}, {y}, {x}")
    for divisor in range(1, 200):
        for value in (0, 1, divisor - 1, divisor, 2 * divisor - 1, 2 * divisor, 4999 // divisor * divisor, 4999):
            if value * divisor < 1 << 20:
                expect(twin.probe_quotient(divisor, value) == value // divisor, f"{value} / {divisor}")


def check_case(twin: ctypes.CDLL, case: dict[str, Array], parts: int, shared_bytes: int) -> None:
    blocks, units = case["blocks"], case["units"]
    weights, scales = case["weights"], case["scales"]
    tables = PlanTables(pointer(blocks), len(blocks), pointer(units), len(units), pointer(weights), pointer(scales))
    programs = {}
    for backward in (1, 0):
        numbers = np.zeros(65536, np.int32)
        terms = parts if backward else 2
        room = shared_bytes if backward else int(case["shared_bytes"][2])
        size = twin.twin_program(byref(tables), backward, terms, room, c_void_p(pointer(numbers)), 65536)
        expect(size > 0, "a network was refused")
        program = numbers[:size].copy()
        facts = np.zeros(6 + 9 * len(blocks), np.int32)
        twin.twin_facts(c_void_p(pointer(program)), c_void_p(pointer(facts)))
        expect(0 < facts[0] < 1 << 24 and 0 < facts[1] < 1 << 22 and 0 <= facts[2] < 1 << 24, "sizes of a program")
        expect(facts[5] <= room, "more shared memory than allowed")
        packed = np.full(facts[0] + 65536, 0xAB, np.uint8)
        twin.twin_weights(byref(tables), c_void_p(pointer(program)), c_void_p(pointer(packed)))
        expect(bool((packed[facts[0] :] == 0xAB).all()), "weights beyond their end")
        check_weights(case, facts, packed, backward, terms)
        programs[backward] = (program, facts, packed)
    check_forward(twin, case, *programs[0])
    check_backward(twin, case, parts, *programs[1])


def units_of(case: dict[str, Array], block: int) -> list[tuple[int, int]]:
    """Return (column of the facts, row of the unit table) of a block's two units and its projection."""
    first, _, _, projection = case["blocks"][block][:4]
    rows = [(0, int(first)), (1, int(first) + 1)]
    return rows if projection < 0 else [*rows, (2, int(projection))]


def check_weights(case: dict[str, Array], facts: Array, packed: Array, backward: int, terms: int) -> None:
    end = 0
    for block in range(len(case["blocks"])):
        scale_row = case["units"][int(case["blocks"][block][0])]
        for column, row in units_of(case, block):
            unit = case["units"][row]
            inputs, outputs, side, offset = int(unit[0]), int(unit[3]), int(unit[6]), int(unit[9])
            weight = case["weights"][offset : offset + outputs * inputs * side * side]
            at = int(scale_row[10] if column == 2 else unit[10])
            scale = case["scales"][at : at + inputs] if backward else None
            place = 6 + (block * 3 + column) * 3
            start, slices = int(facts[place]), int(facts[place + 2])
            expect(slices in (1, side, side * side), "slices of weights")
            expected = packed_weights(weight.reshape(outputs, inputs, side, side), scale, terms, slices)
            measured = packed[start : start + len(expected)]
            expect(start == end and np.array_equal(measured, expected), "packed weights")
            end = start + len(expected)
    expect(end == facts[0], "the end of the packed weights")


def row_of_bits(case: dict[str, Array], facts: Array) -> Array:
    """Return uint8 [B, bytes]: the true ReLU bits in the program's places."""
    batch = len(case["y0"])
    row = np.zeros((batch, facts[1]), np.uint8)
    for block in range(len(case["blocks"])):
        for unit in range(2):
            bits = packed_bits(case[f"bits_{block}_{unit}"])
            start = int(facts[6 + (block * 3 + unit) * 3 + 1])
            expect(0 <= start <= facts[1] - bits.shape[1], "bits beyond a sample's")
            row[:, start : start + bits.shape[1]] = bits
    return row


def check_forward(twin: ctypes.CDLL, case: dict[str, Array], program: Array, facts: Array, packed: Array) -> None:
    batch, paths = len(case["y0"]), len(case["forward_routing"])
    expect(facts[3] == len(case["affine"]), "the size of the BN table")
    shape = case["outputs"].shape[2:]
    for record in (True, False):
        routing = np.ones_like(case["forward_routing"][:1]) if record else case["forward_routing"]
        count = len(routing)
        output = np.zeros((count, batch, *shape), np.float32)
        # Guards around the scratch, where the kernel checks no bounds.
        scratch = np.full(2 * facts[2] + 8192, np.float32(12345.0))
        bits = np.full((batch + 1, facts[1]), 0x55, np.uint8)
        order, counter = np.arange(count, dtype=np.int32), np.zeros(1, np.int32)
        arrays = [program, packed, case["affine"], case["y0"], routing, order, counter]
        # The twin has memory of its own for images.
        outputs = [pointer(scratch), None, pointer(output), pointer(bits) if record else None]
        job = PathForward(*map(pointer, arrays), batch, count, *outputs)
        finding = twin.twin_forward(byref(job)).decode()
        expect(not finding, f"forward: {finding}")
        # One more is taken, which ends the thread block.
        expect(counter[0] == count * batch + 1, "forward: the items of work that are taken")
        outside = np.concatenate([scratch[: facts[2]], scratch[2 * facts[2] :]])
        expect(bool((outside == 12345).all()), "writes beyond the second thread block's part of the scratch")
        truth = case["recorded"][None] if record else case["outputs"]
        error = np.linalg.norm((output - truth).reshape(count, -1), axis=1)
        size = np.linalg.norm(truth.reshape(count, -1), axis=1)
        expect(bool((error <= 1e-4 * size).all()), f"forward: error {error / size}")
        if record:
            check_recorded_bits(case, facts, bits)
    expect(paths >= 2, "a case needs routings")


def check_recorded_bits(case: dict[str, Array], facts: Array, bits: Array) -> None:
    """Check uint8 [B + 1, bytes]: the recorded ReLU bits of B samples, and a guard."""
    batch = len(bits) - 1
    expect(bool((bits[batch] == 0x55).all()), "bits beyond the batch's")
    start = 0
    for block in range(len(case["blocks"])):
        for unit in range(2):
            expected = packed_bits(case[f"bits_{block}_{unit}"])
            sure = packed_bits(case[f"sure_{block}_{unit}"])
            # The backward and the forward program have a unit's bits in the same place.
            recorded = bits[:batch, start : start + expected.shape[1]]
            start += expected.shape[1]
            image = np.ones_like(case[f"bits_{block}_{unit}"])
            if case["units"][int(case["blocks"][block][0]) + unit][11] < 0:
                # Without a ReLU all bits are set, those of padded channels too.
                image = np.ones((batch, pad16(image.shape[1]), *image.shape[2:]), bool)
            expect(
                np.array_equal(recorded & sure, expected & sure) and not (recorded & ~packed_bits(image)).any(),
                f"recorded bits of block {block}, unit {unit}",
            )
    expect(start == facts[1], "the end of a sample's bits")


def check_backward(
    twin: ctypes.CDLL, case: dict[str, Array], parts: int, program: Array, facts: Array, packed: Array
) -> None:
    batch, routing = len(case["grad"]), case["routing"]
    paths = len(routing)
    # Rows of bits are longer than the program's. The second gradient is the negative of the first, with another
    # mantissa and exponent.
    relu_bits = np.pad(row_of_bits(case, facts), [(0, 0), (0, 64)], constant_values=0x55)
    grads, exponents = np.stack([case["grad"], -2 * case["grad"]]), np.stack([case["exponent"], case["exponent"] - 1])
    starts = (np.arange(paths) % 2).astype(np.int32)
    for order in (np.arange(paths, dtype=np.int32), np.arange(paths, dtype=np.int32)[::-1].copy()):
        norms = np.zeros((paths, batch))
        grad_input = np.zeros((paths, *case["y0"].shape), np.float32)
        exponent_input, counter = np.zeros((paths, batch), np.int32), np.zeros(1, np.int32)
        arrays = [program, packed, relu_bits, grads, exponents, starts, routing, order, counter]
        outputs = [norms, grad_input, exponent_input]
        job = PathBackward(*map(pointer, arrays), relu_bits.shape[1], 2, batch, paths, None, *map(pointer, outputs))
        finding = twin.twin_backward(byref(job)).decode()
        expect(not finding, f"backward: {finding}")
        expect(counter[0] == paths * -(-batch // facts[4]) + 1, "backward: the items of work that are taken")
        truth = np.where(starts, -1, 1)[:, None, None, None, None] * case["gradients"]
        measured = np.ldexp(grad_input.astype(float), exponent_input[:, :, None, None, None])
        size = np.linalg.norm(truth.reshape(paths, batch, -1), axis=2)
        error = np.linalg.norm((measured - truth).reshape(paths, batch, -1), axis=2)
        tolerance = 1e-4 if parts == 2 else 3e-2
        expect(bool((error <= tolerance * size).all()), f"backward: error {(error / size).max()}")
        expect(bool((np.abs(norms - size) <= tolerance * size).all()), "norms")
        largest = np.abs(grad_input).reshape(paths, batch, -1).max(2)
        changed = case["changed"][:, None]
        # The power of two of a bound of the largest magnitude is taken out: of two branches before they are added,
        # and of values that may be rounded up to 1.
        expect(bool(((largest >= 0.004) & (largest <= 1) | ~changed).all()), "the scale of a gradient")


def load_cases(file: str) -> list[dict[str, Array]]:
    with np.load(file) as stored:
        count = int(stored["count"])
        return [
            {key.split("/", 1)[1]: stored[key] for key in stored.files if key.startswith(f"{i}/")}
            for i in range(count)
        ]


def judge(library: str, cases: str) -> None:
    """Raise Wrong with the first error."""
    twin = load(library)
    check_geometry(twin)
    for case in load_cases(cases):
        for parts in (1, 2):
            check_case(twin, case, parts, int(case["shared_bytes"][parts - 1]))


if __name__ == "__main__":
    try:
        judge(sys.argv[1], sys.argv[2])
    except Wrong as wrong:
        print(wrong)
        sys.exit(1)
