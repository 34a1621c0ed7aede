"""Notes for the report of an adapted model: additions that are no blocks, and operations that moved into the stem."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from torch import fx

from pathnet.checks import listed
from pathnet.models.tracing.connections import Connection
from pathnet.models.tracing.decisions import decided
from pathnet.models.tracing.flow import GradientFlow
from pathnet.models.tracing.graphs import describe_node, module_path, module_paths
from pathnet.models.tracing.operations import feeds_a_sum

__all__ = ["addition_notes", "stem_note"]


def addition_notes(
    flow: GradientFlow, blocks: Sequence[Connection], within: Collection[fx.Node] | None = None
) -> list[str]:
    """Return a line for each reason why additions of branches are no blocks, with the additions.

    Args:
        blocks: the residual connections, from input to output.
        within: the nodes among which additions were considered; None for all.
    """
    ends = {connection.addition for connection in blocks}
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for node in flow.nodes:
        if node not in ends and not feeds_a_sum(node) and flow.terms(node):
            reason, where = _reason(flow, node, blocks, within)
            by_reason[reason].append(describe_node(node) + where)
    return [f"no blocks, {reason}: {listed(places)}" for reason, places in by_reason.items()]


def _reason(
    flow: GradientFlow, node: fx.Node, blocks: Sequence[Connection], within: Collection[fx.Node] | None
) -> tuple[str, str]:
    """Return why an addition is no block, and the block that it is inside of in words."""
    for number, connection in enumerate(blocks):
        if flow.index[connection.source] < flow.index[node] < flow.index[connection.addition]:
            return "since they are inside the branches of a block", f" in block {number}"
    if within is not None and node not in within:
        return "since they are outside the modules named by blocks= or stream=", ""
    if node not in flow.dominators:
        return "since other paths lead around them", ""
    source = flow.dominators[flow.dominators.index(node) - 1]
    if flow.split(node, source) is None:
        return "since no branch has weights", ""
    return "since they add the outputs of linear classifiers", ""


def stem_note(flow: GradientFlow, y0: fx.Node, first: Connection) -> str | None:
    """Return a line on the operations of the first block's module that run in the stem, or None if there are none.

    Args:
        y0: the node whose value is the first block's input.
    """
    name = module_path(first.addition)
    if not name or y0 not in flow.index:
        return None
    before = flow.nodes[: flow.index[y0] + 1]
    moved = [
        node
        for node in before
        if node.target is not decided and any(f"{path}.".startswith(f"{name}.") for path in module_paths(node))
    ]
    if not moved:
        return None
    labels = [repr(node.target) if node.op == "call_module" else describe_node(node) for node in moved]
    return f"block 0: {listed(labels)} run in the stem, since both branches begin after them; y0 is their output"
