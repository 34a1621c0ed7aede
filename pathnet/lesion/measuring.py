"""Outputs of many lesioned copies of a network from one shared forward pass, and their test errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathnet.checks import check_callable, described, one_of
from pathnet.data import Batches, Data
from pathnet.data.batches import sent
from pathnet.data.passes import Answers, Passes, count_answers
from pathnet.engines.fallback import through_shared_prefixes
from pathnet.full_precision import full_precision
from pathnet.intervals import wilson
from pathnet.lesion.networks import BATCH, Lesion, Scaled, check_lesions, lesioned_as, reorder
from pathnet.lesion.recalibration import check_training_split, recalibrated
from pathnet.models.inputs import map_tensors
from pathnet.models.residual_net import Block, ResidualNet, check_net
from pathnet.recorder import Recorder
from pathnet.recording import BatchNormMode, BatchNormPolicy, snapshot

__all__ = ["Errors", "Take", "errors", "factored", "in_type"]


@dataclass(frozen=True)
class Errors:
    """Test errors of L lesioned networks.

    Attributes:
        misclassified: bool [L, images], which test images each network classifies wrongly; which labels that count,
            for sequences.
        bn: the policy for batch normalisation: ``running`` statistics of training (the paper's), statistics of the
            test ``batch``, or running statistics ``recalibrated`` on training batches for each lesioned network.

    Example:
        >>> import numpy
        >>> from pathnet import lesion
        >>> misclassified = numpy.arange(360) < [[23], [58]]
        >>> measured = lesion.Errors(misclassified, bn="running")
        >>> measured.wrong, measured.rate.round(4)
        (array([23, 58]), array([0.0639, 0.1611]))
        >>> measured.interval.round(3)
        array([[0.043, 0.094],
               [0.127, 0.203]])
    """

    misclassified: NDArray[np.bool_]
    bn: BatchNormPolicy

    @property
    def wrong(self) -> NDArray[np.int64]:
        """Number of images that each network classifies wrongly, int64 [L]."""
        return np.asarray(self.misclassified.sum(1))

    @property
    def images(self) -> int:
        """Number of test images; of labels that count, for sequences."""
        return int(self.misclassified.shape[1])

    @property
    def rate(self) -> NDArray[np.float64]:
        """Error rates in [0, 1], float64 [L]."""
        return self.wrong / self.images

    @property
    def interval(self) -> NDArray[np.float64]:
        """95 % intervals of the error rates (Wilson 1927), float64 [L, 2]."""
        return np.array([wilson(int(wrong), self.images) for wrong in self.wrong]).reshape(-1, 2)


def errors(
    net: ResidualNet,
    data: Data | Batches | Iterable[Any],
    lesions: Sequence[Lesion],
    bn: BatchNormPolicy = "running",
    images: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Errors:
    """Return the test errors of lesioned networks, all measured on the same images (Veit et al. 2016, section 4).

    Args:
        net: the trained network, which stays unchanged.
        data: a data set; or `pathnet.data.Batches`; or an iterable of batches, used as they come (inputs normalised
            already): pairs of inputs and labels, or mappings with ``labels``. It is read once for each order of the
            blocks, and once more if there are orders, so an iterator serves only lesions without one.
        lesions: L lesions; those with equal orders share forward passes.
        bn: the policy for batch normalisation, see `Errors`. ``recalibrated`` copies the network and runs a few
            batches of the training split for each lesion, and shares no forward passes; it takes a data set or
            `pathnet.data.Batches`.
        images: number of images of a data set's test split, spread evenly over it; 0 for all.
        progress: called with (images done, images in total as far as known, a note).

    Raises:
        ValueError: a lesion does not fit the network, an argument is out of range, or an output of a lesioned
            network is not finite. What is wrong with an element of an iterable is told by its position, from 0.

    Example:
        >>> import torch
        >>> import pathnet
        >>> from pathnet.lesion import Lesion
        >>> _ = torch.manual_seed(0)
        >>> data = pathnet.data.synthetic(images=128, classes=4, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, num_classes=4, in_channels=1).eval()
        >>> lesions = [Lesion(), Lesion(deleted=(3,)), Lesion(deleted=(1, 3)), Lesion(order=(1, 0, 2, 3, 4, 5))]
        >>> measured = pathnet.lesion.errors(net, data, lesions)
        >>> measured.images, measured.rate.shape, measured.interval.shape
        (32, (4,), (4, 2))
    """
    check_net(net)
    one_of("bn", bn, BatchNormPolicy)
    if progress is not None:
        check_callable("progress", progress)
    if not isinstance(lesions, Sequence) or isinstance(lesions, str | bytes):
        raise ValueError(f"lesions: expected a list of Lesions, got {described(lesions)}")
    for lesion in lesions:
        if not isinstance(lesion, Lesion):
            raise ValueError(f"lesions: expected a list of Lesions, got one with {described(lesion)}")
    if bn == "recalibrated":
        check_training_split(data)
    orders = {lesion.order for lesion in lesions}
    times = len(orders) + any(orders)
    passes = Passes(data, BATCH, images, (times, "for each order of the blocks, and for their shapes"))
    check_lesions(net, lesions, passes)
    if not lesions:
        for _ in passes if passes.samples is None else ():
            continue
        return Errors(np.zeros((0, passes.samples or 0), np.bool_), bn)
    device = next(net.parameters()).device
    misclassified: list[list[NDArray[np.bool_]]] = [[] for _ in lesions]
    done = 0
    for numbers, outputs in _groups(net, data, lesions, bn):
        for number, (inputs, labels) in enumerate(passes):
            with passes.element(number):
                take = partial(count_answers, labels=labels.to(device))
                facts = torch.stack(outputs(sent(inputs, device), take)).cpu()
                answers = [Answers.of(each) for each in facts]
            for which, answer in zip(numbers, answers, strict=True):
                if not answer.finite:
                    raise ValueError(
                        f"lesions: expected finite outputs, got NaN or infinity from lesion {which}, "
                        f"{lesions[which]}, on batch {number}"
                    )
                misclassified[which].append(answer.misclassified)
            done += answers[0].total * len(numbers)
            if progress is not None:
                progress(done, max(done, (passes.samples or 0) * len(lesions)), "images through lesioned networks")
    if not passes.samples:
        raise ValueError("data: expected at least one label that counts, got none")
    return Errors(np.array([np.concatenate(batches) for batches in misclassified]), bn)


Take = Callable[[Tensor], Tensor]
Outputs = Callable[[Any, Take], list[Tensor]]
Group = tuple[list[int], Outputs]


def _groups(net: ResidualNet, data: Any, lesions: Sequence[Lesion], bn: BatchNormPolicy) -> Iterator[Group]:
    """Yield the numbers of lesions that run together, and the function that returns a result for each of them.

    The function takes images [B, C, H, W], and a function of one lesioned network's outputs [B, classes].
    """
    if bn == "recalibrated":
        for number, lesion in enumerate(lesions):
            ready = recalibrated(lesioned_as(net, lesion), data)
            yield [number], lambda images, take, ready=ready: [take(_plain(ready, images))]  # type: ignore[misc]
        return
    together: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, lesion in enumerate(lesions):
        together[lesion.order].append(number)
    for order, numbers in together.items():
        ordered = reorder(net, order) if order else net
        factors = [
            [0.0 if i in lesions[number].deleted else lesions[number].scale for i in range(net.n)]
            for number in numbers
        ]
        yield numbers, factored(ordered, factors, bn)


def factored(
    net: ResidualNet,
    factors: Sequence[Sequence[float]],
    bn: BatchNormMode,
    dtype: torch.dtype = torch.float32,
    images: bool = True,
) -> Outputs:
    """Return a function of (inputs, take) that returns ``take(output)`` for each list of factors.

    Args:
        factors: for each of L networks, the factor on each of its n residual modules; 0 deletes the block.
        dtype: float32 or float64.
        images: true if inputs are images; these run through the engine if deleting a block leaves its skip
            connection. Other inputs run through the blocks themselves, with one output in memory at a time.
    """
    if images and all(type(block).lesioned is Block.lesioned for block in net):
        recorder = Recorder(net, bn, precision="float64" if dtype == torch.float64 else "float32")
        modules = torch.tensor(factors, dtype=dtype)
        routing = torch.stack([torch.ones_like(modules), modules], -1)
        return lambda inputs, take: [take(output) for output in recorder.routed_outputs(inputs, routing)]
    frozen = snapshot(net, bn, dtype)
    return lambda inputs, take: _walked(frozen, in_type(inputs, dtype), factors, take)


def in_type(inputs: Any, dtype: torch.dtype) -> Any:
    """Return a copy of ``inputs`` in a floating-point type; integers, such as tokens, keep theirs.

    It is a copy because a stem may begin with an in-place ReLU.
    """
    return map_tensors(
        inputs, lambda tensor: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    )


@full_precision()
@torch.no_grad()
def _walked(net: ResidualNet, inputs: Any, factors: Sequence[Sequence[float]], take: Take) -> list[Tensor]:
    """Return ``take(output)`` for each list of factors, where a block with the factor 0 runs its `Block.lesioned`."""
    x, context = net.split(inputs)
    net = net.bound(context)
    blocks = list(net)

    def apply(i: int, y: Tensor, factor: float) -> Tensor:
        if factor == 0:
            return blocks[i].lesioned(y.clone())
        block = blocks[i] if factor == 1 else Scaled(blocks[i], factor)
        return torch.as_tensor(block(y.clone()))

    # Copies, since a head may begin with an in-place ReLU, and two lists of factors may be equal.
    return [take(net.head(y_n.clone())) for y_n in through_shared_prefixes(net.stem(x), factors, apply)]


@full_precision()
@torch.no_grad()
def _plain(net: ResidualNet, images: Tensor) -> Tensor:
    return torch.as_tensor(net(images))
