"""The fused block as a function for training, in Triton's interpreter, against autograd through its modules."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers.cases import shaken
from helpers.oracles import relative_error
from torch import Tensor, nn

import pathnet
from pathnet.models import Block, PreactBlock, ResidualNet
from pathnet.nn import fused_residual

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/triton")

KINDS: dict[str, tuple[Any, ...]] = {
    "basic": (4, (3, 3), (4, 4), 1, "projection"),
    "basic-16": (16, (3, 3), (16, 16), 1, "projection"),
    "basic-projection": (3, (3, 3), (6, 6), 2, "projection"),
    "basic-pad": (3, (3, 3), (7, 7), 2, "pad"),
    "bottleneck": (8, (1, 3, 1), (3, 3, 8), 1, "projection"),
    "bottleneck-projection": (5, (1, 3, 1), (3, 4, 20), 2, "projection"),
    "one-unit": (5, (3,), (5,), 1, "projection"),
    "large-kernel": (2, (5, 3), (3, 2), 1, "projection"),
    "one-channel": (1, (3, 3), (1, 1), 1, "projection"),
}

FLOAT32 = 1e-5
"""Of a whole tensor: a few hundred roundings of 2^-24, and what differences of large sums leave of them."""


@pytest.fixture(autouse=True)
def right_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import interpreter

    interpreter.correct()
    interpreter.big_tiles(monkeypatch)


def block_of(kind: str, training: bool) -> PreactBlock:
    torch.manual_seed(1)
    block = PreactBlock(*KINDS[kind])
    shaken(ResidualNet(nn.Identity(), [block], nn.Identity()))
    return block.train(training)


def given(kind: str, batch: int = 3, side: int = 7) -> tuple[Tensor, Tensor]:
    """float32 input, and a random direction of the output's size."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, KINDS[kind][0], side, side + 1, generator=generator)
    block = block_of(kind, training=False)
    return x, torch.randn(block(x).shape, generator=generator)


