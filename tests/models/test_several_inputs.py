"""Models of several inputs: every path against the models' own `detach` loop, for batches unlike the example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import relative_error
from helpers.routed_models import (
    VOCABULARY,
    Conditioned,
    Judged,
    Padded,
    Routed,
    TimeFirst,
    Translating,
    along,
    cast,
    padded,
    sentences,
    squared,
)
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet


def labelled(batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    inputs = sentences(batch, length, generator)
    return {**inputs, "labels": torch.randint(0, 5, (batch, length), generator=generator)}


def noisy(batch: int, length: int, generator: torch.Generator) -> tuple[Any, ...]:
    images = torch.randn(batch, 3, 4, 2 * length, generator=generator)
    return images, torch.rand(batch, generator=generator), torch.randint(0, 4, (batch,), generator=generator), 0.5


def time_first(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    _, mask = padded(batch, length, generator)
    return torch.randn(length, batch, 3, generator=generator), mask == 0


def translated(batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    source, mask = padded(batch, length, generator)
    target = torch.randint(0, VOCABULARY, (batch, length + 1), generator=generator)
    return {"source": source, "seen": mask == 1, "target": target}


@dataclass(frozen=True)
class Case:
    """A model of several inputs.

    Attributes:
        inputs: returns a batch of some samples of some length.
        arguments: further arguments of `pathnet.adapt`.
        positional: whether the model takes the inputs one by one rather than as one dictionary.
        n: number of blocks.
    """

    id: str
    make: Callable[[], Routed]
    inputs: Callable[[int, int, torch.Generator], Any]
    n: int = 4
    arguments: Mapping[str, Any] | None = None
    positional: bool = True

    def model(self) -> Routed:
        torch.manual_seed(0)
        model = self.make()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)
        return model.eval()

    def batch(self, size: int, length: int, seed: int) -> Any:
        return self.inputs(size, length, torch.Generator().manual_seed(seed))

    def output(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the model's output for inputs of its own type."""
        dtype = next(model.parameters()).dtype
        inputs = cast(inputs, dtype)
        if not self.positional:
            result = model(inputs)
        else:
            result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
        return result if isinstance(result, Tensor) else result[(self.arguments or {})["output"]]


CASES = [
    Case("padded", Padded, lambda *a: tuple(sentences(*a).values())),
    Case("keywords", Padded, sentences),
    Case("last token", lambda: Padded(last=True), sentences),
    Case("conditioned", Conditioned, noisy),
    Case("dictionaries", Judged, labelled, arguments={"output": "logits"}, positional=False),
    Case("time first", TimeFirst, time_first),
    Case("decoder", lambda: Translating("decoder"), translated, 6, {"stream": "decoder"}),
    Case("decoder's input", lambda: Translating("decoder"), translated, 6, {"stream": "target"}),
    Case("encoder", lambda: Translating("encoder"), translated, 4, {"stream": "encoder"}),
]
BY_ID = {case.id: case for case in CASES}


@cache
def adapted(case_id: str) -> tuple[Routed, Any]:
    case = BY_ID[case_id]
    model = case.model()
    return model, pathnet.adapt(model, case.batch(2, 5, 0), **(case.arguments or {}))


