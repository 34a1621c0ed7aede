"""The fused block as a function for training, in Triton's interpreter, against autograd through its modules."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import fused_blocks
from helpers.cases import shaken
from helpers.fused_blocks import FLOAT32, KINDS, batch_for, block_of, compare, results, routed, truth
from helpers.oracles import relative_error
from torch import Tensor, nn

import pathnet
from pathnet.models import PreactBlock, ResidualNet

fused = partial(fused_blocks.fused, engine="triton")
fused_residual = partial(pathnet.nn.fused_residual, engine="triton")
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/gpu/triton"),
    pytest.mark.usefixtures("correct_interpreter", "big_tiles"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_block(kind: str, training: bool) -> None:
    block, (x, direction) = block_of(kind, training), batch_for(kind)
    # With one channel, a gradient is a sum of nearly cancelling terms: here 1e-2 of terms near 1.
    tolerance = 10 * FLOAT32 if kind == "one-channel" else FLOAT32
    compare(fused(block, x, direction), truth(block, x, direction), tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_one_image(training: bool) -> None:
    block, (x, direction) = block_of("basic-projection", training), batch_for("basic-projection", batch=1, side=6)
    compare(fused(block, x, direction), truth(block, x, direction), FLOAT32)


def test_weights_in_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More points than a range holds, more channels and columns than a tile holds, the last of each not full."""
    from pathnet.engines.triton.configurations import WGRAD
    from pathnet.engines.triton.launch import Tile

    for width in WGRAD[torch.float32]:
        monkeypatch.setitem(WGRAD[torch.float32], width, Tile(64, 16, 32))
    torch.manual_seed(1)
    block = PreactBlock(3, (3,), (70,), 2, "projection").train()
    shaken(ResidualNet(nn.Identity(), [block], nn.Identity()))
    x, direction = torch.randn(3, 3, 11, 9), torch.randn(3, 70, 6, 5)
    compare(fused(block, x, direction), truth(block, x, direction), FLOAT32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("a", "c"), [(0.5, -3.0), (0.0, 1.0), (-2.0, 1e-3)])
@pytest.mark.parametrize("kind", ["basic", "basic-projection"])
def test_coefficients(kind: str, a: float, c: float, training: bool) -> None:
    block, (x, direction) = block_of(kind, training), batch_for(kind, batch=2, side=5)
    expected = truth(block, x, direction, a, c)
    if a == 0:
        expected.pop("projection.weight", None)
    compare(fused(block, x, direction, a, c), expected, FLOAT32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["basic-16", "basic-projection", "bottleneck"])
def test_bfloat16(kind: str, training: bool) -> None:
    """The error against float64 is at most twice that of the block's own modules in bfloat16."""
    block, (x, direction) = block_of(kind, training), batch_for(kind)
    x, direction = x.bfloat16(), direction.bfloat16()
    expected = truth(block, x, direction)
    measured = fused(block, x, direction)
    assert measured["output"].dtype == measured["x"].dtype == torch.bfloat16
    eager, leaf = copy.deepcopy(block), x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = eager(leaf)
    eager_results = results(eager, leaf, direction, output.bfloat16())
    for name, value in measured.items():
        bound = 2 * relative_error(eager_results[name], expected[name].double()) + 4e-3
        assert relative_error(value, expected[name].double()) < bound, name


def test_autocast_and_memory_formats() -> None:
    block, (x, direction) = block_of("basic", True), batch_for("basic")
    with torch.autocast("cpu", torch.bfloat16):
        output = fused_residual(block, x)
    assert output.dtype == torch.bfloat16 and output.is_contiguous(memory_format=torch.channels_last)
    strided = torch.randn(3, 7, 8, 8).permute(0, 3, 1, 2)[:, ::2]
    assert torch.equal(fused_residual(block.eval(), strided), fused_residual(block, strided.contiguous()))
    expected = truth(block.train(), x, direction)
    compare(fused(block, x.contiguous(memory_format=torch.channels_last), direction), expected, FLOAT32)


