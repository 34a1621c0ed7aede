"""The parts of a block that fused kernels take, and the blocks that they refuse."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd

from pathnet.engines.forms import unsupported_block
from pathnet.engines.operands import BlockOperands
from pathnet.engines.triton.packing import norm_tensors
from pathnet.models.pointwise import Pointwise
from pathnet.models.residual_net import Block, FusedForm, Unit
from pathnet.nn.running import RunningStatistics

__all__ = ["GLOBAL_HOOKS", "FusedParts", "fused_parts", "never_fused"]

CONVOLVES = (nn.Conv2d.forward, Pointwise.forward)
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    *(torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks),
    *(torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks),
)
"""Hooks of all modules, such as those of `torch.utils.flop_counter.FlopCounterMode`."""
METHODS = ("skip", "residual", "branches", "join")
"""Methods of a block that kernels run in place of."""


def fused_parts(block: Block) -> FusedParts | str:
    """Return the parts of a block, or why fused kernels cannot run it as it is now."""
    form = block.form()
    if form is None:
        return block.unfused_reason()
    reason = _unsupported(form)
    if reason is not None or not isinstance(form, FusedForm):
        return reason or ""
    if any(GLOBAL_HOOKS):
        return "all modules have hooks, which fused kernels do not call"
    replaced = next((name for name in METHODS if name in block.__dict__), None)
    if replaced is not None:
        return f"its method {replaced} was replaced"
    for module in _modules(form):
        problem = _problem(module)
        if problem is not None:
            return f"its module {_name(block, module)} {problem}"
    # A form serves measurement in evaluation too, where dropout is nothing.
    for name, module in block.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            return f"its module {name} drops values in training"
    parts = FusedParts(form)
    if parts.mixed:
        return "expected all of its BNs to take statistics of the batch, or none, got some that do"
    return parts


def never_fused(block: Block) -> str | None:
    """Return why fused kernels can run a block in no mode, and whatever hooks its modules have; or None."""
    form = block.form()
    if form is None and not block.training:
        # The survival probability of a residual module is a factor in evaluation alone.
        trained = copy.copy(block)
        trained.training = True
        form = trained.form()
    if form is None:
        return block.unfused_reason()
    if type(block).forward is not Block.forward:
        return f"its class {type(block).__name__} computes by its own forward method"
    return _unsupported(form)


def _unsupported(form: object) -> str | None:
    if not isinstance(form, FusedForm):
        return "expected a pre-activation block, got a post-activation one"
    return unsupported_block(form)


def _modules(form: FusedForm) -> list[nn.Module]:
    modules: list[nn.Module] = [module for unit in form.units for module in (unit.bn, unit.conv)]
    return modules if form.projection is None else [*modules, form.projection]


def _problem(module: nn.Module) -> str | None:
    """Return what a module computes besides its class's arithmetic, or None."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return "has hooks, which fused kernels do not call"
    kind = type(module)
    plain = kind.forward in CONVOLVES if isinstance(module, nn.Conv2d) else kind.forward is nn.BatchNorm2d.forward
    if not plain or "forward" in module.__dict__:
        return f"computes by its own forward method ({kind.__name__})"
    return None


def _name(block: Block, module: nn.Module) -> str:
    return next((name for name, submodule in block.named_modules() if submodule is module), "outside the block")


class FusedParts:
    """A pre-activation block's modules, and those of their attributes that kernels take.

    Attributes:
        norms: the BN of each unit.
        convs: the convolution of each unit.
        projection: that of the skip connection, or None.
        strides: those of ``convs``.
        by_batch: whether BNs use the statistics of the batch; as in torch, those that keep no others do.
        mixed: whether some do and some do not, which no kernel runs.
        skip: the projection and what comes before it, as a residual module of one unit; None without a projection.
    """

    def __init__(self, form: FusedForm) -> None:
        self.form = form
        self.norms = [unit.bn for unit in form.units]
        self.convs = [unit.conv for unit in form.units]
        self.projection = form.projection
        self.strides = [conv.stride[0] for conv in self.convs]
        self.epsilons = [float(bn.eps) for bn in self.norms]
        by_batch = [bn.training or bn.running_mean is None for bn in self.norms]
        self.by_batch, self.mixed = by_batch[0], any(by_batch) and not all(by_batch)
        self.running = RunningStatistics(self.norms, self.strides)
        self.skip: FusedParts | None = None
        if self.projection is not None:
            self.skip = FusedParts(FusedForm((Unit(self.norms[0], self.projection),)))

    def operands(self, a: float, c: float) -> BlockOperands:
        """Return what an engine's op takes besides the input [B, C, H, W]."""
        weights, strides, norms = [conv.weight for conv in self.convs], self.strides, []
        if self.projection is not None and a != 0:
            weights.append(self.projection.weight)
            strides = [*strides, self.projection.stride[0]]
        for unit in self.form.units:
            norms += norm_tensors(unit, self.by_batch)
        return BlockOperands(weights, norms, strides, self.epsilons, [a, c], self.form.pad_before)
