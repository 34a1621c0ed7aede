"""Ranking of a trained network's blocks for pruning: by single deletions, and by first-order estimates of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathnet.checks import check_callable, check_integer, one_of
from pathnet.data import Batches, Data
from pathnet.data.batches import elements, sent
from pathnet.data.passes import Passes, check_all, check_classes, of_element
from pathnet.full_precision import full_precision
from pathnet.intervals import FEWEST
from pathnet.lesion.measuring import factored, in_type
from pathnet.models.residual_net import ResidualNet, check_inputs, check_net
from pathnet.recording import (
    NOT_FINITE_GRADIENT,
    BatchNormMode,
    Loss,
    check_differentiable,
    check_labels,
    check_loss,
    cross_entropy,
    snapshot,
)

__all__ = ["Ranking", "rank"]

Array = NDArray[np.float64]
By = Literal["loss", "error", "first_order", "taylor"]

SHOWN = 6
"""Largest number of blocks that the representation of a ranking lists."""
RANKING_BATCH = 32
"""Images per batch of a data set; few, so some hundred images give enough batches to estimate the spread."""


@dataclass(frozen=True)
class Ranking:
    """Effects of deleting each single block of a network, as means over batches.

    Attributes:
        loss: float64 [n], the increase of the loss when block i is deleted.
        error: float64 [n], the increase of the error rate; NaN if the targets are not class labels.
        first_order: float64 [n], ``loss`` to first order, ``<dL/dy_i, lesioned_i(y_{i-1}) - y_i>``.
        taylor: float64 [n], the mean over samples of the absolute value of each sample's part of ``first_order``.
            At a minimum of the loss these parts nearly cancel in ``first_order``, and do not here.
        standard_errors: float64 [n] for each of the four by its name, from the spread over batches, which are taken
            to be independent; NaN for fewer than ten batches.
        whole_loss: loss of the intact network.
        whole_error: its error rate, in [0, 1].
        batches: the number of batches.

    Example:
        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> data = pathnet.data.synthetic(images=512, classes=4, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=8, width=8, num_classes=4, in_channels=1)
        >>> ranking = pathnet.lesion.rank(net, data)
        >>> ranking  # the cheapest deletion first
        Ranking(3 blocks, 4 batches, loss 1.4; increase of the loss by deleting ...
        >>> ranking.loss.shape, sorted(ranking.order().tolist()), -1 <= ranking.agreement("taylor") <= 1
        ((3,), [0, 1, 2], True)
    """

    loss: Array
    error: Array
    first_order: Array
    taylor: Array
    standard_errors: dict[By, Array]
    whole_loss: float
    whole_error: float
    batches: int

    def __repr__(self) -> str:
        increases = [f"block {i}: {self.loss[i]:+.3g}" for i in self.order()]
        if len(increases) > SHOWN:
            increases[SHOWN - 1 : -1] = ["..."]
        batches = f"{self.batches} batch{'' if self.batches == 1 else 'es'}"
        return (
            f"Ranking({len(self.loss)} blocks, {batches}, loss {self.whole_loss:.3g}; "
            f"increase of the loss by deleting {', '.join(increases)})"
        )

    def order(self, by: By = "loss") -> NDArray[np.int64]:
        """Return the blocks (from 0) in the order to prune them, the cheapest deletion first, int64 [n].

        Args:
            by: the attribute to sort by: ``loss``, ``error``, ``first_order`` or ``taylor``.

        Raises:
            ValueError: ``by`` is not the name of one of the four.
        """
        one_of("by", by, By)
        return np.argsort(getattr(self, by), kind="stable")

    def agreement(self, by: By = "taylor") -> float:
        """Return Kendall's rank correlation (tau-b) of one of the four with the increase of the loss, in [-1, 1].

        It is NaN if either is the same for all blocks.

        Args:
            by: the attribute to compare: ``loss``, ``error``, ``first_order`` or ``taylor``.

        Raises:
            ValueError: ``by`` is not the name of one of the four.
        """
        one_of("by", by, By)
        return _kendall(getattr(self, by), self.loss)


def rank(
    net: ResidualNet,
    data: Data | Batches | Iterable[Any],
    loss: Loss = cross_entropy,
    bn: BatchNormMode = "running",
    images: int = 0,
) -> Ranking:
    """Measure how much each single block matters to a network.

    The ranking holds the increase of loss and error when a block is deleted (Veit et al. 2016, section 4.1), and a
    first-order estimate from one forward and one backward pass for all blocks.

    The estimate, ``<dL/dy_i, lesioned_i(y_{i-1}) - y_i>``, is exact if everything after the block is linear. Its
    absolute value, sample by sample, is the Taylor criterion of Molchanov et al. ("Pruning Convolutional Neural
    Networks for Resource Efficient Inference", 2017) applied to whole blocks, and ranks them better; their
    "Importance Estimation for Neural Network Pruning" (2019) squares it. `Ranking.agreement` compares the estimate
    with the measured increase.

    Args:
        net: the network, which stays unchanged; copies in evaluation mode are measured, in float64 if its weights
            are float64, else in float32.
        data: a data set, whose test split runs in batches of 32; or `pathnet.data.Batches`; or an iterable of
            batches, read once and used as they come: pairs of inputs, anything that the network takes (images,
            normalised already, or tokens), and targets, anything that ``loss`` takes; or mappings with the target
            under ``labels``.
        loss: a differentiable function of (output, target), a mean over the batch; the mean cross-entropy by default.
            If the target is int64 [B, ...], labels of outputs [B, ..., classes], errors are counted too, and negative
            labels are ignored. The first dimension of the blocks' inputs is samples.
        bn: the statistics of batch normalisation, ``running`` or those of the ``batch``.
        images: number of images of a data set's test split, spread evenly over it; 0 for all.

    Raises:
        ValueError: an argument is out of range, there are no batches, or the network's loss is not finite. What is
            wrong with an element of an iterable is told by its position, from 0.

    Example:
        >>> import torch
        >>> from pathnet import lesion, models
        >>> _ = torch.manual_seed(0)
        >>> net = models.preact_resnet(depth=14, width=8, num_classes=4, in_channels=1)
        >>> batches = [(torch.randn(8, 1, 8, 8), torch.randint(4, (8,))) for _ in range(10)]
        >>> ranking = lesion.rank(net, batches)
        >>> ranking.batches, ranking.loss.shape, ranking.standard_errors["loss"].shape
        (10, (6,), (6,))
    """
    check_net(net)
    one_of("bn", bn, BatchNormMode)
    check_callable("loss", loss)
    images = check_integer("images", images, 0)
    device, dtype = _device_and_type(net)
    frozen, outputs = snapshot(net, bn, dtype), None
    sizes: list[float] = []
    factors = 1.0 - torch.eye(net.n + 1, net.n).roll(1, 0)  # the intact network first
    judged, estimates = [], []
    for inputs, target in _batches(data, images, device):
        with of_element(len(sizes), named=not isinstance(data, Data)):
            if isinstance(inputs, Tensor):
                check_inputs("data", in_type(inputs, dtype), frozen)
            if loss is cross_entropy:
                check_labels(target, device)
            if outputs is None:
                are_images = isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim == 4
                outputs = factored(net, factors.tolist(), bn, dtype, images=are_images)
            judged.append(torch.stack(outputs(inputs, partial(_judged, target=target, loss=loss))).cpu().numpy())
        losses = judged[-1][:, 0]
        if not np.isfinite(losses).all():
            if loss is cross_entropy:
                with of_element(len(sizes), named=not isinstance(data, Data)):
                    outputs(inputs, partial(_check_classes, target=target))
            lesion = int(np.isfinite(losses).argmin())
            without = f" without block {lesion - 1}" if lesion else ""
            raise ValueError(f"net: its loss{without} on batch {len(sizes)} is {losses[lesion]}")
        estimates.append(_first_order(frozen, inputs, target, loss))
        if not np.isfinite(estimates[-1]).all():
            block = int(np.isfinite(estimates[-1]).all(0).argmin())
            raise ValueError(f"net: the first-order estimate of block {block} on batch {len(sizes)} is not finite")
        sizes.append(float(len(target)) if isinstance(target, Tensor) and target.ndim else 1.0)
    if not sizes:
        raise ValueError("data: expected at least one batch, got none")
    losses, wrong, counted = np.moveaxis(np.array(judged), -1, 0)
    first_order, taylor = np.moveaxis(np.array(estimates), 1, 0)
    by_size, by_count = np.array(sizes), counted[:, 0]
    means: dict[By, tuple[Array, Array]] = {
        "loss": _mean(losses[:, 1:] - losses[:, :1], by_size),
        "error": _mean(wrong[:, 1:] - wrong[:, :1], by_count),
        "first_order": _mean(first_order, by_size),
        "taylor": _mean(taylor, by_size),
    }
    return Ranking(
        **{name: mean for name, (mean, _) in means.items()},
        standard_errors={name: spread for name, (_, spread) in means.items()},
        whole_loss=float(_mean(losses[:, 0], by_size)[0]),
        whole_error=float(_mean(wrong[:, 0], by_count)[0]),
        batches=len(sizes),
    )


def _device_and_type(net: ResidualNet) -> tuple[torch.device, torch.dtype]:
    parameter = next(net.parameters())
    return parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _batches(data: Data | Batches | Iterable[Any], images: int, device: torch.device) -> Iterator[tuple[Any, Any]]:
    if isinstance(data, Data | Batches):
        pairs: Iterable[tuple[Any, Any]] = Passes(data, RANKING_BATCH, images)
    else:
        check_all(images)
        pairs = elements("data", data)
    for inputs, target in pairs:
        yield sent(inputs, device), sent(target, device)


def _check_classes(output: Tensor, target: Tensor) -> Tensor:
    check_classes(target, output.shape[-1])
    return output


@full_precision()
@torch.no_grad()
def _judged(output: Tensor, target: Any, loss: Loss) -> Tensor:
    """Return the loss, the error rate and the number of labels it is the mean over, float64 [3]."""
    value = check_loss(loss(output, target))
    wrong = count = torch.tensor(torch.nan, device=output.device)
    if isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == output.shape[:-1]:
        known = target >= 0
        count = known.sum()
        wrong = ((output.argmax(-1) != target) & known).sum().double() / count.clamp(min=1)
    return torch.stack([scalar.double().reshape(()) for scalar in (value, wrong, count)])


@full_precision()
def _first_order(net: ResidualNet, inputs: Any, target: Any, loss: Loss) -> Array:
    """Return the first-order change of the loss by each deletion, and the sum of its absolute values over samples.

    The result is float64 [2, n].
    """
    dtype = next(net.parameters()).dtype
    x, context = net.split(in_type(inputs, dtype))
    net = net.bound(context.detached())
    with torch.enable_grad():
        activations = [net.stem(x).detach().requires_grad_()]
        for block in net:
            activations.append(block(activations[-1].clone()))
        value = check_differentiable(loss(net.head(activations[-1].clone()), target))
        grads = torch.autograd.grad(value, activations[1:], materialize_grads=True)
    with torch.no_grad():
        changes = [
            (grad.double() * (block.lesioned(before.clone()) - after).double()).flatten(1).sum(1)
            for block, before, after, grad in zip(net, activations[:-1], activations[1:], grads, strict=True)
        ]
    samples = torch.stack(changes)
    sums = torch.stack([samples.sum(1), samples.abs().sum(1)]).cpu()
    if not torch.isfinite(sums).all():
        raise ValueError(NOT_FINITE_GRADIENT)
    return sums.numpy()


def _kendall(x: Array, y: Array) -> float:
    """Return Kendall's tau-b of two arrays [n]; NaN if either is constant or holds NaN."""
    x_signs, y_signs = (np.sign(np.subtract.outer(values, values)) for values in (x, y))
    x_untied, y_untied = (np.count_nonzero(signs) / 2 for signs in (x_signs, y_signs))
    if x_untied == 0 or y_untied == 0:
        return math.nan
    tau = (x_signs * y_signs).sum() / 2 / math.sqrt(x_untied) / math.sqrt(y_untied)
    return float(np.clip(tau, -1.0, 1.0))


def _mean(values: Array, weights: Array) -> tuple[Array, Array]:
    """Return the weighted mean over batches of values [batches, ...], and its standard error."""
    shares = (weights / weights.sum()).reshape(-1, *(1,) * (values.ndim - 1))
    mean, count = (shares * values).sum(0), len(values)
    if count < FEWEST:
        return mean, np.full_like(mean, np.nan)
    return mean, np.sqrt(count / (count - 1) * (shares**2 * (values - mean) ** 2).sum(0))
