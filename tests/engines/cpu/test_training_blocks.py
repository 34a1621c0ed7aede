"""`pathnet.nn.fused_residual` on a CPU against the block's modules in float64, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers.fused_blocks import FLOAT32, KINDS, batch_for, block_of, compare, fused, results, routed, truth
from helpers.oracles import relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad

import pathnet
from pathnet import native
from pathnet.models import Block, PreactBlock
from pathnet.nn import fused_residual, serving

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which each pass of the cpu engine adds its name from now on."""
    from pathnet.engines.cpu import training

    names: list[str] = []

    def counted(name: str) -> Any:
        run = getattr(training, f"cpu_fused_residual{name}")

        def call(*arguments: Any) -> Any:
            names.append(name or "forward")
            return run(*arguments)

        return call

    monkeypatch.setattr(serving, "cpu_fused_residual", counted(""))
    monkeypatch.setattr(training, "cpu_fused_residual_backward", counted("_backward"))
    return names


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_block(kind: str, training: bool, calls: list[str]) -> None:
    block, (x, direction) = block_of(kind, training), batch_for(kind)
    # With one channel, a gradient is a sum of nearly cancelling terms: here 1e-2 of terms near 1.
    tolerance = 10 * FLOAT32 if kind == "one-channel" else FLOAT32
    compare(fused(block, x, direction), truth(block, x, direction), tolerance)
    assert calls == ["forward", "_backward"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("a", "c"), [(0.5, -3.0), (0.0, 1.0), (-2.0, 1e-3)])
@pytest.mark.parametrize("kind", ["basic", "basic-projection", "basic-pad"])
def test_coefficients(kind: str, a: float, c: float, training: bool) -> None:
    block, (x, direction) = block_of(kind, training), batch_for(kind, batch=2, side=5)
    expected = truth(block, x, direction, a, c)
    if a == 0:
        expected.pop("projection.weight", None)
    compare(fused(block, x, direction, a, c), expected, FLOAT32)


@pytest.mark.parametrize("kind", ["basic", "basic-projection", "basic-pad"])
def test_a_module_that_is_not_drawn_runs_nothing(kind: str, calls: list[str]) -> None:
    block, (x, direction) = block_of(kind, True), batch_for(kind)
    measured, expected = fused(block, x, direction, 1.0, 0.0), truth(block, x, direction, 1.0, 0.0)
    # A projection reads the pre-activated input, which kernels compute.
    assert calls == (["forward", "_backward"] if "proj" in kind else [])
    drawn = {"output", "x"} | ({"projection.weight", "bns.0.weight", "bns.0.bias"} if "proj" in kind else set())
    assert {name for name in measured if name not in dict(block.named_buffers())} == drawn
    for name in drawn:
        assert relative_error(measured[name], expected[name].double()) < FLOAT32
    if kind == "basic":
        assert fused_residual(block, x, 1.0, 0.0) is x
        assert fused_residual(block, x, 1.0, 1e-50) is x, "float32 has no such number"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["basic-16", "basic-projection", "bottleneck"])
def test_autocast_and_bfloat16_are_as_exact_as_in_the_modules(kind: str, training: bool) -> None:
    block, (x, direction) = block_of(kind, training), batch_for(kind, batch=32, side=8)
    expected = truth(block, x.bfloat16(), direction.bfloat16())
    eager, leaf = copy.deepcopy(block), x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        eager_results = results(eager, leaf, direction, eager(leaf))
        measured = fused(block, x, direction)
    rounded = fused(block, x.bfloat16(), direction)
    assert measured["output"].dtype == rounded["output"].dtype == torch.bfloat16
    assert measured["x"].dtype == torch.float32 and rounded["x"].dtype == torch.bfloat16
    for name, value in measured.items():
        bound = 2 * relative_error(eager_results[name], expected[name].double()) + 4e-3
        assert relative_error(value, expected[name].double()) < bound, name
        assert relative_error(rounded[name], value.double()) < 4e-3, name


def test_memory_formats() -> None:
    block, (x, direction) = block_of("basic", True), batch_for("basic")
    expected = fused(block, x, direction)
    assert expected["output"].is_contiguous(memory_format=torch.channels_last)
    for same in (x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, : x.shape[1]], x.mT.mT):
        assert all(map(torch.equal, fused(block, same, direction).values(), expected.values()))
    block.to(memory_format=torch.channels_last)
    assert all(map(torch.equal, fused(block, x, direction).values(), expected.values()))


def steps(block: PreactBlock, x: Tensor, run: Any) -> dict[str, Tensor]:
    for scale in (1.0, 3.0):
        run(block, scale * x)
    return dict(block.named_buffers())


