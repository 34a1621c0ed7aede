"""`AdaptedNet`: a model of another library as a `ResidualNet`, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathnet.checks import listed
from pathnet.engines import Job, refusals
from pathnet.models.context_graph import InputReader
from pathnet.models.residual_net import ResidualNet
from pathnet.models.tracing.blocks import TracedBlock
from pathnet.models.tracing.graphs import Dropout
from pathnet.models.tracing.kinds import counted
from pathnet.models.tracing.viewed import ViewedModel

__all__ = ["AdaptedNet"]


class AdaptedNet(ResidualNet):
    """A view of a model as stem, residual blocks and head, over the model's own modules and weights.

    `pathnet.adapt` returns one. Training the view, moving it or changing its mode does the same to the model.
    ``print`` shows a report: the blocks, and the engines that support them.

    Attributes:
        reader: reads the model's inputs: what begins the residual stream, and the context.
        traced_by: ``torch.fx`` or ``torch.export``, or ``hand`` if the caller named all parts.
        shapes: for the example, the shapes of each block's input and of the last one's output, without the batch.
        fixed: why the network takes only inputs of the example's shape (batch apart); empty if it takes others too.
        frozen_statistics: the batch normalisations that always use running statistics.
        dropouts: the model's dropout modules that `torch.export` omitted, with their names.
        viewed: the model, and what the network lacks of it.
        notes: lines of the report on additions that are no blocks, and on operations that one may expect elsewhere.

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
        >>> print(net)
        2 residual blocks, found by torch.fx
        block  in the model  input  output  skip      residual module
        0      1             8      8       identity  perceptron
        1      2             8      8       identity  perceptron
        engine cuda: ...
        engine autograd: serves
        engine reference: serves
        >>> torch.equal(net(torch.ones(4, 3)), model(torch.ones(4, 3)))
        True
    """

    dropouts: tuple[tuple[str, Dropout], ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[TracedBlock],
        head: nn.Module,
        traced_by: str,
        shapes: Sequence[torch.Size],
        reader: InputReader,
        fixed: Sequence[str] = (),
        frozen_statistics: Sequence[str] = (),
    ) -> None:
        super().__init__(stem, blocks, head)
        self.reader = reader
        self.frozen_statistics = tuple(frozen_statistics)
        self.traced_by, self.shapes, self.fixed = traced_by, tuple(shapes), tuple(fixed)
        self.viewed = ViewedModel()

    def train(self, mode: bool = True) -> AdaptedNet:
        """Set training or evaluation mode, of the network and of all modules of the model.

        Args:
            mode: whether the mode is training.

        Returns:
            The network itself.

        Raises:
            ValueError: the mode is training, and the trace omits active dropout of the model, or fixed what a module
                does in training.
        """
        if mode:
            self._check_training()
        super().train(mode)
        self.viewed.train(self, mode)
        return self

    @property
    def trains(self) -> bool:
        """True if the network does all that the model does in training."""
        return not self.viewed.branches and not self._omitted()

    def forward(
        self, x: Any, drawn: Sequence[bool] | None = None, routing: Any = None, backward: Any = None
    ) -> Tensor:
        """Return the network's output.

        Args:
            x: a batch of inputs, in the form of the example that the model was adapted with, [B, ...].
            drawn: for each block, whether it keeps its residual module, see `pathnet.models.ResidualNet.forward`.
            routing: coefficients of the forward pass, [n, 2] or [n, parts], see `pathnet.routed`.
            backward: coefficients of the backward pass, likewise.

        Returns:
            The model's output, [B, ...].

        Raises:
            ValueError: the model is in training mode, which `train` refuses.
        """
        if not self.trains and self.viewed.trains(self):
            try:
                self._check_training()
            except ValueError as error:
                raise ValueError(f"{error}; the model is in training mode: call net.eval()") from None
        return super().forward(x, drawn, routing, backward)

    def _omitted(self) -> list[str]:
        """Return the active dropout modules that the trace omits, in words."""
        return [f"{name!r} (p = {dropout.p:g})" for name, dropout in self.dropouts if dropout.p > 0]

    def _check_training(self) -> None:
        if omitted := self._omitted():
            raise ValueError(
                "net: tracing omitted the model's dropout, so training would run without it: expected p = 0, got "
                f"{listed(omitted)}; set it, or give blocks' branches by hand (blocks=)"
            )
        self.viewed.check()

    def as_one_module_each(self) -> None:
        """Make one residual module of those in parallel in each block."""
        for block in self:
            if isinstance(block, TracedBlock):
                block.as_one_module()

    def stem_weight(self) -> Tensor:
        """Return the weight of the first convolution that runs, [C_0, C, k, k].

        Raises:
            ValueError: the stem has no convolution.
        """
        if isinstance(self.stem, fx.GraphModule):
            # The graph is in the order of execution, unlike modules(), which is in the order of registration.
            modules = dict(self.stem.named_modules())
            for node in self.stem.graph.nodes:
                module = modules.get(str(node.target)) if node.op == "call_module" else None
                if isinstance(module, nn.Conv2d):
                    return module.weight
        return super().stem_weight()

    def __repr__(self) -> str:
        return self.report()

    def report(self) -> str:
        """Return a table of the blocks, and which engines support the network."""
        rows: list[Sequence[str]] = [("block", "in the model", "input", "output", "skip", "residual module")]
        for i, block in enumerate(self):
            assert isinstance(block, TracedBlock)
            shapes = ("x".join(map(str, shape)) for shape in self.shapes[i : i + 2])
            rows.append((str(i), block.name, *shapes, block.skip_kind(), block.kind()))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{counted(self.n, 'residual block')}, found by {self.traced_by}"]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += self.notes
        if any(kinds := [block.kinds for block in self if isinstance(block, TracedBlock)]):
            separate = max(self.residual_modules) > 1
            modules = f"modules of {counted(sum(map(bool, kinds)), 'block')} in parallel"
            lines.append(
                f"{modules}: " + ("separate" if separate else 'one module each (parallel="separate" for more)')
            )
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        for name, reason in refusals(Job(self, "running", "float32", self.shapes[0], device)).items():
            lines.append(f"engine {name}: {'serves' if reason is None else reason}")
        if self.dropouts:
            lines.append(f"without dropout, for evaluation only: {listed([name for name, _ in self.dropouts])}")
        if branches := [name or "the model itself" for name in self.viewed.branches]:
            lines.append(f"for evaluation only, without the training branch of {listed(branches)}")
        if hooked := [name or "the model itself" for name in self.viewed.hooked]:
            lines.append(f"without the hooks of {listed(hooked)}")
        if self.fixed:
            lines.append(f"for inputs of the example's shape: {listed(self.fixed, between='; ')}")
        return "\n".join(lines)
