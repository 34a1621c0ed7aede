"""What `adapt` finds and refuses, the forms that engines know, blocks by hand, its report and its own check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import SMALL, Case
from helpers.oracles import relative_error
from helpers.strangers import (
    STRANGERS,
    Basic,
    Bottleneck,
    Functional,
    LanguageModel,
    Parallel,
    Preactivated,
    PreactResNet,
    ResNet,
    VisionTransformer,
    outcome,
    path_gradient,
    shaken,
    sites,
)
from helpers.tolerances import EXACT_WALK, FLOAT32_BATCH_NORM
from torch import Tensor, nn

import pathnet
from pathnet.models import FusedForm, PostActivationForm

BY_NAME = {stranger.name: stranger for stranger in STRANGERS}


def found(name: str) -> pathnet.AdaptedNet:
    stranger = BY_NAME[name]
    return pathnet.adapt(stranger.model(), stranger.batch()[0], output=stranger.output)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_our_own_networks_are_found_as_they_are(case: Case) -> None:
    own, (images, labels) = case.net(), case.images()
    net = pathnet.adapt(own, images)
    assert net.n == own.n
    codes = pathnet.paths.enumerate_all(own.n)[::3]
    for bn in ("running", "batch"):
        walked, expected = (
            pathnet.record(each, images, labels, bn=bn, precision="float64").path_gradients(codes)  # type: ignore[arg-type]
            for each in (net, own)
        )
        assert relative_error(walked, expected) < EXACT_WALK
        fast, same = (
            pathnet.record(each, images, labels, bn=bn, engine="cpu").path_gradient_norms(codes)  # type: ignore[arg-type]
            for each in (net, own)
        )
        torch.testing.assert_close(fast, same, rtol=FLOAT32_BATCH_NORM, atol=0)
    for found_block, block in zip(net, own, strict=True):
        found_form, form = found_block.form(), block.form()
        assert isinstance(found_form, FusedForm) and isinstance(form, FusedForm)
        units = zip(found_form.units, form.units, strict=True)
        assert all(unit.conv is other.conv and unit.bn is other.bn for unit, other in units)
        assert (found_form.projection is None) == (form.projection is None) and found_form.pad == form.pad


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_a_strangers_pre_activation_blocks_go_through_the_fast_engine(bn: str) -> None:
    torch.manual_seed(0)
    blocks = [Preactivated(4, 6), Preactivated(6, 6), Preactivated(6, 7, 2), Functional(7)]
    model = shaken(PreactResNet(blocks, 4, 7)).eval()
    for conv in (model.layers[3].conv1, model.layers[3].conv2):
        conv.bias = None
    images, labels = torch.randn(3, 3, 9, 9), torch.tensor([0, 1, 2])
    net = pathnet.adapt(model, images)
    # The first block is its whole module, BN and ReLU before the projection included.
    assert isinstance(net.stem, torch.fx.GraphModule) and net.blocks[0].before is not None
    codes = pathnet.paths.enumerate_all(net.n)
    slow, fast = (
        pathnet.record(net, images, labels, bn=bn, engine=engine).path_gradient_norms(codes)  # type: ignore[arg-type]
        for engine in ("reference", "cpu")
    )
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=0)
    assert "engine cpu: serves" in str(net)


def test_post_activation_forms() -> None:
    forms = [block.form() for block in found("basic")]
    assert all(isinstance(form, PostActivationForm) for form in forms)
    model = BY_NAME["basic"].model()
    net = pathnet.adapt(model, BY_NAME["basic"].batch()[0])
    for block, own in zip(net, model.layer1, strict=True):
        form = block.form()
        assert isinstance(form, PostActivationForm)
        assert form.convs == (own.conv1, own.conv2) and form.bns == (own.bn1, own.bn2)
        expected = (None, None) if own.downsample is None else tuple(own.downsample)
        assert (form.projection, form.projection_bn) == expected and not form.pad
    assert [len(block.form().convs) for block in found("bottleneck")] == [3, 3, 3]
    padded = [block.form() for block in found("zero padding")]
    assert [form is not None and form.pad for form in padded] == [False, True, False, False]
    # Channels around the image's own are no padding that engines know.
    assert [form is None for form in padded] == [False, False, False, True]
    model = BY_NAME["control flow"].model()
    exported = pathnet.adapt(model, BY_NAME["control flow"].batch()[0])
    assert exported.traced_by == "torch.export"
    forms = [block.form() for block in exported]
    assert [len(form.convs) for form in forms] == [1, 2, 1]
    # Modules of torch are the model's own again.
    assert forms[0].convs[0] is model.layer1[0].conv and forms[1].bns[1] is model.layer1[1].bn2


def test_hooks_and_live_dropout_take_a_block_its_form() -> None:
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
def test_a_strangers_post_activation_blocks_go_through_the_fast_engine(name: str, bn: str) -> None:
    stranger = BY_NAME.get(name, BY_NAME["basic"])
    model, (images, labels) = stranger.model(3).float(), stranger.batch()
    if stranger.name != name:
        model.relu = nn.Tanh()
    net = pathnet.adapt(model, images.float())
    codes = pathnet.paths.enumerate_all(net.n)
    reference, cpu = (pathnet.Recorder(net, bn, engine) for engine in ("reference", "cpu"))  # type: ignore[arg-type]
    slow, fast = (each(images.float(), labels).path_gradient_norms(codes) for each in (reference, cpu))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=0)
    outputs, expected = (
        each.routed_outputs(images.float(), pathnet.paths.routing(codes)) for each in (cpu, reference)
    )
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert "engine cpu: serves" in str(net)


def test_which_blocks_among_others_have_a_form() -> None:
    torch.manual_seed(0)
    net = pathnet.adapt(ResNet([Parallel(4), Basic(4, 4)], 4, 4))
    assert [block.form() is None for block in net] == [True, False]
    copied = copy.deepcopy(net)
    assert [block.form() is None for block in copied] == [True, False]
    assert copied.blocks[1].form().convs[0] is not net.blocks[1].form().convs[0]


def test_additions_that_are_no_residual_connections() -> None:
    kinds = [block.kind() for block in found("language model")]
    assert kinds == ["attention", "linear layers"] * 2
    assert all(block.skip_branch is None for block in found("language model"))
    assert [block.skip_kind() for block in found("scaled")] == ["identity"] * 5
    assert not any(block.nested for name in ("scaled", "language model", "basic") for block in found(name))

    class Polynomial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)
            x = x * torch.sigmoid(x + 0.1 * x**3)
            return self.fc((x + 1).mean((2, 3)))

    with pytest.raises(ValueError, match="no residual connection was found"):
        pathnet.adapt(Polynomial())


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)])
        self.fc = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.conv(x)]
        for layer in self.layers:
            features.append(layer(F.relu(torch.cat(features, 1))))
        return self.fc(torch.cat(features, 1).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.low, self.up = nn.Conv2d(3, 4, 3, padding=1), Basic(4, 4), nn.Conv2d(8, 4, 1)
        self.deep = nn.Sequential(nn.Conv2d(4, 4, 2, 2), Basic(4, 4), nn.ConvTranspose2d(4, 4, 2, 2))
        self.out = Basic(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        high = self.low(self.down(x))
        return self.out(self.up(torch.cat([high, self.deep(high)], 1)))


def test_concatenations_around_blocks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"at cat \(node 'cat_1'\) its ways are joined by concatenation"):
        pathnet.adapt(Dense())
    with pytest.raises(ValueError, match=r"'deep.1'.*concatenation joins again at cat"):
        pathnet.adapt(UNet())
    # Who asks for those that are residual connections gets them, and hears of those that are none.
    net = pathnet.adapt(UNet(), blocks=["low", "out"])
    assert [block.name for block in net] == ["low", "out"]
    with pytest.raises(ValueError, match=r"blocks: no addition in 'deep.1' is a residual connection"):
        pathnet.adapt(UNet(), blocks=["low", "deep.1"])


class Flow(nn.Module):
    """Control flow on values, which nothing traces: in the model, in its blocks or in their branches."""

    def __init__(self, inside: str) -> None:
        super().__init__()
        self.inside = inside
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.blocks = nn.ModuleList([Branch(4, inside), Branch(4, "")])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for block in self.blocks:
            if self.inside != "model" or x.sum() > -1e9:
                x = block(x)
        return self.fc(x.mean((2, 3)))


class Branch(nn.Module):
    def __init__(self, planes: int, inside: str) -> None:
        super().__init__()
        self.module, self.inside = Deciding(planes, inside), inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return F.relu(x + y) if self.inside != "block" or y.sum() > -1e9 else x


class Deciding(nn.Module):
    def __init__(self, planes: int, inside: str) -> None:
        super().__init__()
        self.conv, self.inside = nn.Conv2d(planes, planes, 3, padding=1), inside

    def forward(self, x: Tensor) -> Tensor:
        if self.inside == "branch in place":
            x.relu_()
        return self.conv(x) if not self.inside.startswith("branch") or x.sum() > -1e9 else x


def given(model: Flow) -> dict[str, Any]:
    """Branches by name, as modules, and as functions."""
    first = F.relu if model.inside == "branch in place" else None
    blocks = [(first, "blocks.0.module", torch.relu), (lambda y: y, model.blocks[1].module, nn.ReLU())]
    return {"blocks": blocks, "stem": "conv", "head": lambda y: model.fc(y.mean((2, 3)))}


@pytest.mark.parametrize("inside", ["model", "block", "branch", "branch in place"])
def test_control_flow_on_values(inside: str) -> None:
    torch.manual_seed(0)
    model = Flow(inside).double()
    x, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    nets = [pathnet.adapt(model, x, **given(model))]
    assert nets[0].traced_by == "hand" and nets[0].n == 2
    if inside == "branch":
        nets.append(pathnet.adapt(model, x))
        assert nets[1].traced_by == "torch.fx around blocks.0.module"
    else:
        with pytest.raises(ValueError, match=r"model: cannot be traced \(torch.fx: .*control flow.*torch.export"):
            pathnet.adapt(model, x)
    if inside == "block":
        with pytest.raises(ValueError, match=r"blocks: 'blocks.0' cannot be traced.*give its branches"):
            pathnet.adapt(model, x, blocks=["blocks.0", "blocks.1"])
    first, second = (block.module.conv for block in model.blocks)
    codes = pathnet.paths.enumerate_all(2)
    for net in nets:
        tape = pathnet.record(net, x, labels, precision="float64", at="image")
        image = x.clone().requires_grad_()
        for code, own in zip(codes, tape.path_gradients(codes), strict=True):
            y = model.conv(image)
            if inside == "branch in place":
                y = F.relu(y)
            for way, conv in zip(code, (first, second), strict=True):
                y = F.relu(y.detach() + conv(y) if way else y + conv(y).detach())
            loss = F.cross_entropy(model.fc(y.mean((2, 3))), labels)
            assert relative_error(own, torch.autograd.grad(loss, image)[0]) < EXACT_WALK
        with torch.no_grad():
            y = model.conv(x)
            y = F.relu(y)
            deleted = model.fc(F.relu(y + second(y)).mean((2, 3)))
            torch.testing.assert_close(pathnet.lesion.delete(net, [0])(x.clone()), deleted)


class Around(nn.Module):
    """What is around the blocks can be traced, and one of the blocks by torch.export alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second, self.fc = (
            nn.Conv2d(3, 4, 3),
            Asserting(4, 4),
            Basic(4, 4),
            nn.Linear(4, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class Asserting(Basic):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError(x.shape)
        return super().forward(x)


def test_named_blocks_are_traced_one_by_one() -> None:
    torch.manual_seed(0)
    model = Around()
    x = torch.randn(2, 3, 9, 9)
    for blocks in (["first", "second"], [model.first, model.second], [model.first, "second"]):
        net = pathnet.adapt(model, x, blocks=blocks)
        assert net.traced_by == "torch.fx" and [block.name for block in net] == ["first", "second"]
        assert all(isinstance(block.form(), PostActivationForm) for block in net)
    assert set(net.parameters()) == set(model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": ["conv", "nothing"]}, "blocks: the model has no submodule 'nothing'"),
        ({"blocks": [nn.Conv2d(1, 1, 1)]}, "blocks: expected submodules of the model, their names, or pairs"),
        ({"blocks": [3]}, "blocks: expected submodules of the model"),
        (
            {"blocks": [(None, "blocks.0.module", torch.relu)]},
            "stem: expected a part of the model with blocks as pairs of branches, got None",
        ),
        ({"blocks": None}, "stem: expected None but with blocks as pairs of branches"),
        ({"blocks": [("blocks.0.module",)]}, "blocks: expected pairs"),
        ({"blocks": [("blocks.0.module", None)]}, "blocks: expected a residual module in block 1"),
        ({"blocks": [(None, "fc")]}, "the residual module of block 1: refuses what comes before it"),
        ({"blocks": [(None, 3)]}, "the residual module of block 1: expected a submodule, its name or a function"),
        ({"blocks": [(None, "blocks.0.module")]}, "model: the adapted network's output is not the model's"),
        ({"blocks": [(None, lambda y: y if y.sum() > 0 else -y)]}, "expected a function that torch.fx can trace"),
    ],
)
def test_wrong_blocks(change: dict[str, Any], message: str) -> None:
    model = Flow("")
    arguments = {**given(model), **change}
    if message.startswith("stem: expected a part of the model with blocks as pairs of branches, got None"):
        arguments |= {"stem": None}
    elif isinstance(change["blocks"], list) and not isinstance(change["blocks"][0], tuple):
        arguments = change
    with pytest.raises(ValueError, match=message):
        pathnet.adapt(model, torch.randn(2, 3, 8, 8), **arguments)


def test_outputs_and_examples() -> None:
    stranger = BY_NAME["two outputs"]
    model, (x, _) = stranger.model(), stranger.batch()
    with pytest.raises(ValueError, match="output: .*names 'features', 'prediction'"):
        pathnet.adapt(model, x)
    with pytest.raises(ValueError, match="output: the model has no output 'logits'"):
        pathnet.adapt(model, x, output="logits")
    features = pathnet.adapt(model, x, output="features")
    torch.testing.assert_close(features(x), model(x)["features"])
    with pytest.raises(ValueError, match=r"example: the model refuses the shape \[2, 5\]"):
        pathnet.adapt(model, torch.randn(2, 5))
    with pytest.raises(ValueError, match="example: expected a"):
        pathnet.adapt(model, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected a torch.nn.Module, got 3"):
        pathnet.adapt(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example: none could be guessed"):
        pathnet.adapt(nn.ReLU())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: ResNet([Bottleneck(4, 3)], 4, 6), (3, 32, 32)),
        (lambda: LanguageModel(), (8, 8)),
        (VisionTransformer, (5, 8)),
    ],
    ids=["images", "tokens", "patches"],
)
def test_the_example_is_guessed(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = make()
    if isinstance(model, LanguageModel):
        model.dummy_inputs = {"input_ids": torch.randint(0, 11, (2, 8))}
    if isinstance(model, VisionTransformer):
        model.default_cfg = {"input_size": (3, 8, 8)}
    net = pathnet.adapt(model)
    assert tuple(net.shapes[0]) == ((4, 32, 32) if shape == (3, 32, 32) else shape)


def test_what_is_fixed_for_a_shape_is_told() -> None:
    net = found("language model")
    assert net.fixed and "for inputs of the example's shape: " in str(net)
    with pytest.raises(ValueError, match=r"images: expected those that give blocks an input of \[B, 6, 8\]"):
        net(torch.zeros(2, 5, dtype=torch.int64))
    free = found("basic")
    assert not free.fixed
    free(torch.randn(2, 3, 17, 12, dtype=torch.float64))


class Sized(nn.Module):
    """Takes sizes, twice the batch among them, from its input, and needs them in its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        batch, _, rows, columns = x.shape
        halves = batch * 2
        x = self.conv(x)
        for layer in self.layers:
            x = x + layer(x.reshape(halves, 2 * rows, columns)).tanh().view(batch, -1, rows, columns)
        return self.fc(x.mean((2, 3)))


def test_sizes_from_outside_of_a_branch_follow_the_batch() -> None:
    torch.manual_seed(0)
    model = Sized()
    net = pathnet.adapt(model, torch.randn(2, 3, 6, 8))
    assert net.n == 2 and net.fixed
    x = torch.randn(5, 3, 6, 8)
    torch.testing.assert_close(net(x), model(x))
    with pytest.raises(ValueError, match=r"expected those that give blocks an input of \[B, 4, 6, 8\]"):
        net(torch.randn(2, 3, 8, 8))


class Masked(LanguageModel):
    """Attends to what is no padding: a mask of the tokens' values, that every branch reads."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        mask = torch.where(ids == 0, -1e9, 0.0).to(x.dtype)[:, None, None]
        for layer in self.layers:
            x = layer(x, None, mask)
        return self.head(self.norm(x))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 4, 3), Basic(4, 4), nn.Linear(4, 5)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.norm(self.conv(x))).mean((2, 3)))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(0, 1))
        return self.fc((x + self.second(x).cumsum(0)).mean(0))


