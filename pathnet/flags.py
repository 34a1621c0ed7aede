"""Command-line flags from dataclasses, which are the only lists of them: names, types, defaults and help."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Literal, get_type_hints

import typer

from pathnet.experiments.run import Plan
from pathnet.study import PRESETS, Study
from pathnet.training import Recipe

__all__ = ["Command", "over_a_preset", "settings_of"]

Command = Callable[..., None]


def _helps(kind: type[Any]) -> dict[str, str]:
    """What each field of a dataclass is: its docstring's Attributes section."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:")[2]
    entries = re.findall(r"^ +(\w+): (.+(?:\n {5,}.+)*)", section.replace("``", ""), re.M)
    return {name: " ".join(f"{text[0].upper()}{text[1:]}".split()) for name, text in entries}


def _with_flags(command: Command, made: Callable[[dict[str, Any]], Any], flags: list[inspect.Parameter]) -> Command:
    """The command with more flags, of whose values ``made`` makes its argument ``settings``."""

    @functools.wraps(command)
    def with_flags(**given: Any) -> None:
        command(settings=made({flag.name: given.pop(flag.name) for flag in flags}), **given)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "settings"]
    with_flags.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    return with_flags


def settings_of(kind: type[Any]) -> Callable[[Command], Command]:
    """Gives a command one flag for each field of a dataclass, in place of its argument ``settings``.

    The dataclass is the only list of the flags.
    """
    hints, helps = get_type_hints(kind), _helps(kind)
    flags = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[hints[field.name], typer.Option(help=helps.get(field.name))],
        )
        for field in fields(kind)
    ]
    return lambda command: _with_flags(command, lambda given: kind(**given), flags)


def over_a_preset(command: Command) -> Command:
    """Gives a command the flags of a study, its recipe and its plan, each the preset's unless given.

    The number of modules that training draws is the plan's.
    """
    flags = []
    for kind in (Study, Recipe, Plan):
        hints, helps = get_type_hints(kind), _helps(kind)
        for field in fields(kind):
            if is_dataclass(hints[field.name]) or (kind is Recipe and field.name == "modules"):
                continue
            option = typer.Option(help=helps.get(field.name), show_default="the preset's")
            flags.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[hints[field.name] | None, option],
                )
            )
    preset = inspect.Parameter(
        "preset",
        inspect.Parameter.KEYWORD_ONLY,
        default="digits",
        annotation=Annotated[
            Literal["digits", "cifar10"],
            typer.Option(help="digits: minutes on two processor cores; cifar10: the paper's own scale, for GPUs."),
        ],
    )
    return _with_flags(command, _study, [preset, *flags])


def _study(given: dict[str, Any]) -> tuple[str, Study]:
    """The name of the preset, and it with what was given in its place."""
    name = given.pop("preset")
    changed = {key: value for key, value in given.items() if value is not None}
    base = PRESETS[name]

    def over(settings: Any) -> Any:
        own = {field.name for field in fields(settings)}
        return replace(settings, **{key: value for key, value in changed.items() if key in own})

    recipe = replace(over(base.recipe), modules=0)
    return name, replace(over(base), recipe=recipe, plan=over(base.plan))
