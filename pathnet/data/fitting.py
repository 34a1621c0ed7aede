"""The check that a network takes a data set."""

from __future__ import annotations

from pathnet.data.images import Data
from pathnet.models.residual_net import ResidualNet, first_convolution

__all__ = ["check_fits"]


def check_fits(net: ResidualNet, data: Data) -> None:
    """Check that a network takes the images of a data set, and has an output for each of its classes.

    Channels are compared where the network begins with a convolution, and classes where its configuration tells their
    number.

    Raises:
        ValueError: the images have another number of channels, or there are more classes.
    """
    first, channels = first_convolution(net), data.image_shape[0]
    if first is not None and first.in_channels != channels:
        raise ValueError(
            f"data: expected images of {first.in_channels} channels (the network's), got {channels} in {data.name}"
        )
    outputs = (net.config or {}).get("num_classes", len(data.classes))
    if len(data.classes) > outputs:
        raise ValueError(
            f"data: expected at most {outputs} classes (the network's), got {len(data.classes)} in {data.name}"
        )
