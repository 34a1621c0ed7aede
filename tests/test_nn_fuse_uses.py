"""Fused networks wherever a network can be used: recordings, routings, lesions, compilation, processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from helpers.cases import shaken
from helpers.oracles import relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad

import pathnet
from pathnet import lesion, models, native
from pathnet.models import ResidualNet
from pathnet.nn import FusedNet, fuse

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def pair(training: bool = False, depth: int = 14) -> tuple[ResidualNet, FusedNet]:
    """Return a network, and a fused view of a copy of it."""
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(depth, 4, 5)).train(training)
    return net, fuse(copy.deepcopy(net), "cpu")


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("engine", ["cpu", "autograd", "reference"])
def test_recordings_are_those_of_the_network(engine: str, bn: Any) -> None:
    net, fused = pair()
    paths = pathnet.paths.one_of_each_length(net.n)
    expected = pathnet.record(net, *batch(), bn=bn, engine=engine)
    tape = pathnet.record(fused, *batch(), bn=bn, engine=engine)
    assert tape.engine == engine and tape.loss == expected.loss
    assert torch.equal(tape.path_gradient_norms(paths), expected.path_gradient_norms(paths))
    assert torch.equal(tape.gradient_by_length(), expected.gradient_by_length())
    assert torch.equal(tape.gradient(), expected.gradient())


def test_engines_serve_both() -> None:
    net, fused = pair()
    assert pathnet.Recorder(fused).engine_for(batch()[0]) == pathnet.Recorder(net).engine_for(batch()[0])


@pytest.mark.parametrize("training", [True, False])
def test_routings_are_differentiable_as_those_of_the_network(training: bool) -> None:
    net, fused = pair(training)
    images, labels = batch()
    routing = torch.rand(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = []
    for each in (net, fused):
        coefficients = routing.clone().requires_grad_()
        loss = F.cross_entropy(pathnet.routed(each, images, coefficients), labels)
        grad = pathnet.routed_gradient(each, images, labels, [[1, 0]] * 6)
        (loss + grad.square().sum()).backward()
        parameters = [parameter.grad for parameter in each.parameters() if parameter.grad is not None]
        grads.append([coefficients.grad, grad, *parameters])
    for one, other in zip(*grads, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    ordinary = pathnet.routed(fused, images, torch.ones(6, 2))
    torch.testing.assert_close(ordinary, pathnet.routed(net, images, None), rtol=1e-4, atol=1e-4)


def test_lesions_are_those_of_the_network() -> None:
    net, fused = pair()
    images, _ = batch()
    for change in (lambda net: lesion.delete(net, [1, 4]), lambda net: lesion.reorder(net, [1, 0, 2, 3, 4, 5])):
        expected = change(net)(images)
        torch.testing.assert_close(change(fused)(images), expected, rtol=1e-4, atol=1e-4)
        with change(fused):
            torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-4)
    data = pathnet.data.synthetic(images=64, classes=5, shape=(3, 8, 8))
    lesions = [
        lesion.Lesion((2,)),
        lesion.Lesion(scale=0.5),
        lesion.Lesion(order=(1, 0, 2, 3, 4, 5)),
    ]
    assert (lesion.errors(fused, data, lesions).rate == lesion.errors(net, data, lesions).rate).all()
    assert (lesion.rank(fused, data).order("loss") == lesion.rank(net, data).order("loss")).all()


def test_the_effective_depth_is_that_of_the_network(tmp_path: Path) -> None:
    depths = []
    for each, name in zip(pair(), ("net.csv", "fused.csv"), strict=True):
        pathnet.EffectiveDepth(batch(), tmp_path / name, each, every=1)(0)
        depths.append(pathnet.effective_depth.read(tmp_path / name)[0])
    assert depths[0].depth == depths[1].depth and depths[0].loss == depths[1].loss


def test_evaluation_keeps_the_mode() -> None:
    net, fused = pair(training=True)
    data = pathnet.data.synthetic(images=64, classes=5, shape=(3, 8, 8))
    assert pathnet.training.evaluate(fused, data) == pathnet.training.evaluate(net, data)
    assert fused.training and all(block.training for block in fused)


def test_an_adapted_network_is_fused() -> None:
    """Its blocks know their form by a graph, which a call does not read again."""
    net, _ = pair()
    model = nn.Sequential(net.stem, *net.blocks, net.head)
    adapted = pathnet.adapt(model, batch()[0])
    fused = fuse(adapted, "cpu")
    assert isinstance(fused, pathnet.AdaptedNet) and "cpu" in fused.engines
    torch.testing.assert_close(fused(batch()[0]), model(batch()[0]), rtol=1e-4, atol=1e-4)
    forms = []
    kind = type(adapted.blocks[0])
    form = kind.form
    try:
        kind.form = lambda self: forms.append(self) or form(self)  # type: ignore[attr-defined, assignment, func-returns-value]
        fused(batch()[0])
        assert forms == []
    finally:
        kind.form = form  # type: ignore[method-assign, assignment]


def test_a_fused_network_is_adapted_as_the_network_is() -> None:
    net, fused = pair()
    adapted, expected = pathnet.adapt(fused, batch()[0]), pathnet.adapt(net, batch()[0])
    assert adapted.n == expected.n == 6 and fused.engines == ("cpu",) * 6
    assert torch.equal(adapted(batch()[0]), expected(batch()[0]))
    assert next(adapted.parameters()) is next(fused.parameters())


def compare_steps(net: nn.Module, fused: nn.Module) -> None:
    images, labels = batch()
    for each in (net, fused):
        F.cross_entropy(each(images), labels).backward()
    for (name, one), other in zip(net.named_parameters(), fused.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert relative_error(other.grad, one.grad.double()) < 1e-4, name
    for (name, one), other in zip(net.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=name)


@torch._dynamo.config.patch(recompile_limit=64)
def test_each_block_compiles_as_one_graph_and_so_does_the_network() -> None:
    net, fused = pair(training=True, depth=8)
    for block in fused:
        block.compile(backend="aot_eager", fullgraph=True)
    compare_steps(net, fused)
    assert all(block._intact._compiled_call_impl is None for block in fused)  # type: ignore[union-attr]
    net, fused = pair(training=True, depth=8)
    compare_steps(net, torch.compile(fused, backend="aot_eager", fullgraph=True))


@torch._dynamo.config.patch(recompile_limit=64)
def test_a_program_notices_a_change_of_a_block() -> None:
    net, fused = pair(training=True, depth=8)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    compiled(batch()[0])
    fused.eval()
    torch.testing.assert_close(compiled(batch()[0]), copy.deepcopy(fused)(batch()[0]), rtol=1e-4, atol=1e-4)
    fused.blocks[0].bns[1] = nn.BatchNorm2d(4, eps=0.5).eval()
    torch.testing.assert_close(compiled(batch()[0]), copy.deepcopy(fused)(batch()[0]), rtol=1e-4, atol=1e-4)


def test_in_distributed_data_parallel(tmp_path: Path) -> None:
    net, fused = pair(training=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fused, find_unused_parameters=True)
        compare_steps(net, wrapped)
        wrapped.zero_grad()
        F.cross_entropy(wrapped(batch()[0], [True, False] * 3), batch()[1]).backward()
        routed = pathnet.routed(wrapped, batch()[0], [[1, 1]] * 6)
        torch.testing.assert_close(routed, fused(batch()[0]), rtol=1e-4, atol=1e-4)
    finally:
        dist.destroy_process_group()


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    net, fused = pair()
    images, labels = batch()
    y = fused.stem(images)
    for block in fused:
        y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False)
    F.cross_entropy(fused.head(y), labels).backward()
    expected = fuse(net, "cpu")
    F.cross_entropy(expected(images), labels).backward()
    for one, other in zip(expected.parameters(), fused.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_the_second_pass_of_a_checkpointed_block_leaves_its_statistics() -> None:
    _, fused = pair(training=True)
    fused(batch()[0])
    expected = copy.deepcopy(fused.state_dict())
    _, fused = pair(training=True)
    y = fused.stem(batch()[0])
    for block in fused:
        y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False)
    fused.head(y).sum().backward()
    for name, value in fused.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_transformations_of_functions_run_the_modules() -> None:
    """Gradients of samples by torch.func, as for any network."""
    net, fused = pair()
    images, labels = batch()

    def of_samples(model: nn.Module) -> dict[str, Tensor]:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            output = torch.func.functional_call(model, parameters, image[None])
            return F.cross_entropy(output, label[None])

        grads: dict[str, Tensor] = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, labels)
        return grads

    expected = of_samples(net)
    for name, grad in of_samples(fused).items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_differentiation_runs_the_modules(mode: Any) -> None:
    net, fused = pair()
    x, tangents = batch()[0], []
    for model in (net, fused):
        with forward_ad.dual_level(), mode():
            dual = forward_ad.make_dual(x, torch.ones_like(x))  # type: ignore[no-untyped-call]
            tangents.append(forward_ad.unpack_dual(model(dual)).tangent)  # type: ignore[no-untyped-call]
    assert tangents[0] is not None and torch.equal(*tangents)


def test_batches_of_gradients_are_refused_by_name() -> None:
    _, fused = pair()
    x = batch()[0].requires_grad_()
    output, rows = fused(x).sum(0), torch.eye(5)
    with pytest.raises(RuntimeError, match="fused_residual: expected one gradient at the output"):
        torch.autograd.grad(output, x, rows, retain_graph=True, is_grads_batched=True)
    with pytest.raises(RuntimeError, match="fused_residual: expected one gradient at the output"):
        torch.func.vmap(lambda row: torch.autograd.grad(output, x, row))(rows)


def test_an_output_can_be_changed_in_place() -> None:
    net, fused = pair()
    x, grads = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_(), []
    for model in (net, fused):
        output = model.blocks[0](x).add_(1).relu_()
        grads += torch.autograd.grad(output.square().sum(), x)
    assert relative_error(grads[1], grads[0]) < 1e-4


def test_shapes_are_known_without_memory() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fused = fuse(models.preact_resnet(14, 4, 5), "cpu")
        output = fused(torch.empty(2, 3, 32, 32))
        output.sum().backward()
    assert output.shape == (2, 5)
    assert all(
        parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in fused.parameters()
    )
