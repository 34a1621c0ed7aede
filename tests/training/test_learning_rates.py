"""The learning rate of each step, by both schedules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from helpers.training import SMALL, Board, fresh

from pathnet import data
from pathnet.training import Recipe, train

ONE_CYCLE = Recipe(warmup_steps=400, schedule="one-cycle")
"""From 0.01 to 0.1 in 400 steps."""


def rates(recipe: Recipe, steps: int) -> list[float]:
    return [recipe.rate(step, steps) for step in range(steps)]


def through(*points: tuple[int, Fraction]) -> Iterator[float]:
    """Yield the rates of all steps before the last point, on the straight lines between neighbouring points."""
    for (first, begin), (last, end) in zip(points, points[1:], strict=False):
        for step in range(first, last):
            yield float(begin + (end - begin) * Fraction(step - first, last - first))


def test_steps_warm_up_and_drop_twice() -> None:
    recipe = Recipe(warmup_steps=400)
    assert [recipe.rate(step, 64000) for step in (0, 399, 400, 31999)] == [0.01, 0.01, 0.1, 0.1]
    assert recipe.rate(32000, 64000) == pytest.approx(0.01)
    assert recipe.rate(48000, 64000) == pytest.approx(0.001)


def test_one_cycle_rises_to_the_largest_rate_and_falls_to_zero() -> None:
    assert ONE_CYCLE.rate(0, 2000) == 0.01 and ONE_CYCLE.rate(400, 2000) == 0.1
    assert ONE_CYCLE.rate(200, 2000) == pytest.approx(0.055), "in the middle of the rise"
    assert ONE_CYCLE.rate(1200, 2000) == pytest.approx(0.05), "in the middle of the fall"
    assert ONE_CYCLE.rate(1999, 2000) == pytest.approx(0.1 / 1600), "at the last step"
    assert [ONE_CYCLE.rate(step, 2000) for step in (2000, 2001, 10**6)] == [0, 0, 0], "after it"


@pytest.mark.parametrize(
    ("warmup_steps", "steps", "peak"),
    [(400, 2000, 400), (400, 800, 400), (400, 700, 350), (400, 401, 200), (400, 3, 1), (0, 10, 0), (1, 10, 1)],
)
def test_one_cycle_is_two_straight_lines(warmup_steps: int, steps: int, peak: int) -> None:
    """A training shorter than two warm-ups rises for half of its steps."""
    recipe = dataclasses.replace(ONE_CYCLE, warmup_steps=warmup_steps)
    lines = through((0, Fraction(1, 100)), (peak, Fraction(1, 10)), (steps, Fraction(0)))
    assert rates(recipe, steps) == pytest.approx(list(lines), rel=1e-12)
    assert max(rates(recipe, steps)) == recipe.rate(peak, steps) == 0.1


@pytest.mark.parametrize("warmup_steps", [0, 1, 400])
def test_one_cycle_of_a_single_step_takes_the_largest_rate(warmup_steps: int) -> None:
    assert rates(dataclasses.replace(ONE_CYCLE, warmup_steps=warmup_steps), 1) == [0.1]


def test_no_rate_is_negative_or_above_the_largest() -> None:
    for schedule in ("steps", "one-cycle"):
        for warmup_steps in (0, 1, 2, 7, 50):
            for warmup_rate in (0.0, 0.01, 0.1):
                recipe = Recipe(
                    warmup_steps=warmup_steps,
                    warmup_learning_rate=warmup_rate,
                    schedule=schedule,
                )
                for steps in (1, 2, 3, 10, 49, 50, 101):
                    assert all(0 <= rate <= 0.1 for rate in [*rates(recipe, steps), recipe.rate(steps + 3, steps)])


@pytest.mark.parametrize("epochs", [1, 3])
def test_training_takes_the_rates_of_its_schedule(epochs: int) -> None:
    recipe = dataclasses.replace(SMALL, epochs=epochs, batch_size=8, warmup_steps=20, schedule="one-cycle")
    board = Board()
    train(fresh(), data.synthetic(images=80, shape=(3, 8, 8)), recipe, log=board)
    logged = {step: value for (tag, step), value in board.scalars.items() if tag == "training/learning rate"}
    assert list(logged) == [10 * count for count in range(1, epochs + 1)]
    # A rate is logged with the number of steps done.
    assert logged == {step: recipe.rate(step - 1, 10 * epochs) for step in logged}
    assert logged[10 * epochs] == pytest.approx(0.05 / (5 if epochs == 1 else 15))


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    images, file = data.synthetic(images=32, shape=(3, 8, 8)), tmp_path / "checkpoint.safetensors"
    cycle = dataclasses.replace(SMALL, epochs=1, schedule="one-cycle")
    train(fresh(), images, cycle, file)
    for change, words in (
        ({"schedule": "steps"}, "schedule: expected 'steps', got 'one-cycle'"),
        ({"flips": "alternating"}, "flips: expected 'alternating', got 'random'"),
        ({"label_smoothing": 0.1}, "label_smoothing: expected 0.1, got 0.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"is of another recipe ({words})")):
            train(fresh(), images, dataclasses.replace(cycle, **change), file)


def test_settings_of_the_schedule_are_given_by_name() -> None:
    """The positions of the other settings are those of earlier versions."""
    recipe = Recipe(2, 32, 0.05, 0.8, 1e-3, 3, 0.02, False, True, 4, "zero", 5)
    assert (recipe.momentum, recipe.weight_decay, recipe.warmup_steps) == (0.8, 1e-3, 3)
    assert (recipe.warmup_learning_rate, recipe.augment, recipe.bfloat16) == (0.02, False, True)
    assert (recipe.modules, recipe.undrawn, recipe.seed) == (4, "zero", 5)
    assert (recipe.schedule, recipe.flips, recipe.label_smoothing) == ("steps", "random", 0)
