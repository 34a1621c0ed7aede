"""Settings: dataclasses whose annotations hold the help and the bounds of each field.

``epochs: Annotated[int, Help("Passes over the training split."), AtLeast(1)] = 200`` is the complete description of a
setting. `check_settings` checks a dataclass by it, `documented` writes its docstring, and the command line builds a
flag from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from textwrap import fill
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pathnet.checks import MOST_INTEGER, check_flag, check_integer, check_number, one_of

__all__ = [
    "Above",
    "AtLeast",
    "AtMost",
    "Checked",
    "Flag",
    "Help",
    "Panel",
    "Setting",
    "Unit",
    "Without",
    "check_settings",
    "documented",
    "settings_of",
]

WIDTH = 110
"""Width of the docstrings that `documented` completes, in characters."""

Kind = TypeVar("Kind")
Mark = TypeVar("Mark")


@dataclass(frozen=True)
class Help:
    """Description of a setting, in a sentence or two."""

    text: str


@dataclass(frozen=True)
class Unit:
    """Unit of a quantity; 1 for ratios."""

    text: str


@dataclass(frozen=True)
class AtLeast:
    """Lower bound of a number, included."""

    value: int | float


@dataclass(frozen=True)
class Above:
    """Lower bound of a number, excluded."""

    value: int | float


@dataclass(frozen=True)
class AtMost:
    """Upper bound of a number, included."""

    value: int | float


@dataclass(frozen=True)
class Checked:
    """Check of a value that bounds cannot express: ``check(name, value)`` raises ValueError."""

    check: Callable[[str, Any], object]


@dataclass(frozen=True)
class Flag:
    """Form of a setting on the command line, where it differs from what name and type say.

    Attributes:
        name: the flag, such as ``--lr``.
        value: placeholder of its value, such as FILE.
        default: description of the default, where the value itself does not explain it.
        positional: whether the value stands by itself, without a flag.
        negatable: whether ``--no-...`` turns a flag off that is on by default or in a preset.
        former: an earlier name of the flag, which still works and which the help leaves out.
    """

    name: str | None = None
    value: str | None = None
    default: str | None = None
    positional: bool = False
    negatable: bool = False
    former: str | None = None


@dataclass(frozen=True)
class Panel:
    """Heading of a setting in the help of a command, or of all settings of a nested dataclass."""

    title: str


@dataclass(frozen=True)
class Without:
    """Names of fields of a nested dataclass that cannot be set from outside."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A field of a dataclass, with the marks of its annotation.

    Attributes:
        name: the field's name.
        type: its type, without marks.
        default: its default, or `dataclasses.MISSING`.
        marks: `Help`, `Unit`, bounds, `Flag` and the like.
    """

    name: str
    type: Any
    default: Any
    marks: tuple[object, ...]

    def mark(self, kind: type[Mark]) -> Mark | None:
        """Return the first mark of a kind, or None."""
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)

    @property
    def help(self) -> str:
        """Description of the setting, or an empty string."""
        mark = self.mark(Help)
        return mark.text if mark else ""

    @property
    def unit(self) -> str:
        """Unit of the quantity, or an empty string."""
        mark = self.mark(Unit)
        return mark.text if mark else ""

    @property
    def value_type(self) -> Any:
        """Type of a value other than None."""
        if get_origin(self.type) not in (Union, UnionType):
            return self.type
        choices = [choice for choice in get_args(self.type) if choice is not NoneType]
        return choices[0] if len(choices) == 1 else self.type

    def bound(self, kind: type[AtLeast] | type[Above] | type[AtMost]) -> int | float | None:
        """Return a bound, or None."""
        mark = self.mark(kind)
        return mark.value if mark else None


def settings_of(kind: type[Any]) -> tuple[Setting, ...]:
    """Return the settings of a dataclass, in their order."""
    return _settings(cast(Hashable, kind))


@cache
def _settings(kind: Any) -> tuple[Setting, ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_setting(field.name, hints[field.name], _default(field)) for field in fields(kind))


def check_settings(values: Any) -> None:
    """Check each field of a dataclass by its annotation, and keep numbers as Python's own.

    Integers, floats, flags and choices are checked by their type and bounds, and a `Checked` field also by its check.

    Raises:
        ValueError: a field is of another type, or out of its bounds.
    """
    for setting in settings_of(type(values)):
        value = getattr(values, setting.name)
        # A frozen dataclass takes no assignment.
        object.__setattr__(values, setting.name, _checked(setting, value))


def documented(kind: type[Kind]) -> type[Kind]:
    """Append the settings of a dataclass to its docstring, as its attributes, and return the dataclass."""
    attributes = (f"{setting.name}: {_described(setting)}" for setting in settings_of(kind))
    lines = (fill(attribute, WIDTH, initial_indent=4 * " ", subsequent_indent=8 * " ") for attribute in attributes)
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:", *lines])
    return kind


def _described(setting: Setting) -> str:
    """Return a setting's help with its unit, its choices, its bounds and its default."""
    facts = [f"Unit: {setting.unit}"] if setting.unit not in ("", "1") else []
    if get_origin(setting.value_type) is Literal:
        *choices, last = (f"``{choice}``" for choice in get_args(setting.value_type))
        facts.append(f"{', '.join(choices)} or {last}")
    kinds = {"above": Above, "at least": AtLeast, "at most": AtMost}
    bounds = [f"{words} {bound:g}" for words, kind in kinds.items() if (bound := setting.bound(kind)) is not None]
    if bounds:
        facts.append(", ".join(bounds).capitalize())
    if setting.default is not MISSING and not is_dataclass(setting.default):
        facts.append(f"By default ``{setting.default}``")
    return " ".join([setting.help, *(f"{fact}." for fact in facts)])


def _setting(name: str, hint: Any, default: Any) -> Setting:
    if get_origin(hint) is not Annotated:
        return Setting(name, hint, default, ())
    kind, *marks = get_args(hint)
    return Setting(name, kind, default, tuple(marks))


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _checked(setting: Setting, value: Any) -> Any:
    name, kind = setting.name, setting.value_type
    if value is None and kind is not setting.type:
        return None
    least, most = setting.bound(AtLeast), setting.bound(AtMost)
    if kind is int:
        value = check_integer(name, value, least, MOST_INTEGER if most is None else most)  # type: ignore[arg-type]
    elif kind is float:
        value = check_number(name, value, least, most, setting.bound(Above))
    elif kind is bool:
        value = check_flag(name, value)
    elif get_origin(kind) is Literal:
        one_of(name, value, kind)
    check = setting.mark(Checked)
    if check is not None:
        check.check(name, value)
    return value
