"""The sizes of the step that times training."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CIFAR_10", "FULL", "SMALL", "Sizes"]

CIFAR_10 = 50_000
"""Number of training images of CIFAR-10."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one run.

    Attributes:
        drawn: number of residual modules of a step that draws some.
        rounds: number of steps of each form, and of such draws.
        images: number of images that batches are taken from.
        kept_rounds: number of steps of some forms in a process that keeps the memory it frees; 0 for no process.
        memory_forms: number of forms whose memory is measured, each in a process of its own.
    """

    drawn: int
    rounds: int
    images: int
    kept_rounds: int
    memory_forms: int


FULL = Sizes(drawn=23, rounds=9, images=CIFAR_10, kept_rounds=5, memory_forms=99)
SMALL = Sizes(drawn=2, rounds=2, images=64, kept_rounds=0, memory_forms=2)
