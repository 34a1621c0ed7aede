"""The blocks that the fused engines can run, and the reasons for refusing others.

A reason names the block that fails, numbered from 0, and says what is wrong with it.
"""

from __future__ import annotations

import math

from torch import nn

from pathnet.models.residual_net import Form, FusedForm, PostActivationForm, ResidualNet
from pathnet.recording import BatchNormMode

__all__ = ["post_activation", "unsupported_block", "unsupported_form"]


def post_activation(net: ResidualNet) -> bool:
    """Return whether all blocks have the form of post-activation blocks."""
    return all(isinstance(block.form(), PostActivationForm) for block in net)


def unsupported_form(net: ResidualNet, bn: BatchNormMode) -> str | None:
    """Return why a network cannot be packed into tables, or None."""
    forms: list[Form] = []
    for index, block in enumerate(net):
        form = block.form()
        if form is None:
            return f"block {index}: {block.unfused_reason()}"
        forms.append(form)
    mixed = _unlike_most(forms)
    if mixed is not None:
        return mixed
    for index, form in enumerate(forms):
        reason = _unsupported_in_tables(form, bn)
        if reason is not None:
            return f"block {index}: {reason}"
    return None


def unsupported_block(form: Form) -> str | None:
    """Return why kernels for convolutions that keep the side cannot run a block, or None."""
    reason = _unsupported_part(form)
    if reason is not None:
        return reason
    for conv in _convolutions(form):
        if conv.kernel_size[0] % 2 == 0 or int(conv.padding[0]) != conv.kernel_size[0] // 2:
            return "it has a convolution that changes the side by more than its stride"
    if form.projection is not None and form.projection.kernel_size[0] != 1:
        return "its skip connection is a projection with a kernel larger than 1"
    # Strides 2 and 3 give the same output size on a side of 4, so compare strides, not shapes.
    # A list, because torch.compile cannot trace a generator here.
    stride = math.prod([conv.stride[0] for conv in form.convs])
    if form.projection is not None and form.projection.stride[0] != stride:
        return "its skip connection is a projection whose stride differs from its module's"
    return None


def _unlike_most(forms: list[Form]) -> str | None:
    """Return the first block of the rarer kind if pre-activation and post-activation blocks are mixed, or None."""
    post = [isinstance(form, PostActivationForm) for form in forms]
    if all(post) or not any(post):
        return None
    # Of as many, the kind of the first block is the network's.
    rarer = sum(post) < len(post) / 2 or (sum(post) == len(post) / 2 and not post[0])
    kind, other = ("post", "pre") if rarer else ("pre", "post")
    return f"block {post.index(rarer)}: it is a {kind}-activation block in a network of {other}-activation blocks"


def _unsupported_in_tables(form: Form, bn: BatchNormMode) -> str | None:
    reason = _unsupported_part(form)
    if reason is not None:
        return reason
    if bn == "running" and any(norm.running_var is None for norm in _norms(form)):
        return "it keeps no running statistics"
    if bn == "batch" and _ends_without_norm(form):
        return "its skip connection is a projection without batch normalisation"
    return None


def _unsupported_part(form: Form) -> str | None:
    """Return what no fused engine can run, or None."""
    for conv in _convolutions(form):
        reason = _unsupported_convolution(conv)
        if reason is None and conv.bias is not None and isinstance(form, FusedForm):
            reason = "with a bias"
        if reason is not None:
            return f"{'its skip connection' if conv is form.projection else 'it'} has a convolution {reason}"
    added = form.convs[-1].out_channels - form.convs[0].in_channels if form.pad else 0
    if added < 0:
        return "its skip connection drops channels"
    if not 0 <= form.pad_before <= added:
        return f"its skip connection adds {added} channels, {form.pad_before} of them before the input's"
    return None


def _convolutions(form: Form) -> tuple[nn.Conv2d, ...]:
    return form.convs if form.projection is None else (*form.convs, form.projection)


def _norms(form: Form) -> list[nn.BatchNorm2d]:
    if not isinstance(form, PostActivationForm):
        return [unit.bn for unit in form.units]
    return [*form.bns, *([] if form.projection_bn is None else [form.projection_bn])]


def _ends_without_norm(form: Form) -> bool:
    return isinstance(form, PostActivationForm) and form.projection is not None and form.projection_bn is None


def _unsupported_convolution(conv: nn.Conv2d) -> str | None:
    if not _plain(conv):
        return "that is grouped, dilated or not square"
    if int(conv.padding[0]) >= conv.kernel_size[0]:
        return "whose padding reaches beyond its kernel"
    return None


def _plain(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.stride[0] == conv.stride[1]
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.padding[0] == conv.padding[1]
    )
