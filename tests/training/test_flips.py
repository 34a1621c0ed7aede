"""The images that each epoch mirrors."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from scipy import stats
from torch import Tensor

from pathnet import data
from pathnet.training import Recipe
from pathnet.training.sampling import steps_an_epoch, training_batch

ALTERNATING = Recipe(epochs=6, batch_size=8, flips="alternating", seed=2)
ABSENT = -1


@cache
def images(count: int = 36, padding: int = 0, flip: bool = True) -> data.Data:
    """Return random images, of which no crop equals a crop of another one or of a mirrored one."""
    return dataclasses.replace(data.synthetic(images=count, shape=(3, 8, 8)), crop_padding=padding, flip=flip)


def mirrored(of: data.Data, recipe: Recipe, epoch: int) -> Tensor:
    """Return for each training image whether an epoch mirrors it: 1 or 0, or ABSENT, int64 [images].

    Images are recognised bit for bit among the crops of all images and of their mirror images.
    """
    padding, (_, height, width) = of.crop_padding, of.image_shape
    plain = of.normalise(of.train.take(torch.arange(len(of.train))))
    forms = []
    for form in (plain, plain.flip(3)):
        padded = torch.nn.functional.pad(form, (padding,) * 4)
        forms.append(padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2))
    crops = torch.stack(forms)
    result = torch.full((len(of.train),), ABSENT)
    steps = steps_an_epoch(of, recipe)
    for step in range(epoch * steps, (epoch + 1) * steps):
        batch, labels = training_batch(of, recipe, step)
        for image, label in zip(batch, labels, strict=True):
            ((form, index),) = (crops == image).flatten(3).all(3).any(2).nonzero().tolist()
            assert result[index] == ABSENT and of.train.labels[index] == label
            result[index] = form
    assert (result != ABSENT).sum() == steps * recipe.batch_size
    return result


@pytest.mark.parametrize("padding", [0, 2])
def test_alternating_flips_show_both_forms_of_an_image_in_two_epochs(padding: int) -> None:
    """Four of 36 images are left out of each epoch, and alternate all the same."""
    epochs = [mirrored(images(padding=padding), ALTERNATING, epoch) for epoch in range(6)]
    for first, second in zip(epochs, epochs[1:], strict=False):
        both = (first != ABSENT) & (second != ABSENT)
        assert both.sum() >= 28 and (first + second)[both].eq(1).all()
    for first, later in zip(epochs, epochs[2:], strict=False):
        both = (first != ABSENT) & (later != ABSENT)
        assert torch.equal(first[both], later[both])


@pytest.mark.parametrize("flips", ["random", "alternating"])
def test_the_first_epoch_mirrors_a_random_half(flips: str) -> None:
    many = images(400)
    recipe = dataclasses.replace(ALTERNATING, batch_size=80, flips=flips)  # type: ignore[arg-type]
    seeds = [mirrored(many, dataclasses.replace(recipe, seed=seed), 0) for seed in (2, 3)]
    for chosen in seeds:
        assert stats.binomtest(int(chosen.sum()), 400, 0.5).pvalue > 1e-3
        # Neither the images of a class nor neighbours are mirrored together.
        assert stats.binomtest(int((chosen[1:] ^ chosen[:-1]).sum()), 399, 0.5).pvalue > 1e-3
    assert stats.binomtest(int((seeds[0] ^ seeds[1]).sum()), 400, 0.5).pvalue > 1e-3, "seeds choose independently"


def test_random_flips_choose_anew_in_each_epoch() -> None:
    recipe = dataclasses.replace(ALTERNATING, batch_size=80, flips="random")
    first, second = (mirrored(images(400), recipe, epoch) for epoch in range(2))
    assert stats.binomtest(int((first ^ second).sum()), 400, 0.5).pvalue > 1e-3


def test_alternating_flips_are_a_function_of_the_seed() -> None:
    """Neither the batches nor what was drawn before nor other settings change them."""
    epochs = [mirrored(images(32), ALTERNATING, epoch) for epoch in range(3)]
    changes = {"batch_size": 4, "epochs": 40, "learning_rate": 1.0, "modules": 2, "schedule": "one-cycle"}
    other = dataclasses.replace(ALTERNATING, **changes)  # type: ignore[arg-type]
    for epoch in (2, 0, 1):
        mirrored(images(), ALTERNATING, epoch)
        assert torch.equal(mirrored(images(32), other, epoch), epochs[epoch])


def test_crops_do_not_depend_on_flips() -> None:
    """The positions of the crops are drawn first, so they are the same whatever is mirrored."""
    unmirrored = images(padding=2, flip=False)
    plain, _ = training_batch(unmirrored, ALTERNATING, 5)
    for flips in ("random", "alternating"):
        recipe = dataclasses.replace(ALTERNATING, flips=flips)
        batch, _ = training_batch(images(padding=2), recipe, 5)
        kept = (batch == plain).flatten(1).all(1)
        assert kept.any() and not kept.all()


@pytest.mark.parametrize("flips", ["random", "alternating"])
@pytest.mark.parametrize("padding", [0, 2])
def test_data_that_allow_no_flips_are_never_mirrored(flips: str, padding: int) -> None:
    recipe = dataclasses.replace(ALTERNATING, flips=flips)  # type: ignore[arg-type]
    for epoch in range(2):
        assert not (mirrored(images(padding=padding, flip=False), recipe, epoch) == 1).any()


def test_nothing_is_mirrored_without_augmentation() -> None:
    recipe = dataclasses.replace(ALTERNATING, augment=False)
    for epoch in range(2):
        assert not (mirrored(images(), recipe, epoch) == 1).any()


@pytest.mark.parametrize("step", [0, 3, 4, 9])
def test_shares_of_alternating_flips_make_up_the_batch(step: int) -> None:
    """Each process of a training has its part of the images that one process would have."""
    whole, labels = training_batch(images(padding=2), ALTERNATING, step)
    shares = [training_batch(images(padding=2), ALTERNATING, step, slice(4 * k, 4 * k + 4)) for k in range(2)]
    assert torch.equal(torch.cat([share for share, _ in shares]), whole)
    assert torch.equal(torch.cat([share for _, share in shares]), labels)
