"""Commands built from dataclasses: a flag for every setting, with its help, bounds and default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from pathnet.checks import described
from pathnet.settings import Flag, Panel, Setting, Without, settings_of
from pathnet.study import PRESETS

__all__ = ["Callback", "OverPreset", "command_of"]

Callback = Callable[..., Any]
"""Function that Typer turns into a command, whose parameters are the flags, or that it calls with a value."""
Settings = TypeVar("Settings")

PANELS = ("", "Measurements", "Study", "Network", "Networks", "Training", "General")
"""Headings in the order of the help; the first is that of a command's own flags."""
PLACEHOLDERS = {int: "N", float: "X", Path: "PATH", bool: ""}


@dataclass(frozen=True)
class OverPreset:
    """Mark of a study: each of its flags is the preset's value unless it is set."""


@dataclass(frozen=True)
class _Place:
    """Place of a setting among the flags of a command.

    Attributes:
        setting: the setting.
        panel: its heading.
        over_preset: whether the preset is its default.
    """

    setting: Setting
    panel: str
    over_preset: bool


def command_of(
    kind: type[Settings], run: Callable[[Settings], None], hidden: Container[str] = frozenset()
) -> Callback:
    """Return the function that Typer turns into a command: it builds the settings from flags, and runs with them.

    Args:
        kind: the dataclass; the fields of dataclasses that it holds are flags like its own.
        run: the command, whose name and docstring are the command's.
        hidden: names of settings that the help leaves out.
    """

    def command(**values: Any) -> None:
        run(_built(kind, values))

    places = sorted(_places(kind), key=lambda place: PANELS.index(place.panel))
    parameters = [_parameter(place, place.setting.name in hidden) for place in places]
    parameters += [_former(place) for place in places if _flag(place).former]
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _places(
    kind: type[Any], panel: str = "", over_preset: bool = False, without: Container[str] = ()
) -> Iterator[_Place]:
    for setting in settings_of(kind):
        if setting.name in without:
            continue
        mark = setting.mark(Panel)
        here = mark.title if mark else panel
        if isinstance(setting.type, type) and is_dataclass(setting.type):
            yield from _places(setting.type, here, over_preset or _is_over_preset(setting), _excluded(setting))
        else:
            yield _Place(setting, here, over_preset)


def _is_over_preset(setting: Setting) -> bool:
    return setting.mark(OverPreset) is not None


def _excluded(setting: Setting) -> tuple[str, ...]:
    mark = setting.mark(Without)
    return mark.names if mark else ()


def _parameter(place: _Place, hidden: bool) -> inspect.Parameter:
    setting = place.setting
    default = None if place.over_preset else setting.default
    kind = setting.type | None if place.over_preset else setting.type
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, _option(place, hidden)],
    )


def _option(place: _Place, hidden: bool) -> Any:
    setting, flag = place.setting, _flag(place)
    if flag.positional:
        return typer.Argument(help=setting.help, metavar=flag.value, show_default=False)
    name = _spelled(place)
    if flag.negatable:
        name = f"{name}/--no-{name.removeprefix('--')}"
    return typer.Option(
        name,
        help=_help(place, flag),
        metavar=flag.value if flag.value is not None else PLACEHOLDERS.get(setting.value_type, "TEXT"),
        show_default=False,
        rich_help_panel=place.panel or None,
        hidden=hidden,
        parser=_reader(setting.value_type),
        callback=_once(_spelled(place), flag.former) if flag.former else None,
    )


def _flag(place: _Place) -> Flag:
    return place.setting.mark(Flag) or Flag()


def _spelled(place: _Place) -> str:
    return _flag(place).name or f"--{place.setting.name.replace('_', '-')}"


def _former(place: _Place) -> inspect.Parameter:
    """Return the parameter of a flag's earlier name, whose value becomes the default of the flag."""
    name = str(_flag(place).former)
    option = typer.Option(name, hidden=True, is_eager=True, callback=_defaulting(place.setting.name))
    kind = place.setting.value_type | None
    return inspect.Parameter(
        _field(name), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _field(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _defaulting(name: str) -> Callback:
    """Return a callback that makes a flag's value the default of another one, which may be required."""

    def callback(context: typer.Context, value: Any) -> Any:
        if value is not None:
            context.default_map = {**(context.default_map or {}), name: value}
        return value

    return callback


def _once(flag: str, former: str) -> Callback:
    """Return a callback of a flag that refuses it beside its earlier name."""

    def callback(context: typer.Context, value: Any) -> Any:
        source = context.get_parameter_source(_field(flag))
        if context.params.get(_field(former)) is not None and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{_field(flag)}: expected {flag} or {former}, got both")
        return value

    return callback


def _reader(kind: Any) -> Callable[[Any], Any] | None:
    """Return the function that reads a value from a word of the command line; None for text, paths and switches."""
    if get_origin(kind) is Literal:
        return partial(_read_choice, get_args(kind))
    return partial(_read_number, kind) if kind in (int, float) else None


def _read_choice(choices: Sequence[str], word: Any) -> Any:
    if word not in choices:
        *first, last = choices
        among = f"{', '.join(first)} or {last}" if first else last
        raise typer.BadParameter(f"expected {among}, got {described(word)}")
    return word


def _read_number(kind: Any, word: Any) -> Any:
    # A default comes here too, as the number that it is.
    try:
        return kind(word) if isinstance(word, str) else word
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise typer.BadParameter(f"expected {what}, got {described(word)}") from None


def _help(place: _Place, flag: Flag) -> str:
    """Return the help of a setting with its default, which Typer would put on a line of its own."""
    setting = place.setting
    default = flag.default or setting.default
    if place.over_preset or default in (None, MISSING) or (isinstance(default, bool) and not flag.negatable):
        return setting.help
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"{setting.help} [dim]Default: {default}.[/dim]"


def _built(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    fields: dict[str, Any] = {}
    for setting in settings_of(kind):
        if _is_over_preset(setting):
            fields[setting.name] = _changed(PRESETS[values["preset"]], values)
        elif is_dataclass(setting.type):
            fields[setting.name] = _built(setting.type, values)  # type: ignore[arg-type]
        else:
            fields[setting.name] = values[setting.name]
    return kind(**fields)


def _changed(base: Settings, values: Mapping[str, Any], without: Container[str] = ()) -> Settings:
    """Return a dataclass with the values that are set in place of its own."""
    changes: dict[str, Any] = {}
    for setting in settings_of(type(base)):
        if is_dataclass(setting.type):
            changes[setting.name] = _changed(getattr(base, setting.name), values, _excluded(setting))
        elif setting.name not in without and values[setting.name] is not None:
            changes[setting.name] = values[setting.name]
    return replace(base, **changes)  # type: ignore[type-var]
