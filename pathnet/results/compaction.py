"""Parts merged into one sorted file of each kind, so that a run that grew over many processes and days stays quick.

A kill at any moment loses nothing: the merged file takes its name when it is complete and verified, and only then are
the parts removed whose rows it holds. Rows that are in both meanwhile are read once.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pyarrow as pa

from pathnet.checks import check_path
from pathnet.files import locked, remove_leftovers, telling
from pathnet.results.journal import journals, read_journal
from pathnet.results.kinds import norms_kind
from pathnet.results.norms import STEM
from pathnet.results.parts import Kind, is_part_of, replace_part, stored_schema, write_part
from pathnet.results.rows import optional_in
from pathnet.results.run import Run, read
from pathnet.results.sorting import sorted_once
from pathnet.results.tables import PART, free_names, kind_named, measurements_in, parts_of, rows_in, while_merged

__all__ = ["clear", "compact", "kinds_in", "merge_parts", "recover_journals"]


def compact(folder: str | Path) -> dict[str, int]:
    """Merge the parts of a run into one file of each kind of row, sorted, in today's format.

    Commands that measure do so at their end.

    Args:
        folder: folder of the run.

    Returns:
        The number of parts that became one file, by kind of row, such as ``part`` for path gradient norms.

    Raises:
        ValueError: the folder holds no run, a part cannot be read, or a command is writing to the folder.
        OSError: a file cannot be written; all measurements are kept.

    Example:
        >>> import pathnet
        >>> from pathnet import results
        >>> from pathnet.experiments import PathGradients
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=8, width=8, num_classes=2, in_channels=1)
        >>> plan = PathGradients(batches=2, batch_size=16)
        >>> run = pathnet.measure(net, data, plan, "run")
        >>> results.compact("run")
        {'part': 1}
    """
    folder = check_path("folder", folder)
    run = read(folder)
    with locked(folder / ".lock", "run", f"writing to {folder}"):
        clear(folder)
        recover_journals(folder)
        return merge_parts(run)


def clear(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in a run.

    Raises:
        OSError: one cannot be removed.
    """
    with telling(folder, "run"):
        remove_leftovers(folder, r"run\.json")
        remove_leftovers(measurements_in(folder), PART.pattern)


def recover_journals(folder: Path) -> None:
    """Make parts of the journals that killed processes left.

    Raises:
        OSError: a part cannot be written; the journal stays.
    """
    for file, stem in journals(measurements_in(folder)).items():
        if tables := read_journal(file):
            kept = f"its measurements are kept in {file.name} next to it, and the same command resumes from them"
            write_part(free_names(folder, stem), pa.concat_tables(tables), kept)
        with telling(file, "run"):
            file.unlink(missing_ok=True)


def merge_parts(run: Run) -> dict[str, int]:
    """Merge the parts of each kind in a run that nobody else adds to; see `compact`."""
    merged = {}
    for kind in kinds_in(run):
        parts = parts_of(run.folder, kind.stem)
        _merge(run.folder, kind, parts)
        merged[kind.stem] = len(parts)
    return merged


def kinds_in(run: Run) -> list[Kind]:
    """Return the kinds of row that a run holds, in alphabetical order.

    Their columns are those of the files, since the dataclass of a row may be anybody's. The columns of older parts
    have no meanings with them, and may be fewer, so those of the last and widest part that has some are taken.

    Raises:
        ValueError: a part cannot be read.
    """

    def schemas_now() -> dict[str, list[pa.Schema]]:
        schemas = defaultdict[str, list[pa.Schema]](list)
        for file, stem in journals(measurements_in(run.folder)).items():
            schemas[kind_named(stem)] += [table.schema for table in read_journal(file)[:1]]
        for part in parts_of(run.folder):
            schemas[kind_named(part.stem.rpartition("-")[0])].append(stored_schema(part))
        return schemas

    schemas, kinds = while_merged(schemas_now), []
    for stem in sorted(schemas):
        explained = [schema for schema in schemas[stem] if any(field.metadata for field in schema)]
        schema = max(reversed(explained or schemas[stem]), key=len)
        unknown = Kind(stem, schema.remove_metadata(), (), lambda table: "", optional=optional_in(schema))
        kinds.append(norms_kind(run.n) if stem == STEM else unknown)
    return kinds


def _merge(folder: Path, kind: Kind, parts: list[Path]) -> None:
    rows = rows_in(folder, kind, kind.schema.names)
    merged = sorted_once(rows)
    file = measurements_in(folder) / f"{kind.stem}-{0:06d}.parquet"
    if parts != [file] or not is_part_of(file, merged):
        replace_part(file, merged, "all measurements are kept in the parts that are there")
    for part in parts:
        if part != file:
            with telling(part, "run"):
                part.unlink(missing_ok=True)
