"""One step of training in which a number of residual modules is drawn, beside one of the whole network.

What is not drawn runs neither forward nor back (`pathnet.training`), so that a step should take a little more than
the share of the modules that are drawn: stem, head and projections run in each.
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
from benchmarks.outcome import Failed, Found
from pathnet.models import ResidualNet
from pathnet.training import Recipe
from pathnet.training.sampling import drawn_modules

__all__ = ["training_step"]

CHECKED_DRAWS = 4
TOLERANCE = 1e-10
"""Of float64 gradients: the same operations but for additions of zero."""

Drawn = Sequence[bool]


def training_step(field: Field) -> Found:
    """Forward, backward and the step of SGD; a draw of its own each round."""
    sizes = field.sizes
    checked = network(sizes.checked)
    found: Found = {"drawn": sizes.drawn, "modules": field.n, "batch": sizes.setup.batch, "precision": "float32"}
    found["error"] = error = _error(checked, *batch(sizes.checked), min(sizes.drawn, checked.n - 1))
    if not error < TOLERANCE:
        # As a word, since JSON has no number for a NaN.
        found["error"] = str(error)
        raise Failed(f"gradients with modules drawn are off by {error:.1g}, hence not timed", found)
    take, rounds = _step(field), count()
    timings = field.budget.timed(
        {
            "all modules": lambda: take(None),
            "modules drawn": lambda: take(_draw(field.net, sizes.drawn, next(rounds))),
        },
        sizes.draws,
        "steps",
    )
    return found | {
        "timings": {name: timing.facts() for name, timing in timings.items()},
        "share": timings["modules drawn"].median / timings["all modules"].median,
    }


def _draw(net: ResidualNet, modules: int, step: int) -> Drawn:
    drawn = drawn_modules(net, Recipe(modules=modules), step)
    assert drawn is not None
    return drawn


def _step(field: Field) -> Callable[[Drawn | None], None]:
    """Takes one step after the other, as `pathnet.training.train` takes them."""
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

    def take(drawn: Drawn | None) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(images, drawn), field.labels).backward()
        optimizer.step()

    return take


def _error(net: ResidualNet, images: Tensor, labels: Tensor, modules: int) -> float:
    """How far gradients are from those of modules that are computed and multiplied by zero; infinite where a module
    that is not drawn has one."""
    net = net.double().train()
    errors = []
    for step in range(CHECKED_DRAWS):
        drawn = _draw(net, modules, step)
        output, expected = net(images.double(), drawn), _multiplied(net, images.double(), drawn)
        parameters = list(net.parameters())
        own = torch.autograd.grad(F.cross_entropy(output, labels), parameters, allow_unused=True)
        truth = torch.autograd.grad(F.cross_entropy(expected, labels), parameters)
        for grad, other in zip(own, truth, strict=True):
            size = float(other.norm())
            if grad is None or size == 0:
                errors.append(0.0 if grad is None and size == 0 else torch.inf)
            else:
                errors.append(float((grad - other).norm()) / size)
    # Not max(): it passes a NaN over.
    return float(torch.tensor(errors).max())


def _multiplied(net: ResidualNet, images: Tensor, drawn: Drawn) -> Tensor:
    y = net.stem(images)
    for block, own in zip(net, drawn, strict=True):
        skip, residual = block.branches(y)
        y = skip + float(own) * residual
    return torch.as_tensor(net.head(y))
