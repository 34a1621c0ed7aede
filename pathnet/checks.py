"""Checks of arguments. Each raises a ValueError that names the argument, the expectation and the value."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "MOST_INTEGER",
    "check_callable",
    "check_flag",
    "check_integer",
    "check_integers",
    "check_number",
    "check_path",
    "check_tensor",
    "described",
    "listed",
    "one_of",
]

MOST_INTEGER = (1 << 63) - 1
"""Largest integer that files hold."""
LIMIT = 1_000_000
"""Least upper bound that limits memory or files, and tells nothing about a value that does not exceed it."""
LONGEST = 60
"""Maximum number of characters of a value that an error message quotes."""


def described(value: object) -> str:
    """Return a short description of a value, for an error message."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return "a nested tensor"
        return f"a tensor {value.dtype} {list(value.shape)}" if value.layout == torch.strided else f"{value.layout}"
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST:
        # Python refuses to write out the longest ones.
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, bool | int | float | complex | str | bytes | np.generic | torch.dtype | torch.device | None):
        text = repr(value)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    if isinstance(value, list | tuple | dict) and not value:
        return repr(value)
    return f"a {type(value).__name__}"


def check_integer(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """Return ``value`` as a Python integer.

    Args:
        name: name of the argument in an error.
        value: an integer of Python, NumPy or PyTorch; no bool, no float.
        least, most: inclusive bounds; None for no bound.

    Raises:
        ValueError: ``value`` is no integer, or out of bounds.
    """
    is_flag = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        number = None if is_flag else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or not (-math.inf if least is None else least) <= number <= (
        math.inf if most is None else most
    ):
        shown = None if most is not None and most >= LIMIT and (number is None or number <= most) else most
        raise ValueError(f"{name}: expected an integer{_bounds(least, shown)}, got {described(value)}")
    return number


def check_number(
    name: str, value: object, least: float | None = None, most: float | None = None, above: float | None = None
) -> float:
    """Return ``value`` as a finite float.

    Args:
        name: name of the argument in an error.
        value: a real number of Python, NumPy or PyTorch.
        least, most: inclusive bounds; None for no bound.
        above: an exclusive lower bound, in place of ``least``.

    Raises:
        ValueError: ``value`` is no finite real number, or out of bounds.
    """
    number: float | None = None
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if isinstance(value, Tensor):
        is_number = value.ndim == 0 and value.dtype != torch.bool and not value.is_complex()
    try:
        number = float(value) if is_number else None  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = None
    # Not by `math.isfinite`, which `torch.compile` cannot trace with a number that is no constant to it.
    outside = number is None or not abs(number) < math.inf
    if number is not None and not outside:
        outside = (
            (least is not None and number < least)
            or (most is not None and number > most)
            or (above is not None and number <= above)
        )
    if number is None or outside:
        bound = (
            _bounds(least, most)
            if above is None
            else f" above {above}{'' if most is None else f' and at most {most}'}"
        )
        raise ValueError(f"{name}: expected a finite number{bound}, got {described(value)}")
    return number


def _bounds(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {'2^63 - 1' if most == MOST_INTEGER else most}"
    if least is not None:
        return f" of at least {least}"
    return "" if most is None else f" of at most {most}"


def check_tensor(
    name: str,
    value: object,
    kind: Literal["floating-point", "integer", "any"] = "any",
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return ``value``, a dense tensor that holds values.

    Args:
        name: name of the argument in an error.
        kind: accepted types of elements; bool counts as integer.
        shape: the expected sizes, None for any size; by default any shape.
        device: the expected device, the network's; by default any but ``meta``.

    Raises:
        ValueError: ``value`` is no such tensor: neither sparse, MKL-DNN, quantised, meta nor nested ones are.
    """
    what = "a tensor" if kind == "any" else f"{'an' if kind == 'integer' else 'a'} {kind} tensor"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected {what}, got {described(value)}")
    is_meta = value.device.type == "meta" and device is None
    if value.is_nested or value.layout != torch.strided or value.is_quantized or is_meta:
        kind_of = "nested" if value.is_nested else str(value.layout)
        kind_of = "quantised" if value.is_quantized else "on the device meta" if is_meta else kind_of
        raise ValueError(f"{name}: expected {what} that is dense and holds values, got one that is {kind_of}")
    if device not in (None, value.device):
        raise ValueError(f"{name}: expected device {device} (the network's), got {value.device}")
    fits = {
        "any": not value.is_complex(),
        "floating-point": value.is_floating_point(),
        "integer": not value.is_floating_point() and not value.is_complex(),
    }
    if not fits[kind]:
        raise ValueError(f"{name}: expected {what}, got {value.dtype}")
    if shape is not None and not (
        value.ndim == len(shape)
        and all(expected in (None, size) for expected, size in zip(shape, value.shape, strict=True))
    ):
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{sizes}], got {list(value.shape)}")
    return value


def check_integers(name: str, values: object, least: int | None = None, most: int | None = None) -> tuple[int, ...]:
    """Return the integers of an iterable, each checked by `check_integer`.

    Args:
        values: an iterable of integers, such as a list, a set, an array or a tensor [N]; no text, no mapping.

    Raises:
        ValueError: ``values`` is no such iterable, or one of its values is no integer or out of bounds.
    """
    try:
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
            raise TypeError
        listed = tuple(values)
    except (TypeError, RuntimeError):
        shown = None if most is not None and most >= LIMIT else most
        raise ValueError(
            f"{name}: expected a list of integers{_bounds(least, shown)}, got {described(values)}"
        ) from None
    return tuple(check_integer(name, value, least, most) for value in listed)


def listed(words: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """Return the first words of a list, and how many more it has."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return between.join(words[:most]) + more


def check_flag(name: str, value: object) -> bool:
    """Return ``value`` as a bool; raise ValueError unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {described(value)}")
    return bool(value)


def check_callable(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` can be called."""
    if not callable(value):
        raise ValueError(f"{name}: expected a function, got {described(value)}")


def check_path(name: str, value: object) -> Path:
    """Return ``value`` as a path; raise ValueError unless it is text or a path that a file can have."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"{name}: expected the path of a file or folder, got {described(value)}")
    return Path(text)


def one_of(name: str, value: Any, literal: object) -> None:
    """Raise ValueError unless ``value`` is among the strings of a Literal type."""
    allowed = get_args(literal)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {described(value)}")
