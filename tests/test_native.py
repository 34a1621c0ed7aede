"""The native ops by themselves: every instruction set, any number of threads, no read out of bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

INSTRUCTION_SETS = native.build_facts()["instruction_sets"] if native.LOADED else []


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 8), (5, 3, 3, 3), (4, 16, 5, 5), (0, 9), (3, 0)])
def test_packed_bits_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.flatten()[::5] = 0
    x.flatten()[1::7] = torch.nan
    expected = np.packbits(x.numpy().reshape(len(x), x[0].numel() if len(x) else 9) > 0, axis=1, bitorder="little")
    assert np.array_equal(native.pack_bits(x).numpy(), expected)


def plan(batch: int = 3) -> tuple[Any, ...]:
    """A transition block with a projection, then one with identity skip: 3 channels of 9 x 7 to 6 of 5 x 4."""
    generator = torch.Generator().manual_seed(0)
    units = [[3, 9, 7, 5, 9, 7, 3, 1, 1], [5, 9, 7, 6, 5, 4, 3, 2, 1], [3, 9, 7, 6, 5, 4, 1, 2, 0]]
    units += [[6, 5, 4, 2, 3, 2, 3, 1, 0], [2, 3, 2, 6, 5, 4, 3, 1, 2]]
    blocks = torch.tensor([[0, 2, 1, 2, 3, 9, 7, 6, 5, 4], [3, 2, 0, -1, 6, 5, 4, 6, 5, 4]])
    weights, scales, bits, rows = [], [], [], []
    for position, row in enumerate(units):
        weight = torch.randn(row[3], row[0], row[6], row[6], generator=generator) * 0.3
        offsets = [sum(w.numel() for w in weights), -1, -1]
        if position != 2:
            offsets[1:] = [sum(map(len, scales)), sum(b.shape[1] for b in bits)]
            scales.append(torch.randn(row[0], generator=generator))
            bits.append(native.pack_bits(torch.randn(batch, *row[:3], generator=generator)))
        weights.append(weight)
        rows.append([*row, *offsets])
    grad = torch.randn(batch, 6, 5, 4, generator=generator)
    exponent = torch.arange(batch, dtype=torch.int32)
    routing = torch.randn(4, 2, 2, generator=generator)
    flat = torch.cat([w.flatten() for w in weights])
    return grad, exponent, routing, blocks, torch.tensor(rows), flat, torch.cat(scales), torch.cat(bits, 1)


def truth(arguments: tuple[Any, ...]) -> Tensor:
    """The same in float64 by autograd through masked convolutions."""
    grad, exponent, routing, blocks, units, weights, scales, relu_bits = arguments
    grad = torch.ldexp(grad.double(), exponent[:, None, None, None])
    bits = torch.from_numpy(np.unpackbits(relu_bits.numpy(), axis=1, bitorder="little")).double()

    def unit(index: int, x: Tensor, source: int | None = None) -> Tensor:
        row = units[index].tolist()
        weight = weights.double()[row[9] :][: row[3] * row[0] * row[6] ** 2].reshape(row[3], row[0], row[6], row[6])
        own = units[index if source is None else source].tolist()
        size = own[0] * own[1] * own[2]
        mask = bits[:, own[11] * 8 :][:, :size].reshape(-1, *own[:3])
        scaled = x * scales.double()[own[10] : own[10] + own[0], None, None]
        return F.conv2d(scaled * mask, weight, stride=row[7], padding=row[8])

    x = torch.randn(len(grad), *blocks[0, 4:7].tolist(), dtype=torch.float64, requires_grad=True)
    walked = []
    for own in routing.double():
        first, second = own.tolist()
        y = first[0] * unit(2, x, source=0) + first[1] * unit(1, unit(0, x))
        y = second[0] * y + second[1] * unit(4, unit(3, y))
        walked.append(torch.autograd.grad(y, x, grad)[0])
    return torch.stack(walked)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_walks_like_autograd(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHNET_ISA", isa)
    assert native.build_facts()["selected_instruction_set"] == isa
    for batch in (1, 3):
        grad, exponent = native.routed_backward(*plan(batch))
        walked = torch.ldexp(grad.double(), exponent[:, :, None, None, None])
        torch.testing.assert_close(walked, truth(plan(batch)), rtol=1e-5, atol=1e-5)
        largest = grad.abs().flatten(2).amax(2)
        assert ((largest >= 0.5) & (largest < 1)).all()


def test_an_unknown_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHNET_ISA", "mmx")
    with pytest.raises(RuntimeError, match="PATHNET_ISA: this processor has .*base, got mmx"):
        native.routed_backward(*plan())


def test_results_are_bit_equal_for_any_threads_and_grouping() -> None:
    arguments = plan()
    whole = native.routed_backward(*arguments)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native.routed_backward(*arguments)
    finally:
        torch.set_num_threads(threads)
    for i in range(4):
        one = native.routed_backward(*arguments[:2], arguments[2][i : i + 1], *arguments[3:])
        assert all(
            torch.equal(a[i], b[i]) and torch.equal(a[i], c[0]) for a, b, c in zip(whole, alone, one, strict=True)
        )


def test_values_that_leave_float32_are_kept_and_others_pass_through() -> None:
    grad, exponent, *rest = plan()
    scaled, _ = native.routed_backward(grad * 2.0**-120, exponent, *rest)
    plain, powers = native.routed_backward(grad, exponent - 800, *rest)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
    assert powers.max() < -700
    zeros, untouched = native.routed_backward(torch.zeros_like(grad), exponent, *rest)
    assert not zeros.any() and torch.equal(untouched, exponent.expand(4, 3))
    grad[1, 0, 0, 0] = torch.nan
    walked, _ = native.routed_backward(grad, exponent, *rest)
    assert walked[:, 1].isnan().any() and not walked[:, [0, 2]].isnan().any()


def test_no_paths_and_no_samples() -> None:
    grad, exponent, routing, *rest = plan()
    assert native.routed_backward(grad, exponent, routing[:0], *rest)[0].shape == (0, 3, 3, 9, 7)
    assert native.routed_backward(*plan(batch=0))[1].shape == (4, 0)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.pathnet.pack_bits.default, (torch.randn(3, 2, 5),))
    torch.library.opcheck(torch.ops.pathnet.routed_backward.default, plan())


def broken(position: int, row: int, column: int, value: int) -> tuple[Any, ...]:
    arguments = list(plan())
    arguments[position][row, column] = value
    return tuple(arguments)


def replaced(position: int, value: Any) -> tuple[Any, ...]:
    arguments = list(plan())
    arguments[position] = value(arguments[position])
    return tuple(arguments)


BLOCKS, UNITS = 3, 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: replaced(0, lambda g: g.double()), "grad: expected Float, got Double"),
        (
            lambda: replaced(0, lambda g: g[:, :5].contiguous()),
            r"grad: expected shape \[3, 6, 5, 4\], got \[3, 5, 5, 4\]",
        ),
        (lambda: replaced(0, lambda g: g.transpose(2, 3)), "grad: expected a contiguous tensor"),
        (lambda: replaced(1, lambda e: e[:2]), r"exponent: expected shape \[3\], got \[2\]"),
        (lambda: replaced(2, lambda r: r[:, :1].contiguous()), r"routing: expected shape \[\*, 2, 2\]"),
        (lambda: replaced(3, lambda b: b[:0]), "blocks: expected at least one row"),
        (lambda: replaced(3, lambda b: b[:, :9].contiguous()), r"blocks: expected shape \[\*, 10\]"),
        (lambda: replaced(3, lambda b: b.flip(0)), "blocks: expected row 1 to take what the row before it gives"),
        (lambda: broken(BLOCKS, 0, 0, -1), "blocks: expected units within 5 in row 0"),
        (lambda: broken(BLOCKS, 1, 1, 3), "blocks: expected units within 5 in row 1"),
        (lambda: broken(BLOCKS, 1, 2, 3), "blocks: expected skip 0, 1 or 2 in row 1, got 3"),
        (lambda: broken(BLOCKS, 0, 3, 5), "blocks: expected a projection unit within 5 in row 0, got 5"),
        (lambda: broken(BLOCKS, 0, 2, 0), "blocks: expected no projection unit"),
        (lambda: broken(BLOCKS, 0, 4, 4), "blocks: expected the shapes of row 0"),
        (lambda: broken(UNITS, 0, 0, 1 << 40), "units: expected sizes 1 to 32768 in row 0"),
        (lambda: broken(UNITS, 1, 7, 0), "units: expected sizes"),
        (lambda: broken(UNITS, 1, 7, 3), "units: expected the output side of row 1"),
        (lambda: broken(UNITS, 4, 8, 3), "units: expected padding below the kernel in row 4, got 3"),
        (lambda: broken(UNITS, 4, 9, 10_000), "units: expected a weight offset within"),
        (lambda: broken(UNITS, 4, 9, -1), "units: expected a weight offset within"),
        (lambda: broken(UNITS, 0, 10, 100), "units: expected a scale offset within"),
        (lambda: broken(UNITS, 0, 11, 1 << 62), "units: expected a bits offset within"),
        (lambda: broken(BLOCKS, 0, 1, 1), "blocks: expected the shapes of row 0"),
        (lambda: replaced(7, lambda b: b[:, :-1].contiguous()), "units: expected a bits offset within"),
    ],
)
def test_malformed_plans_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native.routed_backward(*arguments())
