"""Outputs of many lesioned copies of a network in one walk, and their test errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathnet.checks import check_callable, check_integer, described, one_of
from pathnet.data import Data
from pathnet.data.images import check_data_set
from pathnet.engines.fallback import through_shared_prefixes
from pathnet.full_precision import full_precision
from pathnet.lesion.networks import BATCH, Lesion, Scaled, check_lesions, lesioned_as, recalibrated, reorder
from pathnet.models.residual_net import Block, ResidualNet, check_net
from pathnet.recorder import Recorder
from pathnet.recording import BatchNormMode, snapshot

__all__ = ["BatchNormPolicy", "Errors", "Take", "errors", "factored", "in_type", "spread"]

BatchNormPolicy = Literal["running", "batch", "recalibrated"]


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
        tests = (scipy.stats.binomtest(int(wrong), self.images) for wrong in self.wrong)
        return np.array([test.proportion_ci(method="wilson") for test in tests]).reshape(-1, 2)


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
        ValueError: a lesion does not fit the network, an argument is out of its range, or an output of a lesioned
            network is not finite.
    """
    check_net(net)
    check_data_set("data", data)
    one_of("bn", bn, BatchNormPolicy)
    if progress is not None:
        check_callable("progress", progress)
    if not isinstance(lesions, Sequence) or isinstance(lesions, str | bytes):
        raise ValueError(f"lesions: expected a list of Lesions, got {described(lesions)}")
    for lesion in lesions:
        if not isinstance(lesion, Lesion):
            raise ValueError(f"lesions: expected a list of Lesions, got one with {described(lesion)}")
    indices = spread(data, images)
    check_lesions(net, data, lesions)
    device = next(net.parameters()).device
    wrong = np.zeros(len(lesions), np.int64)
    done, total = 0, len(indices) * len(lesions)
    for own, outputs in _jobs(net, data, lesions, bn):
        for number, part in enumerate(indices.split(BATCH)):  # type: ignore[no-untyped-call]
            batch, labels = data.normalise(data.test.take(part)).to(device), data.test.labels[part].to(device)
            found = outputs(batch, partial(_wrong, labels=labels))
            counts, finite = torch.stack(found).cpu().numpy().T
            if not finite.all():
                which = own[int(finite.argmin())]
                raise ValueError(
                    f"lesions: expected finite outputs, got NaN or infinity from lesion {which}, {lesions[which]}, "
                    f"on batch {number}"
                )
            wrong[own] += counts
            done += len(part) * len(own)
            if progress is not None:
                progress(done, total, "images through lesioned networks")
    return Errors(wrong, len(indices), bn)


def _wrong(output: Tensor, labels: Tensor) -> Tensor:
    """int64 [2]: how many answers are wrong, and whether all outputs are finite."""
    return torch.stack([(output.argmax(-1) != labels).sum(), torch.isfinite(output).all()])


def spread(data: Data, images: int) -> Tensor:
    """int64: which test images are taken, so many of them spread evenly over the split; 0 for all.

    Raises:
        ValueError: there are not so many.
    """
    images = check_integer("images", images)
    if not 0 <= images <= len(data.test):
        raise ValueError(f"images: expected 0 (all) to {len(data.test)} (the test images), got {described(images)}")
    count = images or len(data.test)
    return torch.arange(count) * len(data.test) // count


Take = Callable[[Tensor], Tensor]
Outputs = Callable[[Any, Take], list[Tensor]]
Job = tuple[list[int], Outputs]


def _jobs(net: ResidualNet, data: Data, lesions: Sequence[Lesion], bn: BatchNormPolicy) -> Iterator[Job]:
    """Which lesions run together, and what takes images [B, C, H, W] and what is wanted of an output [B, classes] to
    what each of theirs gives."""
    if bn == "recalibrated":
        for number, lesion in enumerate(lesions):
            ready = recalibrated(lesioned_as(net, lesion), data)
            yield [number], lambda images, take, ready=ready: [take(_plain(ready, images))]  # type: ignore[misc]
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
        yield own, factored(ordered, factors, bn)


def factored(
    net: ResidualNet,
    factors: Sequence[Sequence[float]],
    bn: BatchNormMode,
    dtype: torch.dtype = torch.float32,
    images: bool = True,
) -> Outputs:
    """Takes inputs and what is wanted of an output to what every way's output gives: its factors on the modules.

    The factor 0 deletes a block.

    Args:
        dtype: float32, or float64.
        images: whether inputs are images, which go through the engine where deleting leaves the skip; others go
            through the blocks themselves, and one output of theirs exists at a time.
    """
    if images and all(type(block).lesioned is Block.lesioned for block in net):
        recorder = Recorder(net, bn, precision="float64" if dtype == torch.float64 else "float32")
        modules = torch.tensor(factors, dtype=dtype)
        routing = torch.stack([torch.ones_like(modules), modules], -1)
        return lambda inputs, take: [take(output) for output in recorder.routed_outputs(inputs, routing)]
    frozen = snapshot(net, bn, dtype)
    return lambda inputs, take: _walked(frozen, in_type(inputs, dtype), factors, take)


def in_type(inputs: Any, dtype: torch.dtype) -> Any:
    """A copy, since a stem may begin with an in-place ReLU; numbers of tokens stay what they are."""
    if not isinstance(inputs, Tensor):
        return inputs
    return inputs.to(dtype if inputs.is_floating_point() else inputs.dtype, copy=True)


@full_precision()
@torch.no_grad()
def _walked(net: ResidualNet, inputs: Any, factors: Sequence[Sequence[float]], take: Take) -> list[Tensor]:
    """By the blocks' own `lesioned`."""
    blocks = list(net)

    def apply(i: int, y: Tensor, factor: float) -> Tensor:
        if factor == 0:
            return blocks[i].lesioned(y.clone())
        block = blocks[i] if factor == 1 else Scaled(blocks[i], factor)
        return torch.as_tensor(block(y.clone()))

    # Copies, since a head may begin with an in-place ReLU, and ways may end alike.
    return [take(net.head(y_n.clone())) for y_n in through_shared_prefixes(net.stem(inputs), factors, apply)]


@full_precision()
@torch.no_grad()
def _plain(net: ResidualNet, images: Tensor) -> Tensor:
    return torch.as_tensor(net(images))
