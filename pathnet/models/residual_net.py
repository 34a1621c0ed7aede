"""A network as a stem, residual blocks and a head: the view that the rest of pathnet works on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.checks import check_tensor, described
from pathnet.models.block import Block
from pathnet.models.coefficients import check_coefficients, known_as, of_blocks
from pathnet.models.context import NO_CONTEXT, Context
from pathnet.models.context_graph import InputReader, bound_part
from pathnet.models.forms import Form, FusedForm, PostActivationForm, Unit

__all__ = [
    "Block",
    "Form",
    "FusedForm",
    "PostActivationForm",
    "ResidualNet",
    "Unit",
    "check_inputs",
    "check_net",
    "described_net",
]


class ResidualNet(nn.Module):
    """A network as a stem, n residual blocks and a head: ``head(block_{n-1}(... block_0(stem(x))))``.

    It contains 2^n paths, each through the residual module or the skip connection of every block (Veit et al. 2016,
    section 3). Everything in pathnet works on this form; `pathnet.adapt` brings other models into it.

    Args:
        stem: maps images ``[B, C, H, W]`` to ``y_0``, the input of the first block.
        blocks: the n residual blocks, from input to output.
        head: maps ``y_n`` to the output (logits ``[B, classes]`` for the models here).
        config: the constructor's name and arguments in JSON types, from which `pathnet.models.build` builds the
            network again; without it, `pathnet.models.save` refuses the network.

    Attributes:
        frozen_statistics: the batch normalisations that use running statistics in every mode.
        decides_by_batch: whether control flow depends on values of a batch, so batches must not run as one.
        batch_first_output: whether the output's first dimension is the batch: not for a loss, and for [T, B, C].
        reader: reads inputs of more than one tensor, and computes the context; None for networks of one tensor.
        parameter_names: the network's names of its parameters, by the names that they have in an adapted model.

    Raises:
        ValueError: stem or head is no module, ``blocks`` is no list of at least one `Block`, or ``config`` is no
            dictionary.

    Example:
        >>> import torch
        >>> from pathnet import models
        >>> blocks = [models.PreactBlock(8, (3, 3), (8, 8), stride=1, shortcut="projection") for _ in range(5)]
        >>> head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10))
        >>> net = models.ResidualNet(torch.nn.Conv2d(3, 8, 3, padding=1), blocks, head)
        >>> net.n, net(torch.zeros(2, 3, 16, 16)).shape
        (5, torch.Size([2, 10]))
        >>> drawn = [True, True, False, True, True]  # block 2 passes its input on
        >>> net(torch.zeros(2, 3, 16, 16), drawn=drawn).shape
        torch.Size([2, 10])
    """

    frozen_statistics: tuple[str, ...] = ()
    batch_first_output: bool = True
    decides_by_batch: bool = False
    parameter_names: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[Block],
        head: nn.Module,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("stem", stem), ("head", head)):
            if not isinstance(part, nn.Module):
                raise ValueError(f"{name}: expected a torch.nn.Module, got {described(part)}")
        if not isinstance(blocks, Sequence | nn.ModuleList) or len(blocks) == 0:
            got = "none" if isinstance(blocks, Sequence) else described(blocks)
            raise ValueError(f"blocks: expected at least one residual block, in a list, got {got}")
        for block in blocks:
            if not isinstance(block, Block):
                raise ValueError(f"blocks: expected pathnet Blocks, got {described(block)}")
        if config is not None and not isinstance(config, dict):
            raise ValueError(f"config: expected a dictionary or None, got {described(config)}")
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.config = config
        self.reader: InputReader | None = None

    @property
    def n(self) -> int:
        """Number of residual blocks, hence of residual modules."""
        return len(self.blocks)

    @property
    def parts(self) -> int:
        """Maximum number of parts of a block's Jacobian: skip connection, residual modules, and gate."""
        return max(block.part_count for block in self)

    @property
    def residual_modules(self) -> tuple[int, ...]:
        """Number of residual modules in parallel of each block."""
        return tuple(block.residual_modules for block in self)

    def __iter__(self) -> Iterator[Block]:
        """Iterate over the residual blocks, from input to output."""
        return iter(self.blocks)  # type: ignore[arg-type]

    def tensors(self, inputs: Any, name: str = "images") -> dict[str, Tensor]:
        """Return the tensors among the inputs by their names in errors, the main one first.

        Args:
            inputs: a tensor with the batch first; for an adapted network whatever its example was.
            name: the name of the inputs in errors.

        Returns:
            The tensors by name, the main one [B, ...].

        Raises:
            ValueError: the inputs are not of the kind that the network takes.
        """
        if self.reader is not None:
            return self.reader.tensors(inputs, name)
        if not isinstance(inputs, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {described(inputs)}")
        return {name: inputs}

    def split(self, inputs: Any, name: str = "images") -> tuple[Tensor, Context]:
        """Return the tensor among the inputs from which the residual stream begins, and the batch's context.

        Args:
            inputs: see `tensors`.
            name: the name of the inputs in errors.

        Returns:
            The tensor, [B, ...], and the context.

        Raises:
            ValueError: the inputs are not of the kind that the network takes.
        """
        if self.reader is None:
            return self.tensors(inputs, name)[name], NO_CONTEXT
        x, context = self.reader(inputs, name)
        return x, context

    def bound(self, context: Context) -> ResidualNet:
        """Return a view of the network with a batch's context as constants; the network itself if it reads none.

        Args:
            context: what `split` returned for the batch.
        """
        if not context.values:
            return self
        view = copy.copy(self)
        blocks = nn.ModuleList(block.bound(context) for block in self)
        stem, head = bound_part(self.stem, context), bound_part(self.head, context)
        view._modules = {**self._modules, "stem": stem, "blocks": blocks, "head": head}
        return view

    def stem_weight(self) -> Tensor:
        """Return the weight of the first convolution, ``[C_0, C, k, k]``: the paper's first layer.

        Raises:
            ValueError: the stem has no convolution.
        """
        for module in self.stem.modules():
            if isinstance(module, nn.Conv2d):
                return module.weight
        raise ValueError('at="stem_weight": this network\'s stem has no convolution')

    def forward(
        self,
        x: Tensor,
        drawn: Sequence[bool] | None = None,
        routing: Any = None,
        backward: Any = None,
    ) -> Tensor:
        """Return the network's output.

        Args:
            x: inputs, [B, C, H, W] for images.
            drawn: for each block, whether it keeps its residual module; all do by default. Other blocks run as if
                deleted: their residual modules are computed neither here nor in the backward pass (stochastic depth,
                Huang et al. 2016).
            routing: coefficients of the blocks' branches, [n, 2] or [n, `parts`], see `pathnet.routed`, which also
                accepts networks that wrap this one.
            backward: those of the backward pass, by default ``routing``.

        Returns:
            The head's output, [B, classes] for the models here.

        Raises:
            ValueError: ``drawn`` does not have one value per block, or comes with a routing; or a routing is invalid.
        """
        if drawn is not None and len(drawn) != self.n:
            raise ValueError(f"drawn: expected {self.n} values (one per block), got {len(drawn)}")
        if routing is not None or backward is not None:
            if drawn is not None:
                raise ValueError(f"drawn: expected None with a routing, got {described(drawn)}")
            x, context = self.split(x)
            return self.bound(context)._routed(x, routing, backward)
        x, context = self.split(x)
        return self.bound(context)._run(x, drawn)

    def _run(self, x: Tensor, drawn: Sequence[bool] | None) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self):
            x = block(x) if drawn is None or drawn[i] else block.lesioned(x)
        return torch.as_tensor(self.head(x))

    def _routed(self, x: Tensor, routing: Any, backward: Any) -> Tensor:
        ones = [[1.0] * self.parts] * self.n
        rows = ones if routing is None else of_blocks(check_coefficients("routing", routing, self.n, self.parts))
        back_rows = rows
        if backward is not None:
            back_rows = of_blocks(check_coefficients("backward", backward, self.n, self.parts))
        x = self.stem(x)
        for block, row, back_row in zip(self, rows, back_rows, strict=True):
            factors = (*block.coefficients(row)[: 1 + block.residual_modules], *block.coefficients(back_row))
            ordinary = all(known_as(factor, 1) for factor in factors)
            x = block(x) if ordinary else block.routed(x, row, back_row)
        return torch.as_tensor(self.head(x))


