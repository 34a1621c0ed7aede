"""The loss that label smoothing trains, against its definition in float64 (Szegedy et al. 2016)."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers.training import SMALL, fresh
from torch import Tensor

from pathnet import data
from pathnet.models import ResidualNet
from pathnet.training import Recipe, train
from pathnet.training.sampling import training_batch
from pathnet.training.state import TrainingState

RECIPE = dataclasses.replace(SMALL, augment=False)


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


def expected(net: ResidualNet, images: Tensor, labels: Tensor, smoothing: float) -> tuple[float, list[Tensor]]:
    """Return the loss, (1 - e) CE + e times the mean over classes of -log p, and its gradient, as in the formula."""
    net = copy.deepcopy(net).double().train()
    output = net(images.double())
    shifted = (output - output.amax(1, keepdim=True)).detach()
    p = shifted.exp() / shifted.exp().sum(1, keepdim=True)
    one_hot = torch.eye(p.shape[1], dtype=torch.float64)[labels]
    cross_entropy = -p.log()[range(len(labels)), labels]
    loss = (1 - smoothing) * cross_entropy + smoothing * -p.log().mean(1)
    # The derivative of -log p_k by output j is p_j - [j = k].
    output.backward((p - (1 - smoothing) * one_hot - smoothing / p.shape[1]) / len(labels))
    gradients = [parameter.grad for parameter in net.parameters()]
    return loss.mean().item(), [gradient for gradient in gradients if gradient is not None]


def stepped(images: data.Data, recipe: Recipe) -> tuple[float, list[Tensor]]:
    """Return the loss and the gradient of the first step of a training."""
    net = fresh().train()
    loss = TrainingState(net, images, recipe, None, "none").advance()
    gradients = [parameter.grad for parameter in net.parameters()]
    return loss, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_a_step_has_loss_and_gradient_of_the_formula(images: data.Data, smoothing: float) -> None:
    recipe = dataclasses.replace(RECIPE, label_smoothing=smoothing)
    loss, gradients = stepped(images, recipe)
    true_loss, true_gradients = expected(fresh(), *training_batch(images, recipe, 0), smoothing)
    assert loss == pytest.approx(true_loss, rel=1e-6)
    for gradient, truth in zip(gradients, true_gradients, strict=True):
        assert (gradient.double() - truth).norm() <= 1e-4 * truth.norm()


def test_smoothing_changes_the_loss_that_is_trained(images: data.Data) -> None:
    """The tolerances above tell each smoothing from the others."""
    loss, gradients = stepped(images, RECIPE)
    other, moved = stepped(images, dataclasses.replace(RECIPE, label_smoothing=0.1))
    assert abs(other - loss) > 1e-3 * loss
    changes = [
        ((new - old).norm() / old.norm()).item() for new, old in zip(moved, gradients, strict=True) if old.norm() > 0
    ]
    assert max(changes) > 0.05


def test_labels_that_are_spread_entirely_teach_nothing_about_classes(images: data.Data) -> None:
    spread = dataclasses.replace(RECIPE, label_smoothing=1.0)
    pixels = images.train.take(torch.arange(128))
    relabelled = dataclasses.replace(images, train=data.InMemory(pixels, 9 - images.train.labels))
    assert not torch.equal(relabelled.train.labels, images.train.labels)
    assert stepped(images, spread)[0] == pytest.approx(stepped(relabelled, spread)[0], rel=1e-6)
    assert stepped(images, RECIPE)[0] != pytest.approx(stepped(relabelled, RECIPE)[0], rel=1e-3)


def test_an_epoch_reports_the_loss_that_is_trained(images: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, batch_size=128, label_smoothing=0.3)
    (epoch,) = train(fresh(), images, recipe, engine="none")
    assert epoch.train_loss == pytest.approx(expected(fresh(), *training_batch(images, recipe, 0), 0.3)[0], rel=1e-6)
