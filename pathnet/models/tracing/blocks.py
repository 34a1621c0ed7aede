"""Residual blocks of a traced model, and the forms in which fused engines take them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pathnet.models.context import Context
from pathnet.models.context_graph import bound_part, context_names
from pathnet.models.pointwise import Pointwise
from pathnet.models.residual_net import Block, Form, FusedForm, PostActivationForm, Unit
from pathnet.models.tracing.graphs import Dropout
from pathnet.models.tracing.live import TrainingOnly
from pathnet.models.tracing.operations import CLONES, is_relu

__all__ = ["TracedBlock", "is_pad"]


class TracedBlock(Block):
    """A block ``y = join(skip(before(x)) + residual(before(x)))`` cut out of a model, over the model's own modules.

    Args:
        name: name of the module that contains the addition.
        before: the operations that both branches begin with; None for none.
        skip_branch: the skip connection; None for the identity.
        residual_branch: the residual module.
        after: the activation after the addition, if any.
        pads: whether the skip connection only subsamples pixels by the stride and appends zero channels.
        nested: number of residual connections inside the branches.
    """

    def __init__(
        self,
        name: str,
        before: nn.Module | None,
        skip_branch: nn.Module | None,
        residual_branch: nn.Module,
        after: nn.Module | None,
        pads: bool = False,
        nested: int = 0,
    ) -> None:
        super().__init__()
        self.nested = nested
        self.name, self.pads = name, pads
        self.before, self.skip_branch, self.residual_branch, self.after = before, skip_branch, residual_branch, after

    def _before(self, x: Tensor) -> Tensor:
        return x if self.before is None else torch.as_tensor(self.before(x))

    def _skip(self, x: Tensor) -> Tensor:
        return x if self.skip_branch is None else torch.as_tensor(self.skip_branch(x))

    def skip(self, x: Tensor) -> Tensor:
        return self._skip(self._before(x))

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.residual_branch(self._before(x)))

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._before(x)
        return self._skip(x), torch.as_tensor(self.residual_branch(x))

    def join(self, z: Tensor) -> Tensor:
        return z if self.after is None else torch.as_tensor(self.after(z))

    def bound(self, context: Context) -> TracedBlock:
        parts = {name: bound_part(part, context) for name, part in self.named_children()}
        if all(part is self._modules[name] for name, part in parts.items()):
            return self
        block = copy.copy(self)
        block._modules = {**self._modules, **parts}
        return block

    def form(self) -> Form | None:
        steps = self._parts()
        if steps is None:
            return None
        return self._post_activation_form(*steps) if steps[-1] else self._fused_form(*steps[:3])

    def _fused_form(self, before: list[_Step], skip: list[_Step], residual: list[_Step]) -> FusedForm | None:
        units = _units([*before, *residual])
        if units is None:
            return None
        if not before and not skip:
            return FusedForm(units, pad=self.pads)
        if [step.kind for step in before] != ["bn", "relu"] or [step.kind for step in skip] != ["conv"]:
            return None
        return FusedForm(units, projection=skip[0].conv)

    def _post_activation_form(
        self, before: list[_Step], skip: list[_Step], residual: list[_Step], after: list[_Step]
    ) -> PostActivationForm | None:
        if before or [step.kind for step in after] != ["relu"]:
            return None
        kinds = [step.kind for step in residual]
        count = (len(kinds) + 1) // 3
        if count == 0 or kinds != ["conv", "bn", "relu"] * (count - 1) + ["conv", "bn"]:
            return None
        convs, bns = tuple(step.conv for step in residual[::3]), tuple(step.bn for step in residual[1::3])
        skip_kinds = [step.kind for step in skip]
        if skip_kinds not in ([], ["conv"], ["conv", "bn"]):
            return None
        projection, projection_bn = skip[0].conv if skip else None, skip[1].bn if len(skip) > 1 else None
        return PostActivationForm(convs, bns, projection, projection_bn, pad=self.pads)

    def skip_kind(self) -> str:
        """Return the kind of the skip connection in words, and what it shares with the residual branch.

        The kinds are identity, pad, projection (with weights) and other.
        """
        if self.skip_branch is None:
            kind = "identity"
        elif self.pads:
            kind = "pad"
        else:
            kind = "projection" if any(True for _ in self.skip_branch.parameters()) else "other"
        if self.before is None or isinstance(self.form(), FusedForm):
            return kind
        layers = sum(parameter.ndim > 1 for parameter in self.before.parameters())
        return f"{kind} after {f'{layers} shared layers' if layers else 'a shared part'}"

    def kind(self) -> str:
        """Return the kind of the residual module in a few words."""
        form = self.form()
        if form is not None:
            activation = "pre" if isinstance(form, FusedForm) else "post"
            return f"{activation}-activation {_kernel_pattern(form.convs)}"
        layers = _layers(self.residual_branch)
        kind = next((name for name in ("attention", "convolutions", "linear layers") if name in layers), "other")
        within = f" with {self.nested} residual connections inside" if self.nested else ""
        return f"{kind}{within}{', then an activation' if self.after is not None else ''}"

    def _parts(self) -> tuple[list[_Step], list[_Step], list[_Step], list[_Step]] | None:
        """Return the steps of before, skip, residual module and after; None if engines cannot run one of them.

        A padding skip has no steps.
        """
        skip: list[_Step] | None = [] if self.pads else _steps(self.skip_branch)
        parts = [_steps(self.before), skip, _steps(self.residual_branch), _steps(self.after)]
        if any(part is None for part in parts):
            return None
        return tuple(parts)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Step:
    """An operation that fused engines can run: ``conv``, ``bn`` or ``relu``."""

    kind: str
    module: nn.Module | None = None

    @property
    def conv(self) -> nn.Conv2d:
        assert isinstance(self.module, nn.Conv2d)
        return self.module

    @property
    def bn(self) -> nn.BatchNorm2d:
        assert isinstance(self.module, nn.BatchNorm2d)
        return self.module


def _steps(part: nn.Module | None) -> list[_Step] | None:
    """Return the operations of a part if they form a chain of ones that fused engines can run, else None.

    Dropout that is inactive counts as no operation.
    """
    if part is None:
        return []
    if not isinstance(part, fx.GraphModule) or context_names(part):
        return None
    steps: list[_Step] = []
    previous: fx.Node | None = None
    modules = dict(part.named_modules())
    for node in part.graph.nodes:
        if node.op == "output":
            return steps if node.args[0] is previous else None
        if node.op == "placeholder":
            previous = node
            continue
        if node.all_input_nodes != [previous]:
            return None
        previous = node
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if is_relu(node, modules):
            steps.append(_Step("relu"))
        elif isinstance(module, nn.Conv2d) and type(module) in (nn.Conv2d, Pointwise) and _unhooked(module):
            steps.append(_Step("conv", module))
        elif type(module) is nn.BatchNorm2d and _unhooked(module):
            steps.append(_Step("bn", module))
        elif not (node.target in CLONES or _is_identity(module)):
            return None
    return None


def _unhooked(module: nn.Module) -> bool:
    return not (module._forward_pre_hooks or module._forward_hooks)


def _is_identity(module: nn.Module | None) -> bool:
    if isinstance(module, Dropout):
        return not module.training or module.p == 0
    if isinstance(module, TrainingOnly):
        return not module.is_active
    return type(module) is nn.Identity


def _units(steps: Sequence[_Step]) -> tuple[Unit, ...] | None:
    """Return the units of a chain that repeats BN, ReLU, convolution; None for any other chain."""
    count = len(steps) // 3
    if count == 0 or [step.kind for step in steps] != ["bn", "relu", "conv"] * count:
        return None
    return tuple(Unit(bn.bn, conv.conv) for bn, conv in zip(steps[::3], steps[2::3], strict=True))


def is_pad(skip: nn.Module | None, residual: nn.Module, x: Tensor, out: torch.Size) -> bool:
    """Return whether a skip connection only subsamples and appends zero channels, by the residual module's strides
    and widths.

    Args:
        x: an input of the block, on which the skip connection runs.
        out: shape of the block's output.
    """
    steps = _steps(residual)
    if skip is None or not steps or x.ndim != 4 or any(True for _ in skip.parameters()):
        return False
    convs = [step.conv for step in steps if step.kind == "conv"]
    if not convs or convs[-1].out_channels < x.shape[1]:
        return False
    down, across = (math.prod(conv.stride[i] for conv in convs) for i in (0, 1))
    if (down, across, convs[-1].out_channels) == (1, 1, x.shape[1]):
        return False
    expected = F.pad(x[:, :, ::down, ::across], (0, 0, 0, 0, 0, convs[-1].out_channels - x.shape[1]))
    actual = skip(x)
    return actual.shape == expected.shape == out and torch.equal(actual, expected)


def _kernel_pattern(convs: Sequence[nn.Conv2d]) -> str:
    """Return basic, bottleneck, or the kernel sides in words."""
    kernels = [conv.kernel_size[0] for conv in convs]
    return {(3, 3): "basic", (1, 3, 1): "bottleneck"}.get(
        tuple(kernels), "of kernels " + ", ".join(map(str, kernels))
    )


def _layers(part: nn.Module) -> set[str]:
    """Return the kinds of layers that a branch has."""
    layers: set[str] = set()
    nodes = part.graph.nodes if isinstance(part, fx.GraphModule) else ()
    # Weights are left out since their names mislead: "post_attention_layernorm" is not attention.
    calls = (node for node in nodes if node.op in ("call_function", "call_method"))
    names = [str(getattr(node.target, "__name__", node.target)) for node in calls]
    if any("softmax" in name or "attention" in name for name in names):
        layers.add("attention")
    if any(name.startswith("conv") for name in names):
        layers.add("convolutions")
    if any(name.startswith(("linear", "addmm", "mm")) for name in names):
        layers.add("linear layers")
    for module in part.modules():
        if isinstance(module, (nn.MultiheadAttention, nn.Softmax)):
            layers.add("attention")
        elif isinstance(module, nn.modules.conv._ConvNd):
            layers.add("convolutions")
        elif isinstance(module, nn.Linear):
            layers.add("linear layers")
    return layers
