"""Counter-based random streams: every draw is a function of its key alone.

A stream is named by a seed, a purpose and counters of the draw (batch, length, step...), so any worker can redo
any draw without knowing the draws before it.
"""

from __future__ import annotations

import zlib

import numpy as np

__all__ = ["stream"]


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return the generator that belongs to ``(seed, purpose, *counters)``.

    The bit generator is Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), keyed
    through NumPy's ``SeedSequence``; ``purpose`` keeps apart draws that share seed and counters.

    Raises:
        ValueError: the seed or a counter is negative.
    """
    if seed < 0 or any(counter < 0 for counter in counters):
        raise ValueError(f"seed: expected non-negative integers for seed and counters, got {(seed, *counters)}")
    entropy = [seed, zlib.crc32(purpose.encode()), *counters]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