@pytest.mark.parametrize("momenta", [(None, None), (0.25, 0.25), (None, 0.1), (0.3, 0.7), (0.0, 1.0)])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "basic-projection"])
def test_running_statistics_are_those_of_the_modules(kind: str, momenta: tuple[float | None, float | None]) -> None:
    block, (x, _) = block_of(kind, True), batch_for(kind)
    for bn, momentum in zip(block.bns, [momenta[0], *[momenta[1]] * 2], strict=False):
        bn.momentum = momentum
    exact = copy.deepcopy(block).double()
    measured = steps(block, x, fused_residual)
    for name, expected in steps(exact, x.double(), lambda block, x: block(x)).items():
        torch.testing.assert_close(measured[name].double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert int(block.bns[0].num_batches_tracked) == 2


@pytest.mark.parametrize("change", ["frozen", "untracked", "never tracked", "one untracked", "without affine"])
def test_batch_normalisations_of_every_kind(change: str) -> None:
    block, (x, direction) = block_of("basic-projection", True), batch_for("basic-projection")
    for index, bn in enumerate(block.bns):
        if change == "frozen":
            bn.eval()
        elif change == "untracked" or (change == "one untracked" and index == 0):
            bn.track_running_stats = False
        elif change in ("never tracked", "without affine"):
            block.bns[index] = nn.BatchNorm2d(
                bn.num_features,
                track_running_stats=change != "never tracked",
                affine=change != "without affine",
            )
    compare(fused(block, x, direction), truth(block, x, direction), FLOAT32)
    if change == "never tracked":
        compare(fused(block.eval(), x, direction), truth(block, x, direction), FLOAT32)


def test_a_block_some_of_whose_statistics_are_frozen_is_refused() -> None:
    block, (x, _) = block_of("basic", True), batch_for("basic")
    block.bns[0].eval()
    with pytest.raises(ValueError, match="block: expected all of its BNs to take statistics of the batch, or none"):
        fused_residual(block, x)


def test_compiled() -> None:
    """One graph, and the same numbers."""
    block, (x, direction) = block_of("basic-projection", True), batch_for("basic-projection", batch=2, side=5)
    compiled_block, leaf = copy.deepcopy(block), x.clone().requires_grad_()
    compiled = torch.compile(lambda x: fused_residual(compiled_block, x), fullgraph=True)
    compare(results(compiled_block, leaf, direction, compiled(leaf)), truth(block, x, direction), FLOAT32)


def test_compiled_under_autocast_with_other_coefficients() -> None:
    """Each step of stochastic depth is one graph."""
    block, (x, _) = block_of("basic", True), batch_for("basic", batch=2, side=5)
    expected = copy.deepcopy(block)
    compiled = torch.compile(lambda x, a, c: fused_residual(block, x, a, c), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        for a, c in [(1.0, 1.0), (1.0, 0.0), (0.5, 2.0)]:
            assert torch.equal(compiled(x, a, c), fused_residual(expected, x, a, c))
    assert all(map(torch.equal, block.buffers(), expected.buffers())) and int(block.bns[0].num_batches_tracked) == 2


def test_without_gradients_and_in_inference_mode() -> None:
    block, (x, _) = block_of("basic-projection", False), batch_for("basic-projection")
    expected = fused_residual(block, x)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            output = fused_residual(block, x)
        assert not output.requires_grad and torch.equal(output, expected)


def test_two_derivatives_are_refused() -> None:
    block, (x, _) = block_of("basic", True), batch_for("basic", batch=2, side=5)
    (grad,) = torch.autograd.grad(fused_residual(block, x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_residual: expected first derivatives only"):
        torch.autograd.grad(grad.square().sum(), x)


def test_parametrized_weights_get_their_gradients() -> None:
    block, (x, direction) = block_of("basic", False), batch_for("basic")
    nn.utils.parametrizations.weight_norm(block.convs[0])
    compare(fused(block, x, direction), truth(block, x, direction), FLOAT32)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: list[tuple[Any, str]] = [
    (lambda block: block.convs[1].register_forward_hook(print), r"its module convs\.1 has hooks"),
    (lambda block: block.bns[0].register_forward_pre_hook(print), r"its module bns\.0 has hooks"),
    (lambda block: block.convs[0].register_full_backward_hook(print), r"its module convs\.0 has hooks"),
    (lambda block: block.projection.register_full_backward_pre_hook(print), "its module projection has hooks"),
    (lambda block: setattr(block.convs[0], "forward", abs), r"its module convs\.0 computes by its own forward"),
    (lambda block: setattr(block.convs, "1", Doubled(6, 6, 3, padding=1, bias=False)), r"convs\.1 .* \(Doubled\)"),
    (lambda block: setattr(block.bns, "0", nn.SyncBatchNorm(3)), r"its module bns\.0 computes .* \(SyncBatchNorm\)"),
    (lambda block: setattr(block.convs, "0", nn.Conv2d(3, 6, 3, 2, 1)), "it has a convolution with a bias"),
    (lambda block: block.double(), "expected float32 or bfloat16 parameters, got torch.float64"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[reason for _, reason in CHANGES])
def test_a_block_that_computes_more_is_refused(change: Any, reason: str) -> None:
    block, (x, _) = block_of("basic-projection", True), batch_for("basic-projection")
    change(block)
    with pytest.raises(ValueError, match=f"^block: .*{reason}"):
        fused_residual(block, x)


def test_wrong_arguments_are_named() -> None:
    block, (x, _) = block_of("basic", True), batch_for("basic")
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 4, H, W\], not empty, got \[3, 3, 7, 8\]"):
        fused_residual(block, x[:, :3])
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 4, H, W\], not empty, got \[0, 4, 7, 8\]"):
        fused_residual(block, x[:0])
    with pytest.raises(ValueError, match="x: expected a float32 or bfloat16 tensor, got torch.float64"):
        fused_residual(block, x.double())
    with pytest.raises(ValueError, match="x: expected a tensor, got 'x'"):
        fused_residual(block, "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: expected more than one value per channel .* \[1, 4, 1, 1\]"):
        fused_residual(block, x[:1, :, :1, :1])
    with pytest.raises(ValueError, match=r"x: expected more than one value per channel .* \[1, 3, 2, 2\]"):
        fused_residual(block_of("basic-projection", True), x[:1, :3, :2, :2])
    with pytest.raises(ValueError, match="c: expected a finite Python number, got a tensor"):
        fused_residual(block, x, 1.0, torch.ones(()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a: expected a finite number, got inf"):
        fused_residual(block, x, float("inf"))
    with pytest.raises(ValueError, match=r"a: expected a number that is finite in float32, got 1e\+39"):
        fused_residual(block, x, 1e39)
    with pytest.raises(ValueError, match="engine: expected 'auto' or 'cpu' or 'triton' or 'none', got 'cuda'"):
        fused_residual(block, x, engine="cuda")  # type: ignore[arg-type]
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="x: expected autocast to torch.bfloat16 or none, got .* torch.float16"),
    ):
        fused_residual(block, x)
    with pytest.raises(ValueError, match="block: its class Block defines no fused form"):
        fused_residual(Block(), x)
    (post, *_) = pathnet.models.resnet(depth=8, width=4)
    with pytest.raises(ValueError, match="block: expected a pre-activation block, got a post-activation one"):
        fused_residual(post, x)


def test_sizes_beyond_those_of_native_code_are_left_to_the_modules() -> None:
    block = block_of("one-channel", False)
    largest, larger = torch.ones(1, 1, 1, 1 << 15), torch.ones(1, 1, 1, (1 << 15) + 1)
    assert fused_residual(block, largest).shape == largest.shape
    with pytest.raises(ValueError, match="x: expected sizes of at most 32768 for the cpu engine, got 32769"):
        fused_residual(block, larger)
    fused_block = pathnet.nn.fuse(pathnet.models.ResidualNet(nn.Identity(), [block], nn.Identity()), "cpu").blocks[0]
    assert torch.equal(fused_block(larger), block(larger))


@pytest.mark.parametrize("engine", ["auto", "none"])
def test_where_no_kernel_serves_the_modules_run(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LOADED", False)
    monkeypatch.setattr(native, "WHY_NOT", "the native library is not built")
    serving.warn.cache_clear()
    block, (x, _) = block_of("basic-projection", False), batch_for("basic-projection")
    if engine == "auto":
        with pytest.warns(RuntimeWarning, match="fused_residual runs the block's own modules: the native library is"):
            assert torch.equal(fused_residual(block, x), block(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained, expected = copy.deepcopy(block).train(), copy.deepcopy(block).train()
        torch.testing.assert_close(fused_residual(trained, x, engine=engine), expected(x))
        assert all(map(torch.equal, trained.buffers(), expected.buffers()))
        for a, c in [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]:
            assert fused_residual(trained, x.bfloat16(), a, c, engine).dtype == torch.bfloat16
        torch.testing.assert_close(fused_residual(block, x, 0.5, 2.0, engine), routed(block, x, 0.5, 2.0))
        assert torch.equal(fused_residual(block, x, 0.0, 1.0, engine), block.residual(x))


def test_transformations_run_the_modules() -> None:
    block, (x, direction) = block_of("basic-projection", True), batch_for("basic-projection", batch=2, side=5)
    serving.warn.cache_clear()

    def output(x: Tensor) -> Tensor:
        return (fused_residual(copy.deepcopy(block), x) * direction).sum()

    expected = torch.autograd.grad((block(x.requires_grad_()) * direction).sum(), x)[0]
    x = x.detach()
    with pytest.warns(RuntimeWarning, match="modules: torch.func differentiates modules alone"):
        torch.testing.assert_close(torch.func.grad(output)(x), expected)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))  # type: ignore[no-untyped-call]
        with pytest.warns(RuntimeWarning, match="modules: forward-mode differentiation takes modules alone"):
            tangent = forward_ad.unpack_dual(output(dual)).tangent  # type: ignore[no-untyped-call]
    torch.testing.assert_close(tangent, expected.sum(), rtol=1e-3, atol=1e-3)


def test_the_engine_triton_does_not_run_on_a_cpu_that_does_not_interpret_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_interpreted", lambda: False)
    serving.warn.cache_clear()
    block, (x, _) = block_of("basic", False), batch_for("basic")
    reason = "the triton engine does not run on cpu" if serving._has_triton() else "triton is not installed"
    with pytest.warns(RuntimeWarning, match=f"fused_residual runs the block's own modules: {reason}"):
        assert torch.equal(fused_residual(block, x, engine="triton"), block(x))
