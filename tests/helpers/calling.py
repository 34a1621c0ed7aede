"""A public callable with valid arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Call", "call_of"]


@dataclass(frozen=True)
class Call:
    """A public callable and its valid arguments.

    Attributes:
        valid: for every parameter, a function that returns a valid value.
        parts: names that an error may begin with in place of the parameter's: those of its fields or parts.
    """

    function: Callable[..., Any]
    valid: Mapping[str, Callable[[], Any]]
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def call_of(function: Callable[..., Any], parts: Mapping[str, Sequence[str]] | None = None, **valid: Any) -> Call:
    """Return a call with these values and the defaults of other parameters.

    Args:
        valid: a value, or a function without parameters that returns it.
    """
    makers = {name: value if is_maker(value) else (lambda value=value: value) for name, value in valid.items()}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in makers and parameter.default is not parameter.empty:
            makers[name] = lambda value=parameter.default: value
    return Call(function, makers, parts or {})


def is_maker(value: Any) -> bool:
    return inspect.isfunction(getattr(value, "__wrapped__", value)) and not inspect.signature(value).parameters
