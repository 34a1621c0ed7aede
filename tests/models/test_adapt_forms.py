"""The blocks that `adapt` finds, the forms in which engines take them, and the report."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import SMALL, Case
from helpers.model_cases import BY_NAME, ModelCase, adapted_by_name, outcome, path_gradient, sites
from helpers.oracles import relative_error
from helpers.third_party import (
    Basic,
    CifarResNet,
    Functional,
    OptionA,
    Parallel,
    Preactivated,
    PreactResNet,
    ResNet,
    cifar_resnet20,
    shaken,
)
from helpers.tolerances import EXACT_WALK, FLOAT32_BATCH_NORM, FLOAT32_SAMPLE_NORM
from torch import Tensor, nn

import pathnet
from pathnet.models import FusedForm, PostActivationForm


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_a_residual_net_is_adapted_to_an_equal_one(case: Case) -> None:
    original, (images, labels) = case.net(), case.images()
    net = pathnet.adapt(original, images)
    assert net.n == original.n
    codes = pathnet.paths.enumerate_all(original.n)[::3]
    for bn in ("running", "batch"):
        grads, expected = (
            pathnet.record(network, images, labels, bn=bn, precision="float64").path_gradients(codes)  # type: ignore[arg-type]
            for network in (net, original)
        )
        assert relative_error(grads, expected) < EXACT_WALK
        norms, expected_norms = (
            pathnet.record(network, images, labels, bn=bn, engine="cpu").path_gradient_norms(codes)  # type: ignore[arg-type]
            for network in (net, original)
        )
        torch.testing.assert_close(norms, expected_norms, rtol=FLOAT32_BATCH_NORM, atol=0)
    for adapted_block, block in zip(net, original, strict=True):
        adapted_form, form = adapted_block.form(), block.form()
        assert isinstance(adapted_form, FusedForm) and isinstance(form, FusedForm)
        units = zip(adapted_form.units, form.units, strict=True)
        assert all(unit.conv is other.conv and unit.bn is other.bn for unit, other in units)
        assert (adapted_form.projection is None) == (form.projection is None) and adapted_form.pad == form.pad


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_third_party_pre_activation_blocks_run_on_the_cpu_engine(bn: str) -> None:
    torch.manual_seed(0)
    blocks = [Preactivated(4, 6), Preactivated(6, 6), Preactivated(6, 7, 2), Functional(7)]
    model = shaken(PreactResNet(blocks, 4, 7)).eval()
    for conv in (model.layers[3].conv1, model.layers[3].conv2):
        conv.bias = None
    images, labels = torch.randn(3, 3, 9, 9), torch.tensor([0, 1, 2])
    net = pathnet.adapt(model, images)
    # The first block includes the BN and ReLU before its projection.
    assert isinstance(net.stem, torch.fx.GraphModule) and net.blocks[0].before is not None
    codes = pathnet.paths.enumerate_all(net.n)
    slow, fast = (
        pathnet.record(net, images, labels, bn=bn, engine=engine).path_gradient_norms(codes)  # type: ignore[arg-type]
        for engine in ("reference", "cpu")
    )
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=0)
    assert "engine cpu: serves" in str(net)


def test_post_activation_forms() -> None:
    forms = [block.form() for block in adapted_by_name("basic")]
    assert all(isinstance(form, PostActivationForm) for form in forms)
    model = BY_NAME["basic"].model()
    net = pathnet.adapt(model, BY_NAME["basic"].batch()[0])
    for block, module in zip(net, model.layer1, strict=True):
        form = block.form()
        assert isinstance(form, PostActivationForm)
        assert form.convs == (module.conv1, module.conv2) and form.bns == (module.bn1, module.bn2)
        expected = (None, None) if module.downsample is None else tuple(module.downsample)
        assert (form.projection, form.projection_bn) == expected and not form.pad
    assert [len(block.form().convs) for block in adapted_by_name("bottleneck")] == [3, 3, 3]
    padded = [block.form() for block in adapted_by_name("zero padding")]
    assert [(form.pad, form.pad_before) for form in padded] == [(False, 0), (True, 0), (False, 0), (True, 2)]
    model = BY_NAME["control flow"].model()
    exported = pathnet.adapt(model, BY_NAME["control flow"].batch()[0])
    assert exported.traced_by == "torch.export"
    forms = [block.form() for block in exported]
    assert [len(form.convs) for form in forms] == [1, 2, 1]
    # The lifted modules are the model's own.
    assert forms[0].convs[0] is model.layer1[0].conv and forms[1].bns[1] is model.layer1[1].bn2


def test_a_block_with_hooks_or_active_dropout_has_no_form() -> None:
    torch.manual_seed(0)
    hooked = Preactivated(4, 4)
    model = PreactResNet([Preactivated(4, 4), hooked], 4, 4).train()
    model.layers[0].bn2 = nn.Sequential(nn.Dropout(0.5), model.layers[0].bn2)
    net = pathnet.adapt(model, torch.randn(2, 3, 9, 9))
    assert [block.form() is None for block in net] == [True, False]
    net.eval()
    assert [block.form() is None for block in net] == [False, False]
    hooked.conv1.register_forward_hook(lambda _, __, output: 2 * output)
    assert [block.form() is None for block in net] == [False, True]


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "control flow", "no ReLU in the stem"])
def test_third_party_post_activation_blocks_run_on_the_cpu_engine(name: str, bn: str) -> None:
    case = BY_NAME.get(name, BY_NAME["basic"])
    model, (images, labels) = case.model(3).float(), case.batch()
    if case.name != name:
        model.relu = nn.Tanh()
    net = pathnet.adapt(model, images.float())
    codes = pathnet.paths.enumerate_all(net.n)
    reference, cpu = (pathnet.Recorder(net, bn, engine) for engine in ("reference", "cpu"))  # type: ignore[arg-type]
    slow, fast = (recorder(images.float(), labels).path_gradient_norms(codes) for recorder in (reference, cpu))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=0)
    outputs, expected = (
        recorder.routed_outputs(images.float(), pathnet.paths.routing(codes)) for recorder in (cpu, reference)
    )
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert "engine cpu: serves" in str(net)


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("width", [5, 16])
def test_the_usual_cifar_resnet_runs_on_the_cpu_engine(width: int, bn: str) -> None:
    """Compare single paths with the model's own code, in which the test detaches branches."""
    case = ModelCase("ResNet-20", lambda: cifar_resnet20(width), (4, 3, 13, 16))
    model, (images, labels) = case.model(1), case.batch()
    net = pathnet.adapt(copy.deepcopy(model).float(), images.float())
    assert [block.form().pad_before for block in net] == [0, 0, 0, width // 2, 0, 0, width, 0, 0]
    tape = pathnet.record(net, images.float(), labels, bn=bn, engine="cpu")  # type: ignore[arg-type]
    codes = torch.cat([pathnet.paths.sample(net.n, length, 2) for length in (0, 3, 6, 9)])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(bn == "batch")
    for code, gradient in zip(codes.tolist(), tape.path_gradients(codes), strict=True):
        assert relative_error(gradient, path_gradient(case, model, code)) < FLOAT32_SAMPLE_NORM
    assert "pad" in str(net) and "engine cpu: serves" in str(net)


def test_zeros_of_the_input_are_not_taken_for_padding() -> None:
    torch.manual_seed(0)
    model = CifarResNet([OptionA(4, 7, 2, around=True)]).eval()
    nn.init.zeros_(model.bn1.weight)
    layer, images = model.layers[0], torch.randn(3, 3, 9, 9)
    net = pathnet.adapt(
        model,
        images,
        stem=lambda x: F.relu(model.bn1(model.conv1(x))),
        blocks=[("layers.0.shortcut", lambda x: layer.bn2(layer.conv2(F.relu(layer.bn1(layer.conv1(x))))), F.relu)],
        head=lambda x: model.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1)),
    )
    assert not net.stem(images).any()
    assert [block.form().pad_before for block in net] == [1]


