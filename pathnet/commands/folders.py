"""``pathnet compact`` and ``pathnet export``: what can be done with the folder of a run, beside figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pathnet.commands.places import check_existing_run, check_folder_to_write
from pathnet.commands.shared import Json
from pathnet.commands.streams import say
from pathnet.settings import Checked, Flag, Help, check_settings

__all__ = ["CompactSettings", "ExportSettings", "compact", "export"]


ExistingRun = Annotated[
    Path, Help("Folder of a run."), Flag(value="RUN", positional=True), Checked(check_existing_run)
]


@dataclass(frozen=True, kw_only=True)
class CompactSettings:
    """Settings of ``pathnet compact``."""

    run: ExistingRun
    as_json: Json = False

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of ``pathnet export``."""

    run: ExistingRun
    to: Annotated[
        Literal["hf"],
        Help("Layout: hf, the Hugging Face Hub's, which datasets, DuckDB, pandas and polars read."),
        Flag(value="LAYOUT"),
    ] = "hf"
    out: Annotated[
        Path | None,
        Help("Folder to create."),
        Flag(value="FOLDER", default="RUN-hf"),
        Checked(check_folder_to_write),
    ] = None
    as_json: Json = False

    def __post_init__(self) -> None:
        check_settings(self)


def compact(settings: CompactSettings) -> None:
    """Merge the parts of a run into one sorted file for each kind of row.

    Commands that measure do so at their end.
    """
    from pathnet import results
    from pathnet.commands.printing import print_json

    merged = results.compact(settings.run)
    if settings.as_json:
        print_json({"merged": merged}, [])
        return
    for kind, count in merged.items():
        say(f"{kind}: {'already one file' if count == 1 else f'{count:,} files became one'}")
    if not merged:
        say("no measurements")


def export(settings: ExportSettings) -> None:
    """Write a run as a data set for others, with a card: network, data, plan, versions, columns."""
    from pathnet import results
    from pathnet.commands.printing import print_json

    run = results.read(settings.run)
    # The folder that a person stands in has a name only in its full path.
    place = settings.run if settings.run.name not in ("", "..") else settings.run.resolve()
    folder = settings.out or place.with_name(f"{place.name}-{settings.to}")
    written = results.export(run, folder)
    if settings.as_json:
        print_json({"run": str(run.folder)}, written)
    else:
        say(*written)
