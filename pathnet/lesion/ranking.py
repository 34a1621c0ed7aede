"""Which blocks a trained network can best do without: single deletions, and what one backward pass says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
from pathnet.full_precision import full_precision
from pathnet.intervals import FEWEST
from pathnet.lesion.measuring import factored, in_type, spread
from pathnet.models.residual_net import ResidualNet, check_inputs, check_net, first_convolution
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

# Of a `Data`: small enough that some hundred images make batches by which to judge the spread.
RANKING_BATCH = 32


@dataclass(frozen=True)
class Ranking:
    """What the deletion of each block alone does to a network, as means over batches.

    Attributes:
        loss: float64 [n], the increase of the loss by deleting block i.
        error: float64 [n], the increase of the share of wrong answers; NaN where targets are no class labels.
        first_order: float64 [n], ``loss`` to first order, ``<dL/dy_i, lesioned_i(y_{i-1}) - y_i>``.
        taylor: float64 [n], the mean over samples of the size of their part of that, which the sum over samples,
            at a minimum of the loss about zero, does not cancel.
        standard_errors: of each of the four by its name, float64 [n]: by the spread over the batches, taken to be
            independent; NaN of fewer than ten.
        whole_loss, whole_error: of the intact network.
        batches: how many there were.
    """

    loss: Array
    error: Array
    first_order: Array
    taylor: Array
    standard_errors: dict[By, Array]
    whole_loss: float
    whole_error: float
    batches: int

    def order(self, by: By = "loss") -> NDArray[np.int64]:
        """int64 [n], the blocks (from 0) to prune, those whose deletion costs least first.

        Raises:
            ValueError: ``by`` is not the name of one of the four.
        """
        one_of("by", by, By)
        return np.argsort(getattr(self, by), kind="stable")

    def agreement(self, by: By = "taylor") -> float:
        """Kendall's rank correlation (tau-b) of one of the four with the increase of the loss, in [-1, 1]; NaN where
        one of them is the same for all blocks.

        Raises:
            ValueError: ``by`` is not the name of one of the four.
        """
        one_of("by", by, By)
        return float(scipy.stats.kendalltau(getattr(self, by), self.loss).statistic)


def rank(
    net: ResidualNet,
    data: Data | Iterable[tuple[Any, Any]],
    loss: Loss = cross_entropy,
    bn: BatchNormMode = "running",
    images: int = 0,
) -> Ranking:
    """How much each block alone matters: the increase of loss and error by deleting it (Veit et al. 2016, section
    4.1), and the estimate to first order from one forward and one backward pass for all blocks.

    The estimate, ``<dL/dy_i, lesioned_i(y_{i-1}) - y_i>``, is exact where everything behind the block is linear. Its
    size, sample by sample, is the Taylor criterion of Molchanov et al. ("Pruning Convolutional Neural Networks for
    Resource Efficient Inference", 2017) for whole blocks, and orders them better; their "Importance
    Estimation for Neural Network Pruning" (2019) squares it. `Ranking.agreement` says how well it does.

    Args:
        net: left as it is; copies in evaluation mode are measured, in float64 where its weights are, else in float32.
        data: a data set, whose test split is taken in batches of 32; or batches of inputs, anything that the stem
            takes (images, tokens), and targets, anything that ``loss`` takes, on the network's device.
        loss: a differentiable function of (output, target), a mean over the batch; the mean cross-entropy by default.
            Where the target is int64 [B, ...], labels of outputs [B, ..., classes], errors are counted too, negative
            labels left out. Samples lie along the first dimension of what goes through the blocks.
        bn: the statistics of batch normalisation: ``running`` ones, or those of the ``batch``.
        images: of a data set's test split, spread evenly over it; 0 for all.

    Raises:
        ValueError: an argument is out of its range, there are no batches, or the network's own loss is not finite.
    """
    check_net(net)
    one_of("bn", bn, BatchNormMode)
    check_callable("loss", loss)
    images = check_integer("images", images, 0)
    device, dtype = _place(net)
    frozen, outputs = snapshot(net, bn, dtype), None
    sizes: list[float] = []
    ways = 1.0 - torch.eye(net.n + 1, net.n).roll(1, 0)  # the intact network first
    found, estimates = [], []
    for inputs, target in _batches(data, images, device):
        if isinstance(inputs, Tensor) or first_convolution(net) is not None:
            check_inputs("data", in_type(inputs, dtype), frozen)
        if loss is cross_entropy:
            check_labels(target, device)
        if outputs is None:
            own = isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim == 4
            outputs = factored(net, ways.tolist(), bn, dtype, images=own)
        found.append(torch.stack(outputs(inputs, partial(_judged, target=target, loss=loss))).cpu().numpy())
        losses = found[-1][:, 0]
        if not np.isfinite(losses).all():
            way = int(np.isfinite(losses).argmin())
            without = f" without block {way - 1}" if way else ""
            raise ValueError(f"net: its loss{without} on batch {len(sizes)} is {losses[way]}")
        estimates.append(_first_order(frozen, inputs, target, loss))
        if not np.isfinite(estimates[-1]).all():
            block = int(np.isfinite(estimates[-1]).all(0).argmin())
            raise ValueError(f"net: the first-order estimate of block {block} on batch {len(sizes)} is not finite")
        sizes.append(float(len(target)) if isinstance(target, Tensor) and target.ndim else 1.0)
    if not sizes:
        raise ValueError("data: expected at least one batch, got none")
    losses, wrong, counted = np.moveaxis(np.array(found), -1, 0)
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


def _place(net: ResidualNet) -> tuple[torch.device, torch.dtype]:
    parameter = next(net.parameters())
    return parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _batches(data: Data | Iterable[tuple[Any, Any]], images: int, device: torch.device) -> Iterator[tuple[Any, Any]]:
    if not isinstance(data, Data):
        if images:
            raise ValueError(f"images: expected 0 beside batches of one's own, got {described(images)}")
        for pair in _iterated(data):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(f"data: expected pairs of inputs and targets, got {described(pair)}")
            yield pair[0], pair[1]
        return
    for part in spread(data, images).split(RANKING_BATCH):  # type: ignore[no-untyped-call]
        yield data.normalise(data.test.take(part)).to(device), data.test.labels[part].to(device)


def _iterated(data: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    try:
        if not isinstance(data, str | bytes | Mapping | Tensor):
            return iter(data)
    except TypeError:
        pass
    raise ValueError(f"data: expected a pathnet Data, or pairs of inputs and targets, got {described(data)}")


@full_precision()
@torch.no_grad()
def _judged(output: Tensor, target: Any, loss: Loss) -> Tensor:
    """float64 [3]: the loss, the share of wrong answers, and of how many."""
    value = check_loss(loss(output, target))
    wrong = count = torch.tensor(torch.nan, device=output.device)
    if isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == output.shape[:-1]:
        known = target >= 0
        count = known.sum()
        wrong = ((output.argmax(-1) != target) & known).sum().double() / count.clamp(min=1)
    return torch.stack([each.double().reshape(()) for each in (value, wrong, count)])


@full_precision()
def _first_order(net: ResidualNet, inputs: Any, target: Any, loss: Loss) -> Array:
    """float64 [2, n]: the change of the loss by each deletion to first order; the sum of its sizes over samples."""
    dtype = next(net.parameters()).dtype
    with torch.enable_grad():
        met = [net.stem(in_type(inputs, dtype)).detach().requires_grad_()]
        for block in net:
            met.append(block(met[-1].clone()))
        value = check_differentiable(loss(net.head(met[-1].clone()), target))
        grads = torch.autograd.grad(value, met[1:], materialize_grads=True)
    with torch.no_grad():
        changes = [
            (grad.double() * (block.lesioned(before.clone()) - after).double()).flatten(1).sum(1)
            for block, before, after, grad in zip(net, met[:-1], met[1:], grads, strict=True)
        ]
    samples = torch.stack(changes)
    sums = torch.stack([samples.sum(1), samples.abs().sum(1)]).cpu()
    if not torch.isfinite(sums).all():
        raise ValueError(NOT_FINITE_GRADIENT)
    return sums.numpy()


def _mean(values: Array, weights: Array) -> tuple[Array, Array]:
    """The weighted mean over batches of values [batches, ...], and its standard error."""
    shares = (weights / weights.sum()).reshape(-1, *(1,) * (values.ndim - 1))
    mean, count = (shares * values).sum(0), len(values)
    if count < FEWEST:
        return mean, np.full_like(mean, np.nan)
    return mean, np.sqrt(count / (count - 1) * (shares**2 * (values - mean) ** 2).sum(0))
