"""Results on stdout, as tables and lines for people or as one JSON object for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pathnet.commands.streams import say, standard_output, write
from pathnet.printable import printable

if TYPE_CHECKING:
    from pathnet.experiments.claims import Claim
    from pathnet.training import Epoch

__all__ = ["console", "print_claims", "print_facts", "print_json", "print_table", "print_training"]


def print_json(facts: Mapping[str, Any], written: Sequence[Path]) -> None:
    """Print facts as one JSON object, with the names of the files that were written."""
    write(json.dumps(_encodable({**facts, "written": list(map(str, written))}), allow_nan=False) + "\n")


def print_table(table: Table) -> None:
    """Print a table, at once."""
    with standard_output():
        console().print(table)
        sys.stdout.flush()


def print_facts(facts: Mapping[str, str]) -> None:
    """Print facts as a table of two columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    print_table(table)


def print_training(history: Sequence[Epoch], *written: Path) -> None:
    """Print a table of the epochs of a training, the test accuracy, and the files that were written."""
    table = Table(box=None, pad_edge=False)
    for heading in ("epoch", "training loss", "test accuracy", "seconds"):
        table.add_column(heading, justify="right")
    for epoch in history:
        row = epoch.epoch + 1, f"{epoch.train_loss:.4f}", f"{100 * epoch.test_accuracy:.2f} %", f"{epoch.seconds:.1f}"
        table.add_row(*map(str, row))
    print_table(table)
    say(f"test accuracy {100 * history[-1].test_accuracy:.2f} %", *written)


def print_claims(claims: Sequence[Claim]) -> None:
    """Print a table of the paper's claims next to the measurements."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for heading in ("the paper", "measured here", ""):
        table.add_column(heading)
    for claim in claims:
        measured = f"{claim.measured}\n(holds where {claim.bound})"
        table.add_row(*map(escape, (f"{claim.paper} ({claim.where})", measured, claim.verdict)))
    print_table(table)


def console() -> Console:
    """Return a console on stdout for tables. A pipe has no width, and rich would take 80 columns and cut."""
    return _PlainConsole(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)


class _PlainConsole(Console):
    """Console that shows text as it is, with escapes in place of what a terminal would obey."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, kept="\n"), **options)


def _encodable(value: Any) -> Any:
    """Return a value with escapes in names that are not UTF-8, for which JSON has no string."""
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_encodable, value))
    if isinstance(value, str):
        return "".join(
            printable(character) if "\ud800" <= character <= "\udfff" else character for character in value
        )
    return value
