"""A traced model, cut into stem, residual blocks and head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.residual_net import FusedForm
from pathnet.models.tracing.blocks import TracedBlock, zeros_before
from pathnet.models.tracing.connections import Connection, connections
from pathnet.models.tracing.cutting import GraphCutter
from pathnet.models.tracing.flow import GradientFlow, Term
from pathnet.models.tracing.graphs import TracedGraph, first_line, module_path, output_node
from pathnet.models.tracing.notes import addition_notes, stem_note
from pathnet.models.tracing.operations import CLONES, RESHAPES
from pathnet.models.tracing.values import Observation, gradient_source, observe

__all__ = ["Dissection", "dissect"]


@dataclass(frozen=True)
class Dissection:
    """The parts of a model.

    Attributes:
        shape: shape of ``y_0`` for the example, without the batch.
        fixed: why the parts take only inputs of the example's shape (batch apart); empty if they take others too.
        notes: on additions that are no blocks, and on operations of the first block that run in the stem.
    """

    stem: nn.Module
    blocks: list[TracedBlock]
    head: nn.Module
    shape: torch.Size
    fixed: list[str]
    notes: Sequence[str] = ()


def dissect(traced: TracedGraph, example: Tensor, within: Collection[fx.Node] | None = None) -> Dissection:
    """Return a traced model as stem, blocks and head.

    Args:
        within: the nodes among which additions count as residual connections; None for all.

    Raises:
        ValueError: the model has no residual connections, or some that cannot be cut out.
    """
    source = gradient_source(traced, example)
    single, _ = observe(traced, example, source)
    try:
        double, _ = observe(traced, torch.cat([example, example]), source)
    except Exception as error:
        raise ValueError(
            f"model: expected batches of any size, got an error for {2 * len(example)} samples ({first_line(error)})"
        ) from error
    flow = GradientFlow(traced, single, source)
    residual_connections = connections(flow, within)
    cutter = GraphCutter(traced, single, double, source)
    start = y0 = _batch_first(residual_connections[0].source, single, example)
    stem = cutter.cut("the stem", cutter.start, [Term(start)])
    blocks: list[TracedBlock] = []
    names = _names(residual_connections)
    for name, connection in zip(names, residual_connections, strict=True):
        blocks.append(_block(cutter, name, start, connection))
        start = connection.end
    earlier_start = _input_of_first_normalisation(residual_connections[0], traced.attributes)
    if earlier_start is not None and not isinstance(blocks[0].form(), FusedForm):
        longer_block = _block(cutter, names[0], earlier_start, residual_connections[0])
        if isinstance(longer_block.form(), FusedForm):
            shorter_stem = cutter.cut("the stem", cutter.start, [Term(earlier_start)])
            blocks[0], stem, y0 = longer_block, shorter_stem, earlier_start
    head = cutter.cut("the head", residual_connections[-1].end, [Term(output_node(traced.graph).args[0])])  # type: ignore[arg-type]
    notes = addition_notes(flow, residual_connections, within)
    shape = single[y0].shape
    assert shape is not None
    if cutter.fixed:
        stem = _with_shape_check(stem, shape)
    return Dissection(
        nn.Identity() if stem is None else stem,
        blocks,
        nn.Identity() if head is None else head,
        shape[1:],
        list(dict.fromkeys(cutter.fixed)),
        [*filter(None, [stem_note(flow, y0, residual_connections[0])]), *notes],
    )


def _block(cutter: GraphCutter, name: str, start: fx.Node, connection: Connection) -> TracedBlock:
    """Cut out a block.

    Args:
        start: the node whose value is the block's input.
    """
    cutter.check_batch(start)
    cutter.check_batch(connection.end)
    source, shape = connection.source, cutter.single[connection.addition].shape
    assert shape is not None
    before = cutter.cut(f"what comes before the branches of {name!r}", start, [Term(source)])
    skip = cutter.cut(f"the skip of {name!r}", source, [connection.skip], shape)
    residual = cutter.cut(f"the residual module of {name!r}", source, connection.residual, shape)
    after = cutter.cut(f"the activation of {name!r}", connection.addition, [Term(connection.end)])
    assert residual is not None
    example = cutter.single[source]
    assert example.shape is not None
    x = torch.empty(example.shape, device=example.device, dtype=example.dtype)
    pad_before = zeros_before(skip, residual, x, shape)
    block = TracedBlock(name, before, skip, residual, after, pad_before, connection.nested)
    if len(connection.modules) > 1:
        what = f"the residual modules of {name!r}"
        modules = [cutter.cut(what, source, terms, shape) or nn.Identity() for terms in connection.modules]
        block.in_parallel(cutter.cut_apart(what, source, connection.modules, shape), modules)
    return block


def _batch_first(source: fx.Node, observations: Mapping[fx.Node, Observation], example: Tensor) -> fx.Node:
    """Return the source of the first block, or the input of the reshape there that lays samples end to end."""
    while observations[source].shape[:1] != example.shape[:1] and source.target in RESHAPES:  # type: ignore[index]
        source = source.all_input_nodes[0]
    return source


def _input_of_first_normalisation(first: Connection, attributes: Mapping[str, Any]) -> fx.Node | None:
    """Return the input of the operation before the ReLU that the first block begins with, or None without those.

    If that operation is a batch normalisation and the block is pre-activated, both belong to the block.
    """
    relu = first.source
    if len(relu.all_input_nodes) != 1 or first.skip.node is relu:
        return None
    node = relu.all_input_nodes[0]
    while node.target in CLONES or type(attributes.get(str(node.target))) is nn.Identity:
        node = node.all_input_nodes[0]
    return node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None


def _names(residual_connections: list[Connection]) -> list[str]:
    """Return the module that contains each addition, numbered from 0 where one contains several."""
    paths = [module_path(connection.addition) or "addition" for connection in residual_connections]
    return [f"{path} ({paths[:i].count(path)})" if paths.count(path) > 1 else path for i, path in enumerate(paths)]


def same_shape(x: Tensor, shape: torch.Size) -> Tensor:
    """Return ``x`` after a check that its shape is [B, *shape]."""
    if x.shape[1:] != shape:
        raise ValueError(
            f"images: expected those that give blocks an input of [B, {', '.join(map(str, shape))}] as the example "
            f"did, since the blocks contain constants of that shape, got {list(x.shape)}"
        )
    return x


def _with_shape_check(stem: fx.GraphModule | None, shape: torch.Size) -> fx.GraphModule:
    """Return the stem with a check of its output's shape, [B, *shape[1:]], at the end."""
    graph = fx.Graph()
    root: Any = {}
    value = graph.placeholder("x")
    if stem is not None:
        graph, root = stem.graph, stem
        result = output_node(graph)
        value = result.args[0]  # type: ignore[assignment]
        graph.erase_node(result)
    graph.output(graph.call_function(same_shape, (value, shape[1:])))
    return fx.GraphModule(root, graph)