def test_only_suitable_blocks_have_a_form() -> None:
    torch.manual_seed(0)
    net = pathnet.adapt(ResNet([Parallel(4), Basic(4, 4)], 4, 4))
    assert [block.form() is None for block in net] == [True, False]
    copied = copy.deepcopy(net)
    assert [block.form() is None for block in copied] == [True, False]
    assert copied.blocks[1].form().convs[0] is not net.blocks[1].form().convs[0]


class Named(nn.Module):
    """Two linear layers after a normalisation whose weight's name is misleading."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.post_attention_scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x * self.post_attention_scale)
        return x + torch.addmm(self.fc.bias, x, self.fc.weight)


def test_the_kind_of_a_block_follows_from_its_operations() -> None:
    net = pathnet.adapt(Named(), torch.randn(3, 4))
    assert [block.kind() for block in net] == ["linear layer"] * 2  # type: ignore[operator]


def test_the_report_names_blocks_shapes_kinds_and_engines() -> None:
    lines = str(adapted_by_name("basic")).splitlines()
    assert lines[0] == "4 residual blocks, found by torch.fx"
    assert lines[1].split("  ") and lines[3].split() == [
        *("1", "layer1.1", "4x5x5", "6x3x3", "projection", "post-activation", "basic"),
    ]
    reasons = dict(line.removeprefix("engine ").split(": ", 1) for line in lines[6:])
    assert set(reasons) == set(pathnet.engines.available()) and reasons["reference"] == "serves"
    assert "attention" in str(adapted_by_name("vision transformer")) and "pad" in str(adapted_by_name("zero padding"))
    assert "pre-activation basic" in str(adapted_by_name("pre-activation"))
    assert "stem's convolution" not in lines


def test_a_module_that_is_used_twice_is_shared() -> None:
    torch.manual_seed(0)
    block = Basic(4, 4)
    model = shaken(ResNet([block, block, Basic(4, 4)], 4, 4)).double()
    x, labels = torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.tensor([0, 1])
    net = pathnet.adapt(model, x)
    assert net.n == 3 and len(list(net.parameters())) == len(list(model.parameters()))
    copied = copy.deepcopy(net)
    assert len(list(copied.parameters())) == len(list(model.parameters()))
    tape = pathnet.record(net, x, labels, precision="float64", at="image")
    x.requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(model.eval()(x), labels), x)
    assert relative_error(tape.path_gradients(pathnet.paths.enumerate_all(3)).sum(0), expected) < EXACT_WALK


def test_the_oracle_depends_on_the_order_of_blocks() -> None:
    case = BY_NAME["basic"]
    model = case.model()
    assert len(sites(model)) == 4
    first, last = (path_gradient(case, model, path) for path in ([1, 0, 0, 0], [0, 0, 0, 1]))
    assert relative_error(first, last) > 0.1
    assert outcome(case, model, case.batch()[0]).shape == (3, 5)
