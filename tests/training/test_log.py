"""Numbers that a training logs to a writer: each step once, also if it is killed; and writers that fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.training import Board, Interrupt

from pathnet import EffectiveDepth, data, models
from pathnet.models import ResidualNet
from pathnet.training import Epoch, Recipe, train
from pathnet.training import loop as training_loop
from pathnet.training.state import TrainingState

RECIPE = Recipe(epochs=3, batch_size=4, warmup_steps=2, learning_rate=0.05)
"""25 steps an epoch."""
STEPS = 75


def images() -> data.Data:
    return data.synthetic(images=100, shape=(1, 4, 4))


def fresh() -> ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(8, 1, in_channels=1)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[dict[tuple[str, int], float], list[Epoch]]:
    board = Board()
    history = train(fresh(), images(), RECIPE, log=board)
    assert not board.repeated
    return board.scalars, history


def test_a_training_logs_losses_rates_and_accuracies(
    undisturbed: tuple[dict[tuple[str, int], float], list[Epoch]],
) -> None:
    scalars, history = undisturbed
    losses: list[float] = []

    def note_of(done: int, steps: int, note: str) -> None:
        losses.append(float(note.split("loss ")[1].split()[0]))

    assert len(train(fresh(), images(), RECIPE, progress=note_of)) == 3 and len(losses) == STEPS
    expected = {
        ("training/loss", step): pytest.approx(losses[step - 1], abs=6e-4) for step in range(10, STEPS + 1, 10)
    }
    for step in range(10, STEPS + 1, 10):
        expected["training/learning rate", step] = pytest.approx(
            0.05 * (1 if step < 39 else 0.1 if step < 58 else 0.01)
        )
    for epoch in history:
        expected["epoch/training loss", 25 * (epoch.epoch + 1)] = epoch.train_loss
        expected["epoch/test accuracy", 25 * (epoch.epoch + 1)] = epoch.test_accuracy
    assert scalars == expected
    steps = [step for _, step in scalars]
    assert steps == sorted(steps)


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, saves: bool) -> Callable[[int, int, str], None]:
    """Return a progress that ends the training; by a kill, which nothing is saved after, or by an interrupt."""

    def stop(done: int, steps: int, note: str) -> None:
        if done == step:
            if not saves:
                monkeypatch.setattr(TrainingState, "save", lambda self: None)
            raise Interrupt

    return stop


@pytest.mark.parametrize("saves", [True, False], ids=["interrupted", "killed"])
@pytest.mark.parametrize("often", [True, False], ids=["saved after every step", "saved after every epoch"])
@pytest.mark.parametrize("stops", [(3, 20, 21), (25, 26, 50), (40, 74, 75)])
def test_a_training_that_resumes_logs_every_step_once(
    undisturbed: tuple[dict[tuple[str, int], float], list[Epoch]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stops: tuple[int, ...],
    often: bool,
    saves: bool,
) -> None:
    monkeypatch.setattr(training_loop, "CHECKPOINT_SECONDS", -1.0 if often else 1e9)
    board, file, save = Board(), tmp_path / "net.safetensors", TrainingState.save
    for step in stops:
        with pytest.raises(Interrupt):
            train(fresh(), images(), RECIPE, file, killed_at(step, monkeypatch, saves), log=board)
        monkeypatch.setattr(TrainingState, "save", save)
    train(fresh(), images(), RECIPE, file, log=board)
    assert board.repeated == []
    assert board.scalars == undisturbed[0]
    train(fresh(), images(), RECIPE, file, log=board)
    assert board.repeated == []


class Failing:
    """A writer that takes numbers up to a step, and then has no room."""

    def __init__(self, last: int) -> None:
        self.last, self.calls = last, 0

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.calls += 1
        if global_step > self.last:
            raise OSError("No space left on device")

    def flush(self) -> None:
        if self.last < 0:
            raise RuntimeError("closed")


def test_a_writer_that_fails_costs_one_warning_and_not_the_training() -> None:
    plain, logged, board = fresh(), fresh(), Failing(20)
    train(plain, images(), RECIPE)
    with pytest.warns(RuntimeWarning) as caught:
        history = train(logged, images(), RECIPE, log=board)
    assert [str(warning.message) for warning in caught] == [
        "log: the writer failed at step 25 (OSError: No space left on device); training goes on, and what the writer "
        "does not take is lost"
    ]
    assert len(history) == 3 and board.calls > 5, "later numbers are tried, in case there is room again"
    assert models.fingerprint(plain) == models.fingerprint(logged)


def test_a_depth_that_a_writer_does_not_take_costs_one_warning() -> None:
    board = Failing(-1)
    depth = EffectiveDepth(images().random_batch(4, 0, 0), board, fresh(), every=1, share=float("inf"))
    with pytest.warns(RuntimeWarning, match=r"^out: the writer failed at step 0 \(OSError") as caught:
        assert [depth(step) is not None for step in range(3)] == [True] * 3
    assert len(caught) == 1


def test_depths_and_losses_go_to_one_writer_that_cannot_flush() -> None:
    board = Board()
    depth = EffectiveDepth(images().random_batch(4, 0, 0), board, every=15, share=float("inf"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(fresh(), images(), RECIPE, callback=depth, log=board)
    depths = [step for tag, step in board.scalars if tag == "effective depth/depth"]
    assert depths == [0, 15, 30, 45, 60, 75] and ("training/loss", 30) in board.scalars and not board.repeated


@pytest.mark.parametrize("log", [7, "runs", Board, Path("log.csv")], ids=str)
def test_what_is_no_writer_is_refused(log: object) -> None:
    with pytest.raises(ValueError, match="^log: expected a writer with a method add_scalar, got "):
        train(fresh(), images(), RECIPE, log=log)  # type: ignore[arg-type]
