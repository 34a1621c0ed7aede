"""`adapt`: any PyTorch model as a `ResidualNet`, by tracing it, without editing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.adapted import AdaptedNet
from pathnet.checks import MOST_INTEGER, check_integer, described
from pathnet.full_precision import full_precision
from pathnet.models.hooks import hooked
from pathnet.models.residual_net import ResidualNet
from pathnet.models.tracing.by_hand import Part, assemble, nodes_inside, submodules, trace_block_by_block
from pathnet.models.tracing.dissect import Dissection, dissect
from pathnet.models.tracing.examples import Example, checked_example
from pathnet.models.tracing.graphs import Dropout, differs, first_line
from pathnet.models.tracing.outputs import SingleOutput, select_output
from pathnet.models.tracing.restoring import evaluating_restored, plain, uncompiled
from pathnet.models.tracing.tracers import trace_model, untraceable_reason
from pathnet.models.tracing.training_reads import TrainingReads, calling_whole, fixed_branches, observed_reads
from pathnet.models.tracing.viewed import ViewedModel, listed

__all__ = ["AdaptedNet", "adapt"]


_OutputAndGrads = tuple[Tensor, tuple[Tensor | None, ...]]
BatchNorm = nn.modules.batchnorm._BatchNorm
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)


def adapt(
    model: nn.Module,
    example: Any = None,
    blocks: Sequence[str | nn.Module | Sequence[Part | None]] | None = None,
    stem: Part | None = None,
    head: Part | None = None,
    output: str | int | None = None,
    stream: str | int | None = None,
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

    Returns:
        A network whose output and gradients (of the input and all parameters) equal the model's, as checked on the
        example.

    Raises:
        ValueError: the model cannot be traced, has no residual connections (dense connections, concatenations around
            blocks), the adapted network is not equal to it, or an argument does not fit it.
    """
    if isinstance(model, nn.Module):
        model = uncompiled(model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {described(model)}")
    if isinstance(model, WRAPPERS):
        raise ValueError(f"model: expected the module inside the wrapper or script, got {type(model).__name__}")
    if blocks is not None and (isinstance(blocks, str) or not isinstance(blocks, Sequence) or not len(blocks)):
        raise ValueError(f"blocks: expected a list of submodules or their names, got {described(blocks)}")
    if output is not None and not isinstance(output, str):
        output = check_integer("output", output, -MOST_INTEGER, MOST_INTEGER)
    if stream is not None and not isinstance(stream, str):
        stream = check_integer("stream", stream, 0, MOST_INTEGER)
    _check_differentiable(model)
    hooks = hooked(model)
    with plain(model), full_precision(), evaluating_restored(model):
        model_modules = set(model.modules())
        example = checked_example(model, example)
        root = SingleOutput(model, example.structure, partial(select_output, output=output))
        run = partial(_run, root, example)
        reads, expected = observed_reads(model, run)
        truth = _output_and_grads("model", root, model, example)
        if blocks is not None and any(isinstance(block, (tuple, list)) for block in blocks):
            if stem is None or head is None:
                name = "stem" if stem is None else "head"
                raise ValueError(f"{name}: expected a part of the model since blocks are pairs of branches, got None")
            trace = partial(_network_by_hand, model, example, stem, blocks, head)  # type: ignore[arg-type]
        elif stem is not None or head is not None:
            name, part = ("head", head) if stem is None else ("stem", stem)
            raise ValueError(f"{name}: expected None unless blocks are pairs of branches, got {described(part)}")
        else:
            trace = partial(_traced_network, root, model, example, blocks, stream, expected)  # type: ignore[arg-type]
        net, branches = _live_network(trace, model, reads, run, expected)
        _check_equal(truth, net, model, example)
    net.viewed = ViewedModel(model, branches, hooks)
    mode = model.training and not branches
    for module in net.modules():
        if module not in model_modules:
            module.training = mode
    net.parameter_names = _parameter_names(net, model)
    return net


def _run(root: nn.Module, example: Example) -> Tensor:
    return torch.as_tensor(root(*example.copies()))


def _network_by_hand(
    model: nn.Module,
    example: Example,
    stem: Part,
    blocks: Sequence[Sequence[Part | None]],
    head: Part,
) -> AdaptedNet:
    return _network(assemble(model, example, stem, blocks, head), "hand", example)


def _live_network(
    trace: Callable[[], AdaptedNet],
    model: nn.Module,
    reads: TrainingReads,
    run: Callable[[], Tensor],
    expected: Tensor,
) -> tuple[AdaptedNet, dict[str, nn.Module]]:
    """Return a network with as many training branches of the model as possible, and the modules it lacks those of.

    A module with weights is traced into unless its training branch is lost by that: fused engines see its layers.

    Args:
        trace: traces the model.
    """
    with calling_whole(reads):
        net = trace()
    branches = fixed_branches(model, reads, _live(net, model), run, expected)
    whole = [module for name, module in branches.items() if module in reads.unary and not _has_block(net, name)]
    if whole and net.traced_by != "torch.export":
        try:
            with calling_whole(reads.calling(whole)):
                longer_trace = trace()
        except ValueError:
            return net, branches
        if longer_trace.n == net.n:
            return longer_trace, fixed_branches(model, reads, _live(longer_trace, model), run, expected)
    return net, branches


def _live(net: AdaptedNet, model: nn.Module) -> set[nn.Module]:
    """Return the modules of the model that act in a network, or are known to be omitted.

    Batch normalisation may act through a module of the network's with the same statistics.
    """
    live = {*net.modules(), *(dropout for _, dropout in net.dropouts)}
    statistics = {id(module.running_mean) for module in live if isinstance(module, BatchNorm)}
    norms = (module for module in model.modules() if isinstance(module, BatchNorm))
    return live | {norm for norm in norms if id(norm.running_mean) in statistics}


def _has_block(net: AdaptedNet, name: str) -> bool:
    """Return whether a module of the model contains one of the additions that end blocks."""
    names = [str(block.name).split(" ")[0] for block in net]
    return not name or any(f"{block}.".startswith(f"{name}.") for block in names)


def _parameter_names(net: AdaptedNet, model: nn.Module) -> dict[str, str]:
    """Return the network's names of the model's parameters, by the model's names."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: names[id(parameter)] for name, parameter in parameters if id(parameter) in names}


def _traced_network(
    root: SingleOutput,
    model: nn.Module,
    example: Example,
    blocks: Sequence[str | nn.Module] | None,
    stream: str | int | None,
    expected: Tensor,
) -> AdaptedNet:
    """Return the network found by tracing.

    Args:
        blocks: the submodules, or their names, whose additions count; None for all.
        stream: see `adapt`.
        expected: the model's output for the example.
    """
    if not torch.isfinite(expected).all():
        raise ValueError("example: expected one for which the model's output is finite, got NaN or infinity")
    if differs(root(*example.copies()), expected):
        raise ValueError("model: expected the same output each time in evaluation mode; does it draw random numbers?")
    named = submodules(model, blocks or ())
    by_block = partial(trace_block_by_block, root, named, example) if named else None
    traced, failures = trace_model(root, model, root.choose, example, expected, by_block)
    if traced is None:
        raise _untraced(model, failures)
    within = None if blocks is None else nodes_inside(traced, list(named))
    if within is None and isinstance(stream, str) and stream not in example.structure.tensor_keys:
        within = nodes_inside(traced, [stream])
    try:
        parts = dissect(traced, example, within, stream)
    except ValueError as error:
        if not traced.untraced:
            if advice := _advice_on_experts(model):
                raise ValueError(f"{error}; {advice}") from error
            raise
        # The untraced modules may contain the residual connections.
        raise _untraced(model, failures) from None
    outside = (parts.stem, *(block.before for block in parts.blocks if block.before is not None), parts.head)
    if any(module in traced.untraced for part in outside for module in part.modules()):
        # The untraced modules may contain further residual connections.
        raise _untraced(model, failures)
    for name in named:
        if not any(f"{block.name.split(' ')[0]}.".startswith(f"{name}.") for block in parts.blocks):
            raise ValueError(f"blocks: no addition in {name!r} is a residual connection, which every route must pass")
    return _network(parts, traced.traced_by, example, traced.frozen_statistics, traced.dropouts)


def _untraced(model: nn.Module, failures: Mapping[str, str]) -> ValueError:
    experts = _advice_on_experts(model)
    by_hand = "blocks= takes branches, (skip, residual), by hand"
    return ValueError("; ".join(filter(None, (f"model: {untraceable_reason(failures)}", experts, by_hand))))


def _advice_on_experts(model: nn.Module) -> str:
    """Return how to make a mixture of experts of Hugging Face traceable; empty for other models."""
    experts = any("Experts" in type(module).__name__ for module in model.modules())
    if not experts or not hasattr(model, "set_experts_implementation"):
        return ""
    return 'its experts can be traced after model.set_experts_implementation("batched_mm")'


def _check_differentiable(model: nn.Module) -> None:
    """Raise ValueError if layers are of the kinds of torch that have no gradient."""
    quantised = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if not name.endswith("_packed_params")
        and type(module).__module__.startswith(
            ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic")
        )
    }
    if quantised:
        raise ValueError(
            f"model: expected layers that autograd differentiates, got quantised ones: {listed(list(quantised))}"
        )


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
    return net


def _check_equal(truth: _OutputAndGrads, net: AdaptedNet, model: nn.Module, example: Example) -> None:
    """Check on an example that a network equals the model.

    Args:
        truth: the model's output and gradients for the example.

    Raises:
        ValueError: output or gradients of ``net`` are not the model's, or samples of a batch influence each other.
    """
    structure = example.structure

    def adapted(*tensors: Tensor) -> Tensor:
        return net(structure.inputs(tensors))

    expected, expected_grads = truth
    output, grads = _output_and_grads("the adapted network", adapted, model, example)
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
    actual = _last(net.bound(context), x)[: len(expected)]
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
    name: str, net: Callable[..., Tensor], model: nn.Module, example: Example
) -> _OutputAndGrads:
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
