"""Gradients at the input of any block and of any parameter, against a loop over detached branches in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.cases import SMALL, shaken
from helpers.context_nets import scaled_inputs, scaled_net
from helpers.oracles import in_float64, relative_error
from helpers.token_nets import language_model, sentences
from torch import Tensor, nn

import pathnet
from pathnet import models, native, paths
from pathnet.models import Block, ResidualNet
from pathnet.recording import cross_entropy

Example = tuple[ResidualNet, Tensor, Tensor]
needs_native = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def preactivated() -> Example:
    return (SMALL[0].net(), *SMALL[0].images())


def postactivated() -> Example:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    blocks = [
        models.PostactBlock(4, (3, 3), (4, 4), 1, "projection"),
        models.PostactBlock(4, (3, 3), (5, 6), 2, "projection"),
        models.PostactBlock(6, (1, 3, 1), (3, 3, 8), 2, "pad"),
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return (shaken(ResidualNet(stem, blocks, head)).eval(), *SMALL[0].images())


def dropped() -> Example:
    """Stochastic depth, whose survival probabilities engines fold into weights."""
    net = SMALL[0].net()
    for i, block in enumerate(net):
        block.survival = 1 - 0.2 * i
    return (net, *SMALL[0].images())


def gated() -> Example:
    torch.manual_seed(0)
    net = shaken(models.highway(8, 2, num_classes=5)).eval()
    for block in net:
        nn.init.normal_(block.gate.weight)  # type: ignore[arg-type]
    return (net, *SMALL[0].images())


def tokens() -> Example:
    return (language_model(3), *sentences(3, 5))


class TwoBranches(nn.Module):
    """A model of another library: a shared beginning, a projection, an activation after the addition."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.skip = nn.BatchNorm2d(width), nn.Conv2d(width, out, 1)
        self.conv1, self.conv2 = nn.Conv2d(width, 3, 3, padding=1), nn.Conv2d(3, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).tanh()
        return torch.relu(self.skip(x) + self.conv2(self.conv1(x).sigmoid()))


def adapted() -> Example:
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 4, 3), TwoBranches(4, 5), TwoBranches(5, 5), nn.Flatten(), nn.Linear(180, 5)
    model = nn.Sequential(*parts).eval()
    return (pathnet.adapt(model, SMALL[0].images()[0]), *SMALL[0].images())


EXAMPLES = [preactivated, postactivated, dropped, gated, tokens, adapted]


def place_of(net: ResidualNet, at: str | int) -> tuple[int, str]:
    """Return the first block that paths may enter, and the name of the parameter."""
    if isinstance(at, int):
        return at, ""
    name = net.parameter_names.get(at, at)
    return (int(name.split(".")[1]) if name.startswith("blocks.") else 0), name


