"""Lesioned networks written without pathnet.lesion, and data on which lesions show."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from pathnet.data import Data, InMemory
from pathnet.models import ResidualNet, VggLayer


def rebuilt(net: ResidualNet, order: Sequence[int], deleted: Collection[int], images: Tensor) -> Tensor:
    """Return the outputs with blocks deleted; a deleted block keeps only the operation that changes the shape."""
    y = net.stem(images)
    for i in order:
        block = net.blocks[i]
        if i not in deleted:
            y = block(y)
        elif isinstance(block, VggLayer):
            y = nn.functional.max_pool2d(y, 2) if block.pool else y
        elif block.projection is not None:
            y = block.projection(torch.relu(block.bns[0](y)))
        elif block.pad:
            y = nn.functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1]))
    return net.head(y)


@torch.no_grad()
def with_modules_times(net: ResidualNet, factor: float) -> ResidualNet:
    """Return a copy whose residual modules are multiplied by a positive factor, through their weights."""
    copied = copy.deepcopy(net)
    for block in copied.blocks:
        if isinstance(block, VggLayer):  # pooling and ReLU pass a positive factor on
            block.bn.weight.mul_(factor)
            block.bn.bias.mul_(factor)
        else:
            block.convs[-1].weight.mul_(factor)
    return copied


@torch.no_grad()
def labelled_by(net: ResidualNet, images: Data) -> Data:
    """Label the test images by the intact network, so a lesion's errors are the answers that it changes.

    The network's outputs are centred and scaled first, because a random network gives every image the same answer.
    """
    batch, _ = next(images.test_batches(len(images.test)))
    outputs = net(batch)
    net.head.linear.weight.div_(outputs.std(0)[:, None])
    net.head.linear.bias.sub_(outputs.mean(0)).div_(outputs.std(0))
    answers = net(batch).argmax(1)
    return dataclasses.replace(images, test=InMemory(images.test.take(torch.arange(len(answers))), answers))


def wrong(outputs: Tensor, labels: Tensor) -> int:
    return int((outputs.argmax(1) != labels).sum())
