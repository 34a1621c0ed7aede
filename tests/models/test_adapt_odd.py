"""`adapt` on models that store results, wrap other models, share weights across blocks or omit dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.oracles import relative_error
from helpers.third_party import Basic
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


class Storing(Perceptron):
    """A model that stores a result, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: Tensor | None = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[operator]
        self.stored = self.module(x)
        return x + self.stored


def test_results_that_a_model_stores_are_restored() -> None:
    model = Storing()
    x, calls = torch.randn(3, 4), model.calls
    model(x)
    stored = model.stored
    net = pathnet.adapt(model, x)
    assert model.stored is stored and model.calls is calls and float(calls) == 1  # type: ignore[arg-type]
    torch.testing.assert_close(net(x), model(x), rtol=0, atol=0)
    assert model.stored is not stored and float(calls) == 2  # type: ignore[arg-type]


class Caching(Perceptron):
    """A model that keeps masks by length in a dictionary, and its last results in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[Any, Tensor] = {}
        self.results: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in self.masks:
            self.masks[x.shape[1]] = torch.ones(x.shape[1])
        self.results.append(self.module(x))
        return x + self.results[-1] * self.masks[x.shape[1]]


def test_items_of_a_model_s_containers_are_restored() -> None:
    model, x = Caching(), torch.randn(3, 4)
    masks, results = model.masks, model.results
    net = pathnet.adapt(model, x)
    assert model.masks is masks and not masks and model.results is results and not results
    torch.testing.assert_close(net(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: None,
        lambda y: "logits",
        lambda y: y.argmax(1),
        lambda y: ({"scores": y},),
        lambda y: 1.0,
    ],
    ids=["none", "string", "integers", "nested", "number"],
)
def test_outputs_that_are_no_real_tensors_are_refused(change: Any) -> None:
    class Model(Perceptron):
        def forward(self, x: Tensor) -> Any:
            return change(super().forward(x))

    with pytest.raises(ValueError, match="model: expected an output that is a floating-point tensor, got "):
        pathnet.adapt(Model(), torch.randn(3, 4))


@pytest.mark.parametrize("traceable", [True, False])
def test_modules_that_a_forward_pass_makes_are_traced_into(traceable: bool) -> None:
    class Model(Perceptron):
        def forward(self, x: Tensor) -> Any:
            y = nn.Tanh()(super().forward(x))
            return y if traceable or float(y.sum()) < 1e9 else -y

    if traceable:
        assert pathnet.adapt(Model(), torch.randn(3, 4)).n == 1
    else:
        with pytest.raises(ValueError, match="model: cannot be traced"):
            pathnet.adapt(Model(), torch.randn(3, 4))


def test_weights_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = Perceptron()
    with pytest.raises(ValueError, match="model: expected weights that autograd differentiates"):
        pathnet.adapt(model, torch.randn(3, 4))


def test_a_model_that_stores_results_can_be_copied_afterwards() -> None:
    model = Storing()
    pathnet.adapt(model, torch.randn(3, 4))
    copy.deepcopy(model)


class HardCoded(Perceptron):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(3, 4))


class Random(Perceptron):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x + torch.randn_like(x))


class Rejecting(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("too long")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (HardCoded, {}, "model: expected batches of any size, got an error for 6 samples"),
        (Random, {}, "model: expected the same output each time"),
        (Rejecting, {}, r"example: the model rejects the shape \[3, 4\] in torch.float32 \(too long\)"),
        (Rejecting, {"example": None}, r"example: none could be guessed, .*\[2, 4\] in torch.float32: too long"),
        (Perceptron, {"example": torch.full((3, 4), torch.nan)}, "example: expected one for which .* is finite"),
        (
            Perceptron,
            {"example": [torch.zeros(3, 4)]},
            "example: expected a tensor, a tuple .* or a mapping .*, got a list",
        ),
        (Perceptron, {"output": 0}, "output: expected None for a model that returns one tensor, got 0"),
        (Perceptron, {"blocks": []}, r"blocks: expected a list of submodules or their names, got \[\]"),
        (Perceptron, {"blocks": "first"}, "blocks: expected a list of submodules or their names, got 'first'"),
        (Perceptron, {"blocks": ["first"]}, "blocks: no addition in them is a residual connection"),
        (
            lambda: nn.DataParallel(Perceptron()),
            {},
            "model: expected the module inside the wrapper or .*got DataParallel",
        ),
    ],
)
def test_unsupported_models_and_arguments_are_named(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pathnet.adapt(make(), **{"example": torch.randn(3, 4), **arguments})


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = Basic(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.block(x).mean((2, 3)))
        return y


class Wrapping(nn.Module):
    """A model with another one as its attribute ``model``, which needs `torch.export`."""

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
    bn = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert bn in set(net.modules())


class Lying(nn.Module):
    """A model that behaves differently while torch.fx traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 4, 3), Basic(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.conv(x))
        if not isinstance(x, torch.fx.Proxy):
            x = x + 1
        return self.fc(x.mean((2, 3)))


