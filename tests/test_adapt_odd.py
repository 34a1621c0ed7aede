"""`adapt` on models that keep what they compute, hold others or share weights across blocks, and refusals told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles import relative_error
from strangers import Basic
from torch import Tensor, nn

import pathnet


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def module(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y

    def forward(self, x: Tensor) -> Any:
        return x + self.module(x)


class Keeping(Perceptron):
    """Keeps what it computed, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[operator]
        self.kept = self.module(x)
        return x + self.kept


def test_what_a_model_keeps_is_as_it_was() -> None:
    model = Keeping()
    x, calls = torch.randn(3, 4), model.calls
    model(x)
    kept = model.kept
    net = pathnet.adapt(model, x)
    assert model.kept is kept and model.calls is calls and float(calls) == 1  # type: ignore[arg-type]
    torch.testing.assert_close(net(x), model(x), rtol=0, atol=0)
    assert model.kept is not kept and float(calls) == 2  # type: ignore[arg-type]


class HardCoded(Perceptron):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(3, 4))


class Random(Perceptron):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x + torch.randn_like(x))


class Refusing(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("too long")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (HardCoded, {}, "model: takes no batch of another size than 3"),
        (Random, {}, "model: expected the same output each time"),
        (Refusing, {}, r"example: the model refuses the shape \[3, 4\] \(too long\)"),
        (Refusing, {"example": None}, r"example: none could be guessed, .*\[2, 4\]: too long"),
        (Perceptron, {"example": torch.full((3, 4), torch.nan)}, "example: expected one for which .* is finite"),
        (Perceptron, {"example": (torch.zeros(3, 4),)}, "example: expected a batch of inputs as a tensor, got tuple"),
        (Perceptron, {"output": 0}, "output: expected None of a model that gives one tensor, got 0"),
        (Perceptron, {"blocks": []}, r"blocks: expected a list of submodules or their names, got \[\]"),
        (Perceptron, {"blocks": "first"}, "blocks: expected a list of submodules or their names, got 'first'"),
        (Perceptron, {"blocks": ["first"]}, "blocks: no addition in them is a residual connection"),
        (
            lambda: nn.DataParallel(Perceptron()),
            {},
            "model: expected the module that was wrapped or .*got DataParallel",
        ),
    ],
)
def test_what_cannot_be_served_is_told(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pathnet.adapt(make(), **{"example": torch.randn(3, 4), **arguments})


def test_named_blocks_are_told_apart_from_those_with_longer_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), *(Basic(4, 4) for _ in range(9)))
    assert [block.name for block in pathnet.adapt(model, torch.randn(2, 3, 5, 5), blocks=["10"])] == ["10"]
    with pytest.raises(ValueError, match="blocks: no addition in '1' is a residual connection"):
        pathnet.adapt(model, torch.randn(2, 3, 5, 5), blocks=["1", "10"])


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = Basic(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.block(x).mean((2, 3)))
        return y


class Wrapping(nn.Module):
    """Holds another as ``model``, and takes `torch.export` to be traced."""

    def __init__(self, several: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.model, self.several = nn.Conv2d(3, 4, 1), Stage(), several

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        for _ in range(y.shape[1] - 3):
            y = self.model(y)
        return {"prediction": y, "shifted": y + 1} if self.several else SimpleNamespace(logits=y)


@pytest.mark.parametrize("output", [None, "prediction"])
def test_exported_models_keep_their_names_and_statistics(output: str | None) -> None:
    model = Wrapping(output is not None).eval()
    x = torch.randn(3, 3, 5, 5)
    net = pathnet.adapt(model, x, output=output)
    assert net.traced_by == "torch.export" and net.frozen_statistics == ()
    assert [block.name for block in net] == ["model.block"]
    assert [block.name for block in pathnet.adapt(model, x, blocks=["model.block"], output=output)] == ["model.block"]
    own = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert own in set(net.modules())


class Biased(nn.Module):
    """All blocks take a bias that the first one computes, of weights and of the shape (relative positions)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.positions(torch.arange(x.shape[1])) * 2
        for layer in self.layers:
            x = x + torch.tanh(layer(x) + bias)
        return x


def test_weights_outside_of_the_branches_get_their_gradient_in_each() -> None:
    model = Biased().double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    net = pathnet.adapt(model, x)
    assert net.n == 3
    other = torch.randn(2, 5, 4, dtype=torch.float64)
    weight = model.positions.weight
    (given,) = torch.autograd.grad(net(other).square().sum(), weight)
    (expected,) = torch.autograd.grad(model(other).square().sum(), weight)
    assert relative_error(given, expected) < 1e-14
    with torch.no_grad():
        weight.mul_(3)
    torch.testing.assert_close(net(other), model(other), rtol=0, atol=1e-14)
    y = other
    bias = model.positions(torch.arange(5)) * 2
    for i in (0, 2):
        y = y + torch.tanh(model.layers[i](y) + bias)
    torch.testing.assert_close(pathnet.lesion.delete(net, [1])(other), y, rtol=0, atol=1e-14)


class Named(nn.Module):
    """Two linear layers behind a normalisation whose weights are named after another part."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.post_attention_scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x * self.post_attention_scale)
        return x + torch.addmm(self.fc.bias, x, self.fc.weight)


def test_kinds_are_of_what_is_called() -> None:
    net = pathnet.adapt(Named(), torch.randn(3, 4))
    assert [block.kind() for block in net] == ["linear layers"] * 2  # type: ignore[operator]


def test_copies_of_a_model_that_keeps_what_it_computes() -> None:
    model = Keeping()
    pathnet.adapt(model, torch.randn(3, 4))
    copy.deepcopy(model)


class Leaking(nn.Module):
    """Behind its block an addition one of whose branches goes on elsewhere too."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.block, self.leaks = Basic(4, 4), leaks
        self.first, self.second, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        source = self.first(self.block(x))
        branch = self.second(source)
        return self.fc(torch.cat([source + branch, branch if self.leaks else source], 1).mean((2, 3)))


def test_an_addition_whose_branch_goes_on_elsewhere_is_no_block_with_something_led_around_it() -> None:
    torch.manual_seed(0)
    assert [block.name for block in pathnet.adapt(Leaking(True), torch.randn(2, 4, 5, 5))] == ["block"]
    with pytest.raises(ValueError, match="model: 1 additions from add .* are no residual connections"):
        pathnet.adapt(Leaking(False), torch.randn(2, 4, 5, 5))


class HeavySkip(nn.Module):
    """A projection of more weights than the residual module, which has more layers."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(4, 4, 3, padding=1)
        self.module = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1))

    def forward(self, x: Tensor) -> Any:
        return self.module(x) + self.projection(x)


def test_the_skip_is_the_branch_of_fewer_layers_whatever_their_size() -> None:
    torch.manual_seed(0)
    model, x = HeavySkip(), torch.randn(2, 4, 5, 5)
    without = pathnet.lesion.delete(pathnet.adapt(model, x), [0])
    torch.testing.assert_close(without(x), model.projection(x), rtol=0, atol=0)