def test_what_cannot_be_cut_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"model: the residual module of 'layers.0 \(1\)' needs getitem .*values"):
        pathnet.adapt(Masked(), torch.randint(1, 11, (2, 6)))
    with pytest.raises(ValueError, match="model: samples of a batch influence each other"):
        pathnet.adapt(Mixed(), torch.randn(2, 3, 9, 9))
    with pytest.raises(ValueError, match=r"model: expected the batch in the first dimension \(2\)"):
        pathnet.adapt(TimeFirst(), torch.randn(2, 5, 4))


class Lying(nn.Module):
    """Does something else for whoever traces it by torch.fx."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 4, 3), Basic(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.conv(x))
        if not isinstance(x, torch.fx.Proxy):
            x = x + 1
        return self.fc(x.mean((2, 3)))


def test_a_trace_that_computes_something_else_is_not_taken() -> None:
    assert pathnet.adapt(Lying(), torch.randn(2, 3, 9, 9)).traced_by == "torch.export"


def test_the_gradients_are_checked_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"gradient of (the input|0.weight) is not the model's"):
        pathnet.adapt(
            model,
            torch.randn(2, 3, 4, 4),
            stem="0",
            blocks=[(lambda y: 0 * y, "1")],
            head=lambda y: y.detach() * 2 - y,
        )


class OwnStatistics(nn.Module):
    """Batch normalisation with statistics that are computed, which no module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 4, 3), Basic(4, 4), nn.Linear(4, 5)
        self.register_buffer("deviation", torch.rand(4) + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.deviation * 0, self.deviation**2)
        return self.fc(self.block(x).mean((2, 3)))


