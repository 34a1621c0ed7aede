"""The training loop: its steps, its interruptions, and the arguments that it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import SMALL, Interrupt, fresh
from torch import nn

from pathnet import data, models
from pathnet.models.weights import read_tensors, write_tensors
from pathnet.streams import stream
from pathnet.training import Recipe, evaluate, train
from pathnet.training.engines import Engine
from pathnet.training.sampling import drawn_modules, training_batch


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_interrupted_training_resumes_bit_exactly(
    images: data.Data, tmp_path: Path, stop: int, bfloat16: bool
) -> None:
    recipe = dataclasses.replace(SMALL, bfloat16=bfloat16)
    straight = fresh()
    history = train(straight, images, recipe)

    def interrupt(done: int, steps: int, note: str) -> None:
        if done == stop:
            raise Interrupt

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupt):
        train(fresh(), images, recipe, path, interrupt)
    resumed = models.preact_resnet(8, 4)
    again = train(resumed, images, recipe, path)
    assert models.fingerprint(resumed) == models.fingerprint(straight)
    assert [(e.epoch, e.train_loss, e.test_accuracy) for e in again] == [
        (e.epoch, e.train_loss, e.test_accuracy) for e in history
    ]
    assert models.fingerprint(models.load(path)) == models.fingerprint(straight)


def test_it_learns_and_says_how_well(images: data.Data) -> None:
    net = fresh()
    history = train(net, images, dataclasses.replace(SMALL, epochs=20, augment=False))
    assert history[-1].test_accuracy > 0.9 > history[0].test_accuracy
    assert evaluate(net, images) == history[-1].test_accuracy and not net.training


def test_the_steps_are_those_of_sgd_with_nesterov_momentum(images: data.Data) -> None:
    """Compare one epoch with the update rule written out (Sutskever et al. 2013, in PyTorch's form)."""
    recipe = dataclasses.replace(SMALL, epochs=1, augment=False, weight_decay=1e-2, momentum=0.8)
    trained, net = fresh(), fresh().train()
    train(trained, images, recipe)
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    order = stream(recipe.seed, "epoch", 0).permutation(128)
    for step in range(4):
        indices = torch.from_numpy(order[32 * step : 32 * step + 32])
        batch = images.normalise(images.train.take(indices)).contiguous(memory_format=torch.channels_last)
        net.to(memory_format=torch.channels_last)
        loss = torch.nn.functional.cross_entropy(net(batch), images.train.labels[indices])
        rate = [0.01, 0.01, 0.01, 0.05 * 0.1**2][step]
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            for p, v, g in zip(net.parameters(), velocity, gradients, strict=True):
                g = g + 1e-2 * p
                v.mul_(0.8).add_(g)
                p.sub_(rate * (g + 0.8 * v))
    for ours, theirs in zip(trained.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_something_else_is_refused(images: data.Data, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(fresh(), images, SMALL, path)
    with pytest.raises(ValueError, match=r"is of another model \(depth: expected 14, got 8\); give another file, or"):
        train(models.preact_resnet(14, 4), images, SMALL, path)
    with pytest.raises(ValueError, match="checkpoint: .* is of another recipe"):
        train(fresh(), images, dataclasses.replace(SMALL, seed=1), path)
    with pytest.raises(ValueError, match="checkpoint: .* is of another data"):
        train(fresh(), data.synthetic(images=128, shape=(3, 8, 8), seed=1), SMALL, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="weights: .* is not a readable"):
        train(fresh(), images, SMALL, path)


@pytest.mark.parametrize(
    "change",
    [
        *(
            {name: value}
            for name in ("epochs", "batch_size", "modules", "seed")
            for value in (math.nan, 1.5, True, "1")
        ),
        *(
            {name: value}
            for name in ("learning_rate", "warmup_learning_rate", "momentum", "weight_decay")
            for value in (math.nan, -0.1, math.inf, None)
        ),
        *({"warmup_steps": value} for value in (math.nan, -1, 0.5)),
        *({name: value} for name in ("augment", "bfloat16") for value in (1, "no", None)),
        *({"schedule": value} for value in ("cosine", "one_cycle", "", True, None)),
        *({"flips": value} for value in (True, "none", "Random", None)),
        *({"label_smoothing": value} for value in (math.nan, -0.1, 1.5, math.inf, "x", None)),
    ],
    ids=str,
)
def test_a_recipe_of_what_is_no_number_is_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Recipe(**change)


def test_a_recipe_holds_pythons_own_numbers() -> None:
    recipe = Recipe(epochs=np.int64(3), learning_rate=torch.tensor(0.5), modules=torch.tensor(2))  # type: ignore[arg-type]
    assert json.loads(json.dumps(dataclasses.asdict(recipe)))["epochs"] == 3
    assert recipe == Recipe(epochs=3, learning_rate=0.5, modules=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_no_accuracy(images: data.Data, value: float) -> None:
    net = fresh().train()
    net.head.linear.bias.data[0] = value
    with pytest.raises(ValueError, match="net: expected finite outputs, got NaN or infinity on test batch 0"):
        evaluate(net, images)
    assert net.training


@pytest.mark.parametrize("wrong", [None, [], "digits", torch.ones(2), torch.utils.data.DataLoader([1])])  # type: ignore[arg-type]
def test_what_is_no_network_data_set_or_recipe_is_named(images: data.Data, wrong: Any) -> None:
    for call in (
        lambda net, data, recipe: train(net, data, recipe),
        lambda net, data, _: evaluate(net, data),
        lambda net, _, recipe: drawn_modules(net, recipe, 0),
        lambda _, data, recipe: training_batch(data, recipe, 0),
    ):
        right = {"net": fresh(), "data": images, "recipe": SMALL}
        for name in right:
            arguments = right | {name: wrong}
            if call.__code__.co_varnames[list(right).index(name)] != "_":
                with pytest.raises(ValueError, match=f"^{name}: expected (a pathnet|at least one batch|.* pairs)"):
                    call(*arguments.values())


def test_a_network_that_does_not_take_the_data_is_refused_before_the_first_step(images: data.Data) -> None:
    grey = models.preact_resnet(8, 4, in_channels=1)
    with pytest.raises(ValueError, match="^data: expected images of 1 channels .*, got 3 in synthetic$"):
        train(grey, images, SMALL)
    with pytest.raises(ValueError, match="^data: expected at most 9 classes .*, got 10 in synthetic$"):
        train(models.preact_resnet(8, 4, num_classes=9), images, SMALL)


def test_bad_recipes_are_named(images: data.Data) -> None:
    with pytest.raises(ValueError, match="recipe: batch_size 256 exceeds the 128 training images"):
        train(fresh(), images, dataclasses.replace(SMALL, batch_size=256))
    with pytest.raises(ValueError, match="epochs: expected an integer"):
        Recipe(epochs=0)
    with pytest.raises(ValueError, match=r"seed: expected an integer from 0 to 2\^63 - 1, got 18446744073709551616"):
        Recipe(seed=1 << 64)
    with pytest.raises(ValueError, match="recipe: the loss is"):
        train(fresh(), images, dataclasses.replace(SMALL, learning_rate=1e20, warmup_steps=0))
    with pytest.raises(ValueError, match="modules: expected an integer of at least 0, got -1"):
        Recipe(modules=-1)
    with pytest.raises(ValueError, match="undrawn: expected 'none' or 'zero', got 'nothing'"):
        Recipe(undrawn="nothing")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule: expected 'steps' or 'one-cycle', got 'cosine'"):
        Recipe(schedule="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="flips: expected 'random' or 'alternating', got True"):
        Recipe(flips=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="label_smoothing: expected a finite number from 0 to 1, got 1.5"):
        Recipe(label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"modules: expected at most 3 \(the network's\), got 4"):
        train(fresh(), images, dataclasses.replace(SMALL, modules=4))
    with pytest.raises(ValueError, match="modules: expected 0 for a network with stochastic depth, got 2"):
        train(models.preact_resnet(8, 4, survival=0.5), images, dataclasses.replace(SMALL, modules=2))
    with pytest.raises(ValueError, match=r"drawn: expected 3 values \(one per block\), got 2"):
        fresh()(torch.zeros(1, 3, 8, 8), [True, False])
    for survival in (0, 1.5, math.nan):
        with pytest.raises(
            ValueError, match=f"survival: expected a finite number above 0 and at most 1, got {survival}"
        ):
            models.preact_resnet(8, 4, survival=survival)


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("engine", ["none", "auto"])
def test_an_interrupted_step_leaves_no_trace(images: data.Data, tmp_path: Path, engine: Engine, back: bool) -> None:
    """The interrupt comes in the third step, after the blocks' BNs have updated their running statistics."""
    straight, path = fresh(), tmp_path / "checkpoint.safetensors"
    train(straight, images, SMALL, engine=engine)
    calls = iter(range(3))

    def interrupt(*_: object) -> None:
        if next(calls) == 2:
            raise Interrupt

    interrupted = fresh()
    if back:
        interrupted.stem.weight.register_hook(interrupt)
    else:
        interrupted.head.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupt):
        train(interrupted, images, SMALL, path, engine=engine)
    assert read_tensors(path)[1]["progress"]["step"] == 2
    resumed = models.preact_resnet(8, 4)
    train(resumed, images, SMALL, path)
    assert models.fingerprint(resumed) == models.fingerprint(straight)


def test_an_interrupted_test_is_made_up_for(
    images: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, path = fresh(), tmp_path / "checkpoint.safetensors"
    history = train(straight, images, SMALL)

    def interrupt(*_: object) -> float:
        raise Interrupt

    for epochs in range(2):
        net = fresh()
        with monkeypatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr("pathnet.training.state.evaluate", interrupt)
            train(net, images, SMALL, path)
        assert read_tensors(path)[1]["progress"]["step"] == 4 and epochs < 2
    again = train(fresh(), images, SMALL, path)
    assert [dataclasses.replace(epoch, seconds=0) for epoch in again] == [
        dataclasses.replace(epoch, seconds=0) for epoch in history
    ]


def test_a_test_that_fails_leaves_the_network_in_its_mode(images: data.Data) -> None:
    net = fresh().train()
    net.head = nn.Identity()
    net.stem = nn.Conv2d(1, 4, 3)
    with pytest.raises(RuntimeError):
        evaluate(net, images)
    assert net.training


def test_a_checkpoint_from_before_a_setting_goes_on(images: data.Data, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(fresh(), images, SMALL, path)
    tensors, metadata = read_tensors(path)
    for setting in ("modules", "undrawn", "schedule", "flips", "label_smoothing"):
        del metadata["recipe"][setting]
    write_tensors(path, tensors, metadata)
    assert len(train(fresh(), images, SMALL, path)) == 2
    with pytest.raises(ValueError, match="checkpoint: .* is of another recipe"):
        train(fresh(), images, dataclasses.replace(SMALL, modules=2), path)
