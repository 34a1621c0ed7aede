"""The blocks that the fused engines can run, and the reasons for refusing others."""

from __future__ import annotations

import math

from torch import nn

from pathnet.models.residual_net import Form, PostActivationForm, ResidualNet
from pathnet.recording import BatchNormMode

__all__ = ["post_activation", "unsupported_block", "unsupported_form"]


def post_activation(net: ResidualNet) -> bool:
    """Return whether all blocks have the form of post-activation blocks."""
    return all(isinstance(block.form(), PostActivationForm) for block in net)


def unsupported_form(net: ResidualNet, bn: BatchNormMode) -> str | None:
    """Return why a network cannot be packed into tables, or None."""
    post = post_activation(net)
    for number, block in enumerate(net, 1):
        form = block.form()
        if form is None:
            return f"block {number} has no fused form"
        if isinstance(form, PostActivationForm) and not post:
            return f"block {number} is post-activation, but other blocks are not"
        for conv in _convolutions(form):
            reason = _unsupported_convolution(conv) or ("with a bias" if conv.bias is not None and not post else None)
            if reason is not None:
                return f"block {number} has a convolution {reason}"
        if bn == "running" and any(norm.running_var is None for norm in _norms(form)):
            return f"block {number} keeps no running statistics"
        if bn == "batch" and _ends_without_norm(form):
            return f"block {number} has a projection without batch normalisation"
    return None


def unsupported_block(form: Form) -> str | None:
    """Return why kernels for convolutions that keep the side cannot run a block, or None."""
    biased = isinstance(form, PostActivationForm)
    for conv in _convolutions(form):
        reason = _unsupported_convolution(conv) or ("with a bias" if conv.bias is not None and not biased else None)
        if reason is None and (conv.kernel_size[0] % 2 == 0 or int(conv.padding[0]) != conv.kernel_size[0] // 2):
            reason = "that changes the side by more than its stride"
        if reason is not None:
            return f"it has a convolution {reason}"
    if form.projection is not None and form.projection.kernel_size[0] != 1:
        return "it has a projection with a kernel larger than 1"
    # Strides 2 and 3 give the same output size on a side of 4, so compare strides, not shapes.
    # A list, because torch.compile cannot trace a generator here.
    stride = math.prod([conv.stride[0] for conv in form.convs])
    if form.projection is not None and form.projection.stride[0] != stride:
        return "it has a projection whose stride differs from its module's"
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
