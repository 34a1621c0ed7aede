"""Lesions: a trained network with blocks deleted or in another order, at test time (section 4 of the paper).

Lesioned copies of a batch go through the engine together, and those that begin alike share their beginning: all
single deletions of n blocks cost about half of n forward passes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor, nn

from pathnet.data import Data
from pathnet.engines.unfused import through_shared_prefixes
from pathnet.models.residual_net import Block, ResidualNet
from pathnet.record import full_precision, one_of, snapshot
from pathnet.tape import Recorder

__all__ = ["BatchNormPolicy", "Errors", "Lesion", "delete", "errors", "recalibrated", "reorder", "shapes"]

BatchNormPolicy = Literal["running", "batch", "recalibrated"]
BATCH = 128
RECALIBRATION_BATCHES = 8


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


@dataclass(frozen=True)
class Errors:
    """How often lesioned networks were wrong.

    Attributes:
        wrong: int64 [L], the images that each gave a wrong class.
        images: how many test images there were.
        bn: the policy for batch normalisation: ``running`` statistics of training (the paper's), those of the
            ``batch``, or ``recalibrated`` on training batches for each lesioned network.
    """

    wrong: NDArray[np.int64]
    images: int
    bn: BatchNormPolicy

    @property
    def rate(self) -> NDArray[np.float64]:
        """float64 [L], in [0, 1]."""
        return self.wrong / self.images

    @property
    def interval(self) -> NDArray[np.float64]:
        """float64 [L, 2], the 95 % interval of the error rate (Wilson 1927)."""
        tests = (binomtest(int(wrong), self.images) for wrong in self.wrong)
        return np.array([test.proportion_ci(method="wilson") for test in tests]).reshape(-1, 2)


class _Deleted(Block):
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


class _Scaled(Block):
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


class _Lesioned(ResidualNet):
    """A network over the same weights as ``whole``. Within ``with``, ``whole`` itself is the lesioned one."""

    def __init__(self, whole: ResidualNet, blocks: Sequence[Block]) -> None:
        super().__init__(whole.stem, blocks, whole.head)
        self.training = whole.training
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


def delete(net: ResidualNet, blocks: Iterable[int]) -> _Lesioned:
    """The network without the given blocks (from 0), each of which leaves its skip (section 4.1 and 4.2).

    It shares the weights of ``net``. As a context manager it lesions ``net`` itself for a while::

        with lesion.delete(net, [3]):
            accuracy = training.evaluate(net, data)

    Raises:
        ValueError: a block is not one of the network's, or given twice.
    """
    deleted = tuple(blocks)
    _check_deleted(net, deleted)
    return _Lesioned(net, [_Deleted(block) if i in deleted else block for i, block in enumerate(net)])


def reorder(net: ResidualNet, order: Iterable[int]) -> _Lesioned:
    """The network with its blocks (from 0) in another order (section 4.3); a context manager as `delete` is.

    Raises:
        ValueError: ``order`` does not hold every block once.
    """
    blocks, order = list(net), tuple(order)
    _check_order(net, order)
    return _Lesioned(net, [blocks[i] for i in order])


def shapes(net: ResidualNet, images: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes [C, H, W] that enter and leave every block, for images [B, C, H, W] of which the first is used.

    A block that changes the shape is a downsampling block; only blocks of equal shapes can change places.
    """
    found = []
    training = net.training
    net.eval()
    with torch.no_grad():
        y = net.stem(images[:1].clone())
        for block in net:
            entered, y = tuple(y.shape[1:]), block(y.clone())
            found.append((entered, tuple(y.shape[1:])))
    net.train(training)
    return found


def errors(
    net: ResidualNet,
    data: Data,
    lesions: Sequence[Lesion],
    bn: BatchNormPolicy = "running",
    images: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Errors:
    """The test errors of lesioned networks, each on the same images.

    Args:
        lesions: L of them; those with one order are the cheapest together.
        bn: the policy for batch normalisation, see `Errors`. ``recalibrated`` takes a copy of the network and
            a few batches of the training split for each lesion, and shares nothing.
        images: of the test split, spread evenly over it; 0 for all.
        progress: called with (images done, images in all, a note).

    Raises:
        ValueError: a lesion does not fit the network, or an argument is out of its range.
    """
    if bn != "recalibrated":
        one_of("bn", bn, BatchNormPolicy)
    if not 0 <= images <= len(data.test):
        raise ValueError(f"images: expected 0 (all) to {len(data.test)} (the test images), got {images}")
    _check(net, data, lesions)
    count = images or len(data.test)
    indices = torch.arange(count) * len(data.test) // count
    device = next(net.parameters()).device
    wrong = np.zeros(len(lesions), np.int64)
    done, total = 0, count * len(lesions)
    for own, outputs in _jobs(net, data, lesions, bn):
        for part in indices.split(BATCH):  # type: ignore[no-untyped-call]
            batch, labels = data.normalise(data.test.take(part)).to(device), data.test.labels[part].to(device)
            wrong[own] += (outputs(batch).argmax(-1) != labels).sum(1).cpu().numpy()
            done += len(part) * len(own)
            if progress is not None:
                progress(done, total, "images through lesioned networks")
    return Errors(wrong, count, bn)


Job = tuple[list[int], Callable[[Tensor], Tensor]]


def _jobs(net: ResidualNet, data: Data, lesions: Sequence[Lesion], bn: BatchNormPolicy) -> Iterator[Job]:
    """Which lesions run together, and what takes images [B, C, H, W] to their outputs [l, B, classes]."""
    if bn == "recalibrated":
        for number, lesion in enumerate(lesions):
            ready = recalibrated(_lesioned(net, lesion), data)
            yield [number], lambda images, ready=ready: _plain(ready, images)[None]  # type: ignore[misc]
        return
    together: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, lesion in enumerate(lesions):
        together[lesion.order].append(number)
    for order, own in together.items():
        ordered = reorder(net, order) if order else net
        # What each module is multiplied by; 0 where its block is deleted.
        factors = [
            [0.0 if i in lesions[number].deleted else lesions[number].scale for i in range(net.n)] for number in own
        ]
        yield own, _factored(ordered, factors, bn)


def _factored(net: ResidualNet, factors: Sequence[Sequence[float]], bn: Any) -> Callable[[Tensor], Tensor]:
    """Takes images [B, C, H, W] to outputs [l, B, classes]: for each way, its factors on the modules, 0 deletes."""
    if all(type(block).lesioned is Block.lesioned for block in net):
        recorder = Recorder(net, bn)
        modules = torch.tensor(factors)
        routing = torch.stack([torch.ones_like(modules), modules], -1)
        return lambda images: recorder.routed_outputs(images, routing)
    frozen = snapshot(net, bn, torch.float32)
    return lambda images: _walked(frozen, images, factors)


@full_precision()
@torch.no_grad()
def _walked(net: ResidualNet, images: Tensor, factors: Sequence[Sequence[float]]) -> Tensor:
    """[l, B, classes], by the blocks' own `lesioned`."""
    blocks = list(net)

    def apply(i: int, y: Tensor, factor: float) -> Tensor:
        if factor == 0:
            return blocks[i].lesioned(y.clone())
        block = blocks[i] if factor == 1 else _Scaled(blocks[i], factor)
        return torch.as_tensor(block(y.clone()))

    return torch.stack([net.head(y_n) for y_n in through_shared_prefixes(net.stem(images), factors, apply)])


def _lesioned(net: ResidualNet, lesion: Lesion) -> ResidualNet:
    ordered = reorder(net, lesion.order) if lesion.order else net
    if lesion.scale != 1:
        ordered = _Lesioned(ordered, [_Scaled(block, lesion.scale) for block in ordered])
    return delete(ordered, lesion.deleted)


@full_precision()
@torch.no_grad()
def _plain(net: ResidualNet, images: Tensor) -> Tensor:
    return torch.as_tensor(net(images))


@full_precision()
@torch.no_grad()
def recalibrated(net: ResidualNet, data: Data, batches: int = RECALIBRATION_BATCHES, seed: int = 0) -> ResidualNet:
    """A copy in evaluation mode whose running statistics are the means over a few training batches.

    Args:
        batches: random batches of 128 training images, not augmented, that the whole copy runs on.
    """
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


def _check(net: ResidualNet, data: Data, lesions: Sequence[Lesion]) -> None:
    for lesion in lesions:
        if not lesion.scale > 0:
            raise ValueError(f"scale: expected a factor above 0, got {lesion.scale}")
        _check_deleted(net, lesion.deleted)
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


def _check_deleted(net: ResidualNet, deleted: Sequence[int]) -> None:
    if len(set(deleted)) < len(deleted) or not all(0 <= i < net.n for i in deleted):
        raise ValueError(f"blocks: expected different numbers from 0 to {net.n - 1}, got {list(deleted)}")


def _check_order(net: ResidualNet, order: Sequence[int]) -> None:
    if sorted(order) != list(range(net.n)):
        raise ValueError(f"order: expected every number from 0 to {net.n - 1} once, got {list(order)}")
