"""The check that a network takes a data set."""

from __future__ import annotations

import copy

from torch import fx, nn

from pathnet.data.images import Data
from pathnet.models.residual_net import ResidualNet

__all__ = ["check_fits"]

KEEP_CHANNELS = (nn.Identity, nn.Dropout, nn.BatchNorm2d, nn.ReLU, nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d)
"""Modules whose outputs have as many channels as their inputs."""

KEEP_SHAPE = ("contiguous", "float", "to")
"""Methods of tensors whose results have the tensor's shape."""


def check_fits(net: ResidualNet, data: Data) -> None:
    """Check that a network takes the images of a data set, and has an output for each of its classes.

    Channels are compared where the stem convolves the images themselves, and classes where the configuration tells
    their number.

    Raises:
        ValueError: the images have another number of channels, or there are more classes.
    """
    expected, channels = _channels(net.stem), data.image_shape[0]
    if expected not in (None, channels):
        raise ValueError(
            f"data: expected images of {expected} channels (the network's), got {channels} in {data.name}"
        )
    outputs = (net.config or {}).get("num_classes", len(data.classes))
    if len(data.classes) > outputs:
        raise ValueError(
            f"data: expected at most {outputs} classes (the network's), got {len(data.classes)} in {data.name}"
        )


def _channels(stem: nn.Module) -> int | None:
    """Return the number of channels that a stem's convolution of the images takes, or None if none is known."""
    if isinstance(stem, nn.Conv2d):
        return stem.in_channels or None  # A lazy one takes any.
    graph_module = stem if isinstance(stem, fx.GraphModule) else _traced(stem)
    if graph_module is None:
        return None
    # Modules are registered in any order; the graph tells which of them get the images.
    modules = dict(graph_module.named_modules())
    images, *nodes = graph_module.graph.nodes
    with_channels = {images}
    for node in nodes:
        if not with_channels.issuperset(node.all_input_nodes[:1] or [node]):
            continue
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            return module.in_channels or None
        if isinstance(module, KEEP_CHANNELS) or (node.op == "call_method" and node.target in KEEP_SHAPE):
            with_channels.add(node)
    return None


def _traced(stem: nn.Module) -> fx.GraphModule | None:
    """Return the graph of a stem, or None if it cannot be traced, for example because it decides by values."""
    try:
        # Hooks and attributes of the caller's modules must not get to see what stands for tensors in a trace.
        copied = copy.deepcopy(stem)
        for module in copied.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return fx.symbolic_trace(copied)
    except Exception:  # Of whatever kind: the stem is anyone's code.
        return None
