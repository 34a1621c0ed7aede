"""Lesioned networks: blocks deleted, in another order, their modules scaled; over the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathnet.checks import MOST_INTEGER, check_integer, check_integers, check_number
from pathnet.data import Data
from pathnet.data.images import check_data_set
from pathnet.full_precision import full_precision
from pathnet.models.residual_net import Block, ResidualNet, check_inputs, check_net

__all__ = [
    "BATCH",
    "Lesion",
    "RECALIBRATION_BATCHES",
    "Scaled",
    "check_lesions",
    "delete",
    "lesioned_as",
    "recalibrated",
    "reorder",
    "shapes",
]

BATCH = 128
RECALIBRATION_BATCHES = 8
MOST_BATCHES = 10_000


@dataclass(frozen=True)
class Lesion:
    """What is done to a network; blocks are numbered from 0. Nothing leaves it intact.

    Attributes:
        deleted: the blocks that are deleted, of the network in its new order.
        order: the blocks in the order in which they run; empty for the order of training.
        scale: what the residual modules that are kept are multiplied by (k / n after training with k of n).
    """

    deleted: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("deleted", "order"):
            object.__setattr__(self, name, check_integers(name, getattr(self, name), 0, MOST_INTEGER))
        object.__setattr__(self, "scale", check_number("scale", self.scale, above=0))


class Deleted(Block):
    """A deleted block: what is left of it is its skip."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def skip(self, x: Tensor) -> Tensor:
        return self.block.lesioned(x)

    def residual(self, x: Tensor) -> Tensor:
        return 0.0 * self.skip(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x)


class Scaled(Block):
    """A block whose residual module is multiplied by a factor."""

    def __init__(self, block: Block, scale: float) -> None:
        super().__init__()
        self.block, self.scale = block, scale

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip, residual = self.block.branches(x)
        return skip, self.scale * residual

    def join(self, z: Tensor) -> Tensor:
        return self.block.join(z)

    def lesioned(self, x: Tensor) -> Tensor:
        return self.block.lesioned(x)


class Lesioned(ResidualNet):
    """A network over the same weights as ``whole``. Within ``with``, ``whole`` itself is the lesioned one."""

    def __init__(self, whole: ResidualNet, blocks: Sequence[Block]) -> None:
        super().__init__(whole.stem, blocks, whole.head)
        self.training = whole.training
        self.frozen_statistics = whole.frozen_statistics
        # In a tuple, since a module of a module would be registered, and its weights counted twice.
        self._whole = (whole,)
        self._intact: nn.ModuleList | None = None

    def __enter__(self) -> ResidualNet:
        (whole,) = self._whole
        self._intact, whole.blocks = whole.blocks, self.blocks
        return whole

    def __exit__(self, *_: object) -> None:
        (whole,) = self._whole
        assert self._intact is not None
        whole.blocks = self._intact


def delete(net: ResidualNet, blocks: Iterable[int]) -> Lesioned:
    """The network without the given blocks (from 0), each of which leaves its skip (section 4.1 and 4.2).

    It shares the weights of ``net``. As a context manager it lesions ``net`` itself for a while::

        with lesion.delete(net, [3]):
            accuracy = training.evaluate(net, data)

    Raises:
        ValueError: a block is not one of the network's, or given twice.
    """
    check_net(net)
    deleted = check_integers("blocks", blocks, 0, MOST_INTEGER)
    _check_deleted("blocks", net, deleted)
    return Lesioned(net, [Deleted(block) if i in deleted else block for i, block in enumerate(net)])


def reorder(net: ResidualNet, order: Iterable[int]) -> Lesioned:
    """The network with its blocks (from 0) in another order (section 4.3); a context manager as `delete` is.

    Raises:
        ValueError: ``order`` does not hold every block once.
    """
    check_net(net)
    blocks, order = list(net), check_integers("order", order, 0, MOST_INTEGER)
    _check_order(net, order)
    return Lesioned(net, [blocks[i] for i in order])


def shapes(net: ResidualNet, images: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes [C, H, W] that enter and leave every block, for images [B, C, H, W] of which the first is used.

    A block that changes the shape is a downsampling block; only blocks of equal shapes can change places.

    Raises:
        ValueError: an argument is not such a one.
    """
    check_net(net)
    if len(check_inputs("images", images, net).shape) == 0 or len(images) == 0:
        raise ValueError(f"images: expected a batch of at least one, got shape {list(images.shape)}")
    found = []
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            y = net.stem(images[:1].clone())
            for block in net:
                entered, y = tuple(y.shape[1:]), block(y.clone())
                found.append((entered, tuple(y.shape[1:])))
    finally:
        net.train(training)
    return found


def lesioned_as(net: ResidualNet, lesion: Lesion) -> ResidualNet:
    """The network with all that a lesion does to it."""
    ordered = reorder(net, lesion.order) if lesion.order else net
    if lesion.scale != 1:
        ordered = Lesioned(ordered, [Scaled(block, lesion.scale) for block in ordered])
    return delete(ordered, lesion.deleted)


@full_precision()
@torch.no_grad()
def recalibrated(net: ResidualNet, data: Data, batches: int = RECALIBRATION_BATCHES, seed: int = 0) -> ResidualNet:
    """A copy in evaluation mode whose running statistics are the means over a few training batches.

    Args:
        batches: random batches of 128 training images, not augmented, that the whole copy runs on.

    Raises:
        ValueError: running statistics of the network are fixed, or an argument is out of its range.
    """
    check_net(net)
    check_data_set("data", data)
    batches, seed = check_integer("batches", batches, 1, MOST_BATCHES), check_integer("seed", seed, 0)
    if net.frozen_statistics:
        raise ValueError(f"net: expected running statistics that can change, got fixed {net.frozen_statistics[0]}")
    copied = copy.deepcopy(net).eval()
    norms = [module for module in copied.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    device = next(net.parameters()).device
    for batch in range(batches):
        images, _ = data.random_batch(min(BATCH, len(data.train)), seed, batch)
        copied(images.to(device))
    return copied.eval()


def check_lesions(net: ResidualNet, data: Data, lesions: Sequence[Lesion]) -> None:
    """Raises ValueError unless every lesion fits the network."""
    for lesion in lesions:
        _check_deleted("deleted", net, lesion.deleted)
        if lesion.order:
            _check_order(net, lesion.order)
    orders = {lesion.order for lesion in lesions if lesion.order}
    if not orders:
        return
    images, _ = next(data.test_batches(1))
    met = shapes(net, images.to(next(net.parameters()).device))
    for order in orders:
        leaving = met[0][0]
        for place, block in enumerate(order):
            if met[block][0] != leaving:
                raise ValueError(
                    f"order: block {block} takes {list(met[block][0])}, got {list(leaving)} in place {place}"
                )
            leaving = met[block][1]


def _check_deleted(name: str, net: ResidualNet, deleted: Sequence[int]) -> None:
    if len(set(deleted)) < len(deleted) or not all(0 <= i < net.n for i in deleted):
        raise ValueError(f"{name}: expected different numbers from 0 to {net.n - 1}, got {list(deleted)}")


def _check_order(net: ResidualNet, order: Sequence[int]) -> None:
    if sorted(order) != list(range(net.n)):
        raise ValueError(f"order: expected every number from 0 to {net.n - 1} once, got {list(order)}")
