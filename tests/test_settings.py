"""Settings of a dataclass in its docstring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pathnet.settings import Above, AtLeast, AtMost, Help, Unit, documented


@dataclass(frozen=True)
class Inner:
    """Settings within settings."""


@documented
@dataclass(frozen=True)
class Example:
    """Settings of an example.

    Raises:
        ValueError: one is out of its range.
    """

    count: Annotated[int, Help("Number of things."), AtLeast(1)]
    width: Annotated[float, Help("Width of one."), Unit("mm")] = 2.0
    share: Annotated[float, Help("Share of them."), Above(0), AtMost(1)] = 0.5
    kind: Annotated[Literal["a", "b", "c"], Help("Kind of thing.")] = "b"
    whole: Annotated[bool, Help("Whether " + "things are whole, " * 6 + "or not.")] = True
    inner: Annotated[Inner, Help("Further settings.")] = field(default_factory=Inner)


DOCSTRING = """\
Settings of an example.

Raises:
    ValueError: one is out of its range.

Attributes:
    count: Number of things. At least 1.
    width: Width of one. Unit: mm. By default ``2.0``.
    share: Share of them. Above 0, at most 1. By default ``0.5``.
    kind: Kind of thing. ``a``, ``b`` or ``c``. By default ``b``.
    whole: Whether things are whole, things are whole, things are whole, things are whole, things are whole,
        things are whole, or not. By default ``True``.
    inner: Further settings."""


def test_a_docstring_lists_the_settings_with_help_choices_bounds_and_defaults() -> None:
    assert Example.__doc__ == DOCSTRING
