"""Comparison of printed outputs: text exactly, numbers as far as processors agree."""

from __future__ import annotations

import math
import re

__all__ = ["same_output"]

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)")
TOLERANCE = 1e-3
"""Relative difference of numbers with a fraction or an exponent; float32 sums differ by less between processors."""


def same_output(expected: str, printed: str) -> bool:
    """Return whether an output is the one expected, apart from spacing and the last digits of its numbers.

    Integers must be equal. ``...`` in ``expected`` stands for any text.
    """
    parts = [re.split(r"\s+", part.strip()) for part in expected.split("...")]
    words = re.split(r"\s+", printed.strip())
    if len(parts) == 1:
        return len(parts[0]) == len(words) and all(map(_same_word, parts[0], words))
    return _matches(parts, words)


def _matches(parts: list[list[str]], words: list[str]) -> bool:
    """Return whether words consist of the parts, in order, with anything between two parts."""
    position = 0
    for i, part in enumerate(parts):
        part = [word for word in part if word]
        starts = [0] if i == 0 else range(position, len(words) - len(part) + 1)
        if i == len(parts) - 1 and part:
            starts = [len(words) - len(part)] if len(words) - len(part) >= position else []
        for start in starts:
            if len(words) - start >= len(part) and all(map(_same_word, part, words[start:])):
                position = start + len(part)
                break
        else:
            return False
    return True


def _same_word(expected: str, printed: str) -> bool:
    if expected == printed:
        return True
    if NUMBER.sub("#", expected) != NUMBER.sub("#", printed):
        return False
    return all(map(_same_number, NUMBER.findall(expected), NUMBER.findall(printed)))


def _same_number(expected: str, printed: str) -> bool:
    if expected == printed:
        return True
    if not re.search(r"[.eE]", expected + printed):
        return False
    # One unit in the last digit that the page shows.
    mantissa = re.split(r"[eE]", expected)[0]
    digits = len(mantissa.partition(".")[2])
    exponent = int(re.split(r"[eE]", expected)[1]) if re.search(r"[eE]", expected) else 0
    unit = 10.0 ** (exponent - digits)
    return math.isclose(float(expected), float(printed), rel_tol=TOLERANCE, abs_tol=1.01 * unit)
