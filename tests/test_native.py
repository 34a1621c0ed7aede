"""The native ops by themselves: every instruction set, any number of threads, no read out of bounds."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

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


def random_plan(seed: int) -> tuple[Any, ...]:
    """One to four blocks of any kernels, paddings ("same" or not), strides, widths, odd sides and skips."""
    rng = np.random.default_rng(seed)
    batch, paths, count = (int(rng.integers(1, high)) for high in (4, 3, 5))
    shape = (int(rng.integers(1, 8)), int(rng.integers(3, 10)), int(rng.integers(3, 10)))
    units, blocks, weights, scales, bits = [], [], [], [], []

    def add_unit(shape: Shape, conv: Convolution, projection: bool) -> Shape:
        out = output_shape(shape, conv)
        offsets = (sum(w.size for w in weights), -1, -1)
        if not projection:
            offsets = (offsets[0], sum(s.size for s in scales), sum(b.shape[1] for b in bits))
            scales.append(rng.normal(size=shape[0]))
            bits.append(np.packbits(rng.random((batch, math.prod(shape))) < 0.5, axis=1, bitorder="little"))
        weights.append(rng.normal(size=out[0] * shape[0] * conv[1] ** 2) / math.sqrt(shape[0] * conv[1] ** 2))
        units.append([*shape, *out, *conv[1:], *offsets])
        return out

    for _ in range(count):
        kind = int(rng.integers(3))
        skips: list[Convolution | None] = []
        while not skips:
            convs = [random_convolution(rng) for _ in range(rng.integers(1, 4))]
            convs[-1] = (shape[0] + int(rng.integers(0, 2)), *convs[-1][1:])
            shapes = list(itertools.accumulate(convs, output_shape, initial=shape))
            if min(map(min, shapes)) > 0 and max(shapes[-1][1:]) < 12:
                skips = [conv for own, conv in admitted_skips(shape, shapes[-1], convs) if own == kind]
        skip = skips[rng.integers(len(skips))]
        first, before = len(units), shape
        for conv in convs:
            shape = add_unit(shape, conv, projection=False)
        blocks.append([first, len(convs), kind, -1 if skip is None else len(units), *before, *shape])
        if skip is not None:
            add_unit(before, skip, projection=True)

    routing = rng.normal(size=(paths + 3, count, 2))
    codes = np.stack([np.zeros(count), np.ones(count), rng.integers(0, 2, count)])
    routing[paths:] = np.stack([1 - codes, codes], axis=2)
    grad = rng.normal(size=(batch, *shape))
    exponent = torch.from_numpy(rng.integers(-40, 40, batch).astype(np.int32))
    grad, routing, *flat = (
        torch.from_numpy(a).float() for a in (grad, routing, *map(np.concatenate, (weights, scales)))
    )
    return (
        grad,
        exponent,
        routing,
        torch.tensor(blocks),
        torch.tensor(units),
        *flat,
        torch.from_numpy(np.concatenate(bits, 1)),
    )


Shape = tuple[int, int, int]  # channels, height, width
Convolution = tuple[int, int, int, int]  # output channels, kernel, stride, padding


def random_convolution(rng: np.random.Generator) -> Convolution:
    kernel = int(rng.choice([1, 2, 3, 3, 5]))
    return int(rng.integers(1, 8)), kernel, int(rng.choice([1, 1, 1, 2])), int(rng.integers(0, kernel))


def output_shape(shape: Shape, conv: Convolution) -> Shape:
    channels, kernel, stride, padding = conv
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in shape[1:])
    return channels, height, width


def admitted_skips(shape: Shape, out: Shape, convs: list[Convolution]) -> list[tuple[int, Convolution | None]]:
    stride = math.prod(conv[2] for conv in convs)
    skips: list[tuple[int, Convolution | None]] = [(0, None)] if shape == out else []
    for kernel, own, padding in itertools.product((1, 2, 3), {1, stride}, (0, 1, 2)):
        if padding < kernel and output_shape(shape, (out[0], kernel, own, padding)) == out:
            skips.append((1, (out[0], kernel, own, padding)))
    if out[0] >= shape[0] and out[1:] == tuple(-(-side // stride) for side in shape[1:]):
        skips.append((2, None))
    return skips


def truth(arguments: tuple[Any, ...]) -> Tensor:
    """The same in float64 [P, B, C, H, W], by autograd through masked convolutions."""
    grad, exponent, routing, blocks, units, weights, scales, relu_bits = arguments
    grad = torch.ldexp(grad.double(), exponent[:, None, None, None])
    bits = torch.from_numpy(np.unpackbits(relu_bits.numpy(), axis=1, bitorder="little")).double()

    def activated(row: list[int], x: Tensor) -> Tensor:
        mask = bits[:, row[11] * 8 :][:, : math.prod(row[:3])].reshape(x.shape)
        return x * scales.double()[row[10] :][: row[0], None, None] * mask

    def convolved(row: list[int], x: Tensor) -> Tensor:
        shape = (row[3], row[0], row[6], row[6])
        weight = weights.double()[row[9] :][: math.prod(shape)].reshape(shape)
        return F.conv2d(x, weight, stride=row[7], padding=row[8])

    def skip(kind: int, rows: list[list[int]], projection: list[int], x: Tensor) -> Tensor:
        if kind == 1:
            return convolved(projection, activated(rows[0], x))
        stride = math.prod(row[7] for row in rows) if kind == 2 else 1
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, rows[-1][3] - rows[0][0]))

    x = torch.zeros(len(grad), *blocks[0, 4:7].tolist(), dtype=torch.float64, requires_grad=True)
    grads = []
    for path in routing.double():
        y = x
        for (first, count, kind, projection, *_), (a, c) in zip(blocks.tolist(), path.tolist(), strict=True):
            rows, before = units[first : first + count].tolist(), y
            for row in rows:
                y = convolved(row, activated(row, y))
            y = a * skip(kind, rows, units[projection].tolist(), before) + c * y
        grads.append(torch.autograd.grad(y, x, grad)[0])
    return torch.stack(grads)


@functools.cache
def judged(seed: int) -> tuple[tuple[Any, ...], Tensor]:
    return random_plan(seed), truth(random_plan(seed))


def walked(arguments: tuple[Any, ...]) -> Tensor:
    grad, exponent = native.routed_backward(*arguments)
    return torch.ldexp(grad.double(), exponent[:, :, None, None, None])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_random_plans_walk_like_autograd(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each (path, sample) by the norm of its difference, so that a small one cannot hide behind a large one."""
    monkeypatch.setenv("PATHNET_ISA", isa)
    kinds = torch.zeros(3)
    for seed in range(80):
        arguments, expected = judged(seed)
        kinds += torch.bincount(arguments[3][:, 2], minlength=3)
        error = (walked(arguments) - expected).flatten(2).norm(dim=2)
        assert (error <= 1e-5 * expected.flatten(2).norm(dim=2)).all(), f"seed {seed}"
    assert kinds.min() >= 40


