"""Judges one build of the twin: its index arithmetic against formulas written here, its walks against truths.

Knows nothing of torch, so that hundreds of builds are judged in a few minutes: ``judge.py library cases.npz`` prints
what is wrong first, or nothing.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import Structure, byref, c_char_p, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Image(Structure):
    _fields_ = [("channels", c_int32), ("height", c_int32), ("width", c_int32)]

    @property
    def rows(self) -> int:
        return 8 if self.channels == 16 else 4


class Tables(Structure):
    _fields_ = [
        ("blocks", c_void_p),
        ("block_count", c_int64),
        ("units", c_void_p),
        ("unit_count", c_int64),
        ("weights", c_void_p),
        ("scales", c_void_p),
    ]


POINTERS_BACKWARD = ["program", "weights", "relu_bits", "grad", "exponent", "starts", "routing", "order", "counter"]
POINTERS_FORWARD = ["program", "weights", "affine", "y0", "routing", "order", "counter"]


class Backward(Structure):
    _fields_ = [
        *((name, c_void_p) for name in POINTERS_BACKWARD),
        ("bits_stride", c_int64),
        ("gradients", c_int32),
        ("batch", c_int32),
        ("paths", c_int32),
        *((name, c_void_p) for name in ("images", "norms", "grad_input", "exponent_input")),
    ]


class Forward(Structure):
    _fields_ = [
        *((name, c_void_p) for name in POINTERS_FORWARD),
        ("batch", c_int32),
        ("paths", c_int32),
        *((name, c_void_p) for name in ("scratch", "images", "output", "relu_bits")),
    ]


class Wrong(Exception):
    pass


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


def pointer(array: Array) -> int:
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def pad16(channels: int) -> int:
    return -(-channels // 16) * 16


# Layouts, written a second time


def packed_bits(bits: Array) -> Array:
    """uint8 [B, bytes] of bool [B, C, H, W]: [strip][lane][tile][rows * 2 bits], channels filled up to 16."""
    batch, channels, height, width = bits.shape
    rows = 8 if pad16(channels) == 16 else 4
    down, across, tiles = -(-height // rows), -(-width // 8), pad16(channels) // 8
    full = np.zeros((batch, tiles * 8, down * rows, across * 8), bool)
    full[:, :channels, :height, :width] = bits
    # channel = tile, pair, parity; y = line, row; x = column, pixel
    parts = full.reshape(batch, tiles, 4, 2, down, rows, across, 8)
    ordered = parts.transpose(0, 4, 6, 7, 2, 1, 5, 3)  # batch, line, column, pixel, pair, tile, row, parity
    return np.packbits(ordered.reshape(batch, -1), axis=1, bitorder="little")


def bf16_terms(values: Array, parts: int) -> list[Array]:
    """uint16 arrays whose bf16 values add up to float32 ``values``, each the rest rounded to nearest even."""
    terms, rest = [], values.astype(np.float32)
    for _ in range(parts):
        raw = rest.view(np.uint32).astype(np.uint64)
        term = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
        terms.append(term)
        rest = rest - (term.astype(np.uint32) << 16).view(np.float32)
    return terms


def packed_weights(weight: Array, scale: Array | None, parts: int, slices: int) -> Array:
    """uint8 of [out, in, k, k]: [chunk][slice][part][tap of a slice][tile][lane][4] bf16; with scales the transposed
    convolution's."""
    if scale is not None:
        weight = (weight * scale[None, :, None, None]).transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    out, reduced, side, _ = weight.shape
    full = np.zeros((pad16(out), pad16(reduced), side, side), np.float32)
    full[:out, :reduced] = weight
    terms = np.stack(bf16_terms(full, parts))  # part, column, reduced, row of the kernel, column of the kernel
    lane, i = np.meshgrid(np.arange(32), np.arange(4), indexing="ij")
    k, n = lane % 4 * 2 + i % 2 + i // 2 * 8, lane // 4
    chunks, tiles = pad16(reduced) // 16, pad16(out) // 8
    split = terms.reshape(parts, tiles, 8, chunks, 16, side, side)
    taken = split[:, :, n, :, k]  # lane, i, part, tile, chunk, row, column
    by_tap = taken.transpose(4, 2, 6, 5, 3, 0, 1).reshape(chunks, parts, slices, -1)
    return by_tap.transpose(0, 2, 1, 3).copy().view(np.uint8).reshape(-1)


