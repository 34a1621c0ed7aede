"""Schemas of the cpu engine's ops, and the errors of wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.op_cases import PACKED, WALKS, Packing, arguments, closed_plan, pack, two_blocks
from helpers.walk_cases import plan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pathnet import native
from pathnet.engines.cpu import ops

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.mark.parametrize("name", WALKS)
def test_opcheck(name: str) -> None:
    op, call = getattr(torch.ops.pathnet, name).default, arguments(name, plan(3, wide=False))
    torch.library.opcheck(op, tuple(call.values()))
    if "forward" in name:
        torch.library.opcheck(op, tuple(arguments(name, plan(3, wide=False), record=True).values()))
    else:
        torch.library.opcheck(op, tuple({**call, "gradients": False}.values()))


@pytest.mark.parametrize("packing", PACKED)
def test_opcheck_of_packing(packing: Packing) -> None:
    backward, bn = packing
    call = ops.pack_arguments(plan(3, wide=False).tables, backward, bn, False)
    torch.library.opcheck(torch.ops.pathnet.cpu_pack.default, call)


def test_shapes_and_devices_of_results_are_known_without_values() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        grad = torch.empty(3, 5, 4, 4, device="cuda")
        routing, bits = torch.empty(7, 2, 2, device="cuda"), torch.empty(3, 40, dtype=torch.uint8, device="cuda")
        exponent = torch.empty(3, dtype=torch.int32, device="cuda")
        norms, grads, exponents = torch.ops.pathnet.cpu_backward_running(grad, exponent, routing, bits, bits, True)
        assert norms.shape == (7, 3) and norms.dtype == torch.float64 and norms.device.type == "cuda"
        assert grads.shape[:2] == exponents.shape == (7, 3)


def cell(row: int, column: int, value: int) -> Callable[[Tensor], Tensor]:
    """Return what sets one number of a table."""

    def change(table: Tensor) -> Tensor:
        table = table.clone()
        table[row, column] = value
        return table

    return change


def shorter(x: Tensor) -> Tensor:
    return x[..., :-1].contiguous()


def double(x: Tensor) -> Tensor:
    return x.double()


WRONG_TABLES = [
    ("blocks", lambda b: b.int(), "blocks: expected Long, got Int"),
    ("units", double, "units: expected Long, got Double"),
    ("blocks", lambda b: b[:0], "blocks: expected at least one row"),
    ("blocks", lambda b: b[:, :10].contiguous(), r"blocks: expected shape \[\*, 11\]"),
    ("units", lambda u: u[:, :11].contiguous(), r"units: expected shape \[\*, 12\]"),
    ("units", lambda u: u.t().contiguous().t(), "units: expected a contiguous tensor"),
    ("blocks", lambda b: b.flip(0), "blocks: expected row 1 to take what the row before it gives"),
    ("blocks", cell(0, 0, -1), "blocks: expected units within 5 in row 0"),
    ("blocks", cell(1, 1, 3), "blocks: expected units within 5 in row 1"),
    ("blocks", cell(1, 1, 0), "blocks: expected units within 5 in row 1"),
    ("blocks", cell(1, 2, 5), "blocks: expected skip 0 to 4 in row 1, got 5"),
    ("blocks", cell(0, 3, 5), "blocks: expected a projection unit within 5 in row 0, got 5"),
    ("blocks", cell(0, 2, 0), "blocks: expected no projection unit"),
    ("blocks", cell(0, 4, 4), "blocks: expected the shapes of row 0"),
    ("blocks", cell(0, 1, 1), "blocks: expected the shapes of row 0"),
    ("blocks", lambda b: cell(1, 2, 2)(cell(1, 3, 2)(b)), "blocks: expected no projection unit"),
    ("blocks", cell(0, 10, 1), r"blocks: expected no zero channels \(0\) before those of a skip .* in row 0, got 1"),
    *(
        ("blocks", lambda b, n=n: cell(1, 2, 2)(cell(1, 10, n)(b)), "blocks: expected 0 to 0 zero channels before")
        for n in (-1, 1)
    ),
    ("blocks", lambda b: b[:1], "units: expected row 3 to belong to one block, got 0"),
    ("units", cell(0, 0, 1 << 40), "units: expected sizes 1 to 32768 in row 0"),
    ("units", cell(1, 7, 0), "units: expected sizes"),
    ("units", cell(1, 7, 3), "units: expected the output side of row 1"),
    ("units", cell(4, 8, 3), "units: expected padding below the kernel in row 4, got 3"),
    ("units", cell(4, 9, -1), "units: expected a weight offset within"),
    ("units", cell(1, 10, -1), "units: expected a scale offset within"),
    ("units", cell(0, 10, -2), "units: expected -1 for no scale in row 0, got -2"),
    ("units", cell(0, 10, -1), r"units: expected in row 2 the BN \(kernel 0, no bits\) of what row 1 gives"),
    ("units", cell(0, 11, -2), "units: expected an even bits offset within"),
    ("units", cell(2, 10, 0), r"units: expected no scale and no bits \(-1\) for the projection in row 2"),
    ("units", cell(2, 11, 1 << 62), r"units: expected no scale and no bits \(-1\) for the projection in row 2"),
    ("units", cell(0, 11, 1), "units: expected an even bits offset within"),
    ("units", cell(0, 11, 1 << 62), "units: expected an even bits offset within"),
    ("units", cell(0, 10, 1 << 62), "units: expected a scale offset within"),
    ("units", cell(0, 10, 100), "units: expected a scale offset within"),
    ("units", cell(4, 9, 10_000), "units: expected a weight offset within"),
    ("weights", double, "weights: expected Float, got Double"),
    ("weights", shorter, "units: expected a weight offset within"),
    ("weights", lambda w: w[None], r"weights: expected shape \[\*\]"),
    ("scales", double, "scales: expected Float, got Double"),
    ("scales", shorter, "units: expected a scale offset within"),
    ("scales", lambda s: torch.cat([s, s]), r"shifts: expected shape \[\d+\]"),
    ("shifts", shorter, r"shifts: expected shape \[\d+\]"),
    ("shifts", double, "shifts: expected Float, got Double"),
]
WRONG_FOR_MODE: dict[str, list[tuple[str, Callable[[Tensor], Tensor], str]]] = {
    "running": [
        ("biases", lambda b: b[1:], r"biases: expected shape \[\d+\], got"),
        ("biases", double, "biases: expected Float, got Double"),
    ],
    "batch": [
        ("blocks", cell(1, 2, 3), "blocks: expected skip 0, 1 or 2 for this pass in row 1, got 3"),
        ("epsilons", shorter, r"epsilons: expected shape \[5\], got \[4\]"),
        ("epsilons", double, "epsilons: expected Float, got Double"),
    ],
}


@pytest.mark.parametrize("packing", PACKED)
def test_wrong_tables_are_named(packing: Packing) -> None:
    network = two_blocks()
    pack(network, packing)
    for table, change, message in [*WRONG_TABLES, *WRONG_FOR_MODE[packing[1]]]:
        with pytest.raises(RuntimeError, match=message):
            pack(replace(network, **{table: change(getattr(network, table))}), packing)


def test_a_walk_that_there_is_not_is_named() -> None:
    *tables, _, bf16 = ops.pack_arguments(two_blocks().tables, True, "running", False)
    for walk in (-1, 4):
        with pytest.raises(RuntimeError, match=f"walk: expected 0 to 3, got {walk}"):
            torch.ops.pathnet.cpu_pack(*tables, walk, bf16)


@pytest.mark.parametrize("packing", PACKED)
def test_what_closed_blocks_are_refused(packing: Packing) -> None:
    closed = closed_plan()
    if packing[1] == "running":
        with pytest.raises(RuntimeError, match="units: expected a scale for this pass in row 0"):
            pack(closed, packing)
        return
    pack(closed, packing)
    end = r"units: expected in row {} the BN \(kernel 0, no bits\)"
    for change, message in (
        (lambda u: u[:5], "units: expected a row for the BN that ends row 4"),
        (cell(1, 6, 1), end.format(1)),
        (cell(3, 0, 5), end.format(3)),
        (cell(5, 11, 0), end.format(5)),
        (cell(3, 10, -1), "units: expected a scale offset within"),
        (cell(0, 10, -2), "units: expected -1 for no scale"),
        (lambda u: cell(4, 10, 0)(u)[:5].contiguous(), "units: expected a scale in the first unit of every"),
        (cell(4, 11, -1), "blocks: expected skip 0, 1 or 2 before a unit without ReLU in row 1, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pack(replace(closed, units=change(closed.units)), packing)


@pytest.mark.parametrize("name", [name for name, (_, bn) in WALKS.items() if bn == "batch"])
def test_closed_blocks_are_walked_in_mode_batch(name: str) -> None:
    getattr(ops, name)(**arguments(name, closed_plan()))


BACKWARD_BATCH: list[tuple[str, Callable[[Any], Any], str]] = [
    ("normalized", shorter, r"normalized: expected shape \[\d+\], got"),
    ("normalized", double, "normalized: expected Float, got Double"),
    ("scales", shorter, r"scales: expected shape \[\d+\], got"),
    ("scales", double, "scales: expected Float, got Double"),
]
PATHS = [("routing", lambda r: r[:, :1].contiguous(), r"routing: expected shape \[\*, 2, 2\]")]
LENGTHS = [("routing", lambda r: r[:1].contiguous(), r"routing: expected shape \[2, 2\], got \[1, 2\]")]
WRONG_ARGUMENTS: dict[str, list[tuple[str, Callable[[Any], Any], str]]] = {
    "backward": [
        ("grad", double, "grad: expected Float, got Double"),
        ("grad", lambda g: g[:, :5].contiguous(), r"grad: expected shape \[3, 6, 5, 4\], got \[3, 5, 5, 4\]"),
        ("grad", lambda g: g[:2], r"grad: expected shape \[3, 6, 5, 4\], got \[2, 6, 5, 4\]"),
        ("grad", lambda g: g.transpose(2, 3), "grad: expected a contiguous tensor"),
        ("exponent", lambda e: e.long(), "exponent: expected Int, got Long"),
        ("exponent", lambda e: torch.cat([e, e]), r"exponent: expected shape \[\d\], got"),
        ("routing", double, "routing: expected Float, got Double"),
        ("relu_bits", lambda b: b.char(), "relu_bits: expected Byte, got Char"),
        ("relu_bits", lambda b: b[0], r"relu_bits: expected shape \[\*, \*\]"),
        (
            "relu_bits",
            lambda b: b[:, :-4].contiguous(),
            r"relu_bits: expected at least \d+ bytes per sample, got \d+",
        ),
        ("relu_bits", lambda b: b[:2], r"grad: expected shape \[2, 6, 5, 4\], got"),
    ],
    "cpu_backward_running": PATHS,
    "cpu_backward_batch": [*PATHS, *BACKWARD_BATCH],
    "cpu_sums_by_length_running": LENGTHS,
    "cpu_sums_by_length_batch": [*LENGTHS, *BACKWARD_BATCH],
    "forward": [
        *PATHS,
        ("y0", double, "y0: expected Float, got Double"),
        ("y0", lambda y: y[:, 1:].contiguous(), r"y0: expected shape \[\*, 3, 9, 7\], got \[3, 2, 9, 7\]"),
        ("y0", lambda y: y.transpose(2, 3), "y0: expected a contiguous tensor"),
        ("routing", double, "routing: expected Float, got Double"),
        ("record", lambda _: True, "routing: expected one to record, got 9"),
    ],
}


@pytest.mark.parametrize("name", WALKS)
def test_wrong_arguments_are_named(name: str) -> None:
    direction = "backward" if WALKS[name][0] else "forward"
    call, right = getattr(ops, name), arguments(name, two_blocks())
    call(**right)
    for argument, change, message in [*WRONG_ARGUMENTS[direction], *WRONG_ARGUMENTS.get(name, [])]:
        with pytest.raises(RuntimeError, match=message):
            call(**{**right, argument: change(right[argument])})


@pytest.mark.parametrize("name", [name for name, (backward, _) in WALKS.items() if not backward])
def test_a_module_left_out_of_a_recording_is_named(name: str) -> None:
    inputs = arguments(name, two_blocks())
    ones = torch.ones_like(inputs["routing"][:1])
    recorded = {**inputs, "record": True}
    getattr(ops, name)(**{**recorded, "routing": ones})
    ones[0, 1, 1] = 0.0
    with pytest.raises(RuntimeError, match="routing: expected no residual module left out .*, got 0 in row 1"):
        getattr(ops, name)(**{**recorded, "routing": ones})