def test_the_path_through_identity_skips_alone_changes_no_bit() -> None:
    grad, exponent, _, _, _, *rest = plan()
    blocks = torch.tensor([[0, 2, 0, -1, 6, 5, 4, 6, 5, 4]] * 30)
    blocks[:, 0] = torch.arange(30) * 2
    units = torch.tensor([[6, 5, 4, 2, 3, 2, 3, 1, 0, 0, 0, 0], [2, 3, 2, 6, 5, 4, 3, 1, 2, 0, 0, 0]]).repeat(30, 1)
    routing = torch.tensor([1.0, 0.0]).expand(1, 30, 2).contiguous()
    result = walked((grad, exponent, routing, blocks, units, *rest))
    assert torch.equal(result[0], torch.ldexp(grad.double(), exponent[:, None, None, None]))


def test_small_values_keep_their_relative_precision() -> None:
    """A one-channel chain whose every block multiplies by 1e-4 without rounding error to speak of: 1e-200."""
    bits = native.pack_bits(torch.ones(1, 9))
    blocks = torch.tensor([[i, 1, 0, -1, 1, 3, 3, 1, 3, 3] for i in range(50)])
    units = torch.tensor([[1, 3, 3, 1, 3, 3, 1, 1, 0, 0, 0, 0]] * 50)
    weight, scale = torch.tensor([1e-2]), torch.tensor([1e-2])
    routing = torch.tensor([0.0, 1.0]).expand(1, 50, 2).contiguous()
    grad = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    tables = (torch.zeros(1, dtype=torch.int32), routing, blocks, units, weight, scale, bits)
    expected = grad.double() * (weight.double() * scale.double()) ** 50
    assert expected.max() < 1e-199
    torch.testing.assert_close(walked((grad, *tables))[0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_walks_like_autograd(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHNET_ISA", isa)
    assert native.build_facts()["selected_instruction_set"] == isa
    for batch in (1, 3):
        grad, _ = native.routed_backward(*plan(batch))
        torch.testing.assert_close(walked(plan(batch)), truth(plan(batch)), rtol=1e-5, atol=1e-5)
        largest = grad.abs().flatten(2).amax(2)
        assert ((largest >= 0.5) & (largest < 1)).all()


def test_an_unknown_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHNET_ISA", "mmx")
    with pytest.raises(RuntimeError, match="PATHNET_ISA: this processor has .*base, got mmx"):
        native.routed_backward(*plan())


def test_results_are_bit_equal_for_any_threads_and_grouping() -> None:
    arguments = plan()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = native.routed_backward(*arguments)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, whole, native.routed_backward(*arguments)))
    finally:
        torch.set_num_threads(threads)
    for i in range(4):
        one = native.routed_backward(*arguments[:2], arguments[2][i : i + 1], *arguments[3:])
        assert all(torch.equal(a[i], b[0]) for a, b in zip(whole, one, strict=True))


def test_values_that_leave_float32_are_kept_and_others_pass_through() -> None:
    grad, exponent, *rest = plan()
    scaled, _ = native.routed_backward(grad * 2.0**-120, exponent, *rest)
    plain, powers = native.routed_backward(grad, exponent - 800, *rest)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
    assert powers.max() < -700
    zeros, untouched = native.routed_backward(torch.zeros_like(grad), exponent, *rest)
    assert not zeros.any() and torch.equal(untouched, exponent.expand(4, 3))
    grad[1, 0, 0, 0] = torch.nan
    spoiled, _ = native.routed_backward(grad, exponent, *rest)
    assert spoiled[:, 1].isnan().any() and not spoiled[:, [0, 2]].isnan().any()


def test_no_paths_and_no_samples() -> None:
    grad, exponent, routing, *rest = plan()
    assert native.routed_backward(grad, exponent, routing[:0], *rest)[0].shape == (0, 3, 3, 9, 7)
    assert native.routed_backward(*plan(batch=0))[1].shape == (4, 0)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.pathnet.pack_bits.default, (torch.randn(3, 2, 5),))
    torch.library.opcheck(torch.ops.pathnet.routed_backward.default, plan())


def test_bits_of_a_cuda_tensor_have_their_shape_and_device() -> None:
    with FakeTensorMode():
        bits = native.pack_bits(torch.empty(3, 5, 5, device="cuda"))
        assert bits.shape == (3, 4) and bits.dtype == torch.uint8 and bits.device.type == "cuda"


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
