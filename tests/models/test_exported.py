"""`exported`: the model's own parameters in a graph for batches of any size and, of its copies, any precision."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pathnet.models.tracing.exported import exported


class Untraceable(nn.Module):
    """Whatever makes a trace awkward: tied weights, a buffer that is not saved, a constant, a literal, questions of
    shape, casts (one that copies, a real one, one in a softmax), dropout, statistics, an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.linear.weight = self.embedding.weight
        self.register_buffer("shift", torch.randn(4), persistent=False)
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        self.constant = torch.randn(4)

    def forward(self, x: Tensor, use_cache: bool = True) -> Any:
        assert not use_cache
        y = self.embedding(x) + self.shift + self.constant + torch.tensor([1.0, 2.0, 3.0, 4.0])
        y = y.to(self.shift.dtype, copy=True) * (2 if y.shape[0] > 0 else 3)
        z = y.to(self.shift.dtype, copy=True)
        z.relu_()
        z = self.dropout(self.norm(z.mT).mT) + y
        z = z + torch.arange(x.shape[0] * 4, device=z.device).view(x.shape[0], 1, 4).to(z.dtype)
        scores = F.softmax(z @ z.mT, -1, dtype=self.shift.dtype).to(y.dtype)
        return SimpleNamespace(logits=self.linear(scores @ z), past_key_values=None)


@cache
def make() -> tuple[Untraceable, fx.GraphModule]:
    torch.manual_seed(0)
    model = Untraceable().train()
    model.embedding.eval()
    return model, exported(model, torch.randint(0, 7, (1, 5)))


def test_fx_alone_cannot_trace_it() -> None:
    with pytest.raises(Exception):  # noqa: B017
        fx.symbolic_trace(Untraceable())


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_outputs_and_gradients_equal_the_models(batch: int) -> None:
    model, graph = make()
    x, truth = torch.randint(0, 7, (batch, 5)), copy.deepcopy(model).eval()
    output, expected = graph(x), truth(x, use_cache=False).logits
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    for own, true in zip(grads, torch.autograd.grad(expected.square().sum(), list(truth.parameters())), strict=True):
        torch.testing.assert_close(own, true)


def test_a_copy_in_float64_is_float64_throughout() -> None:
    model, graph = make()
    x = torch.randint(0, 7, (3, 5))
    truth = copy.deepcopy(model).double().eval()
    truth.constant = truth.constant.double()
    difference = copy.deepcopy(graph).double()(x) - truth(x, use_cache=False).logits
    assert difference.dtype == torch.float64 and difference.abs().max() < 1e-13
    assert copy.deepcopy(graph).double().float()(x).dtype == torch.float32


def test_parameters_are_the_models_own_and_modes_are_left() -> None:
    model, graph = make()
    assert model.training and not model.embedding.training and model.norm.training
    theirs = {id(own): name for name, own in [*model.named_parameters(), *model.named_buffers()]}
    ours = dict([*graph.named_parameters(), *graph.named_buffers()])
    assert set(map(id, model.parameters())) == set(map(id, graph.parameters()))
    strangers = [name for name, own in ours.items() if id(own) not in theirs]
    assert [name.split(".")[-1] for name in strangers] == ["constant", "lifted_tensor_0"]
    assert ours["constant"] is model.constant
    assert {"linear.weight", "norm.running_var", "shift"} <= set(ours)
    assert graph.linear.weight is model.embedding.weight
    assert fx.GraphModule(graph, graph.graph).train().training  # Unlike what torch.export gives, it has both modes.


def test_no_guards_assertions_or_trees_are_left() -> None:
    _, graph = make()
    kinds = [node.op for node in graph.graph.nodes]
    assert kinds.count("placeholder") == kinds.count("output") == 1 and "call_module" not in kinds
    assert not [node for node in graph.graph.nodes if "assert" in str(node.target) or "pytree" in str(node.target)]
    casts = [node for node in graph.graph.nodes if str(node.target).startswith("aten.to.")]
    assert len(casts) == 1 and casts[0].args[0].meta["val"].dtype == torch.int64
    embedded = next(node for node in graph.graph.nodes if str(node.target) == "aten.embedding.default")
    assert isinstance(embedded.meta["val"].shape[0], torch.SymInt) and embedded.meta["val"].shape[1:] == (5, 4)


def test_another_shape_than_the_traced_one_is_told() -> None:
    _, graph = make()
    with pytest.raises(ValueError, match=r"^images: expected the shape that was traced, \[B, 5\], got \[3, 10\]"):
        graph(torch.zeros(3, 10, dtype=torch.int64))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class OfTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(2, 1)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching(), r"model: torch.export fails for batches of any size \(.*data-dependent"),
        (OfTwo(), r"model: torch.export fails for batches of any size \(Constraints violated .* constant"),
        (Pair(), r"model: torch.export fails .*\(expected an output that is a tensor or has logits, got tuple\)"),
        (nn.Linear(3, 3).bfloat16(), "model: expected float32 or float64 weights, got torch.bfloat16 in weight"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_exported_is_told(model: nn.Module, message: str) -> None:
    model.train()
    with pytest.raises(ValueError, match=f"^{message}"):
        exported(model, torch.randn(2, 3))
    assert model.training
