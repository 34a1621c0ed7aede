"""Checks that an adapted network equals its model on an example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pathnet.models.residual_net import ResidualNet
from pathnet.models.tracing.decisions import OtherWay
from pathnet.models.tracing.examples import Example
from pathnet.models.tracing.graphs import differs, first_line

__all__ = ["DependentSamplesError", "OutputAndGrads", "check_equal", "output_and_grads"]

OutputAndGrads = tuple[Tensor, tuple[Tensor | None, ...]]


class DependentSamplesError(ValueError):
    """Samples of a batch influence each other."""


def check_equal(truth: OutputAndGrads, net: ResidualNet, model: nn.Module, example: Example) -> None:
    """Check on an example that a network equals the model.

    Args:
        truth: the model's output and gradients for the example.

    Raises:
        ValueError: output or gradients of ``net`` are not the model's, or samples of a batch influence each other.
    """
    structure = example.structure

    def adapted(*tensors: Tensor) -> Tensor:
        return torch.as_tensor(net(structure.inputs(tensors)))

    expected, expected_grads = truth
    output, grads = output_and_grads("the adapted network", adapted, model, example)
    if differs(output, expected):
        raise ValueError("model: the adapted network's output is not the model's")
    inputs = [structure.name(i, "the input") for i, x in enumerate(example.tensors) if x.is_floating_point()]
    names = [*inputs, *(name for name, _ in model.named_parameters())]
    largest = max((float(grad.norm()) for grad in expected_grads if grad is not None), default=0.0)
    for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
        if (grad is None) != (expected_grad is None) or (
            grad is not None and expected_grad is not None and differs(grad, expected_grad, largest)
        ):
            raise ValueError(f"model: the adapted network's gradient of {name} is not the model's")
    _check_independent(net, example)


@torch.no_grad()
def _check_independent(net: ResidualNet, example: Example) -> None:
    """Check that samples of a batch do not influence each other, up to the last block.

    Raises:
        ValueError: they do, or the context of a repeated batch is not the repeated context.
    """
    assert net.reader is not None
    structure, main = example.structure, net.reader.x
    # Beside other samples: a batch of the same ones twice has the same statistics.
    changed = list(example.copies())
    changed[main] = changed[main] * 1.5 if changed[main].is_floating_point() else changed[main].roll(1, -1)
    mixed = [
        tensor if dim is None else torch.cat([tensor, other.roll(1, dim)], dim)
        for tensor, other, dim in zip(example.tensors, changed, structure.batch_dims, strict=True)
    ]
    x, context = net.split(structure.inputs(example.copies()))
    times = 2 if context.values else 1
    repeated = _last(net.bound(context.repeated(times)), torch.cat([x] * times))
    expected, *again = (repeated[i * len(x) : (i + 1) * len(x)] for i in range(times))
    x, context = net.split(structure.inputs(mixed))
    try:
        actual = _last(net.bound(context), x)[: len(expected)]
    except OtherWay:
        # The example beside itself goes the traced way.
        actual = expected
    if any(differs(y, expected) for y in (actual, *again)):
        raise DependentSamplesError(
            "model: samples of a batch influence each other in evaluation mode (through batch statistics?)"
        )


def _last(net: ResidualNet, x: Tensor) -> Tensor:
    """Return the output of the last block."""
    y = torch.as_tensor(net.stem(x.clone()))
    for block in net:
        y = block(y)
    return y


def output_and_grads(name: str, net: Callable[..., Tensor], model: nn.Module, example: Example) -> OutputAndGrads:
    """Return the output, and the gradients of its random weighted sum at the inputs and the model's parameters.

    Integer inputs have no gradient.

    Args:
        name: the name of ``net`` in an error.

    Raises:
        ValueError: autograd cannot differentiate the output.
    """
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in example.copies()]
    parameters = list(model.parameters())
    leaves = [*(x for x in inputs if x.is_floating_point()), *parameters]
    differentiated = [parameter for parameter in parameters if parameter.is_floating_point()]
    for parameter in differentiated:
        parameter.requires_grad_()
    try:
        output = net(*(x * 1 if x.is_floating_point() else x for x in inputs))
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        if not output.requires_grad:
            return output, (None,) * len(leaves)
        return output.detach(), torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(f"{name}: expected one that autograd differentiates ({first_line(error)})") from error
    finally:
        for parameter in differentiated:
            parameter.requires_grad_(False)