def along(example: Example, at: str | int, path: Tensor, bn: str) -> Tensor:
    """Return the gradient of one path by the ordinary forward pass, with the branch next to the path detached."""
    net, x, target = example
    first, name = place_of(net, at)
    net = in_float64(net, bn)
    net.requires_grad_()
    y = net.stem(x.double() if x.is_floating_point() else x)
    for block in list(net)[:first]:
        y = block(y)
    leaf = net.get_parameter(name) if name else y.detach().requires_grad_()
    y = y if name else leaf
    for block, entered in zip(list(net)[first:], path.tolist(), strict=True):
        skip, residual = block.branches(y)
        y = block.join(skip.detach() + residual if entered else skip + residual.detach())
    # In two steps, since no path leads to what the head has of a parameter.
    y_n = y.detach().requires_grad_()
    (start,) = torch.autograd.grad(cross_entropy(net.head(y_n), target), y_n)
    (grad,) = torch.autograd.grad(y, leaf, start, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad


def places(net: ResidualNet, bn: str) -> list[str | int]:
    """Return every block, and some of the parameters of the stem and of every block; others in the other BN mode."""
    names = net.parameter_names or {name: name for name, _ in net.named_parameters()}
    within = [name for name, inner in names.items() if not inner.startswith("head.")]
    return [*range(net.n), *within[bn == "batch" :: 4]]


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("make", EXAMPLES)
def test_every_path_to_every_place_equals_the_detach_loop(make: Callable[[], Example], bn: Any) -> None:
    example = make()
    net, x, target = example
    for at in places(net, bn):
        tape = pathnet.record(net, x, target, bn, precision="float64", at=at)
        codes = paths.enumerate_all(tape.n)
        assert tape.n == net.n - place_of(net, at)[0]
        expected = torch.stack([along(example, at, code, bn) for code in codes])
        grads = tape.path_gradients(codes)
        close = partial(torch.testing.assert_close, rtol=1e-9, atol=max(1e-15, 1e-10 * float(expected.abs().max())))
        assert grads.shape == expected.shape and (expected.any() or "gate" in str(at))
        close(grads, expected)
        close(tape.path_gradient_norms(codes), expected.flatten(1).norm(dim=1))
        mantissa, exponent = tape.path_gradients(codes, scaled=True)
        torch.testing.assert_close(mantissa * 2.0**exponent, grads, rtol=0, atol=0)
        lengths = torch.stack([expected[codes.sum(1) == k].sum(0) for k in range(tape.n + 1)])
        close(tape.gradient_by_length(), lengths)
        scaled = tape.gradient_by_length(scaled=True)
        close(scaled.mantissa * 2.0**scaled.exponent, lengths)


@pytest.mark.parametrize("engine", ["auto", "reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("make", [preactivated, postactivated])
def test_every_engine_serves_every_place(make: Callable[[], Example], bn: Any, engine: str) -> None:
    example = make()
    net, x, target = example
    last = net.n - 1
    weights = [name for name, _ in net.named_parameters() if name.startswith("blocks.") and "conv" in name]
    for at in (last, 1, weights[0], weights[-1], "stem.0.weight" if make is postactivated else "stem.weight"):
        tape = pathnet.record(net, x, target, bn, engine, at=at)
        codes = paths.enumerate_all(tape.n)[:4]
        for code, grad in zip(codes, tape.path_gradients(codes), strict=True):
            assert relative_error(grad, along(example, at, code, bn)) < 2e-4
        expected = "reference" if place_of(net, at)[0] == last and isinstance(at, str) else engine
        assert tape.engine == expected or engine == "auto"


def ordinary(example: Example, name: str, bn: str) -> Tensor:
    net, x, target = example
    net = in_float64(net, bn)
    loss = cross_entropy(net(x.double() if x.is_floating_point() else x), target)
    return torch.autograd.grad(loss, net.get_parameter(name))[0]


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("make", EXAMPLES)
def test_the_gradient_of_a_parameter_is_autograds(make: Callable[[], Example], bn: Any) -> None:
    example = make()
    net, x, target = example
    for name in [name for name, _ in net.named_parameters() if name.startswith("blocks.")]:
        tape = pathnet.record(net, x, target, bn, precision="float64", at=name)
        assert relative_error(tape.gradient(), ordinary(example, name, bn)) < 1e-9


def test_samples_have_shares_of_a_parameters_gradient() -> None:
    net, x, target = preactivated()
    name = "blocks.1.convs.0.weight"
    tape = pathnet.record(net, x, target, precision="float64", at=name)
    codes = paths.enumerate_all(tape.n)
    norms = tape.path_gradient_norms(codes, per_sample=True)
    alone = [
        along((net, x[i : i + 1], target[i : i + 1]), name, code, "running") / len(x)
        for code in codes
        for i in range(3)
    ]
    torch.testing.assert_close(norms.flatten(), torch.stack([grad.norm() for grad in alone]))


def test_signed_draws_at_a_parameter_have_the_norms_of_their_sums() -> None:
    net, x, target = preactivated()
    tape = pathnet.record(net, x, target, precision="float64", at="blocks.1.convs.1.weight")
    signs = paths.signs(tape.n, 2, 5)
    codes = paths.enumerate_all(tape.n)
    grads = tape.path_gradients(codes)
    signed = torch.stack([(signs[draw] ** codes).prod(1) for draw in range(2)])
    expected = [
        [(grads * s[:, None, None, None, None])[codes.sum(1) == k].sum(0).square().sum() for k in range(3)]
        for s in signed
    ]
    torch.testing.assert_close(tape.squared_norms_by_length(2, seed=5), torch.tensor(expected))


class Scalar(Block):
    """A block with one number as its parameter, so small that float32 would lose the gradient behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.tensor(1e-25)), nn.Parameter(torch.tensor(1e-25))

    def residual(self, x: Tensor) -> Tensor:
        return self.first * (self.second * x.tanh())


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_number_far_from_one_keeps_its_digits(precision: Any) -> None:
    net = ResidualNet(nn.Identity(), [Scalar(), Scalar(), Scalar()], nn.Flatten())
    x, target = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum() * 1e-25

    tape = pathnet.record(net, x, target, loss=loss, precision=precision, at="blocks.0.second")
    expected = (x.tanh() * target).sum() * 1e-50
    torch.testing.assert_close(
        tape.path_gradients(torch.tensor([[1, 0, 0], [0, 1, 1]]))[0], expected, rtol=1e-5, atol=0
    )
    assert tape.path_gradients(torch.tensor([[0, 1, 1]])).tolist() == [0.0]
    assert tape.path_gradients(torch.tensor([[1, 0, 0]]), scaled=True).mantissa.shape == (1,)


@pytest.mark.parametrize("place", [1, "blocks.1.convs.0.weight", "stem.weight"])
def test_results_do_not_depend_on_how_paths_are_grouped(place: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, target = preactivated()
    tape = pathnet.record(net, x, target, engine="reference", at=place)
    codes = paths.enumerate_all(tape.n)
    grads, norms = tape.path_gradients(codes), tape.path_gradient_norms(codes, per_sample=True)
    for size in (1, 3000, 7000):
        monkeypatch.setattr("pathnet.chunks.CHUNK_BYTES", size)
        assert torch.equal(tape.path_gradients(codes), grads)
        assert torch.equal(tape.path_gradient_norms(codes, per_sample=True), norms)


def test_routed_outputs_and_shapes_of_a_recorder_at_a_place_are_those_of_the_whole_network() -> None:
    net, x, target = preactivated()
    routing = torch.rand(2, net.n, 2, generator=torch.Generator().manual_seed(0))
    expected = pathnet.Recorder(net, engine="reference").routed_outputs(x, routing)
    recorder = pathnet.Recorder(net, engine="reference", at=2)
    tape = recorder(x, target)
    assert torch.equal(recorder.routed_outputs(x, routing), expected)
    assert tape.n == 1 and recorder(x, target).path_gradients(torch.tensor([[1]])).shape == (
        1,
        *tape._record.y0_shape,
    )


@pytest.mark.parametrize("at", [3, -1, True, 1.0, "y1", "blocks.0", None])
def test_what_is_no_place_is_refused(at: Any) -> None:
    net, x, target = preactivated()
    what = r"'y0', 'image', 'stem_weight', the number of a block \(0 to 2\) or the name of a parameter"
    with pytest.raises(ValueError, match=f"^at: expected {what}, got {at!r}$"):
        pathnet.record(net, x, target, at=at)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("blocks.0.convs.1.bias", "block 0 and block 1"),
        ("stem.0.bias", "the stem and block 2"),
        ("extra.weight", "the context of the blocks"),
        ("head.linear.bias", "the head"),
    ],
)
def test_a_parameter_without_a_gradient_along_paths_is_refused_with_its_places(at: str, message: str) -> None:
    net, x, target = preactivated()
    biases = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    net.blocks[0].convs[1].bias = net.blocks[1].convs[1].bias = biases[0]
    net.blocks[2].convs[0].bias = biases[1]
    net.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    net.stem[0].bias = biases[1]
    net.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"^at: expected a parameter .* got '{at}' of {message}$"):
        pathnet.record(net, x, target, at=at)


def test_a_parameter_after_the_addition_is_told() -> None:
    class Learned(Block):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.after = nn.Linear(3, 3), nn.PReLU()

        def residual(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.f(x))

        def join(self, z: Tensor) -> Tensor:
            return torch.as_tensor(self.after(z))

    net = ResidualNet(nn.Identity(), [Learned(), Learned()], nn.Identity())
    tape = pathnet.record(net, torch.randn(2, 3), torch.tensor([0, 1]), at="blocks.1.after.weight")
    with pytest.raises(
        ValueError, match=r"^at: expected .* got 'blocks.1.after.weight', which block 1 uses after its ad"
    ):
        tape.gradient()


def test_blocks_before_the_place_read_the_context_too() -> None:
    net = scaled_net()
    inputs, target = scaled_inputs(3)
    double = copy.deepcopy(net).double()
    x, scale = (each.double() for each in inputs)
    y1 = double.stem(x)
    y1 = scale * y1 + scale * torch.tanh(double.blocks[0].linear(y1))
    s, f = scale * y1.detach(), scale * torch.tanh(double.blocks[1].linear(y1.detach()))
    y2 = s + f
    y3 = scale * y2 + (scale * torch.tanh(double.blocks[2].linear(y2))).detach()
    weight = double.blocks[1].linear.weight
    (expected,) = torch.autograd.grad(cross_entropy(double.head(y3), target), weight)
    tape = pathnet.record(net, inputs, target, precision="float64", at="blocks.1.linear.weight")  # type: ignore[arg-type]
    torch.testing.assert_close(tape.path_gradients(torch.tensor([[1, 0]]))[0], expected)
    tape = pathnet.record(net, inputs, target, precision="float64", at=2)  # type: ignore[arg-type]
    leaf = y2.detach().requires_grad_()
    y3 = scale * leaf + scale * torch.tanh(double.blocks[2].linear(leaf))
    (expected,) = torch.autograd.grad(cross_entropy(double.head(y3), target), leaf)
    torch.testing.assert_close(tape.gradient(), expected)