def everything(block: PreactBlock, x: Tensor, direction: Tensor, output: Tensor) -> dict[str, Tensor]:
    """The output, and gradients of its product with a direction: of the input and of each parameter that has one."""
    wanted = {"x": x, **dict(block.named_parameters())}
    product = (output * direction.to(output.dtype)).sum()
    grads = torch.autograd.grad(product, list(wanted.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    return {"output": output.detach(), **found, **buffers}


def routed(block: Block, x: Tensor, a: float, c: float) -> Tensor:
    skip, residual = block.branches(x)
    return a * skip + c * residual


def truth(block: PreactBlock, x: Tensor, direction: Tensor, a: float = 1.0, c: float = 1.0) -> dict[str, Tensor]:
    """In float64, through the block's own modules."""
    exact, x = copy.deepcopy(block).double(), x.detach().double().requires_grad_()
    return everything(exact, x, direction.double(), routed(exact, x, a, c))


def fused(block: PreactBlock, x: Tensor, direction: Tensor, a: float = 1.0, c: float = 1.0) -> dict[str, Tensor]:
    block, x = copy.deepcopy(block), x.detach().requires_grad_()
    return everything(block, x, direction, fused_residual(block, x, a, c))


def compare(own: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert own.keys() == expected.keys()
    for name, value in own.items():
        assert relative_error(value, expected[name].double()) < tolerance, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_block(kind: str, training: bool) -> None:
    block, (x, direction) = block_of(kind, training), given(kind)
    # A gradient of one number is what terms leave that nearly cancel: here 1e-2 of terms near 1.
    tolerance = 10 * FLOAT32 if kind == "one-channel" else FLOAT32
    compare(fused(block, x, direction), truth(block, x, direction), tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_one_image(training: bool) -> None:
    block, (x, direction) = block_of("basic-projection", training), given("basic-projection", batch=1, side=6)
    compare(fused(block, x, direction), truth(block, x, direction), FLOAT32)


def test_weights_in_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More points than a range, more channels and more columns than a tile, the last of each not full."""
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
    block, (x, direction) = block_of(kind, training), given(kind, batch=2, side=5)
    expected = truth(block, x, direction, a, c)
    if a == 0:
        expected.pop("projection.weight", None)
    compare(fused(block, x, direction, a, c), expected, FLOAT32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["basic-16", "basic-projection", "bottleneck"])
def test_bfloat16(kind: str, training: bool) -> None:
    """No further from float64 than the block's own modules in bfloat16, twice over."""
    block, (x, direction) = block_of(kind, training), given(kind)
    x, direction = x.bfloat16(), direction.bfloat16()
    expected = truth(block, x, direction)
    own = fused(block, x, direction)
    assert own["output"].dtype == own["x"].dtype == torch.bfloat16
    eager, leaf = copy.deepcopy(block), x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = eager(leaf)
    other = everything(eager, leaf, direction, output.bfloat16())
    for name, value in own.items():
        bound = 2 * relative_error(other[name], expected[name].double()) + 4e-3
        assert relative_error(value, expected[name].double()) < bound, name


def test_autocast_and_memory_formats() -> None:
    block, (x, direction) = block_of("basic", True), given("basic")
    with torch.autocast("cpu", torch.bfloat16):
        output = fused_residual(block, x)
    assert output.dtype == torch.bfloat16 and output.is_contiguous(memory_format=torch.channels_last)
    strided = torch.randn(3, 7, 8, 8).permute(0, 3, 1, 2)[:, ::2]
    assert torch.equal(fused_residual(block.eval(), strided), fused_residual(block, strided.contiguous()))
    expected = truth(block.train(), x, direction)
    compare(fused(block, x.contiguous(memory_format=torch.channels_last), direction), expected, FLOAT32)


def test_running_statistics_with_other_momenta() -> None:
    block, (x, _) = block_of("basic", True), given("basic")
    block.bns[0].momentum = None
    block.bns[1].momentum = 0.25
    expected, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    for _ in range(2):
        fused_residual(expected, x)
        exact(x.double())
    for own, other in zip(expected.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(own.double(), other.double(), rtol=1e-5, atol=1e-6)
    assert int(expected.bns[0].num_batches_tracked) == 2


def test_frozen_statistics_in_training() -> None:
    """A BN in evaluation uses its running statistics whatever the block is in, and keeps them."""
    block, (x, direction) = block_of("basic-projection", True), given("basic-projection")
    for bn in block.bns:
        bn.eval()
    compare(fused(block, x, direction), truth(block, x, direction), FLOAT32)
    block.bns[0].train()
    with pytest.raises(ValueError, match="block: expected all of its BNs to take statistics of the batch, or none"):
        fused_residual(block, x)


def test_statistics_that_are_not_tracked_stay() -> None:
    block, (x, direction) = block_of("basic", True), given("basic")
    block.bns[0].track_running_stats = False
    compare(fused(block, x, direction), truth(block, x, direction), FLOAT32)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from now on."""
    import importlib

    names: list[str] = []
    for module in ("arrivals", "dgrad", "folding", "forward", "statistics", "sums", "wgrad"):
        own: Any = importlib.import_module(f"pathnet.engines.triton.{module}")

        def launch(kernel: Any, *given: Any, run: Any = own.launch, **constants: Any) -> None:
            names.append(kernel.fn.__name__)
            run(kernel, *given, **constants)

        monkeypatch.setattr(own, "launch", launch)
    return names


@pytest.mark.parametrize("kind", ["basic", "basic-projection", "basic-pad"])
def test_a_skipped_module_launches_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, (x, direction) = block_of(kind, True), given(kind)
    names = count_launches(monkeypatch)
    own, expected = fused(block, x, direction, 1.0, 0.0), truth(block, x, direction, 1.0, 0.0)
    assert names == []
    taking_part = {"output", "x"} | ({"projection.weight", "bns.0.weight", "bns.0.bias"} if "proj" in kind else set())
    assert {name for name in own if name not in dict(block.named_buffers())} == taking_part
    for name in taking_part:
        assert relative_error(own[name], expected[name].double()) < FLOAT32
    if kind == "basic":
        assert fused_residual(block, x, 1.0, 0.0) is x
        fused(block, x, direction)
        assert set(names) >= {"_forward_kernel", "_dgrad_kernel", "_wgrad_kernel"}


def test_a_step_of_stochastic_depth() -> None:
    """Exactly the gradients that multiplying a whole module by zero gives, and None where a module is not drawn."""
    torch.manual_seed(0)
    net = pathnet.models.preact_resnet(14, 4, 5).train()
    images, labels = torch.randn(3, 3, 6, 6), torch.tensor([0, 1, 2])
    drawn = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    exact = copy.deepcopy(net).double()

    def forward(own: ResidualNet, x: Tensor, fuse: bool) -> Tensor:
        y = own.stem(x)
        for block, c in zip(own.blocks, drawn, strict=True):
            y = fused_residual(block, y, 1.0, c) if fuse else routed(block, y, 1.0, c)  # type: ignore[arg-type]
        return torch.as_tensor(nn.functional.cross_entropy(own.head(y), labels))

    forward(net, images, True).backward()
    forward(exact, images.double(), False).backward()
    for (name, own), other in zip(net.named_parameters(), exact.parameters(), strict=True):
        skipped = name.startswith(("blocks.1.", "blocks.3.", "blocks.4."))
        if own.grad is None:
            assert skipped and not other.grad.any()
        else:
            assert relative_error(own.grad, other.grad) < 1e-4, name


def detached(own: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, own)


def operands(kind: str) -> tuple[PreactBlock, Tensor, tuple[Any, ...]]:
    """A block, a direction of its output, and what the operator is called with in mode batch."""
    block, (x, direction) = block_of(kind, True), given(kind, batch=2, side=5)
    weights = [conv.weight for conv in block.convs]
    strides = [conv.stride[0] for conv in block.convs]
    if block.projection is not None:
        weights, strides = [*weights, block.projection.weight], [*strides, block.projection.stride[0]]
    norms = [tensor for bn in block.bns for tensor in (bn.weight, bn.bias)]
    epsilons = [bn.eps for bn in block.bns]
    return block, direction, (x.requires_grad_(), weights, norms, strides, epsilons, [1.0, 1.0])


def test_opcheck() -> None:
    own = torch.ops.pathnet.fused_residual.default
    block, _, arguments = operands("basic-projection")
    torch.library.opcheck(own, arguments)
    norms = [row for bn in block.bns for row in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]
    evaluated = (arguments[0].bfloat16(), arguments[1], norms, *arguments[3:])
    torch.library.opcheck(own, evaluated, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_of_the_way_back() -> None:
    own = torch.ops.pathnet.fused_residual_backward.default
    all_of_them = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    for kind, tests in [("one-unit", all_of_them), ("basic-projection", "test_faketensor")]:
        _, direction, arguments = operands(kind)
        _, _, *saved = torch.ops.pathnet.fused_residual(*arguments)
        back = direction, saved, *arguments[1:], list(arguments[0].shape)
        torch.library.opcheck(own, detached(back), test_utils=tests)


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training: bool) -> None:
    """One graph, and the same numbers."""
    block, (x, direction) = block_of("basic-projection", training), given("basic-projection", batch=2, side=5)
    own, leaf = copy.deepcopy(block), x.clone().requires_grad_()
    compiled = torch.compile(lambda x: fused_residual(own, x), backend="aot_eager", fullgraph=True)
    compare(everything(own, leaf, direction, compiled(leaf)), truth(block, x, direction), FLOAT32)


def test_compiled_with_other_coefficients() -> None:
    """A step of stochastic depth after the other, in one graph each."""
    block, (x, _) = block_of("basic", True), given("basic", batch=2, side=5)
    expected = copy.deepcopy(block)
    compiled = torch.compile(lambda x, a, c: fused_residual(block, x, a, c), backend="aot_eager", fullgraph=True)
    for a, c in [(1.0, 1.0), (1.0, 0.0), (0.5, 2.0), (1.0, 1.0)]:
        torch.testing.assert_close(compiled(x, a, c), fused_residual(expected, x, a, c))
    assert int(block.bns[0].num_batches_tracked) == 3


def test_two_derivatives_are_refused() -> None:
    block, (x, _) = block_of("basic", True), given("basic", batch=2, side=5)
    (grad,) = torch.autograd.grad(fused_residual(block, x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_residual is differentiable once"):
        torch.autograd.grad(grad.square().sum(), x)


def test_input_that_does_not_fit_is_told() -> None:
    block, (x, _) = block_of("basic", True), given("basic")
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 4, H, W\], not empty, got \[3, 3, 7, 8\]"):
        fused_residual(block, x[:, :3])
    with pytest.raises(ValueError, match="x: expected a float32 or bfloat16 tensor, got torch.float64"):
        fused_residual(block, x.double())
    with pytest.raises(ValueError, match=r"x: expected more than one value a channel .* \[1, 4, 1, 1\]"):
        fused_residual(block, x[:1, :, :1, :1])
    strided = block_of("basic-projection", True)
    with pytest.raises(ValueError, match=r"x: expected more than one value a channel .* \[1, 3, 2, 2\]"):
        fused_residual(strided, x[:1, :3, :2, :2])
    with pytest.raises(ValueError, match="x: expected at most 524271 images of this size, got 524288"):
        fused_residual(block, x[:1, :, :1, :1].expand(1 << 19, 4, 32, 32))
    with pytest.raises(ValueError, match=r"x: expected sides of at most 524288 pixels .* \[1, 524289\]"):
        fused_residual(block, x[:1, :, :1, :1].expand(1, 4, 1, (1 << 19) + 1))
    with pytest.raises(ValueError, match="c: expected a finite Python number, got a tensor"):
        fused_residual(block, x, 1.0, torch.ones(()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a: expected a finite number, got inf"):
        fused_residual(block, x, float("inf"))
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="x: expected autocast to torch.bfloat16 or none, got .* torch.float16"),
    ):
        fused_residual(block, x)
    with pytest.raises(ValueError, match="block: it has no fused form"):
        fused_residual(Block(), x)
    block.convs[0] = nn.Conv2d(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match="block: it has a convolution with a bias"):
        fused_residual(block, x)


def test_without_triton_the_modules_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathnet.nn._interpreted", lambda: False)
    pathnet.nn._warn.cache_clear()
    block, (x, _) = block_of("basic-projection", False), given("basic-projection")
    with pytest.warns(RuntimeWarning, match="fused_residual runs the block's own modules: x is on cpu"):
        assert torch.equal(fused_residual(block, x), block(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own, other = copy.deepcopy(block).train(), copy.deepcopy(block).train()
        torch.testing.assert_close(fused_residual(own, x), other(x))
        assert all(map(torch.equal, own.buffers(), other.buffers()))
        for a, c in [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]:
            assert fused_residual(own, x.bfloat16(), a, c).dtype == torch.bfloat16
        torch.testing.assert_close(fused_residual(block, x, 0.5, 2.0), routed(block, x, 0.5, 2.0))
        assert torch.equal(fused_residual(block, x, 0.0, 1.0), block.residual(x))
