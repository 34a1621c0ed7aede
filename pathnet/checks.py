"""Checks of arguments. Each raises a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_flag", "check_integer", "check_number", "check_tensor", "described", "one_of"]

LONGEST = 60
"""Characters of a value that an error message quotes."""


def described(value: object) -> str:
    """Return a short name of what came in place of an argument, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {list(value.shape)}" if value.layout == torch.strided else f"{value.layout}"
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        text = repr(value)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return f"a {type(value).__name__}"


def check_integer(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """Return ``value`` as a Python integer.

    Args:
        name: what an error calls the argument.
        value: an integer of Python's, NumPy's or PyTorch's; no bool, no float.
        least, most: its bounds, both included; None for no bound.

    Raises:
        ValueError: ``value`` is no integer, or out of its bounds.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        number = None
    if number is None or not (-math.inf if least is None else least) <= number <= (
        math.inf if most is None else most
    ):
        raise ValueError(f"{name}: expected an integer{_bounds(least, most)}, got {described(value)}")
    return number


def check_number(
    name: str, value: object, least: float | None = None, most: float | None = None, above: float | None = None
) -> float:
    """Return ``value`` as a finite float.

    Args:
        name: what an error calls the argument.
        value: a real number of Python's, NumPy's or PyTorch's.
        least, most: its bounds, both included; None for no bound.
        above: a lower bound that is excluded, in place of ``least``.

    Raises:
        ValueError: ``value`` is no finite real number, or out of its bounds.
    """
    number: float | None
    try:
        number = None if isinstance(value, bool | str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = None
    outside = number is None or not math.isfinite(number)
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
        return f" from {least} to {most}"
    if least is not None:
        return f" of at least {least}"
    return "" if most is None else f" of at most {most}"


def check_tensor(
    name: str,
    value: object,
    kind: Literal["floating-point", "integer", "any"] = "any",
    shape: Sequence[int | None] | None = None,
) -> Tensor:
    """Return ``value``, a dense tensor that holds values.

    Args:
        name: what an error calls the argument.
        kind: which types of elements are accepted; bool counts as integer.
        shape: the expected sizes, None where any will do; by default any shape.

    Raises:
        ValueError: ``value`` is no such tensor: sparse, MKL-DNN, quantised, meta and nested ones are refused too.
    """
    what = "a tensor" if kind == "any" else f"{'an' if kind == 'integer' else 'a'} {kind} tensor"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected {what}, got {described(value)}")
    if value.is_nested or value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        came = "nested" if value.is_nested else str(value.layout)
        came = "quantised" if value.is_quantized else "on the device meta" if value.device.type == "meta" else came
        raise ValueError(f"{name}: expected {what} that is dense and holds values, got one that is {came}")
    fits = {
        "any": not value.is_complex(),
        "floating-point": value.is_floating_point(),
        "integer": not value.is_floating_point() and not value.is_complex(),
    }
    if not fits[kind]:
        raise ValueError(f"{name}: expected {what}, got {value.dtype}")
    if shape is not None and not (
        value.ndim == len(shape) and all(own in (None, size) for own, size in zip(shape, value.shape, strict=True))
    ):
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{sizes}], got {list(value.shape)}")
    return value


def check_flag(name: str, value: object) -> bool:
    """Return ``value``, True or False; raise ValueError where it is neither."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {described(value)}")
    return bool(value)


def one_of(name: str, value: Any, literal: object) -> None:
    """Raise ValueError unless ``value`` is among the strings of a Literal type."""
    allowed = get_args(literal)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {described(value)}")
