"""`adapt`: any PyTorch model as a `ResidualNet`, by tracing it, without editing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pathnet.adapted import AdaptedNet
from pathnet.checks import MOST_INTEGER, check_integer, described, one_of
from pathnet.full_precision import full_precision
from pathnet.models.residual_net import ResidualNet
from pathnet.models.tracing.by_hand import Part, assemble, nodes_inside, submodules, trace_block_by_block
from pathnet.models.tracing.decisions import OtherWay
from pathnet.models.tracing.dissect import Dissection, dissect
from pathnet.models.tracing.examples import Example, checked_example
from pathnet.models.tracing.graphs import Dropout, differs
from pathnet.models.tracing.outputs import SingleOutput, select_output
from pathnet.models.tracing.restoring import evaluating_restored
from pathnet.models.tracing.tracers import trace_model, untraceable_reason

__all__ = ["AdaptedNet", "adapt"]


Parallel = Literal["together", "separate"]

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)


def adapt(
    model: nn.Module,
    example: Any = None,
    blocks: Sequence[str | nn.Module | Sequence[Part | None]] | None = None,
    stem: Part | None = None,
    head: Part | None = None,
    output: str | int | None = None,
    stream: str | int | None = None,
    parallel: Parallel = "together",
) -> AdaptedNet:
    """Return a model as a `ResidualNet`, by tracing it in evaluation mode (`torch.fx`, or else `torch.export`).

    An addition is a residual connection if every path from the network's input to its output passes through it and
    through the common source of its operands, and if one of its branches has weights. A subtraction is the addition
    of a branch with its sign flipped. The branch with the fewest weight matrices is the skip connection. An
    activation right after the addition (post-activation blocks, ``y = relu(s(x) + f(x))``) is the block's
    `Block.join`: both branches pass its Jacobian. Other operations between a block and the source of the next one
    belong to both branches of the next one.

    The network shares the model's weights, and the model itself is unchanged. Dropout modules are active in training;
    functional dropout remains inactive, as traced in evaluation mode. `torch.export` omits all dropout: a network
    that it traced cannot be put into training mode while the model has dropout modules with p above 0.

    Args:
        example: an input batch, floating-point [B, C, H, W] or int64 [B, T], ...; or several inputs, a tuple of
            positional arguments or a mapping of keyword arguments (of the model's single argument, if it takes no such
            keywords), in which numbers and None are constants; guessed from the model by default. The residual
            stream begins at the first floating-point input, or else at the first embedding of integers. Everything
            else that the blocks and the head read, such as masks, positions and conditioning vectors, is context: it
            belongs to a batch, and no path's gradient flows through it.
        blocks: the residual blocks, if tracing cannot or should not find them. Either submodules that contain
            residual blocks, or their names: additions elsewhere then do not count, and if the whole model cannot be
            traced, these modules are traced one by one. Or the branches of every block, as pairs (skip, residual) or
            triples (skip, residual, join); each is a submodule, its name, a function over submodules, or None for the
            identity.
        stem, head: the parts before the first block and after the last, in the same forms as branches; only together
            with the branches of every block.
        output: name or index of one of the model's outputs, if it has several.
        stream: where the residual stream begins, if not at the likeliest input: the name or index of an input, or the
            name of a submodule, such as an encoder-decoder's ``decoder``, whose encoder is then context.
        parallel: whether residual modules in parallel, as attention and perceptron in GPT-J and GPT-NeoX (``y = x +
            f(x) + g(x)``), count as one residual module of their block ("together") or as one each ("separate").
            Routings then have a coefficient for each, and paths enter one of them or none (see `pathnet.paths`).

    Returns:
        A network whose output and gradients (of the input and all parameters) equal the model's, as checked on the
        example.

    Raises:
        ValueError: the model cannot be traced, has no residual connections (dense connections, concatenations around
            blocks), the adapted network is not equal to it, or an argument does not fit it.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {described(model)}")
    if isinstance(model, WRAPPERS):
        raise ValueError(f"model: expected the module inside the wrapper or script, got {type(model).__name__}")
    if blocks is not None and (isinstance(blocks, str) or not isinstance(blocks, Sequence) or not len(blocks)):
        raise ValueError(f"blocks: expected a list of submodules or their names, got {described(blocks)}")
    if output is not None and not isinstance(output, str):
        output = check_integer("output", output, -MOST_INTEGER, MOST_INTEGER)
    one_of("parallel", parallel, Parallel)
    model_modules = set(model.modules())
    if stream is not None and not isinstance(stream, str):
        stream = check_integer("stream", stream, 0, MOST_INTEGER)
    with full_precision(), evaluating_restored(model):
        example = checked_example(model, example)
        root = SingleOutput(model, example.structure, partial(select_output, output=output))
        if blocks is not None and any(isinstance(block, (tuple, list)) for block in blocks):
            if stem is None or head is None:
                name = "stem" if stem is None else "head"
                raise ValueError(f"{name}: expected a part of the model since blocks are pairs of branches, got None")
            net = _network(assemble(model, example, stem, blocks, head), "hand", example)  # type: ignore[arg-type]
        elif stem is not None or head is not None:
            name, part = ("head", head) if stem is None else ("stem", stem)
            raise ValueError(f"{name}: expected None unless blocks are pairs of branches, got {described(part)}")
        else:
            net = _traced_network(root, model, example, blocks, stream)  # type: ignore[arg-type]
        if parallel == "together":
            net.as_one_module_each()
        _check_equal(root, net, model, example)
    for module in net.modules():
        if module not in model_modules:
            module.training = model.training
    return net


