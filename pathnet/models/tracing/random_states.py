"""The states of the random generators that a model may draw from on the CPU."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

__all__ = ["random_states", "random_states_restored", "set_draws"]

WORDS = 624
"""Number of words in the state of a Mersenne twister."""
STATES = {"least": 0, "most": 0x12DD9BB3}
"""Words from which a Mersenne twister draws integers whose bits are all 0, or all 1."""


def random_states() -> tuple[Any, ...]:
    """Return the states of the generators of torch, Python and NumPy, comparable with ``==``."""
    numpy = _numpy()
    _, words, *position = numpy.get_state() if numpy else (None, b"")
    return torch.get_rng_state().tolist(), random.getstate(), bytes(words), position


def _numpy() -> Any:
    """Return NumPy's global generator, or None if nothing has imported it."""
    numpy = sys.modules.get("numpy")
    return numpy and numpy.random.mtrand._rand


@contextmanager
def random_states_restored() -> Iterator[None]:
    state, python_state, numpy = torch.get_rng_state(), random.getstate(), _numpy()
    numpy_state = numpy and numpy.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python_state)
        if numpy:
            numpy.set_state(numpy_state)


def set_draws(draws: Literal["seeded", "least", "most"]) -> None:
    """Set all generators so that the next 300 uniform numbers are any, about 0, or about 1.

    A branch that is taken with some probability is taken for one of the extremes, however small the probability.
    """
    torch.manual_seed(0)
    random.seed(0)
    if numpy := _numpy():
        numpy.seed(0)
    if draws == "seeded":
        return
    word = STATES[draws]
    random.setstate((3, (word,) * WORDS + (0,), None))
    if numpy:
        numpy.set_state(("MT19937", [word] * WORDS, 0))
    state = torch.get_rng_state()
    if len(state) > 24 + 8 * WORDS:
        # Seed (8 bytes), words left (4), a flag (4), next word (8), then the words in 8 bytes each.
        state[8:12].view(torch.int32).fill_(WORDS)
        state[16:24].view(torch.int64).fill_(0)
        state[24 : 24 + 8 * WORDS].view(torch.int64).fill_(word)
        torch.set_rng_state(state)