def test_fixed_statistics_and_statistics_of_the_batch() -> None:
    torch.manual_seed(0)
    model = OwnStatistics().eval()
    net = pathnet.adapt(model, torch.randn(2, 3, 9, 9))
    images, labels = torch.randn(2, 3, 9, 9), torch.tensor([0, 1])
    assert pathnet.record(net, images, labels, engine="reference").n == 1
    with pytest.raises(ValueError, match="bn: expected 'running' for a network whose running statistics are fixed"):
        pathnet.record(net, images, labels, bn="batch", engine="reference")
    # What is computed of buffers is computed anew.
    before = net(images).detach()
    model.deviation += 1
    torch.testing.assert_close(net(images), model(images))
    assert relative_error(before, net(images).detach().double()) > 1e-3
    for lesioned in (pathnet.lesion.delete(net, [0]), pathnet.lesion.reorder(net, [0])):
        with pytest.raises(ValueError, match="bn: expected 'running' for a network whose"):
            pathnet.record(lesioned, images, labels, bn="batch", engine="reference")
        with pytest.raises(ValueError, match="net: expected running statistics that can change, got fixed"):
            pathnet.lesion.recalibrated(lesioned, pathnet.data.synthetic())


def test_the_report_names_blocks_shapes_kinds_and_engines() -> None:
    lines = str(found("basic")).splitlines()
    assert lines[0] == "4 residual blocks, found by torch.fx"
    assert lines[1].split("  ") and lines[3].split() == [
        *("2", "layer1.1", "4x5x5", "6x3x3", "projection", "post-activation", "basic"),
    ]
    reasons = dict(line.removeprefix("engine ").split(": ", 1) for line in lines[6:])
    assert set(reasons) == set(pathnet.engines.available()) and reasons["reference"] == "serves"
    assert "attention" in str(found("vision transformer")) and "pad" in str(found("zero padding"))
    assert "pre-activation basic" in str(found("pre-activation"))
    assert "stem's convolution" not in lines


