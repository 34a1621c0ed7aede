"""Blocks with several residual modules in parallel, against `detach` loops over the modules written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import relative_error
from torch import Tensor, nn

import pathnet
from pathnet import lesion, paths
from pathnet.lesion.networks import Scaled
from pathnet.models import Block, ResidualNet

EXACT = 1e-12
MODULES = (2, 1, 3)


class Parallel(Block):
    """``tanh(x W + f_1(h) + ... + f_m(h))`` with a shared ``h = norm(x)``."""

    def __init__(self, width: int, modules: int) -> None:
        super().__init__()
        self.residual_modules = modules
        self.norm, self.projection = nn.LayerNorm(width), nn.Linear(width, width)
        self.branches_ = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 5), nn.ReLU(inplace=True), nn.Linear(5, width)) for _ in range(modules)
        )

    def skip(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.projection(x))

    def residual(self, x: Tensor) -> Tensor:
        return torch.stack([torch.as_tensor(part) for part in self.parts(x)[1:]]).sum(0)

    def parts(self, x: Tensor, wanted: Collection[int] | None = None) -> tuple[Tensor | None, ...]:
        h = self.norm(x)
        parts = (self.skip(x), *(module(h) for module in self.branches_))
        return tuple(part if wanted is None or i in wanted else None for i, part in enumerate(parts))

    def join(self, z: Tensor) -> Tensor:
        return torch.tanh(z)


def network() -> ResidualNet:
    torch.manual_seed(0)
    blocks = [Parallel(4, modules) for modules in MODULES]
    return ResidualNet(nn.Linear(3, 4), blocks, nn.Linear(4, 5)).double().eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 1])


def written_out(
    net: ResidualNet, x: Tensor, forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """Return the output and ``y_0`` with a coefficient for each part of each block, by the blocks' own layers."""
    y = y0 = net.stem(x)
    for block, ahead, back in zip(net.blocks, forward, backward, strict=True):
        h = block.norm(y)
        parts = [block.projection(y), *(module(h.clone()) for module in block.branches_)]
        z = sum(
            a * part.detach() + b * (part - part.detach())
            for part, a, b in zip(parts, ahead, back, strict=False)  # type: ignore[misc]
        )
        y = torch.tanh(z)
    return net.head(y), y0


def one_hot(path: Sequence[int]) -> list[list[float]]:
    return [[float(part == entry) for part in range(4)] for entry in path]


ONES = [[1.0] * 4] * 3


def truth(path: Sequence[int]) -> Tensor:
    x, labels = batch()
    output, y0 = written_out(network(), x, ONES, one_hot(path))
    return torch.autograd.grad(F.cross_entropy(output, labels), y0)[0]


def tape() -> pathnet.Tape:
    return pathnet.record(network(), *batch(), precision="float64", engine="reference")


def test_every_path_enters_one_module_of_each_block_or_none() -> None:
    net, codes = network(), paths.enumerate_all(3, MODULES)
    assert (net.residual_modules, net.parts) == (MODULES, 4)
    assert {tuple(code) for code in codes.tolist()} == set(itertools.product(range(3), range(2), range(4)))
    recorded, sums = tape(), torch.zeros(4, 3, 4, dtype=torch.float64)
    for code, grad in zip(codes.tolist(), recorded.path_gradients(codes), strict=True):
        expected = truth(code)
        assert relative_error(grad, expected) < EXACT, code
        sums[sum(entry > 0 for entry in code)] += expected
    assert relative_error(recorded.gradient_by_length(), sums) < EXACT
    assert relative_error(recorded.gradient(), sums.sum(0)) < EXACT
    assert relative_error(recorded.routed_gradients(torch.ones(1, 3, 2))[0], sums.sum(0)) < EXACT
    with pytest.raises(ValueError, match="b: expected values 0 to 1 for block 1, got values 0 to 2"):
        recorded.path_gradients(torch.tensor([[0, 0, 3], [2, 2, 0]]))


def test_coefficients_of_modules_in_both_directions() -> None:
    net, (x, labels) = network(), batch()
    generator = torch.Generator().manual_seed(2)
    there, back = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    there[0, 1] = back[0, 1] = there[2, 3] = 0
    for columns in (4, 2):
        # Two coefficients stand for (a, c, c, c).
        rows = [[*row[:columns], *[row[1]] * (4 - columns)] for row in there.tolist()]
        back_rows = [[*row[:columns], *[row[1]] * (4 - columns)] for row in back.tolist()]
        expected, y0 = written_out(net, x, rows, back_rows)
        (of_y0,) = torch.autograd.grad(F.cross_entropy(expected, labels), y0)
        kept: list[Tensor] = []
        handle = net.stem.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        output = pathnet.routed(net, x, there[:, :columns], back[:, :columns])
        handle.remove()
        assert relative_error(output.detach(), expected.detach()) < EXACT
        (measured,) = torch.autograd.grad(F.cross_entropy(output, labels), kept[0])
        assert relative_error(measured, of_y0) < EXACT
        outputs = pathnet.Recorder(net, precision="float64").routed_outputs(x, there[None, :, :columns])
        assert relative_error(outputs[0], expected.detach()) < EXACT
        (backward, _) = written_out(net, x, ONES, back_rows), None
        (of_tape,) = torch.autograd.grad(F.cross_entropy(backward[0], labels), backward[1])
        assert relative_error(tape().routed_gradients(back[None, :, :columns])[0], of_tape) < EXACT
        grad = pathnet.routed_gradient(net, x, labels, back[:, :columns])
        assert relative_error(grad.detach(), of_tape) < EXACT


