"""`exported`: a graph over the model's own parameters, for batches of any size; its copies have any precision."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pathnet.models.tracing.examples import example_of
from pathnet.models.tracing.exported import exported


class Untraceable(nn.Module):
    """A model with all that makes a trace difficult.

    It has tied weights, a non-persistent buffer, a constant, a literal, control flow on shapes, casts (one that
    copies, one to another type, one in a softmax), dropout, batch statistics, and an in-place operation.
    """

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
def model_and_graph() -> tuple[Untraceable, fx.GraphModule]:
    torch.manual_seed(0)
    model = Untraceable().train()
    model.embedding.eval()
    return model, exported(model, example_of(model, torch.randint(0, 7, (1, 5))))[0]


def test_fx_cannot_trace_the_model() -> None:
    with pytest.raises(Exception):  # noqa: B017
        fx.symbolic_trace(Untraceable())


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_outputs_and_gradients_equal_the_models(batch: int) -> None:
    model, graph = model_and_graph()
    x, truth = torch.randint(0, 7, (batch, 5)), copy.deepcopy(model).eval()
    output, expected = graph(x), truth(x, use_cache=False).logits
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    expected_grads = torch.autograd.grad(expected.square().sum(), list(truth.parameters()))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_a_copy_in_float64_is_float64_throughout() -> None:
    model, graph = model_and_graph()
    x = torch.randint(0, 7, (3, 5))
    truth = copy.deepcopy(model).double().eval()
    truth.constant = truth.constant.double()
    difference = copy.deepcopy(graph).double()(x) - truth(x, use_cache=False).logits
    assert difference.dtype == torch.float64 and difference.abs().max() < 1e-13
    assert copy.deepcopy(graph).double().float()(x).dtype == torch.float32


def test_parameters_are_the_models_own_and_modes_are_unchanged() -> None:
    model, graph = model_and_graph()
    assert model.training and not model.embedding.training and model.norm.training
    of_model = {id(tensor) for _, tensor in [*model.named_parameters(), *model.named_buffers()]}
    of_graph = dict([*graph.named_parameters(), *graph.named_buffers()])
    assert set(map(id, model.parameters())) == set(map(id, graph.parameters()))
    added = [name for name, tensor in of_graph.items() if id(tensor) not in of_model]
    assert [name.split(".")[-1] for name in added] == ["constant", "lifted_tensor_0"]
    assert of_graph["constant"] is model.constant
    assert {"linear.weight", "norm.running_var", "shift"} <= set(of_graph)
    assert graph.linear.weight is model.embedding.weight
    assert fx.GraphModule(graph, graph.graph).train().training  # A module of torch.export would raise.


def test_no_guards_assertions_or_trees_remain() -> None:
    _, graph = model_and_graph()
    kinds = [node.op for node in graph.graph.nodes]
    assert kinds.count("placeholder") == kinds.count("output") == 1 and "call_module" not in kinds
    assert not [node for node in graph.graph.nodes if "assert" in str(node.target) or "pytree" in str(node.target)]
    casts = [node for node in graph.graph.nodes if str(node.target).startswith("aten.to.")]
    assert len(casts) == 1 and casts[0].args[0].meta["val"].dtype == torch.int64
    embedded = next(node for node in graph.graph.nodes if str(node.target) == "aten.embedding.default")
    assert isinstance(embedded.meta["val"].shape[0], torch.SymInt) and embedded.meta["val"].shape[1:] == (5, 4)


def test_other_sequence_lengths_than_the_traced_one() -> None:
    model, graph = model_and_graph()
    x = torch.randint(0, 7, (3, 9))
    torch.testing.assert_close(graph(x), copy.deepcopy(model).eval()(x, use_cache=False).logits, rtol=1e-5, atol=1e-5)


class Halving(nn.Module):
    """A model whose size must be even in one dimension and is fixed in another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        halves = x.unflatten(1, (x.shape[1] // 2, 2)).mean(2)
        return self.linear(halves) + y[:, None]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 8, 6), (2, 6)], None),
        ([(1, 2, 6), (1, 6)], None),
        ([(2, 8, 5), (2, 6)], r"images\[0\]: expected the shape that was traced, \[B, any, 6\], got \[2, 8, 5\]"),
        (
            [(2, 7, 6), (2, 6)],
            r"images: expected images\[0\].shape\[1\] == .*, which the trace assumes, got \[2, 7, 6\], \[2, 6",
        ),
        ([(2, 8, 6), (3, 6)], r"images: expected images\[1\].shape\[0\] == images\[0\].shape\[0\], which the trace"),
    ],
)
def test_shapes_that_the_trace_does_not_cover_are_named(shapes: list[tuple[int, ...]], message: str | None) -> None:
    example = example_of(Halving(), (torch.randn(2, 4, 6), torch.randn(2, 6)))
    _, guards = exported(Halving(), example)
    tensors = [torch.zeros(shape) for shape in shapes]
    if message is None:
        guards.check(example.structure, tensors, "images")
    else:
        with pytest.raises(ValueError, match=f"^{message}"):
            guards.check(example.structure, tensors, "images")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(2, 1)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching(), r"model: torch.export fails for batches of any size \(.*data-dependent"),
        (FixedBatch(), r"model: torch.export fails for batches of any size \(Constraints violated .* constant"),
        (Pair(), r"model: torch.export fails .*\(expected an output that is a tensor or has logits, got tuple\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_that_cannot_be_exported_are_rejected_by_name(model: nn.Module, message: str) -> None:
    model.train()
    with pytest.raises(ValueError, match=f"^{message}"):
        exported(model, example_of(model, torch.randn(2, 3)))
    assert model.training
