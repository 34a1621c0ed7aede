"""Running statistics of batch normalisation for lesioned networks, from a few training batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from pathnet.checks import check_integer, described
from pathnet.data import Batches, Data
from pathnet.data.batches import labelled, sent
from pathnet.data.passes import of_element
from pathnet.full_precision import full_precision
from pathnet.lesion.networks import BATCH
from pathnet.models.hooks import copy_without_hooks
from pathnet.models.residual_net import ResidualNet, check_net

__all__ = ["RECALIBRATION_BATCHES", "check_training_split", "recalibrated"]

RECALIBRATION_BATCHES = 8
"""Default number of training batches that recalibrated running statistics are the means over."""
MOST_BATCHES = 10_000


@full_precision()
@torch.no_grad()
def recalibrated(
    net: ResidualNet, data: Data | Batches | Iterable[Any], batches: int = RECALIBRATION_BATCHES, seed: int = 0
) -> ResidualNet:
    """Return a copy in evaluation mode whose running statistics are means over a few training batches.

    Args:
        net: the network, such as a lesioned one; it stays unchanged.
        data: a data set; `pathnet.data.Batches` with training batches; or an iterable of training batches as `errors`
            takes test batches.
        batches: number of random batches of 128 training images, without augmentation, that the copy runs on; of a
            caller's own batches, the first of them, or all if there are fewer.
        seed: seed of the random batches of a data set.

    Raises:
        ValueError: the network's running statistics are frozen, or an argument is out of range.

    Example:
        >>> import pathnet
        >>> from pathnet import lesion
        >>> data = pathnet.data.synthetic(images=128, classes=4, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, num_classes=4, in_channels=1)
        >>> recalibrated = lesion.recalibrated(lesion.delete(net, [3]), data, batches=2)
        >>> net.head.bn.running_var.mean().item(), recalibrated.head.bn.running_var.mean().item() == 1
        (1.0, False)
    """
    check_net(net)
    batches, seed = check_integer("batches", batches, 1, MOST_BATCHES), check_integer("seed", seed, 0)
    if net.frozen_statistics:
        raise ValueError(f"net: expected running statistics that can change, got fixed {net.frozen_statistics[0]}")
    recalibrating = copy_without_hooks(net).eval()
    norms = [module for module in recalibrating.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    device = next(net.parameters()).device
    for number, inputs in enumerate(_training_inputs(data, batches, seed)):
        with of_element(number, named=not isinstance(data, Data)):
            recalibrating(sent(inputs, device))
    return recalibrating.eval()


def _training_inputs(data: Data | Batches | Iterable[Any], batches: int, seed: int) -> Iterator[Any]:
    if isinstance(data, Data):
        for batch in range(batches):
            yield data.random_batch(data.batch_size(BATCH), seed, batch)[0]
        return
    check_training_split(data, needed=isinstance(data, Batches))
    source = data.train if isinstance(data, Batches) else labelled("data", data)
    yield from (inputs for inputs, _ in islice(source or (), batches))


def check_training_split(data: object, needed: bool = True) -> None:
    """Raise ValueError if ``data`` has no training batches.

    Args:
        needed: whether an iterable of test batches alone is refused too.
    """
    if needed and not isinstance(data, Data) and (not isinstance(data, Batches) or data.train is None):
        raise ValueError(
            "data: expected a data set, or pathnet.data.Batches with training batches (train=), to recalibrate batch "
            f"normalisation, got {described(data)}"
        )
