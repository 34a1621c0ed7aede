"""A traced model, cut into stem, residual blocks and head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.checks import listed
from pathnet.models.context_graph import InputReader, context_names
from pathnet.models.residual_net import FusedForm
from pathnet.models.tracing.blocks import TracedBlock, zeros_before
from pathnet.models.tracing.connections import Connection, LedAroundError, connections
from pathnet.models.tracing.cutting import GraphCutter
from pathnet.models.tracing.decisions import decisions_of
from pathnet.models.tracing.examples import Example
from pathnet.models.tracing.flow import GradientFlow, Term
from pathnet.models.tracing.graphs import TracedGraph, first_line, module_path, operation, output_node
from pathnet.models.tracing.notes import addition_notes, stem_note
from pathnet.models.tracing.operations import CLONES, RESHAPES
from pathnet.models.tracing.values import Source, batch_dim_of, gradient_sources, observe

__all__ = ["Dissection", "dissect"]


@dataclass(frozen=True)
class Dissection:
    """The parts of a model.

    Attributes:
        reader: reads the model's inputs, and computes the context that the parts read.
        shapes: for the example, the shapes of each block's input and of the last one's output, without the batch.
        fixed: why the parts take only inputs of the example's shape (batch apart); empty if they take others too.
        batch_first_output: whether the output's first dimension is the batch.
        decisions: the places in the model's code whose control flow is fixed, and checked in each run.
        notes: on additions that are no blocks, and on operations of the first block that run in the stem.
    """

    reader: InputReader
    stem: nn.Module
    blocks: list[TracedBlock]
    head: nn.Module
    shapes: Sequence[torch.Size]
    fixed: list[str]
    batch_first_output: bool = True
    notes: Sequence[str] = ()
    decisions: Sequence[str] = ()


def dissect(
    traced: TracedGraph,
    example: Example,
    within: Collection[fx.Node] | None = None,
    stream: str | int | None = None,
) -> Dissection:
    """Return a traced model as stem, blocks and head.

    Args:
        within: the nodes among which additions count as residual connections; None for all.
        stream: the input or the submodule where the residual stream begins; None for the likeliest input.

    Raises:
        ValueError: the model has no residual connections, or some that cannot be cut out.
    """
    first_error: ValueError | None = None
    for source in gradient_sources(traced, example, stream):
        try:
            return _dissect_from(traced, example, source, within)
        except LedAroundError:
            raise
        except ValueError as error:
            # Another input may be where the residual stream begins.
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _dissect_from(
    traced: TracedGraph, example: Example, source: Source, within: Collection[fx.Node] | None
) -> Dissection:
    single = observe(traced, example, source.node)
    batch = example.structure.batch(example.tensors)
    try:
        double = observe(traced, example.twice(), source.node)
    except Exception as error:
        raise ValueError(
            f"model: expected batches of any size, got an error for {2 * batch} samples ({first_line(error)})"
        ) from error

    def holds_batch(node: fx.Node) -> bool:
        return batch_dim_of(single[node], double[node], batch) is not None

    flow = GradientFlow(traced, single, source.node, holds_batch)
    residual_connections = connections(flow, within)
    start = y0 = residual_connections[0].source
    # The reshape that lays samples end to end belongs to the first block.
    while not holds_batch(start) and start.target in RESHAPES:
        start = y0 = start.all_input_nodes[0]
    cutter = GraphCutter(traced, single, double, source, batch, y0)
    stem = cutter.cut("the stem", cutter.start, [Term(start)], scope="")
    blocks: list[TracedBlock] = []
    names = _names(residual_connections)
    for name, connection in zip(names, residual_connections, strict=True):
        blocks.append(_block(cutter, name, start, connection))
        start = connection.end
    earlier_start = _input_of_first_normalisation(residual_connections[0], traced.attributes)
    if earlier_start is not None and not isinstance(blocks[0].form(), FusedForm):
        longer_block = _block(cutter, names[0], earlier_start, residual_connections[0])
        if isinstance(longer_block.form(), FusedForm):
            shorter_stem = cutter.cut("the stem", cutter.start, [Term(earlier_start)], scope="")
            blocks[0], stem, y0 = longer_block, shorter_stem, earlier_start
    output = output_node(traced.graph).args[0]
    assert isinstance(output, fx.Node)
    head = cutter.cut("the head", residual_connections[-1].end, [Term(output)], is_output=True)
    notes = addition_notes(flow, residual_connections, within)
    decisions = decisions_of(traced.graph)
    if decisions:
        notes.append(f"control flow as for the example, which each run checks: {listed(decisions)}")
    shapes = [cutter.shape_of_sample(node) for node in (y0, *(connection.end for connection in residual_connections))]
    if cutter.fixed:
        stem = _with_shape_check(stem, shapes[0])
    reads = dict.fromkeys(
        name
        for part in (stem, head, *(part for block in blocks for part in block.children()))
        for name in context_names(part)
    )
    return Dissection(
        InputReader(
            example.structure, source.x, cutter.context.graph(list(reads)), cutter.context.kinds(reads), traced.guards
        ),
        nn.Identity() if stem is None else stem,
        blocks,
        nn.Identity() if head is None else head,
        shapes,
        list(dict.fromkeys(cutter.fixed)),
        cutter.batch_dim(output) == 0,
        [*filter(None, [stem_note(flow, y0, residual_connections[0])]), *notes],
        decisions,
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
    scope = module_path(connection.addition) or None
    before = cutter.cut(f"what comes before the branches of {name!r}", start, [Term(source)], scope=scope)
    skip = cutter.cut(f"the skip of {name!r}", source, [connection.skip], shape, scope)
    residual = cutter.cut(f"the residual module of {name!r}", source, connection.residual, shape, scope)
    after = cutter.cut(f"the activation of {name!r}", connection.addition, [Term(connection.end)])
    assert residual is not None
    pad_before = None
    if skip is not None and not context_names(skip):
        example = cutter.single[source]
        assert example.shape is not None
        x = torch.empty(example.shape, device=example.device, dtype=example.dtype)
        pad_before = zeros_before(skip, residual, x, shape)
    block = TracedBlock(name, before, skip, residual, after, pad_before, connection.nested)
    if len(connection.modules) > 1:
        what = f"the residual modules of {name!r}"
        modules = [cutter.cut(what, source, terms, shape, scope) or nn.Identity() for terms in connection.modules]
        block.in_parallel(cutter.cut_apart(what, source, connection.modules, shape, scope), modules)
    return block


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


@operation
def same_shape(x: Tensor, shape: torch.Size) -> Tensor:
    """Return ``x`` after a check that its shape is [B, *shape]."""
    if x.shape[1:] != shape:
        raise ValueError(
            f"images: expected those that give blocks an input of [B, {', '.join(map(str, shape))}] as the example "
            f"did, since the blocks contain constants of that shape, got {list(x.shape)}"
        )
    return x


def _with_shape_check(stem: fx.GraphModule | None, shape: torch.Size) -> fx.GraphModule:
    """Return the stem with a check of its output's shape, [B, *shape], at the end."""
    graph = fx.Graph()
    root: Any = {}
    value = graph.placeholder("x")
    if stem is not None:
        graph, root = stem.graph, stem
        result = output_node(graph)
        value = result.args[0]  # type: ignore[assignment]
        graph.erase_node(result)
    graph.output(graph.call_function(same_shape, (value, shape)))
    return fx.GraphModule(root, graph)
