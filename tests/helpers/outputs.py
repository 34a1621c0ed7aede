"""Comparison of printed outputs: text exactly, numbers as far as processors agree."""

from __future__ import annotations

import math
import re

__all__ = ["same_output"]

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w|\.\d)")
TOLERANCE = 1e-3
"""Relative difference of numbers with a fraction or an exponent; float32 sums differ by less between processors."""


def same_output(expected: str, printed: str) -> bool:
    """Return whether an output is the one expected, apart from spacing and the last digits of its numbers.

    Integers must be equal, also those printed as ``1.``, and only zero equals zero. Other numbers may differ by
    `TOLERANCE`, and by one unit of the last digit that ``expected`` shows if it has two significant ones; zeros at
    its end do not count. ``...`` in ``expected`` stands for any text.
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
    if NUMBER.split(expected) != NUMBER.split(printed):
        return False
    return all(map(_same_number, NUMBER.findall(expected), NUMBER.findall(printed)))


def _same_number(expected: str, printed: str) -> bool:
    if expected == printed:
        return True
    if not (_is_float(expected) and _is_float(printed)):
        return False
    values = float(expected), float(printed)
    if expected.endswith(".") or printed.endswith(".") or 0.0 in values:
        return values[0] == values[1]
    mantissa, _, exponent = expected.lower().partition("e")
    whole, _, fraction = mantissa.lstrip("+-").partition(".")
    significant = (whole + fraction).strip("0")
    unit = 10.0 ** (int(exponent or 0) - len(fraction)) if len(significant) > 1 else 0.0
    # A little more than one unit, for the rounding of decimal numbers.
    return math.isclose(*values, rel_tol=TOLERANCE, abs_tol=1.01 * unit)


def _is_float(number: str) -> bool:
    return bool(re.search("[.eE]", number))
