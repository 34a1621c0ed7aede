"""A training step in which some residual modules are drawn, against one of the whole network.

Modules that are not drawn run neither forward nor backward (`pathnet.training`), so a step should take a little
more than the share of the modules that are drawn: stem, head and projections run in each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import batch, network
from benchmarks.cpu.field import Field
from benchmarks.outcome import Failed, Findings
from pathnet.models import ResidualNet
from pathnet.training import Recipe
from pathnet.training.sampling import drawn_modules

__all__ = ["training_step"]

CHECKED_DRAWS = 4
TOLERANCE = 1e-10
"""Largest relative error of float64 gradients: the operations are the same except for additions of zero."""

Drawn = Sequence[bool]


def training_step(field: Field) -> Findings:
    """Check and time forward pass, backward pass and SGD step, with a new draw each round."""
    sizes = field.sizes
    checked = network(sizes.checked)
    findings: Findings = {
        "drawn": sizes.drawn,
        "modules": field.n,
        "batch": sizes.setup.batch,
        "precision": "float32",
    }
    findings["error"] = error = _error(checked, *batch(sizes.checked), min(sizes.drawn, checked.n - 1))
    if not error < TOLERANCE:
        # A string, since JSON has no NaN.
        findings["error"] = str(error)
        raise Failed(f"gradients with modules drawn are off by {error:.1g}, hence not timed", findings)
    train_step, rounds = _step(field), count()
    timings = field.budget.timed(
        {
            "all modules": lambda: train_step(None),
            "modules drawn": lambda: train_step(_draw(field.net, sizes.drawn, next(rounds))),
        },
        sizes.draws,
        "steps",
    )
    return findings | {
        "timings": {name: timing.facts() for name, timing in timings.items()},
        "share": timings["modules drawn"].median / timings["all modules"].median,
    }


def _draw(net: ResidualNet, modules: int, step: int) -> Drawn:
    drawn = drawn_modules(net, Recipe(modules=modules), step)
    assert drawn is not None
    return drawn


def _step(field: Field) -> Callable[[Drawn | None], None]:
    """Return a function that trains one step, as `pathnet.training.train` does."""
    recipe = Recipe()
    net = copy.deepcopy(field.net).train().to(memory_format=torch.channels_last)
    images = field.images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=recipe.warmup_learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )

    def train_step(drawn: Drawn | None) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(images, drawn), field.labels).backward()
        optimizer.step()

    return train_step


def _error(net: ResidualNet, images: Tensor, labels: Tensor, modules: int) -> float:
    """Return the largest relative error against gradients of modules that are computed and multiplied by zero.

    It is infinite if a module that is not drawn has a gradient.
    """
    net = net.double().train()
    errors = []
    for step in range(CHECKED_DRAWS):
        drawn = _draw(net, modules, step)
        output, expected = net(images.double(), drawn), _multiplied(net, images.double(), drawn)
        parameters = list(net.parameters())
        grads = torch.autograd.grad(F.cross_entropy(output, labels), parameters, allow_unused=True)
        truth = torch.autograd.grad(F.cross_entropy(expected, labels), parameters)
        for grad, expected_grad in zip(grads, truth, strict=True):
            size = float(expected_grad.norm())
            if grad is None or size == 0:
                errors.append(0.0 if grad is None and size == 0 else torch.inf)
            else:
                errors.append(float((grad - expected_grad).norm()) / size)
    # Not max(), which ignores a NaN.
    return float(torch.tensor(errors).max())


def _multiplied(net: ResidualNet, images: Tensor, drawn: Drawn) -> Tensor:
    y = net.stem(images)
    for block, active in zip(net, drawn, strict=True):
        skip, residual = block.branches(y)
        y = skip + float(active) * residual
    return torch.as_tensor(net.head(y))
