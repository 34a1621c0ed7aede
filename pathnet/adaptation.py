"""`adapt`: any PyTorch model as a `ResidualNet`, by tracing it, without editing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pathnet.adapted import AdaptedNet
from pathnet.checks import MOST_INTEGER, check_integer, described, one_of
from pathnet.full_precision import full_precision
from pathnet.models.hooks import hooked
from pathnet.models.tracing.by_hand import Part, assemble, nodes_inside, submodules, trace_block_by_block
from pathnet.models.tracing.dissect import Dissection, dissect
from pathnet.models.tracing.equality import DependentSamplesError, check_equal, output_and_grads
from pathnet.models.tracing.examples import Example, checked_example
from pathnet.models.tracing.graphs import Dropout, differs
from pathnet.models.tracing.outputs import SingleOutput, select_output
from pathnet.models.tracing.refusals import advice_on_experts, check_model, untraced
from pathnet.models.tracing.restoring import evaluating_restored, plain, uncompiled
from pathnet.models.tracing.tracers import trace_model
from pathnet.models.tracing.training_reads import (
    TrainingReads,
    calling_whole,
    fixed_branches,
    lost_overrides,
    observed_reads,
)
from pathnet.models.tracing.viewed import ViewedModel

__all__ = ["AdaptedNet", "adapt"]


BatchNorm = nn.modules.batchnorm._BatchNorm
Parallel = Literal["together", "separate"]


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
        model: any module whose output is a floating-point tensor, or contains one; not inside DistributedDataParallel
            or a script. What `torch.compile` returns stands for the module inside.
        example: an input batch, floating-point [B, C, H, W] or int64 [B, T], ...; or several inputs, a tuple of
            positional arguments or a mapping of keyword arguments (the model's single argument, if it takes no such
            keywords), in which numbers and None are constants; guessed from the model by default. The residual
            stream begins at the first floating-point input, or else at the first embedding of integers. Everything
            else that the blocks and the head read, such as masks, positions and conditioning vectors, is context: it
            belongs to a batch, and no path's gradient flows through it.
        blocks: the residual blocks, if tracing cannot or should not find them. Either submodules that contain
            residual blocks, or their names: additions elsewhere then do not count, and if the whole model cannot be
            traced, these modules are traced one by one. Or the branches of every block, as pairs (skip, residual) or
            triples (skip, residual, join); each is a submodule, its name, a function over submodules, or None for the
            identity.
        stem: the part before the first block, in the same forms as branches; only together with the branches of every
            block.
        head: the part after the last block, likewise.
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

    Example:
        >>> import torch
        >>> import pathnet
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        ...
        ...     def forward(self, x):
        ...         return x + self.layers(x)
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 8), Block(8), Block(8), nn.Linear(8, 10))
        >>> net = pathnet.adapt(model, torch.randn(2, 3))
        >>> net.n, net.traced_by
        (2, 'torch.fx')
        >>> tape = pathnet.record(net, torch.randn(4, 3), torch.randint(10, (4,)), at="1.layers.0.weight")
        >>> tape.path_gradients(torch.tensor([[1, 0], [1, 1]])).shape
        torch.Size([2, 8, 8])
    """
    if isinstance(model, nn.Module):
        model = uncompiled(model)
    check_model(model)
    if blocks is not None and (isinstance(blocks, str) or not isinstance(blocks, Sequence) or not len(blocks)):
        raise ValueError(f"blocks: expected a list of submodules or their names, got {described(blocks)}")
    if output is not None and not isinstance(output, str):
        output = check_integer("output", output, -MOST_INTEGER, MOST_INTEGER)
    one_of("parallel", parallel, Parallel)
    if stream is not None and not isinstance(stream, str):
        stream = check_integer("stream", stream, 0, MOST_INTEGER)
    hooks = hooked(model)
    with plain(model), full_precision(), evaluating_restored(model):
        model_modules = set(model.modules())
        read = checked_example(model, example)
        try:
            net, branches = _checked_network(model, read, blocks, stem, head, output, stream, parallel)
        except ValueError as error:
            second = read.with_batch_second() if _may_hold_batch_second(model, error) else None
            if second is None:
                raise
            try:
                net, branches = _checked_network(model, second, blocks, stem, head, output, stream, parallel)
            except ValueError:
                raise error from None
    net.viewed = ViewedModel(model, branches, hooks)
    mode = model.training and net.trains
    for module in net.modules():
        if module not in model_modules:
            module.training = mode
    net.parameter_names = _parameter_names(net, model)
    return net


