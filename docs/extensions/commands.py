"""The command reference: ``{commands}`` describes all commands and options as ``--help`` does, from its objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from rich.text import Text
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pathnet.commands.app import app as pathnet_app

__all__ = ["commands_of", "described", "panels_of", "setup"]

FLAG = re.compile(r"(?<![\w`-])(--[a-z][\w-]*)")
"""A flag within a help text."""
SPECIAL = re.compile(r"([\\`*_<>\[\]$#])")
"""Characters that Markdown reads as markup."""


def commands_of(app: typer.Typer, name: str) -> Iterator[tuple[str, Any]]:
    """Yield a program and all its commands by their full names, in the order of the help."""
    program: Any = typer.main.get_command(app)
    yield name, program
    context = typer.Context(program, info_name=name)
    for command in program.list_commands(context):
        yield f"{name} {command}", program.get_command(context, command)


def _plain(text: str | None) -> str:
    """Return a help text as Markdown: without rich's markup, and with flags as code."""
    plain = SPECIAL.sub(r"\\\1", Text.from_markup(text or "").plain)
    return FLAG.sub(r"`\1`", plain)


def _spelling(parameter: Any) -> str:
    """Return how an option or argument is written, with the placeholder of its value."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    names = " / ".join([*parameter.opts, *parameter.secondary_opts])
    return f"{names} {parameter.metavar or ''}".rstrip()


def described(name: str, command: Any) -> str:
    """Return the Markdown of one command: its purpose, its usage, and its options under the headings of the help."""
    context = typer.Context(command, info_name=name)
    lines = [f"## `{name}`", ""]
    lines += [f"{_plain(' '.join(paragraph.split()))}\n" for paragraph in command.help.split("\n\n")]
    lines += ["```text", command.get_usage(context).removeprefix("Usage: "), "```", ""]
    lines += [f"```{{program}} {name}", "```", ""]
    for panel, parameters in panels_of(command.get_params(context)).items():
        lines += [f"### {panel}", ""]
        for parameter in parameters:
            required = " *Required.*" if parameter.required else ""
            lines += [f"````{{option}} {_spelling(parameter)}", _plain(parameter.help) + required, "````", ""]
    if command.epilog:
        lines += [_plain(" ".join(command.epilog.split())), ""]
    return "\n".join(lines)


def panels_of(parameters: list[Any]) -> dict[str, list[Any]]:
    """Return the options and arguments that the help shows, by its headings."""
    panels: dict[str, list[Any]] = {"Arguments": [], "Options": []}
    for parameter in parameters:
        default = "Arguments" if parameter.param_type_name == "argument" else "Options"
        if not parameter.hidden:
            panels.setdefault(parameter.rich_help_panel or default, []).append(parameter)
    return {panel: listed for panel, listed in panels.items() if listed}


class _Commands(SphinxDirective):
    """``{commands}``: all commands of ``pathnet``, each under a heading of its own."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        text = "\n".join(described(name, command) for name, command in commands_of(pathnet_app, "pathnet"))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive (called by Sphinx)."""
    app.add_directive("commands", _Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
