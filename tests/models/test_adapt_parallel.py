"""`adapt` with residual modules in parallel, as one module of their block or one each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import relative_error
from torch import Tensor, nn

import pathnet
from pathnet import lesion, paths

EXACT = 1e-12


class Adapter(nn.Module):
    """A linear layer with a low-rank adapter, whose sum is no pair of residual modules."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.base(x) + 0.5 * self.up(self.down(x)))


class Layer(nn.Module):
    """``x + f(norm(x)) - 2 g(norm(x)) + tanh(x)`` with a ReLU after it, in one of three ways to write the sum."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.norm, self.f, self.written = nn.LayerNorm(4), Adapter(), written
        self.g = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Any:
        h = self.norm(x)
        f, g, t = self.f(h), self.g(h), torch.tanh(x)
        if self.written == "in place":
            x = x + f
            x -= 2 * g
            return torch.relu(x + t)
        if self.written == "dropout":
            return torch.relu(x + F.dropout(f - 2 * g + t, 0.5, self.training))
        return torch.relu((t + f) + torch.sub(x, g, alpha=2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 5)
        self.layers = nn.ModuleList(Layer(written) for written in ("in place", "dropout", "nested"))
        self.single = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x + self.single(x))


def case() -> tuple[Model, Tensor, Tensor]:
    model = Model().double().eval()
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, x, torch.tensor([0, 3, 1])


def written_out(model: Model, x: Tensor, path: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the loss's input and ``y_0``, with gradients through one part of each block."""
    y = y0 = model.first(x)
    for layer, entry in zip(model.layers, path, strict=False):
        h = layer.norm(y)
        f = layer.f.base(h) + 0.5 * layer.f.up(layer.f.down(h))
        # The term without weights belongs to the first module.
        parts = [y, f + torch.tanh(y), -2 * layer.g(h)]
        y = torch.relu(sum(part if i == entry else part.detach() for i, part in enumerate(parts)))  # type: ignore[arg-type]
    parts = [y, model.single(y)]
    y = parts[path[3]] + parts[1 - path[3]].detach()
    return model.last(y), y0


def test_every_path_through_separate_modules() -> None:
    model, x, labels = case()
    net = pathnet.adapt(model, x, parallel="separate")
    assert net.residual_modules == (2, 2, 2, 1) and net.parts == 3
    tape = pathnet.record(net, x, labels, precision="float64")
    codes = paths.enumerate_all(4, net.residual_modules)
    for code, grad in zip(codes.tolist(), tape.path_gradients(codes), strict=True):
        output, y0 = written_out(model, x, code)
        (expected,) = torch.autograd.grad(F.cross_entropy(output, labels), y0)
        assert relative_error(grad, expected) < EXACT, code
    assert len(codes) == 54
    assert "perceptron and perceptron in parallel, then an activation" in str(net)
    assert "modules of 3 blocks in parallel: separate" in str(net)


def test_they_are_one_module_unless_asked_for() -> None:
    model, x, labels = case()
    net = pathnet.adapt(model, x)
    assert net.residual_modules == (1,) * 4 and net.parts == 2
    assert len(net.state_dict()) < len(pathnet.adapt(model, x, parallel="separate").state_dict())
    assert 'modules of 3 blocks in parallel: one module each (parallel="separate" for more)' in str(net)
    tape = pathnet.record(net, x, labels, precision="float64")
    for code in itertools.product(range(2), repeat=4):
        of_modules = itertools.product(*([1, 2] if entry and i < 3 else [entry] for i, entry in enumerate(code)))
        expected = torch.zeros(3, 4, dtype=torch.float64)
        for path in of_modules:
            output, y0 = written_out(model, x, path)
            expected += torch.autograd.grad(F.cross_entropy(output, labels), y0)[0]
        assert relative_error(tape.path_gradients(torch.tensor([code]))[0], expected) < EXACT
    with pytest.raises(ValueError, match="parallel: expected 'together' or 'separate', got 'apart'"):
        pathnet.adapt(model, x, parallel="apart")  # type: ignore[arg-type]


def test_one_module_alone_is_deleted_by_routing_and_all_of_them_by_a_lesion() -> None:
    model, x, _ = case()
    net = copy.deepcopy(pathnet.adapt(model, x, parallel="separate"))
    routing = torch.ones(2, 4, 3)
    routing[0, 1, 2] = routing[1, 1, 1] = routing[1, 1, 2] = 0
    outputs = pathnet.Recorder(net, precision="float64").routed_outputs(x, routing)
    with torch.no_grad():
        y = model.layers[0](model.first(x))
        h = model.layers[1].norm(y)
        without_g = torch.relu(y + model.layers[1].f(h) + torch.tanh(y))
        for output, after in zip(outputs, (without_g, torch.relu(y)), strict=True):
            y = model.layers[2](after)
            assert relative_error(output, model.last(y + model.single(y))) < EXACT
    torch.testing.assert_close(lesion.delete(net, [1])(x), outputs[1], rtol=1e-12, atol=1e-12)