def _checked_network(
    model: nn.Module,
    example: Example,
    blocks: Sequence[str | nn.Module | Sequence[Part | None]] | None,
    stem: Part | None,
    head: Part | None,
    output: str | int | None,
    stream: str | int | None,
    parallel: Parallel,
) -> tuple[AdaptedNet, dict[str, nn.Module]]:
    """Return the network for an example, equal to the model on it, and the modules whose training branches it lacks.

    Args:
        blocks, stem, head, output, stream, parallel: see `adapt`.
    """
    root = SingleOutput(model, example.structure, partial(select_output, output=output))
    run = partial(_run, root, example)
    reads, expected = observed_reads(model, run)
    truth = output_and_grads("model", root, model, example)
    if torch.isfinite(expected).all() and differs(truth[0], expected):
        raise ValueError("model: expected the same output each time in evaluation mode; does it draw random numbers?")
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
    if parallel == "together":
        net.as_one_module_each()
    net.viewed = ViewedModel(model, branches)
    check_equal(truth, net, model, example)
    if net.trains:
        branches = lost_overrides(model, run, net, lambda: net(example.structure.inputs(example.copies())))
    return net, branches


def _may_hold_batch_second(model: nn.Module, error: ValueError) -> bool:
    """Return whether the second dimension may be the batch, [T, B, ...], since the first does not serve as it."""
    second = any(getattr(module, "batch_first", None) is False for module in model.modules())
    return second or isinstance(error, DependentSamplesError)


def _run(root: nn.Module, example: Example) -> Tensor:
    output = root(*example.copies())
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(f"model: expected an output that is a floating-point tensor, got {described(output)}")
    return output


def _network_by_hand(
    model: nn.Module,
    example: Example,
    stem: Part,
    blocks: Sequence[Sequence[Part | None]],
    head: Part,
) -> AdaptedNet:
    return _network(assemble(model, example, stem, blocks, head), "hand")


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
    named = submodules(model, blocks or ())
    by_block = partial(trace_block_by_block, root, named, example) if named else None
    traced, failures = trace_model(root, model, root.choose, example, expected, by_block)
    if traced is None:
        raise untraced(model, failures)
    within = None if blocks is None else nodes_inside(traced, list(named))
    if within is None and isinstance(stream, str) and stream not in example.structure.tensor_keys:
        within = nodes_inside(traced, [stream])
    try:
        parts = dissect(traced, example, within, stream)
    except ValueError as error:
        if not traced.untraced:
            if advice := advice_on_experts(model):
                raise ValueError(f"{error}; {advice}") from error
            raise
        # The untraced modules may contain the residual connections.
        raise untraced(model, failures) from None
    outside = (parts.stem, *(block.before for block in parts.blocks if block.before is not None), parts.head)
    if any(module in traced.untraced for part in outside for module in part.modules()):
        # The untraced modules may contain further residual connections.
        raise untraced(model, failures)
    for name in named:
        if not any(f"{block.name.split(' ')[0]}.".startswith(f"{name}.") for block in parts.blocks):
            raise ValueError(f"blocks: no addition in {name!r} is a residual connection, which every route must pass")
    return _network(parts, traced.traced_by, traced.frozen_statistics, traced.dropouts)


def _network(
    parts: Dissection,
    traced_by: str,
    frozen: Sequence[str] = (),
    dropouts: Sequence[tuple[str, Dropout]] = (),
) -> AdaptedNet:
    net = AdaptedNet(parts.stem, parts.blocks, parts.head, traced_by, parts.shapes, parts.reader, parts.fixed, frozen)
    net.dropouts = tuple(dropouts)
    net.batch_first_output = parts.batch_first_output
    net.decides_by_batch = bool(parts.decisions)
    net.notes = tuple(parts.notes)
    return net