def test_a_lesion_deletes_or_scales_all_modules_of_a_block() -> None:
    net, (x, _) = network(), batch()
    without = [[1.0, 0.0, 0.0, 0.0], *ONES[1:]]
    deleted = lesion.delete(net, [0])
    assert relative_error(deleted(x).detach(), written_out(net, x, without, ONES)[0].detach()) < EXACT
    grads = pathnet.record(deleted, *batch(), precision="float64").path_gradients(
        torch.tensor([[0, 1, 2], [2, 1, 2]])
    )
    assert grads[0].any() and not grads[1].any()
    scaled = ResidualNet(net.stem, [Scaled(block, 0.5) for block in net], net.head)
    expected = written_out(net, x, [[1.0, 0.5, 0.5, 0.5]] * 3, ONES)[0]
    assert scaled.residual_modules == MODULES
    assert relative_error(pathnet.routed(scaled, x, torch.ones(3, 4)).detach(), expected.detach()) < EXACT


def test_a_module_that_is_left_out_in_both_directions_is_not_computed() -> None:
    class Failing(Parallel):
        def parts(self, x: Tensor, wanted: Collection[int] | None = None) -> tuple[Tensor | None, ...]:
            assert wanted is not None and 2 not in wanted
            return super().parts(x, wanted)

    net = network()
    net.blocks[0].__class__ = Failing
    routing = torch.ones(3, 4)
    routing[0, 2] = 0
    pathnet.routed(net, batch()[0], routing)
    pathnet.Recorder(net, precision="float64", engine="reference").routed_outputs(batch()[0], routing[None])


def test_signed_draws_over_all_signs_sum_the_squares_of_all_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    every = torch.tensor(list(itertools.product((-1, 1), repeat=9)), dtype=torch.int8)
    monkeypatch.setattr(paths, "signs", lambda n, count, seed, first: every)
    squares = tape().squared_norms_by_length(len(every)).mean(0)
    expected = torch.zeros(4, dtype=torch.float64)
    for code in itertools.product(range(3), range(2), range(4)):
        expected[sum(entry > 0 for entry in code)] += truth(code).square().sum()
    torch.testing.assert_close(squares, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("modules", [2, (2, 1, 3, 1)])
def test_every_path_of_a_length_is_equally_likely(modules: int | tuple[int, ...]) -> None:
    codes = paths.sample(4, 2, count=4000, seed=1, modules=modules)
    assert ((codes > 0).sum(1) == 2).all()
    counts: dict[tuple[int, ...], int] = {}
    for code in map(tuple, codes.tolist()):
        counts[code] = counts.get(code, 0) + 1
    of_blocks = modules if isinstance(modules, tuple) else (modules,) * 4
    number = sum(first * second for first, second in itertools.combinations(of_blocks, 2))
    assert len(counts) == number
    chi_squared = sum((count - 4000 / number) ** 2 * number / 4000 for count in counts.values())
    freedom = number - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)
    assert torch.equal(codes[7:9], paths.sample(4, 2, count=2, seed=1, first=7, modules=modules))


def test_wrong_numbers_of_modules_are_named() -> None:
    with pytest.raises(ValueError, match=r"modules: expected 3 numbers \(one per block\), got 2"):
        paths.sample(3, 1, 1, modules=[1, 2])
    with pytest.raises(ValueError, match="modules: expected at most 1048576 paths, got 3486784401"):
        paths.enumerate_all(20, 2)
    with pytest.raises(ValueError, match="paths: expected values 0 to 2 for block 1, got values 3 to 3"):
        paths.routing(torch.tensor([[0, 3]]), parts=3)


@pytest.mark.parametrize(
    "at", [1, 2, "blocks.0.branches_.1.0.weight", "blocks.1.norm.weight", "blocks.2.projection.weight"]
)
def test_paths_end_at_inputs_and_parameters_of_parallel_blocks(at: str | int) -> None:
    net, (x, labels) = network(), batch()
    first = at if isinstance(at, int) else int(at.split(".")[1])
    recorded = pathnet.record(net, x, labels, engine="reference", precision="float64", at=at)
    behind = ResidualNet(nn.Sequential(net.stem, *list(net)[:first]), list(net)[first:], net.head)
    codes = paths.enumerate_all(recorded.n, MODULES[first:])
    sums: list[Tensor] = [torch.zeros(()) for _ in range(recorded.n + 1)]
    for code, grad in zip(codes.tolist(), recorded.path_gradients(codes), strict=True):
        output, entering = written_out(behind, x, ONES[first:], one_hot(code))
        leaf = entering if isinstance(at, int) else net.get_parameter(at)
        (expected,) = torch.autograd.grad(F.cross_entropy(output, labels), leaf, materialize_grads=True)
        assert relative_error(grad, expected) < EXACT, code
        sums[sum(entry > 0 for entry in code)] = sums[sum(entry > 0 for entry in code)] + expected
    assert relative_error(recorded.gradient_by_length(), torch.stack(sums)) < EXACT
    assert relative_error(recorded.routed_gradients(torch.ones(1, recorded.n, 2))[0], sum(sums)) < EXACT  # type: ignore[arg-type]
    assert torch.isfinite(recorded.squared_norms_by_length(2)).all()
