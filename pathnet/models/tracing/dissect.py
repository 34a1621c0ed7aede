"""From a traced model to a stem, residual blocks and a head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.models.residual_net import FusedForm
from pathnet.models.tracing.blocks import TracedBlock, is_pad
from pathnet.models.tracing.connections import CLONES, RESHAPES, Connection, Term, connections
from pathnet.models.tracing.cutting import Scissors
from pathnet.models.tracing.graphs import Traced, first_line, path_of
from pathnet.models.tracing.values import Fact, observe, source_of

__all__ = ["Dissection", "dissect"]


@dataclass(frozen=True)
class Dissection:
    """A model taken apart.

    Attributes:
        shape: of ``y_0`` for the example, without the batch.
        fixed: why it holds for inputs of the example's shape alone (batch apart); empty where it does not.
    """

    stem: nn.Module
    blocks: list[TracedBlock]
    head: nn.Module
    shape: torch.Size
    fixed: list[str]


def dissect(traced: Traced, example: Tensor, within: Collection[fx.Node] | None = None) -> Dissection:
    """A traced model as stem, blocks and head.

    Args:
        within: the operations among which additions count as residual connections; None for all.

    Raises:
        ValueError: there are no residual connections, or some that cannot be cut out.
    """
    source = source_of(traced, example)
    once, _ = observe(traced, example, source)
    try:
        twice, _ = observe(traced, torch.cat([example, example]), source)
    except Exception as error:
        raise ValueError(
            f"model: takes no batch of another size than {len(example)} ({first_line(error)})"
        ) from error
    found = connections(traced, once, source, within)
    scissors = Scissors(traced, once, twice, source)
    (result,) = (node for node in traced.graph.nodes if node.op == "output")
    start = y0 = _batch_first(found[0].source, once, example)
    stem = scissors.cut("the stem", scissors.start, [Term(start)])
    blocks: list[TracedBlock] = []
    names = _names(found)
    for name, connection in zip(names, found, strict=True):
        blocks.append(_block(scissors, name, start, connection))
        start = connection.end
    begun = _begin_before(found[0], traced.held)
    if begun is not None and not isinstance(blocks[0].form(), FusedForm):
        earlier = _block(scissors, names[0], begun, found[0])
        if isinstance(earlier.form(), FusedForm):
            blocks[0], stem, y0 = earlier, scissors.cut("the stem", scissors.start, [Term(begun)]), begun
    head = scissors.cut("the head", found[-1].end, [Term(result.args[0])])
    shape = once[y0].shape
    assert shape is not None
    if scissors.fixed:
        stem = _only_for(stem, shape)
    return Dissection(
        nn.Identity() if stem is None else stem,
        blocks,
        nn.Identity() if head is None else head,
        shape[1:],
        list(dict.fromkeys(scissors.fixed)),
    )


def _block(scissors: Scissors, name: str, start: fx.Node, connection: Connection) -> TracedBlock:
    scissors.check_batch(start)
    scissors.check_batch(connection.end)
    source, shape = connection.source, scissors.once[connection.addition].shape
    assert shape is not None
    before = scissors.cut(f"what comes before the branches of {name!r}", start, [Term(source)])
    skip = scissors.cut(f"the skip of {name!r}", source, [connection.skip], shape)
    residual = scissors.cut(f"the residual module of {name!r}", source, connection.residual, shape)
    after = scissors.cut(f"the activation of {name!r}", connection.addition, [Term(connection.end)])
    assert residual is not None
    example = scissors.once[source]
    assert example.shape is not None
    x = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example.device, example.dtype)
    pads = is_pad(skip, residual, x, shape)
    return TracedBlock(name, before, skip, residual, after, pads, connection.nested)


def _batch_first(source: fx.Node, facts: Mapping[fx.Node, Fact], example: Tensor) -> fx.Node:
    """The source of the first block, or what it makes one list of, where it lays samples end to end."""
    while facts[source].shape[:1] != example.shape[:1] and source.target in RESHAPES:  # type: ignore[index]
        source = source.all_input_nodes[0]
    return source


def _begin_before(first: Connection, held: Mapping[str, Any]) -> fx.Node | None:
    """What the normalisation reads whose ReLU the first block begins with, where there is one: if the block is
    pre-activated, its own."""
    relu = first.source
    if len(relu.all_input_nodes) != 1 or first.skip.node is relu:
        return None
    node = relu.all_input_nodes[0]
    while node.target in CLONES or type(held.get(str(node.target))) is nn.Identity:
        node = node.all_input_nodes[0]
    return node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None


def _names(found: list[Connection]) -> list[str]:
    """Where the additions are in the model; numbered where there are several in one module."""
    paths = [path_of(connection.addition) or "addition" for connection in found]
    return [
        f"{path} ({paths[: i + 1].count(path)})" if paths.count(path) > 1 else path for i, path in enumerate(paths)
    ]


def same_shape(x: Tensor, shape: torch.Size) -> Tensor:
    """``x``, once it is found to be of shape [B, *shape]."""
    if x.shape[1:] != shape:
        raise ValueError(
            f"images: expected those that give blocks an input of [B, {', '.join(map(str, shape))}] as the example "
            f"did, since the blocks hold constants of that shape, got {list(x.shape)}"
        )
    return x


def _only_for(stem: fx.GraphModule | None, shape: torch.Size) -> fx.GraphModule:
    graph = fx.Graph()
    held: Any = {}
    value = graph.placeholder("x")
    if stem is not None:
        graph, held = stem.graph, stem
        (result,) = (node for node in graph.nodes if node.op == "output")
        value = result.args[0]
        graph.erase_node(result)
    graph.output(graph.call_function(same_shape, (value, shape[1:])))
    return fx.GraphModule(held, graph)