def check_net(net: object) -> None:
    """Raise ValueError unless ``net`` is a `ResidualNet`."""
    if not isinstance(net, ResidualNet):
        raise ValueError(f"net: expected a pathnet ResidualNet, got {described_net(net)}")


def described_net(net: object) -> str:
    """Return a description of what is no `ResidualNet`, and for a module the way to make one of it."""
    way = "; pathnet.adapt(model, images) makes one" if isinstance(net, nn.Module) else ""
    return f"{described(net)}{way}"


def first_convolution(net: ResidualNet) -> nn.Conv2d | None:
    """Return the convolution that the stem begins with, or None if it is not known to begin with one."""
    first = net.stem[0] if isinstance(net.stem, nn.Sequential) and len(net.stem) else net.stem
    return first if isinstance(first, nn.Conv2d) else None


def check_inputs(name: str, inputs: object, net: ResidualNet) -> Tensor:
    """Return the main tensor among the inputs, all dense tensors on the network's device.

    Its shape and type fit the convolution that the stem begins with, if there is one.

    Args:
        name: the inputs' name in errors.

    Raises:
        ValueError: they are no such tensors, or not those that the network takes.
    """
    device = next((parameter.device for parameter in net.parameters()), None)
    tensors = net.tensors(inputs, name)
    for entry, tensor in tensors.items():
        check_tensor(entry, tensor, device=device)
    name, checked = next(iter(tensors.items()))
    first = first_convolution(net)
    if first is not None:
        check_tensor(name, checked, "floating-point", [None, first.in_channels, None, None], device)
        if checked.numel() == 0:
            raise ValueError(f"{name}: expected images that are not empty, got shape {list(checked.shape)}")
        if checked.dtype != first.weight.dtype and not torch.is_autocast_enabled(checked.device.type):
            raise ValueError(f"{name}: expected {first.weight.dtype} (the network's), got {checked.dtype}")
    return checked