def _traced_network(
    root: SingleOutput,
    model: nn.Module,
    example: Example,
    blocks: Sequence[str | nn.Module] | None,
    stream: str | int | None,
) -> AdaptedNet:
    """Return the network found by tracing.

    Args:
        blocks: the submodules, or their names, whose additions count; None for all.
        stream: see `adapt`.
    """
    expected = root(*example.copies()).detach()
    if not torch.isfinite(expected).all():
        raise ValueError("example: expected one for which the model's output is finite, got NaN or infinity")
    if differs(root(*example.copies()), expected):
        raise ValueError("model: expected the same output each time in evaluation mode; does it draw random numbers?")
    named = submodules(model, blocks or ())
    by_block = partial(trace_block_by_block, root, named, example) if named else None
    traced, failures = trace_model(root, model, root.choose, example, expected, by_block)
    if traced is None:
        raise _untraced(failures)
    within = None if blocks is None else nodes_inside(traced, list(named))
    if within is None and isinstance(stream, str) and stream not in example.structure.tensor_keys:
        within = nodes_inside(traced, [stream])
    try:
        parts = dissect(traced, example, within, stream)
    except ValueError:
        if not traced.untraced:
            raise
        # The untraced modules may contain the residual connections.
        raise _untraced(failures) from None
    outside = (parts.stem, *(block.before for block in parts.blocks if block.before is not None), parts.head)
    if any(module in traced.untraced for part in outside for module in part.modules()):
        # The untraced modules may contain further residual connections.
        raise _untraced(failures)
    for name in named:
        if not any(f"{block.name.split(' ')[0]}.".startswith(f"{name}.") for block in parts.blocks):
            raise ValueError(f"blocks: no addition in {name!r} is a residual connection, which every route must pass")
    return _network(parts, traced.traced_by, example, traced.frozen_statistics, traced.dropouts)


def _untraced(failures: Mapping[str, str]) -> ValueError:
    return ValueError(f"model: {untraceable_reason(failures)}; blocks= takes branches, (skip, residual), by hand")


def _network(
    parts: Dissection,
    traced_by: str,
    example: Example,
    frozen: Sequence[str] = (),
    dropouts: Sequence[tuple[str, Dropout]] = (),
) -> AdaptedNet:
    shapes: list[torch.Size] = []
    net = AdaptedNet(
        parts.stem, parts.blocks, parts.head, traced_by, shapes, parts.reader, parts.fixed, frozen, dropouts
    )
    net.batch_first_output = parts.batch_first_output
    x, context = net.split(example.structure.inputs(example.copies()))
    bound = net.bound(context)
    y = bound.stem(x)
    for block in bound:
        shapes.append(y.shape[1:])
        y = block(y)
    net.shapes = (*shapes, y.shape[1:])
    net.notes = tuple(parts.notes)
    return net


def _check_equal(root: nn.Module, net: AdaptedNet, model: nn.Module, example: Example) -> None:
    """Check on an example that a network equals the model.

    Raises:
        ValueError: output or gradients of ``net`` are not the model's, or samples of a batch influence each other.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    structure = example.structure

    def adapted(*tensors: Tensor) -> Tensor:
        return net(structure.inputs(tensors))

    expected, expected_grads = _output_and_grads(root, model, example)
    output, grads = _output_and_grads(adapted, model, example)
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
def _check_independent(net: AdaptedNet, example: Example) -> None:
    """Check that samples of a batch do not influence each other, up to the last block.

    Raises:
        ValueError: they do, or the context of a repeated batch is not the repeated context.
    """
    structure, main = example.structure, net.reader.x
    # Beside other samples: a batch of the same ones twice has the same statistics.
    further = list(example.copies())
    further[main] = further[main] * 1.5 if further[main].is_floating_point() else further[main].roll(1, -1)
    mixed = [
        tensor if dim is None else torch.cat([tensor, other.roll(1, dim)], dim)
        for tensor, other, dim in zip(example.tensors, further, structure.batch_dims, strict=True)
    ]
    x, context = net.split(structure.inputs(example.copies()))
    expected = _last(net.bound(context), x)
    repeated = _last(net.bound(context.repeated(2)), torch.cat([x, x]))
    x, context = net.split(structure.inputs(mixed))
    try:
        actual = _last(net.bound(context), x)[: len(expected)]
    except OtherWay:
        # The example beside itself goes the traced way.
        actual = expected
    if any(differs(y, expected) for y in (actual, *repeated.split(len(expected)))):
        raise ValueError(
            "model: samples of a batch influence each other in evaluation mode (through batch statistics?)"
        )


def _last(net: ResidualNet, x: Tensor) -> Tensor:
    """Return the output of the last block."""
    y = torch.as_tensor(net.stem(x.clone()))
    for block in net:
        y = block(y)
    return y


def _output_and_grads(
    net: Callable[..., Tensor], model: nn.Module, example: Example
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the output, and the gradients of its random weighted sum at the inputs and the parameters.

    Integer inputs have no gradient.
    """
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in example.copies()]
    leaves = [*(x for x in inputs if x.is_floating_point()), *model.parameters()]
    output = net(*(x * 1 if x.is_floating_point() else x for x in inputs))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    return output.detach(), torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
