"""Failures: bad input and interrupts end a command in one line on stderr; a bug keeps its traceback."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pathnet import interrupts
from pathnet.commands.streams import fail, is_first_to_say
from pathnet.printable import printable

__all__ = ["OneLineFailures", "PlainCommand", "kept"]

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""UsageError of Click, which newer versions of Typer include and older ones import."""


class PlainCommand(TyperCommand):
    """Command whose ``--help`` shows no type."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option ``--help``, to which Typer would add <bool>."""
        return _without_type(super().get_help_option(ctx))


class OneLineFailures(TyperGroup):
    """Group of commands whose failures are one line on stderr."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option ``--help`` as `PlainCommand` has it."""
        return _without_type(super().get_help_option(ctx))

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command; bad input ends the process with status 1."""
        try:
            return super().main(*args, **options)
        except (ValueError, OSError) as error:
            fail(str(error), 1)

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse the words that stand before the command."""
        with _printable_usage():
            return super().make_context(*args, **options)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, and refuse empty values, which Typer would take for a path to the current folder."""
        for before, word in zip(args, args[1:], strict=False):
            flag, equals, value = word.partition("=")
            flag = flag if equals and flag.startswith("--") else before
            if value == "" and (word == "" or flag != before):
                raise ValueError(f"{flag.removeprefix('--').replace('-', '_')}: expected a value, got ''")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interrupt ends the process with the status of an interrupt."""
        try:
            with interrupts.raised(), _printable_usage():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            # As the interpreter ends it looks for garbage among all that torch holds, which takes seconds.
            gc.freeze()
            fail(f"interrupted; {interrupt}" if interrupt.args else "interrupted", interrupts.STATUS)


def _without_type(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option


@contextmanager
def kept(what: str) -> Iterator[None]:
    """Let an interrupt say what is kept on disk."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{what}; the same command resumes from there") from None


@contextmanager
def _printable_usage() -> Iterator[None]:
    """Escape the words of the command line that a usage error quotes."""
    try:
        yield
    except USAGE_ERROR as error:
        if not (message := printable(error.format_message(), kept="\n")):
            raise  # The command line is empty, and the help is shown.
        if not is_first_to_say(message):
            raise SystemExit(error.exit_code) from None
        raise USAGE_ERROR(message, error.ctx) from None
