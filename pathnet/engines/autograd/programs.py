"""A block's captured forward pass and pull-backs, without its modules and without autograd.

What depends on weights alone is computed once. What depends on the block's input is computed once for each record,
in the forward pass. The rest, linear in a gradient, runs for each gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.engines.autograd.capture import NotCapturedError, capture
from pathnet.engines.autograd.dependence import Depends
from pathnet.engines.autograd.pullbacks import IDENTITY, Pullback, Pullbacks
from pathnet.engines.autograd.rewriting import Rewriter
from pathnet.models.context import Context
from pathnet.models.residual_net import Block

__all__ = ["Program", "compile_block"]


@dataclass(frozen=True)
class Linear:
    """A pull-back as a function of (gradient, *some of the saved tensors).

    Attributes:
        shape, stride: the gradient's layout for which it was captured.
        saved: the numbers of the saved tensors that it reads.
        kind: what is computed: the code, and the shapes of the tensors in it.
    """

    run: Callable[..., Tensor]
    shape: torch.Size
    stride: tuple[int, ...]
    saved: tuple[int, ...]
    kind: object

    def bound(self, saved: Sequence[Tensor]) -> Pullback:
        return partial(self._pulled, [saved[number] for number in self.saved])

    @torch.no_grad()
    def _pulled(self, saved: Sequence[Tensor], grad: Tensor) -> Tensor:
        if grad.stride() != self.stride:
            grad = grad.new_empty_strided(self.shape, self.stride).copy_(grad)
        return self.run(grad, *saved)


@dataclass(frozen=True)
class Program:
    """A block's forward pass and pull-backs.

    Attributes:
        forward: (x, *tensors of the context) to the output and the saved tensors.
        shape, stride: the layout of x.
        pulls: the pull-backs of the join and the parts.
        held: tensors that the program keeps alive.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    shape: torch.Size
    stride: tuple[int, ...]
    pulls: Sequence[Pullback | Linear | None]
    inner: torch.dtype
    held: Sequence[Tensor]

    @torch.no_grad()
    def record(self, x: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, Pullbacks]:
        """Run the block forward at a batch's input; return its output and its pull-backs."""
        y, *saved = self.forward(x, *values)
        join, *parts = (pull.bound(saved) if isinstance(pull, Linear) else pull for pull in self.pulls)
        assert join is not None
        kind = tuple(pull.kind if isinstance(pull, Linear) else pull for pull in self.pulls)
        return y, Pullbacks(join, tuple(parts), self.inner, lambda: [*saved, *self.held], kind)


def compile_block(
    block: Block,
    context: Context,
    x: Tensor,
    plain: Pullbacks,
    copies: bool,
    known: dict[object, int],
) -> Program:
    """Return the program of a block for inputs like x.

    Raises:
        NotCapturedError: the block's operators depend on values, or the like.
    """
    to = torch.float64 if x.dtype == torch.float64 else torch.float32
    pulls: list[Any] = [plain.join, *plain.parts]
    wanted = [number for number, pull in enumerate(pulls) if pull is not None and pull is not IDENTITY]
    traced, inputs = capture(block, context, x, copies, wanted, to)
    with torch.no_grad():
        rewriter = Rewriter(traced, inputs, len(wanted), known)
        rewriter.rewrite()
        cutter = _Cutter(rewriter)
        for number, grad, pulled in zip(wanted, cutter.placeholders[1:], cutter.results[1:], strict=False):
            pulls[number] = cutter.linear(grad, pulled)
        return Program(cutter.forward(), x.shape, x.stride(), pulls, plain.inner, cutter.held())


class _Cutter:
    """Cutter of a captured graph into its forward pass and its pull-backs.

    Attributes:
        saved: the nodes that depend on the block's input and that pull-backs read.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self.graph, self.values, self.depends = rewriter.graph, rewriter.values, rewriter.depends
        self.gradients = rewriter.gradients
        self.placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        (self.results,) = next(node for node in self.graph.nodes if node.op == "output").args
        self.saved: dict[fx.Node, int] = {}

    def forward(self) -> Callable[..., tuple[Tensor, ...]]:
        """Return the function from (x, *tensors of the context) to the output and the saved tensors."""
        inputs = [self.placeholders[0], *self.placeholders[1 + self.gradients :]]
        return self._function(inputs, [self.results[0], *self.saved], single=False).forward

    def linear(self, grad: fx.Node, pulled: fx.Node) -> Linear:
        """Return the pull-back from one of the graph's gradients to one of its results."""
        if self.depends[pulled] != Depends.GRADIENT:
            raise NotCapturedError("a pulled gradient does not depend on the gradient")
        needed = self._needed([pulled], lambda node: self.depends[node] == Depends.GRADIENT)
        reads = {argument: None for node in needed for argument in node.all_input_nodes}
        saved = [node for node in reads if self.depends[node] == Depends.INPUT]
        for node in saved:
            self.saved.setdefault(node, len(self.saved))
        example = self.values[grad]
        run = self._function([grad, *saved], [pulled], single=True)
        shapes = [self.values[node].shape for node in saved]
        kind = run.code, tuple(shapes), tuple(constant.shape for constant in run.buffers())
        return Linear(run.forward, example.shape, example.stride(), tuple(self.saved[node] for node in saved), kind)

    def held(self) -> list[Tensor]:
        """Return the tensors that depend on weights alone, packed weights among them."""
        constants = [self.values[node] for node in self.graph.nodes if self.depends[node] == Depends.WEIGHTS]
        packed = [tensor for node in self.graph.nodes for tensor in getattr(node.target, "held", ())]
        return [tensor for tensor in (*constants, *packed) if isinstance(tensor, Tensor)]

    def _needed(self, ends: Sequence[fx.Node], follow: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """Return the nodes behind ``ends`` that ``follow`` admits, in the graph's order."""
        needed: set[fx.Node] = set()
        pending = list(ends)
        while pending:
            node = pending.pop()
            if node not in needed and follow(node):
                needed.add(node)
                pending += node.all_input_nodes
        return [node for node in self.graph.nodes if node in needed]

    def _function(self, inputs: Sequence[fx.Node], ends: Sequence[fx.Node], single: bool) -> fx.GraphModule:
        """Return the function from some nodes' values to those of others."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        constants: dict[str, Any] = {}
        for number, node in enumerate(inputs):
            copies[node] = graph.placeholder(f"input_{number}")

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:
                name = f"constant_{len(constants)}"
                constants[name] = self.values[node]
                copies[node] = graph.get_attr(name)
            return copies[node]

        for node in self._needed(ends, lambda node: node not in copies and self.depends[node] > Depends.WEIGHTS):
            copies[node] = graph.node_copy(node, copied)
        results = [copied(end) for end in ends]
        graph.output(results[0] if single else tuple(results))
        root = nn.Module()
        for name, value in constants.items():
            setattr(root, name, value)
        return fx.GraphModule(root, graph)
