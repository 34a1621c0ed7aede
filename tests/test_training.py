from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pathnet import data, models
from pathnet.streams import stream
from pathnet.training import Recipe, evaluate, train

SMALL = Recipe(epochs=2, batch_size=32, learning_rate=0.05, warmup_steps=3)


def fresh() -> models.ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(8, 4, in_channels=3)


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


class Interrupt(Exception):
    pass


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
    """One epoch against the update rule written out (Sutskever et al. 2013, in PyTorch's form)."""
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


def test_the_learning_rate_warms_up_and_drops_twice() -> None:
    recipe = Recipe(warmup_steps=400)
    assert [recipe.rate(step, 64000) for step in (0, 399, 400, 31999)] == [0.01, 0.01, 0.1, 0.1]
    assert recipe.rate(32000, 64000) == pytest.approx(0.01)
    assert recipe.rate(48000, 64000) == pytest.approx(0.001)


def test_a_checkpoint_of_something_else_is_refused(images: data.Data, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(fresh(), images, SMALL, path)
    with pytest.raises(ValueError, match="checkpoint: .* is of another model"):
        train(models.preact_resnet(14, 4), images, SMALL, path)
    with pytest.raises(ValueError, match="checkpoint: .* is of another recipe"):
        train(fresh(), images, dataclasses.replace(SMALL, seed=1), path)
    with pytest.raises(ValueError, match="checkpoint: .* is of another data"):
        train(fresh(), data.synthetic(images=128, shape=(3, 8, 8), seed=1), SMALL, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="weights: .* is not a readable"):
        train(fresh(), images, SMALL, path)


def test_bad_recipes_are_named(images: data.Data) -> None:
    with pytest.raises(ValueError, match="recipe: batch_size 256 exceeds the 128 training images"):
        train(fresh(), images, dataclasses.replace(SMALL, batch_size=256))
    with pytest.raises(ValueError, match="recipe: expected epochs"):
        Recipe(epochs=0)
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        Recipe(seed=1 << 64)
    with pytest.raises(ValueError, match="recipe: the loss is"):
        train(fresh(), images, dataclasses.replace(SMALL, learning_rate=1e20, warmup_steps=0))
