"""The images and the residual modules of each training step, as functions of seed and step."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathnet.checks import MOST_INTEGER, check_integer, described
from pathnet.data import Data
from pathnet.data.images import check_data_set
from pathnet.models.residual_net import ResidualNet, check_net
from pathnet.streams import stream
from pathnet.training.recipe import Recipe, check_recipe

__all__ = ["drawn_modules", "steps_an_epoch", "training_batch"]


def drawn_modules(net: ResidualNet, recipe: Recipe, step: int) -> tuple[bool, ...] | None:
    """Return for each block whether its residual module takes part in a step; None if the recipe draws nothing.

    Either exactly ``recipe.modules`` of them do, drawn uniformly, or each by its own survival probability (Huang et
    al. 2016).

    Args:
        step: number of the step, from 0.

    Raises:
        ValueError: the recipe draws a number of modules of a network that has survival probabilities, or more
            modules than there are; or an argument is out of range.
    """
    check_net(net)
    check_recipe(recipe)
    step = check_integer("step", step, 0)
    survival = [block.survival for block in net]
    stochastic = any(probability < 1 for probability in survival)
    if recipe.modules == 0:
        if not stochastic:
            return None
        uniform = stream(recipe.seed, "modules", step).random(net.n)
        return tuple(bool(u < probability) for u, probability in zip(uniform, survival, strict=True))
    if stochastic:
        raise ValueError(f"modules: expected 0 for a network with stochastic depth, got {recipe.modules}")
    if recipe.modules > net.n:
        raise ValueError(f"modules: expected at most {net.n} (the network's), got {recipe.modules}")
    chosen = set(stream(recipe.seed, "modules", step).choice(net.n, recipe.modules, replace=False).tolist())
    return tuple(i in chosen for i in range(net.n))


def steps_an_epoch(data: Data, recipe: Recipe) -> int:
    """Return the number of steps in one pass over the training split.

    Raises:
        ValueError: a batch is larger than the training split.
    """
    if recipe.batch_size > len(data.train):
        raise ValueError(
            f"recipe: batch_size {recipe.batch_size} exceeds the {len(data.train)} training images of {data.name}"
        )
    return len(data.train) // recipe.batch_size


def training_batch(data: Data, recipe: Recipe, step: int, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Return the images, float32 [B, C, H, W], and labels, int64 [B], of a step.

    The images are augmented if the recipe says so. They are a function of the recipe's seed, ``batch_size`` and
    ``flips``, and of the step: the whole batch is drawn whatever the share.

    Args:
        step: number of the step, from 0.
        share: the slice of the batch to return, such as one process's part of it.

    Raises:
        ValueError: an argument is of the wrong type or out of range, or a batch is larger than the training split.
    """
    check_data_set("data", data)
    check_recipe(recipe)
    step = check_integer("step", step, 0, MOST_INTEGER)
    if not isinstance(share, slice):
        raise ValueError(f"share: expected a slice, got {described(share)}")
    epoch, position = divmod(step, steps_an_epoch(data, recipe))
    size, order = recipe.batch_size, _order(recipe.seed, epoch, len(data.train))
    indices = torch.from_numpy(order[position * size : (position + 1) * size])
    images = data.normalise(data.train.take(indices))
    if recipe.augment:
        mirrored = None
        if recipe.flips == "alternating":
            mirrored = _mirrored_first(recipe.seed, len(data.train))[indices] ^ (epoch % 2 == 1)
        images = data.augment(images, stream(recipe.seed, "augmentation", epoch, position), mirrored)
    return images[share], data.train.labels[indices][share]


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    """Return the order of the training images in one epoch, int64 [images]; cached for the steps of that epoch."""
    return stream(seed, "epoch", epoch).permutation(images)


@lru_cache(maxsize=1)
def _mirrored_first(seed: int, images: int) -> Tensor:
    """Return which training images alternating flips mirror in even epochs, bool [images]; cached for all steps."""
    return torch.from_numpy(stream(seed, "flips").random(images) < 0.5)