def target_of(case: Case, inputs: Any) -> Tensor:
    shape = case.output(adapted(case.id)[0], inputs).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def batch_first(case: Case, y: Tensor) -> Tensor:
    return y.transpose(0, 1) if case.id == "time first" else y


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(("size", "length"), [(3, 7), (1, 4)])
def test_every_path_equals_the_detach_loop(case: Case, size: int, length: int) -> None:
    model, net = adapted(case.id)
    assert net.n == case.n
    inputs = case.batch(size, length, seed=1)
    target = target_of(case, inputs)
    recorder = pathnet.Recorder(net, precision="float64", loss=squared)
    tape = recorder(inputs, target)
    double = copy.deepcopy(model).double()
    assert relative_error(tape.output, case.output(double, inputs)) < EXACT_WALK

    def loss(model: nn.Module) -> Tensor:
        return squared(case.output(model, inputs), target)

    codes = pathnet.paths.sample(net.n, net.n // 2, count=4)
    for code, grad in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(grad, batch_first(case, along(model, loss, code.tolist()))) < EXACT_WALK
    total = tape.path_gradients(pathnet.paths.enumerate_all(net.n)).sum(0)
    assert relative_error(total, tape.gradient()) < EXACT_WALK


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_outputs_training_gradients_and_deletions_are_the_models(case: Case) -> None:
    model, net = adapted(case.id)
    inputs = case.batch(3, 6, seed=2)
    expected = case.output(model, inputs)
    torch.testing.assert_close(net(inputs), expected, rtol=1e-5, atol=1e-5)
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(net(inputs).square().sum(), list(weights.values()), allow_unused=True)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(weights.values()), allow_unused=True)
    for name, grad, expected_grad in zip(weights, grads, expected_grads, strict=True):
        assert (grad is None) == (expected_grad is None), name
        if grad is not None and expected_grad is not None:
            torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)
    deleted = copy.deepcopy(model)
    deleted.deleted = (2,)
    without = case.output(deleted, inputs)
    assert relative_error(without, expected) > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(pathnet.lesion.delete(net, [2])(inputs), without, rtol=1e-5, atol=1e-5)
    routing = torch.ones(2, net.n, 2)
    routing[1, 2, 1] = 0
    outputs = pathnet.Recorder(net).routed_outputs(inputs, routing)
    for output, truth in zip(outputs, (expected, without), strict=True):
        torch.testing.assert_close(output, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pathnet.routed(net, inputs, routing[1]), without, rtol=1e-5, atol=1e-5)
    tape = pathnet.record(pathnet.lesion.delete(net, [2]), inputs, target_of(case, inputs).float(), loss=squared)
    torch.testing.assert_close(tape.output, without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_differentiable_gradient_along_a_path(case: Case) -> None:
    model, _ = adapted(case.id)
    net = pathnet.adapt(
        copy.deepcopy(model).double(), cast(case.batch(2, 5, 0), torch.float64), **(case.arguments or {})
    )
    inputs = case.batch(2, 4, seed=3)
    target, path = target_of(case, inputs), [1, 0] * (case.n // 2)
    expected = along(model, lambda model: squared(case.output(model, inputs), target), path)
    routing = pathnet.paths.routing(torch.tensor([path]))[0]
    grad = pathnet.routed_gradient(net, cast(inputs, torch.float64), target, routing, squared)
    assert relative_error(grad.detach(), batch_first(case, expected)) < EXACT_WALK


def test_a_conditioned_models_image_gradient_and_a_tape_of_context() -> None:
    model, net = adapted("conditioned")
    inputs = BY_ID["conditioned"].batch(2, 3, seed=4)
    target = target_of(BY_ID["conditioned"], inputs)
    tape = pathnet.record(net, inputs, target, precision="float64", at="image", loss=squared)
    x, time, label, scale = cast(inputs, torch.float64)
    x.requires_grad_()
    value = squared(copy.deepcopy(model).double()(x, time, label, scale), target)
    assert relative_error(tape.gradient(), torch.autograd.grad(value, x)[0]) < EXACT_WALK
    context = tape._record.context
    assert context.tensors and not any(tensor.requires_grad for tensor in context.tensors)
    assert tape.nbytes >= sum(tensor.nbytes for tensor in (*context.tensors, *tape._record.walk.tensors))


def test_a_models_own_loss() -> None:
    case = BY_ID["dictionaries"]
    model, inputs = case.model(), case.batch(3, 6, seed=5)
    net = pathnet.adapt(model, case.batch(2, 5, 0), output="loss")
    tape = pathnet.record(net, inputs, loss="model", precision="float64")
    assert tape.loss == pytest.approx(float(copy.deepcopy(model).double()(inputs)["loss"]), rel=1e-12)
    expected = along(model, lambda model: model(inputs)["loss"], [0, 1, 1, 0])
    assert relative_error(tape.path_gradients(torch.tensor([[0, 1, 1, 0]]))[0], expected) < EXACT_WALK
    routing = torch.ones(3, 4, 2)
    routing[1:, 1:3, 1] = torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    outputs = pathnet.Recorder(net, precision="float64").routed_outputs(inputs, routing)
    assert outputs.shape == (3,) and float(outputs[0]) == pytest.approx(tape.loss, rel=1e-12)
    with pytest.raises(
        ValueError, match=r"loss: expected a network whose output is one number .* got an output of sh"
    ):
        pathnet.record(adapted("dictionaries")[1], inputs, loss="model")
    with pytest.raises(ValueError, match="target: expected an int64 tensor of class labels, got None"):
        pathnet.record(net, inputs)
    with pytest.raises(ValueError, match="target: expected None where the loss is 'model', got a tensor"):
        pathnet.record(net, inputs, torch.zeros(3, dtype=torch.int64), loss="model")


def test_weights_that_act_on_the_context_belong_to_their_block_alone() -> None:
    """Check keys and values of an encoder's output, and a modulation that two blocks share."""
    model, net = adapted("decoder")
    of_block = {name for name, p in model.named_parameters() if any(p is q for q in net.blocks[1].parameters())}
    assert {"decoder.cross.0.k.weight", "decoder.cross.0.v.bias", "decoder.cross.0.q.weight"} <= of_block
    assert not any(name.startswith("encoder") for name in of_block)


TOKENS = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)


@pytest.mark.parametrize(
    ("case", "inputs", "message"),
    [
        ("keywords", TOKENS, "images: expected a mapping with 'ids', 'mask', got a tensor torch.int64"),
        ("keywords", {"ids": TOKENS}, "images: expected a mapping with 'ids', 'mask', got none of 'mask'"),
        ("keywords", {"ids": TOKENS, "mask": MASK, "more": 1}, "images: expected a mapping .*, got also 'more'"),
        ("keywords", {"ids": TOKENS, "mask": None}, r"images\['mask'\]: expected a tensor, got None"),
        (
            "keywords",
            {"ids": TOKENS, "mask": MASK[:1]},
            r"images\['mask'\]: expected a batch of 2 in dimension 0, as in ",
        ),
        (
            "keywords",
            {"ids": TOKENS, "mask": MASK.to("meta")},
            r"images\['mask'\]: expected device cpu \(images\['ids'\]",
        ),
        ("padded", (TOKENS,), "images: expected a tuple of 2, got one of 1"),
        ("padded", [TOKENS, MASK], "images: expected a tuple of 2, got a list"),
        (
            "conditioned",
            BY_ID["conditioned"].batch(2, 3, 0)[:3] + (2.0,),
            r"images\[3\]: expected 0.5, as in adapt's ex",
        ),
    ],
)
def test_inputs_of_another_structure_are_named(case: str, inputs: Any, message: str) -> None:
    _, net = adapted(case)
    with pytest.raises(ValueError, match=f"^{message}"):
        pathnet.record(net, inputs, torch.zeros(2))
    with pytest.raises(ValueError, match=f"^{message}"):
        net(inputs)
    with pytest.raises(ValueError, match=f"^{message.replace('images', 'x')}"):
        pathnet.routed(net, inputs, None)


def test_values_that_are_not_finite_are_named() -> None:
    _, net = adapted("conditioned")
    x, time, label, scale = BY_ID["conditioned"].batch(2, 3, 0)
    target = torch.zeros(2, 6, 12)
    with pytest.raises(ValueError, match=r"^images\[1\]: expected no NaN, got NaN"):
        pathnet.record(net, (x, time.fill_(torch.nan), label, scale), target, loss=F.mse_loss)
    with pytest.raises(ValueError, match=r"^images\[0\]: expected finite values, got NaN or infinity"):
        pathnet.record(net, (x.fill_(torch.inf), torch.zeros(2), label, scale), target, loss=F.mse_loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"stream": "speech"},
            r"stream: expected the name of an input \('source', 'seen', 'target'\) or of a submodule",
        ),
        ({"stream": "seen"}, "stream: expected an input that is embedded, got 'seen'"),
        ({"stream": 1.5}, "stream: expected an integer"),
        ({"stream": "out"}, "blocks: no addition in them is a residual connection"),
    ],
)
def test_streams_that_are_none_are_named(arguments: dict[str, Any], message: str) -> None:
    case = BY_ID["decoder"]
    with pytest.raises(ValueError, match=f"^{message}"):
        pathnet.adapt(case.model(), case.batch(2, 5, 0), **arguments)