class LongSkip(nn.Module):
    """Blocks inside of one long residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body, self.out = (
            nn.Conv2d(3, 4, 3),
            nn.Sequential(Basic(4, 4), Basic(4, 4)),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.out(x + 0.2 * self.body(x))


class Gathering(nn.Module):
    """What enters each block is concatenated later on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(3, 4, 3), nn.ModuleList([Basic(4, 4), Basic(4, 4)])
        self.last, self.fc = Basic(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        gathered = [self.conv(x)]
        for block in self.blocks:
            gathered.append(block(gathered[-1].clone()))
        return self.fc(self.last(torch.cat(gathered, 1)).mean((2, 3)))


def test_blocks_inside_of_others_are_told_and_gathered_ones_refused() -> None:
    net = pathnet.adapt(LongSkip(), torch.randn(2, 3, 9, 9))
    assert net.n == 1 and "convolutions with 2 residual connections inside" in str(net)
    with pytest.raises(ValueError, match=r"2 additions from .* in module 'blocks.0'\).*concatenation joins again"):
        pathnet.adapt(Gathering(), torch.randn(2, 3, 9, 9))


def test_what_stands_between_blocks_belongs_to_both_branches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Basic(4, 4), nn.Conv2d(4, 6, 2, 2), nn.BatchNorm2d(6), Basic(6, 6))
    model.extend([nn.AvgPool2d(2), Basic(6, 6), nn.Flatten(), nn.Linear(24, 5)])
    net = pathnet.adapt(shaken(model).eval(), torch.randn(2, 3, 11, 11))
    assert [block.skip_kind() for block in net] == [
        *("identity", "identity behind 1 shared layers", "identity behind a shared part"),
    ]
    x = torch.randn(2, 3, 11, 11)
    with torch.no_grad():
        expected = model[8](model[7](model[6](model[5](F.relu(model[3](model[2](model[1](model[0](x)))))))))
        torch.testing.assert_close(pathnet.lesion.delete(net, [1])(x), expected)


def test_a_module_that_is_used_twice_has_its_weights_once() -> None:
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


def test_the_oracle_sees_the_order_of_blocks() -> None:
    stranger = BY_NAME["basic"]
    model = stranger.model()
    assert len(sites(model)) == 4
    one, other = (path_gradient(stranger, model, path) for path in ([1, 0, 0, 0], [0, 0, 0, 1]))
    assert relative_error(one, other) > 0.1
    assert outcome(stranger, model, stranger.batch()[0]).shape == (3, 5)