def test_a_trace_that_computes_something_else_is_discarded() -> None:
    assert pathnet.adapt(Lying(), torch.randn(2, 3, 9, 9)).traced_by == "torch.export"


class Biased(nn.Module):
    """Blocks that share a bias, a function of weights and of the input's shape (as T5's relative positions)."""

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


def test_weights_outside_the_branches_get_gradients_from_every_branch() -> None:
    model = Biased().double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    net = pathnet.adapt(model, x)
    assert net.n == 3
    other = torch.randn(2, 5, 4, dtype=torch.float64)
    weight = model.positions.weight
    (grad,) = torch.autograd.grad(net(other).square().sum(), weight)
    (expected,) = torch.autograd.grad(model(other).square().sum(), weight)
    assert relative_error(grad, expected) < 1e-14
    with torch.no_grad():
        weight.mul_(3)
    torch.testing.assert_close(net(other), model(other), rtol=0, atol=1e-14)
    y = other
    bias = model.positions(torch.arange(5)) * 2
    for i in (0, 2):
        y = y + torch.tanh(model.layers[i](y) + bias)
    torch.testing.assert_close(pathnet.lesion.delete(net, [1])(other), y, rtol=0, atol=1e-14)


class Dropping(Perceptron):
    def __init__(self, p: float, exported: bool) -> None:
        super().__init__()
        self.drop, self.exported = nn.Dropout(p), exported

    def forward(self, x: Tensor) -> Any:
        if self.exported and x.shape[1] != 4:
            raise ValueError(x.shape)
        return x + self.drop(self.module(x))


def test_a_network_that_omits_dropout_refuses_training_mode() -> None:
    x = torch.randn(3, 4)
    live = pathnet.adapt(Dropping(0.5, False), x).train()
    assert live.dropouts == () and not torch.equal(live(x), live(x))
    model = Dropping(0.5, True).train()
    net = pathnet.adapt(model, x)
    assert net.traced_by == "torch.export" and "without dropout, for evaluation only: drop" in str(net)
    assert torch.equal(net.eval()(x), model.eval()(x))
    for network in (net, copy.deepcopy(net), nn.Sequential(net)):
        with pytest.raises(
            ValueError, match=r"net: tracing omitted .* expected p = 0, got 'drop' \(p = 0.5\); set it, or"
        ):
            network.train()
    inside = nn.Sequential(nn.Linear(4, 4), model, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"got '1.drop' \(p = 0.5\)"):
        pathnet.adapt(inside, x, blocks=["1"]).train()
    model.drop.p = 0.0
    assert net.train().training


def test_half_precision_works_with_fx_and_export() -> None:
    x, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for dtype in (torch.float16, torch.bfloat16):
        for exported in (False, True):
            net = pathnet.adapt(Dropping(0.0, exported).to(dtype), x.to(dtype))
            assert net.traced_by == ("torch.export" if exported else "torch.fx")
            assert pathnet.record(net, x, labels, engine="reference").gradient().dtype == torch.float64
        with pytest.raises(ValueError, match=r"example: the model rejects the shape \[3, 4\] in torch.float32 \("):
            pathnet.adapt(Dropping(0.0, False).to(dtype), x)
