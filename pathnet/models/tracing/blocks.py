"""Residual blocks of a traced model, and the forms in which fused engines take them."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pathnet.models.context import Context
from pathnet.models.context_graph import bound_part, context_names
from pathnet.models.pointwise import Pointwise
from pathnet.models.residual_net import Block, Form, FusedForm, PostActivationForm, Unit
from pathnet.models.tracing.graphs import Dropout
from pathnet.models.tracing.kinds import counted, has_activation, kind_of
from pathnet.models.tracing.live import TrainingOnly
from pathnet.models.tracing.operations import CLONES, is_relu

__all__ = ["TracedBlock", "zeros_before"]


OTHER_SKIP = "its skip connection is neither the identity nor zero padding nor a projection by one convolution"


class TracedBlock(Block):
    """A block ``y = join(skip(before(x)) + residual(before(x)))`` cut out of a model, over the model's own modules.

    Args:
        name: name of the module that contains the addition.
        before: the operations that both branches begin with; None for none.
        skip_branch: the skip connection; None for the identity.
        residual_branch: the residual module.
        after: the activation after the addition, if any.
        pad_before: number of zero channels before the input's, if the skip connection only subsamples pixels by the
            stride and adds zero channels; None for any other.
        nested: number of residual connections inside the branches.

    Attributes:
        kinds: the kinds of the residual modules in parallel, even if they count as one; empty if there are no such.
    """

    def __init__(
        self,
        name: str,
        before: nn.Module | None,
        skip_branch: nn.Module | None,
        residual_branch: nn.Module,
        after: nn.Module | None,
        pad_before: int | None = None,
        nested: int = 0,
    ) -> None:
        super().__init__()
        self.nested = nested
        self.together: nn.Module | None = None
        self.kinds: tuple[str, ...] = ()
        self.name, self.pad_before = name, pad_before
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

    def in_parallel(self, together: nn.Module, modules: Sequence[nn.Module]) -> None:
        """Know the residual module as several in parallel, whose outputs it adds.

        Args:
            together: returns all their outputs as a tuple, what they share computed once.
            modules: returns the output of one each.
        """
        self.kinds = tuple(map(kind_of, modules))
        self.residual_modules = len(modules)
        self.together = together
        for number, module in enumerate(modules, 1):
            self.add_module(f"module_{number}", module)

    def as_one_module(self) -> None:
        """Make one residual module of those in parallel."""
        if self.residual_modules > 1:
            for number in range(1, self.residual_modules + 1):
                delattr(self, f"module_{number}")
            self.residual_modules, self.together = 1, None

    def parts(self, x: Tensor, wanted: Collection[int] | None = None) -> tuple[Tensor | None, ...]:
        if self.together is None:
            return super().parts(x, wanted)
        x, numbers = self._before(x), range(1, self.residual_modules + 1)
        skip = self._skip(x) if wanted is None or 0 in wanted else None
        if wanted is None or set(numbers) <= set(wanted):
            return (skip, *self.together(x))
        of_each = (self.get_submodule(f"module_{i}")(x) if i in wanted else None for i in numbers)
        return (skip, *of_each)

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
        form = self._form_or_reason()
        return None if isinstance(form, str) else form

    def unfused_reason(self) -> str:
        form = self._form_or_reason()
        return form if isinstance(form, str) else super().unfused_reason()

    def _form_or_reason(self) -> Form | str:
        """Return the form in which fused engines take the block, or why they cannot run it."""
        # A padding skip has no steps.
        skip = [] if self.pad_before is not None else _steps(self.skip_branch)
        before, residual, after = map(_steps, (self.before, self.residual_branch, self.after))
        if residual is None:
            return "its residual module is not a chain of convolutions, batch normalisations and ReLUs"
        if before is None:
            return "its branches begin with other shared operations than a batch normalisation and a ReLU"
        if skip is None:
            return OTHER_SKIP
        if after is None or [step.kind for step in after] not in ([], ["relu"]):
            return "its addition is followed by something other than a ReLU"
        form = self._post_activation_form if after else self._fused_form
        return form(before, skip, residual)

    def _fused_form(self, before: list[_Step], skip: list[_Step], residual: list[_Step]) -> FusedForm | str:
        units = _units([*before, *residual])
        if units is None:
            return "its residual module does not repeat batch normalisation, ReLU, convolution"
        if not before and not skip:
            return FusedForm(units, pad=self.pad_before is not None, pad_before=self.pad_before or 0)
        if [step.kind for step in skip] != ["conv"]:
            return OTHER_SKIP
        if [step.kind for step in before] != ["bn", "relu"]:
            return "its skip connection is a projection that does not share a batch normalisation and a ReLU with it"
        return FusedForm(units, projection=skip[0].conv)

    def _post_activation_form(
        self, before: list[_Step], skip: list[_Step], residual: list[_Step]
    ) -> PostActivationForm | str:
        if before:
            return "its branches share operations, and a ReLU follows its addition"
        kinds = [step.kind for step in residual]
        count = (len(kinds) + 1) // 3
        if count == 0 or kinds != ["conv", "bn", "relu"] * (count - 1) + ["conv", "bn"]:
            return "its residual module is not convolutions with a batch normalisation each and ReLUs between"
        convs, bns = tuple(step.conv for step in residual[::3]), tuple(step.bn for step in residual[1::3])
        skip_kinds = [step.kind for step in skip]
        if skip_kinds not in ([], ["conv"], ["conv", "bn"]):
            return OTHER_SKIP
        projection, projection_bn = skip[0].conv if skip else None, skip[1].bn if len(skip) > 1 else None
        pads, pad_before = self.pad_before is not None, self.pad_before or 0
        return PostActivationForm(convs, bns, projection, projection_bn, pads, pad_before)

    def skip_kind(self) -> str:
        """Return the kind of the skip connection in words, and what it shares with the residual branch.

        The kinds are identity, pad, projection (with weights) and other.
        """
        if self.skip_branch is None:
            kind = "identity"
        elif self.pad_before is not None:
            kind = "pad"
        else:
            kind = "projection" if any(True for _ in self.skip_branch.parameters()) else "other"
        if self.before is None or isinstance(self.form(), FusedForm):
            return kind
        layers = sum(parameter.ndim > 1 for parameter in self.before.parameters())
        return f"{kind} after {counted(layers, 'shared layer') if layers else 'a shared part'}"

    def kind(self) -> str:
        """Return the kind of the residual module in a few words."""
        form = self.form()
        if form is not None:
            activation = "pre" if isinstance(form, FusedForm) else "post"
            return f"{activation}-activation {_kernel_pattern(form.convs)}"
        kind = " and ".join(self.kinds) + " in parallel" if self.kinds else kind_of(self.residual_branch)
        within = f" with {counted(self.nested, 'residual connection')} inside" if self.nested else ""
        return f"{kind}{within}{', then an activation' if has_activation(self.after) else ''}"


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


def zeros_before(skip: nn.Module | None, residual: nn.Module, x: Tensor, out: torch.Size) -> int | None:
    """Return how many zero channels a skip connection adds before those of its input, if it only subsamples, by the
    residual module's strides, and adds zero channels, to its width; None if it does anything else.

    Args:
        x: an input of the block, whose shape, type and device matter.
        out: shape of the block's output.
    """
    steps = _steps(residual)
    if skip is None or not steps or x.ndim != 4 or any(True for _ in skip.parameters()):
        return None
    convs = [step.conv for step in steps if step.kind == "conv"]
    if not convs or convs[-1].out_channels < x.shape[1]:
        return None
    down, across = (math.prod(conv.stride[i] for conv in convs) for i in (0, 1))
    if (down, across, convs[-1].out_channels) == (1, 1, x.shape[1]):
        return None
    added = convs[-1].out_channels - x.shape[1]
    # Random, since an input of zeros, which a stem may give, does not show where others are added.
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
    small, actual = x[:, :, ::down, ::across], skip(x.clone())
    for before in range(added + 1):
        expected = F.pad(small, (0, 0, 0, 0, before, added - before))
        if actual.shape == expected.shape == out and torch.equal(actual, expected):
            return before
    return None


def _kernel_pattern(convs: Sequence[nn.Conv2d]) -> str:
    """Return basic, bottleneck, or the kernel sides in words."""
    kernels = [conv.kernel_size[0] for conv in convs]
    return {(3, 3): "basic", (1, 3, 1): "bottleneck"}.get(
        tuple(kernels), "of kernels " + ", ".join(map(str, kernels))
    )
