"""Several gradients through a block at once, by `torch.vmap` over its pull-backs, where that is faster.

On a GPU one launch then serves all of them. On a CPU one after the other stays in the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pathnet.engines.autograd.agreement import agree
from pathnet.engines.autograd.capture import random_like
from pathnet.engines.autograd.pullbacks import IDENTITY, Pullback, Pullbacks, product
from pathnet.engines.autograd.states import ScaledState, in_range, in_range_together
from pathnet.engines.autograd.timing import fastest

__all__ = ["VISITS", "measured_width", "pulled_together"]

WIDTHS = (4, 16)
"""Numbers of gradients that are tried at once."""

TRIALS = 2

VISITS = 640
"""Gradients that pass before the measurement, which costs as much as about 10 % of them."""


def together(pullbacks: Pullbacks) -> Pullbacks:
    """Return the pull-backs of gradients [k, B, ...]."""

    def batched(pull: Pullback | None) -> Pullback | None:
        return pull if pull is None or pull is IDENTITY else torch.vmap(pull)

    join, *parts = map(batched, (pullbacks.join, *pullbacks.parts))
    assert join is not None
    return replace(pullbacks, join=join, parts=tuple(parts))


def pulled_together(
    pullbacks: Pullbacks, step: Sequence[float], states: Sequence[ScaledState], width: int
) -> list[ScaledState | None]:
    """Return states pulled back through a block, at most ``width`` at once; None for those that are zero.

    Args:
        step: the factor of each part of the block.
    """
    alone = partial(product, pullbacks, step)
    after: list[ScaledState | None] = []
    for begin in range(0, len(states), width):
        part = states[begin : begin + width]
        if len(part) == 1:
            after.append(in_range(alone, part[0], pullbacks.inner))
        else:
            at_once = partial(product, together(pullbacks), step)
            after += in_range_together(at_once, alone, part, pullbacks.inner)
    return after


def measured_width(pullbacks: Pullbacks, grad: Tensor, most: int) -> int:
    """Return the number of gradients at which one takes the least time.

    It is 1 where `torch.vmap` fails, lacks an operator's rule (for which it would loop, and write to stderr), or
    disagrees with the pull-backs one by one.

    Args:
        grad: a gradient at the block's output.
        most: maximum number.
    """
    ones = [1.0] * len(pullbacks.parts)
    widths = [width for width in WIDTHS if width <= most]
    if not widths:
        return 1
    grads = random_like(grad.expand(widths[-1], *grad.shape).clone(), grad.dtype)
    checked = (0, 1, widths[-1] - 1)
    expected = torch.stack([product(pullbacks, ones, grads[number]) for number in checked])

    def at_once(width: int) -> Tensor:
        return product(together(pullbacks), ones, grads[:width])

    with _rules_alone(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            if not agree(at_once(widths[-1])[list(checked)], expected, pullbacks.inner):
                return 1
            candidates: list[Callable[[], object]] = [lambda: product(pullbacks, ones, grads[0])]
            candidates += [partial(at_once, width) for width in widths]
            return (1, *widths)[fastest(candidates, grad.device, (1, *widths), TRIALS)]
        except Exception:  # Of whatever kind: a user's own operator may raise any.
            return 1


@contextmanager
def _rules_alone() -> Iterator[None]:
    """Let `torch.vmap` fail where it lacks an operator's rule; in all threads, as PyTorch keeps it."""
    settings: Any = torch._C._functorch
    enabled = settings._is_vmap_fallback_enabled()
    settings._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        settings._set_vmap_fallback_enabled(enabled)