# The checks


def check_geometry(twin: ctypes.CDLL) -> None:
    for channels, height, width in ((16, 9, 11), (32, 5, 8), (48, 6, 3), (64, 4, 17), (16, 1, 1)):
        image = Image(channels, height, width)
        rows, across, tiles = image.rows, -(-width // 8), channels // 8
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
            "units that do not lie in their pixel, each once",
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
    tables = Tables(pointer(blocks), len(blocks), pointer(units), len(units), pointer(weights), pointer(scales))
    walks = {}
    for backward in (1, 0):
        numbers = np.zeros(65536, np.int32)
        terms = parts if backward else 2
        room = shared_bytes if backward else int(case["shared_bytes"][2])
        size = twin.twin_program(byref(tables), backward, terms, room, c_void_p(pointer(numbers)), 65536)
        expect(size > 0, "a plan was refused")
        program = numbers[:size].copy()
        facts = np.zeros(6 + 9 * len(blocks), np.int32)
        twin.twin_facts(c_void_p(pointer(program)), c_void_p(pointer(facts)))
        expect(0 < facts[0] < 1 << 24 and 0 < facts[1] < 1 << 22 and 0 <= facts[2] < 1 << 24, "sizes of a program")
        expect(facts[5] <= room, "more shared memory than allowed")
        packed = np.full(facts[0] + 65536, 0xAB, np.uint8)
        twin.twin_weights(byref(tables), c_void_p(pointer(program)), c_void_p(pointer(packed)))
        expect(bool((packed[facts[0] :] == 0xAB).all()), "weights beyond their end")
        check_weights(case, facts, packed, backward, terms)
        walks[backward] = (program, facts, packed)
    check_forward(twin, case, *walks[0])
    check_backward(twin, case, parts, *walks[1])


def units_of(case: dict[str, Array], block: int) -> list[tuple[int, int]]:
    """(column of the facts, row of the unit table) of a block's two units and its projection."""
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
            own = packed_weights(weight.reshape(outputs, inputs, side, side), scale, terms, slices)
            expect(start == end and np.array_equal(packed[start : start + len(own)], own), "packed weights")
            end = start + len(own)
    expect(end == facts[0], "the end of the packed weights")


def row_of_bits(case: dict[str, Array], facts: Array) -> Array:
    """uint8 [B, bytes]: the truth's ReLU bits where the program has them."""
    batch = len(case["y0"])
    row = np.zeros((batch, facts[1]), np.uint8)
    for block in range(len(case["blocks"])):
        for unit in range(2):
            own = packed_bits(case[f"bits_{block}_{unit}"])
            start = int(facts[6 + (block * 3 + unit) * 3 + 1])
            expect(0 <= start <= facts[1] - own.shape[1], "bits beyond a sample's")
            row[:, start : start + own.shape[1]] = own
    return row


def check_forward(twin: ctypes.CDLL, case: dict[str, Array], program: Array, facts: Array, packed: Array) -> None:
    batch, paths = len(case["y0"]), len(case["forward_routing"])
    expect(facts[3] == len(case["affine"]), "the size of the BN table")
    shape = case["outputs"].shape[2:]
    for record in (True, False):
        routing = np.ones_like(case["forward_routing"][:1]) if record else case["forward_routing"]
        count = len(routing)
        output = np.zeros((count, batch, *shape), np.float32)
        # Guards around what the kernel writes without bounds of its own.
        scratch = np.full(2 * facts[2] + 8192, np.float32(12345.0))
        bits = np.full((batch + 1, facts[1]), 0x55, np.uint8)
        order, counter = np.arange(count, dtype=np.int32), np.zeros(1, np.int32)
        arrays = [program, packed, case["affine"], case["y0"], routing, order, counter]
        # The twin has memory of its own for images.
        outputs = [pointer(scratch), None, pointer(output), pointer(bits) if record else None]
        job = Forward(*map(pointer, arrays), batch, count, *outputs)
        finding = twin.twin_forward(byref(job)).decode()
        expect(not finding, f"forward: {finding}")
        outside = np.concatenate([scratch[: facts[2]], scratch[2 * facts[2] :]])
        expect(bool((outside == 12345).all()), "writes beyond the second thread block's part of the scratch")
        truth = case["recorded"][None] if record else case["outputs"]
        error = np.linalg.norm((output - truth).reshape(count, -1), axis=1)
        size = np.linalg.norm(truth.reshape(count, -1), axis=1)
        expect(bool((error <= 1e-4 * size).all()), f"forward: error {error / size}")
        if not record:
            continue
        expect(bool((bits[batch] == 0x55).all()), "bits beyond the batch's")
        recorded = 0
        for block in range(len(case["blocks"])):
            for unit in range(2):
                own = packed_bits(case[f"bits_{block}_{unit}"])
                sure = packed_bits(case[f"sure_{block}_{unit}"])
                # Of a unit, the backward program's place is the forward's too.
                start = recorded
                recorded += own.shape[1]
                image = np.ones_like(case[f"bits_{block}_{unit}"])
                if case["units"][int(case["blocks"][block][0]) + unit][11] < 0:
                    # Without a ReLU everything passes, in the channels that are filled up too.
                    image = np.ones((batch, pad16(image.shape[1]), *image.shape[2:]), bool)
                expect(
                    np.array_equal(bits[:batch, start:recorded] & sure, own & sure)
                    and not (bits[:batch, start:recorded] & ~packed_bits(image)).any(),
                    f"recorded bits of block {block}, unit {unit}",
                )
        expect(recorded == facts[1], "the end of a sample's bits")
    expect(paths >= 2, "a case needs routings")


def check_backward(
    twin: ctypes.CDLL, case: dict[str, Array], parts: int, program: Array, facts: Array, packed: Array
) -> None:
    batch, routing = len(case["grad"]), case["routing"]
    paths = len(routing)
    # A part of longer rows; and of two gradients one is the other's negative, as another mantissa and exponent.
    relu_bits = np.pad(row_of_bits(case, facts), [(0, 0), (0, 64)], constant_values=0x55)
    grads, exponents = np.stack([case["grad"], -2 * case["grad"]]), np.stack([case["exponent"], case["exponent"] - 1])
    starts = (np.arange(paths) % 2).astype(np.int32)
    for order in (np.arange(paths, dtype=np.int32), np.arange(paths, dtype=np.int32)[::-1].copy()):
        norms = np.zeros((paths, batch))
        grad_input = np.zeros((paths, *case["y0"].shape), np.float32)
        exponent_input, counter = np.zeros((paths, batch), np.int32), np.zeros(1, np.int32)
        arrays = [program, packed, relu_bits, grads, exponents, starts, routing, order, counter]
        outputs = [norms, grad_input, exponent_input]
        job = Backward(*map(pointer, arrays), relu_bits.shape[1], 2, batch, paths, None, *map(pointer, outputs))
        finding = twin.twin_backward(byref(job)).decode()
        expect(not finding, f"backward: {finding}")
        truth = np.where(starts, -1, 1)[:, None, None, None, None] * case["gradients"]
        own = np.ldexp(grad_input.astype(float), exponent_input[:, :, None, None, None])
        size = np.linalg.norm(truth.reshape(paths, batch, -1), axis=2)
        error = np.linalg.norm((own - truth).reshape(paths, batch, -1), axis=2)
        tolerance = 1e-4 if parts == 2 else 3e-2
        expect(bool((error <= tolerance * size).all()), f"backward: error {(error / size).max()}")
        expect(bool((np.abs(norms - size) <= tolerance * size).all()), "norms")
        largest = np.abs(grad_input).reshape(paths, batch, -1).max(2)
        changed = case["changed"][:, None]
        # A bound of the largest magnitude is taken out, of what two branches were before they were added, and of what
        # is rounded to 1 from below.
        expect(bool(((largest >= 0.004) & (largest <= 1) | ~changed).all()), "the scale of a gradient")


def load_cases(file: str) -> list[dict[str, Array]]:
    with np.load(file) as stored:
        count = int(stored["count"])
        return [
            {key.split("/", 1)[1]: stored[key] for key in stored.files if key.startswith(f"{i}/")}
            for i in range(count)
        ]


def load(library: str) -> ctypes.CDLL:
    twin = ctypes.CDLL(library)
    twin.twin_program.restype = c_int64
    for walk in (twin.twin_backward, twin.twin_forward):
        walk.restype = c_char_p
    return twin


def judge(library: str, cases: str) -> None:
    """Raises Wrong with what is wrong first."""
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
