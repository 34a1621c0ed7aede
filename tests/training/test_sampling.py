"""The residual modules that steps draw."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import shaken
from scipy import stats
from torch import Tensor

from pathnet import models
from pathnet.models import ResidualNet
from pathnet.training import Recipe
from pathnet.training.sampling import drawn_modules


def draws(net: ResidualNet, recipe: Recipe, steps: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return the modules drawn in each step, [steps, n]."""
    return np.array([drawn_modules(net, recipe, step) for step in range(steps)])


def test_as_many_modules_as_asked_are_drawn_and_all_sets_of_them_alike() -> None:
    net, steps = models.preact_resnet(14, 2), 4000
    for count in range(1, 7):
        assert (draws(net, Recipe(modules=count), 50).sum(1) == count).all()
    assert drawn_modules(net, Recipe(), 0) is None and drawn_modules(net, Recipe(modules=6), 9) == (True,) * 6
    sets, times = np.unique(draws(net, Recipe(modules=3), steps), axis=0, return_counts=True)
    assert len(sets) == math.comb(6, 3) and stats.chisquare(times).pvalue > 1e-3


def test_what_is_drawn_follows_from_seed_and_step_alone() -> None:
    for net, recipe in (
        (models.preact_resnet(38, 2), Recipe(modules=9, seed=5)),
        (models.preact_resnet(38, 2, survival=0.3), Recipe(seed=5)),
    ):
        forwards = draws(net, recipe, 20)
        other = dataclasses.replace(recipe, epochs=1, batch_size=1, learning_rate=1.0, undrawn="zero")
        backwards = [drawn_modules(copy.deepcopy(net), other, step) for step in reversed(range(20))]
        assert (forwards == np.array(backwards)[::-1]).all()
        assert len(np.unique(forwards, axis=0)) == 20
        assert not (draws(net, dataclasses.replace(recipe, seed=6), 20) == forwards).all(1).any()


def test_probabilities_of_survival_fall_linearly_and_are_kept_to() -> None:
    net, steps = models.preact_resnet(20, 2, survival=0.2), 4000
    expected = [1 - i / 9 * (1 - 0.2) for i in range(1, 10)]
    assert [block.survival for block in net.blocks] == pytest.approx(expected)
    drawn = draws(net, Recipe(), steps)
    for kept, probability in zip(drawn.T, expected, strict=True):
        assert stats.binomtest(int(kept.sum()), steps, probability).pvalue > 1e-3
    # The draws are independent: their number varies as a sum of independent draws does.
    variance = sum(p * (1 - p) for p in expected)
    assert drawn.sum(1).var() == pytest.approx(variance, rel=0.1)
    assert np.abs(np.corrcoef(drawn[:, 1:].T) - np.eye(8)).max() < 4.5 / math.sqrt(steps)


def test_evaluation_multiplies_modules_by_their_probability() -> None:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(14, 4, survival=0.3)).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def expected() -> Tensor:
        y = net.stem(images)
        for i, block in enumerate(net.blocks):
            first = F.relu(block.bns[0](y))
            residual = block.convs[1](F.relu(block.bns[1](block.convs[0](first))))
            skip = y if block.projection is None else block.projection(first)
            y = skip + (1 - (i + 1) / 6 * 0.7 if not net.training else 1) * residual
        return net.head(y)

    for mode in (False, True):
        net.train(mode)
        torch.testing.assert_close(net(images), expected(), rtol=1e-12, atol=1e-12)