def test_running_statistics_with_other_momenta() -> None:
    block, (x, _) = block_of("basic", True), batch_for("basic")
    block.bns[0].momentum = None
    block.bns[1].momentum = 0.25
    trained, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    for _ in range(2):
        fused_residual(trained, x)
        exact(x.double())
    for buffer, expected in zip(trained.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert int(trained.bns[0].num_batches_tracked) == 2


def test_frozen_statistics_in_training() -> None:
    """A BN in evaluation uses and keeps its running statistics in any mode of the block."""
    block, (x, direction) = block_of("basic-projection", True), batch_for("basic-projection")
    for bn in block.bns:
        bn.eval()
    compare(fused(block, x, direction), truth(block, x, direction), FLOAT32)
    block.bns[0].train()
    with pytest.raises(ValueError, match="block: expected all of its BNs to take statistics of the batch, or none"):
        fused_residual(block, x)


def test_statistics_that_are_not_tracked_stay() -> None:
    block, (x, direction) = block_of("basic", True), batch_for("basic")
    block.bns[0].track_running_stats = False
    compare(fused(block, x, direction), truth(block, x, direction), FLOAT32)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which the name of each kernel launched from now on is added."""
    import importlib

    names: list[str] = []
    for name in ("arrivals", "dgrad", "folding", "forward", "statistics", "sums", "wgrad"):
        module: Any = importlib.import_module(f"pathnet.engines.triton.{name}")

        def launch(kernel: Any, programs: int, tile: Any, run: Any = module.launch, **arguments: Any) -> None:
            names.append(kernel.fn.__name__)
            run(kernel, programs, tile, **arguments)

        monkeypatch.setattr(module, "launch", launch)
    return names


@pytest.mark.parametrize("kind", ["basic", "basic-projection", "basic-pad"])
def test_a_skipped_module_launches_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, (x, direction) = block_of(kind, True), batch_for(kind)
    names = count_launches(monkeypatch)
    measured, expected = fused(block, x, direction, 1.0, 0.0), truth(block, x, direction, 1.0, 0.0)
    assert names == []
    taking_part = {"output", "x"} | ({"projection.weight", "bns.0.weight", "bns.0.bias"} if "proj" in kind else set())
    assert {name for name in measured if name not in dict(block.named_buffers())} == taking_part
    for name in taking_part:
        assert relative_error(measured[name], expected[name].double()) < FLOAT32
    if kind == "basic":
        assert fused_residual(block, x, 1.0, 0.0) is x
        fused(block, x, direction)
        assert set(names) >= {"_forward_kernel", "_dgrad_kernel", "_wgrad_kernel"}


def test_a_step_of_stochastic_depth() -> None:
    """The gradients are those with a skipped module multiplied by zero, and None for its parameters."""
    torch.manual_seed(0)
    net = pathnet.models.preact_resnet(14, 4, 5).train()
    images, labels = torch.randn(3, 3, 6, 6), torch.tensor([0, 1, 2])
    drawn = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    exact = copy.deepcopy(net).double()

    def forward(model: ResidualNet, x: Tensor, fuse: bool) -> Tensor:
        y = model.stem(x)
        for block, c in zip(model.blocks, drawn, strict=True):
            y = fused_residual(block, y, 1.0, c) if fuse else routed(block, y, 1.0, c)  # type: ignore[arg-type]
        return torch.as_tensor(nn.functional.cross_entropy(model.head(y), labels))

    forward(net, images, True).backward()
    forward(exact, images.double(), False).backward()
    for (name, parameter), expected in zip(net.named_parameters(), exact.parameters(), strict=True):
        skipped = name.startswith(("blocks.1.", "blocks.3.", "blocks.4."))
        if parameter.grad is None:
            assert skipped and not expected.grad.any()
        else:
            assert relative_error(parameter.grad, expected.grad) < 1e-4, name


def test_a_fused_network_runs_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = pathnet.models.preact_resnet(8, 4, 5).train()
    fused, exact = pathnet.nn.fuse(net, "triton"), copy.deepcopy(net).double()
    assert fused.engines == ("triton",) * 3
    images, labels = torch.randn(3, 3, 6, 6), torch.tensor([0, 1, 2])
    names = count_launches(monkeypatch)
    nn.functional.cross_entropy(fused(images), labels).backward()
    assert names
    nn.functional.cross_entropy(exact(images.double()), labels).backward()
    for (name, parameter), expected in zip(net.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None
        assert relative_error(parameter.grad, expected.grad) < 1e-4, name
