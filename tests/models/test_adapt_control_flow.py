"""`adapt` with named blocks where control flow depends on values, against the models' own code and `detach` loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import relative_error
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet


class Choosing(nn.Module):
    """One of two experts for each batch, by its values."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Any:
        return self.experts[int(x.mean() > 0)](x)


class Layer(nn.Module):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.f, self.g = place, nn.Linear(4, 4), nn.Linear(4, 4)
        if place == "module":
            self.f = Choosing()

    def forward(self, x: Tensor) -> Any:
        y = self.f(x)
        if self.place == "block" and y.mean() > 0:
            y = self.g(y)
        return torch.tanh(x + y)


class Model(nn.Module):
    """Control flow in the stem, between blocks, in a block, in the head, or in the modules of these."""

    def __init__(self, place: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place = place
        self.first, self.extra, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 5)
        self.layers = nn.ModuleList([Layer(place), Layer("")])
        self.choosing = Choosing()
        # All layers are odd functions, so the input's sign decides.
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def stem(self, x: Tensor) -> Any:
        if self.place == "input" and x.mean() > 0:
            x = x * 2
        x = self.first(x)
        if self.place == "stem" and x.mean() > 0:
            x = self.extra(x)
        return self.choosing(x) if self.place == "stem's module" else x

    def between(self, x: Tensor, flag: Tensor) -> Any:
        if self.place == "between" and x.mean() > 0:
            x = self.extra(x)
        if self.place == "between, from the start" and flag:
            x = self.extra(x)
        return self.choosing(x) if self.place == "between's module" else x

    def head(self, x: Tensor) -> Any:
        if self.place == "head" and x.sum().item() > 0:
            x = self.extra(x)
        if self.place == "loop":
            for _ in range(int((x.mean() > 0).sum()) + 1):
                x = self.extra(x)
        return self.last(x)

    def forward(self, x: Tensor) -> Any:
        assert x.shape[-1] == 3
        flag = x.mean() > 0
        x = self.stem(x)
        for i in [0, 1]:
            x = self.layers[i](x if i == 0 else self.between(x, flag))
        return self.head(x)


WHOLE = ["stem's module", "between's module", "module"]
"""Places whose modules the network calls whole, so that they choose anew."""
PLACES = ["input", "stem", "between", "block", "head", "loop", *WHOLE]


def inputs(model: Model, seed: int = 0) -> Tensor:
    return torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def truth(model: Model, x: Tensor, path: tuple[int, ...]) -> Tensor:
    """Return the gradient at y_0 along a path, in the model's own code."""
    y = y0 = model.stem(x).detach().requires_grad_()
    for i, (layer, takes_residual) in enumerate(zip(model.layers, path, strict=True)):
        y = y if i == 0 else model.between(y, x.mean() > 0)
        f = layer.f(y)
        if layer.place == "block" and f.mean() > 0:
            f = layer.g(f)
        y = torch.tanh(y.detach() + f if takes_residual else y + f.detach())
    loss = F.cross_entropy(model.head(y), torch.tensor([0, 3, 1]))
    return torch.autograd.grad(loss, y0)[0]


@pytest.mark.parametrize("place", PLACES)
def test_named_blocks_work_wherever_control_flow_stands(place: str) -> None:
    model = Model(place).double().eval()
    x = inputs(model)
    if place != "module":
        with pytest.raises(ValueError, match="model: cannot be traced"):
            pathnet.adapt(model, x)
    net = pathnet.adapt(model, x, blocks=["layers.0", "layers.1"])
    assert [block.name for block in net] == ["layers.0", "layers.1"]
    same, other = [], []
    for seed in range(40):
        x = inputs(model, seed)
        try:
            output = net(x)
        except ValueError as error:
            other.append(str(error))
            continue
        same.append(seed)
        assert relative_error(output.detach(), model(x).detach()) < EXACT_WALK
        tape = pathnet.record(net, x, torch.tensor([0, 3, 1]), precision="float64")
        paths = list(itertools.product((0, 1), repeat=2)) if seed < 8 else []
        for path in paths:
            assert relative_error(tape.path_gradients(torch.tensor([path]))[0], truth(model, x, path)) < EXACT_WALK
    if place in WHOLE:
        # The model's assertion is checked; the modules choose anew.
        assert len(same) == 40 and str(net).count("test_adapt_control_flow.py:") == 1
        assert net.traced_by == f"torch.fx around {'layers.0.f' if place == 'module' else 'choosing'}"
    else:
        assert same and other and all("test_adapt_control_flow.py:" in message for message in other)
        assert "net: expected inputs for which the model's control flow goes the traced way, got " in other[0]
        assert "control flow as for the example, which each run checks: test_adapt_control_flow.py:" in str(net)


def test_a_lesion_that_would_turn_control_flow_is_refused_too() -> None:
    model = Model("between").double().eval()
    nn.init.constant_(model.layers[0].f.bias, 9.0)
    nn.init.constant_(model.first.bias, -3.0)
    net = pathnet.adapt(model, inputs(model), blocks=["layers.0", "layers.1"])
    with pytest.raises(
        ValueError, match="net: expected inputs for which the model's control flow goes the traced way"
    ):
        pathnet.lesion.delete(net, [0])(inputs(model))


def test_control_flow_between_blocks_that_depends_on_more_than_the_stream_is_refused_or_checked() -> None:
    model = Model("between, from the start").double().eval()
    x = inputs(model)
    net = pathnet.adapt(model, x, blocks=["layers.0", "layers.1"])
    outcomes = set()
    for seed in range(20):
        x = inputs(model, seed)
        try:
            assert relative_error(net(x).detach(), model(x).detach()) < EXACT_WALK
            outcomes.add("equal")
        except ValueError as error:
            assert "control flow goes the traced way" in str(error)
            outcomes.add("refused")
    assert outcomes == {"equal", "refused"}


def test_lesioned_outputs_are_checked_one_by_one() -> None:
    """Check outputs whose conditions hold for all of them together, but not for each."""
    model = Model("head").double().eval()
    nn.init.constant_(model.layers[1].f.bias, -9.0)
    nn.init.constant_(model.first.bias, 1.0)
    x = inputs(model)
    net = pathnet.adapt(model, x, blocks=["layers.0", "layers.1"])
    routing = torch.ones(3, 2, 2)
    with torch.no_grad():
        assert pathnet.lesion.delete(net, [0])(x).isfinite().all()
        with pytest.raises(ValueError, match="control flow goes the traced way, got True instead of False"):
            pathnet.lesion.delete(net, [1])(x)
    routing[0, 1, 1] = 0
    for network in (net, pathnet.lesion.delete(net, [])):
        recorder = pathnet.Recorder(network, precision="float64")
        assert recorder.routed_outputs(x, routing[1:]).shape == (2, 3, 5)
        with pytest.raises(ValueError, match="control flow goes the traced way"):
            recorder.routed_outputs(x, routing)
