"""Runs for others: a folder that ``datasets.load_dataset``, DuckDB, pandas and polars read, with a card."""

from __future__ import annotations

import shutil
from pathlib import Path

from pathnet.checks import check_path
from pathnet.files import telling, unfinished
from pathnet.results.card import card, subset_of
from pathnet.results.compaction import kinds_in
from pathnet.results.parts import write_part
from pathnet.results.run import Run, check_run
from pathnet.results.sorting import sorted_once
from pathnet.results.tables import rows_in

__all__ = ["export"]


def export(run: Run, out: str | Path) -> list[Path]:
    """Write the measurements of a run as a data set in the layout of the Hugging Face Hub.

    Each kind of row becomes a subset of one Parquet file, whose columns say in their metadata what they mean. The
    card, ``README.md``, describes network, data, plan, versions and columns. It names no licence: that is for its
    author.

    Args:
        run: a run, as `pathnet.results.read` returns it.
        out: the folder to create; an empty one may be there.

    Returns:
        The files written: the card, and a file for each kind of row.

    Raises:
        ValueError: the run holds no measurements, or a part cannot be read; or ``out`` holds something.
        OSError: a file cannot be written; nothing is left behind.

    Example:
        >>> import pathnet
        >>> from pathnet import results
        >>> from pathnet.experiments import PathGradients
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=8, width=8, num_classes=2, in_channels=1)
        >>> plan = PathGradients(batches=2, batch_size=16)
        >>> run = pathnet.measure(net, data, plan, "run")
        >>> [str(file) for file in results.export(run, "exported")]
        ['exported/README.md', 'exported/data/path_gradients.parquet']
    """
    check_run("run", run)
    folder = check_path("out", out)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, got {folder}, which holds something")
    tables = {
        kind.stem: sorted_once(rows_in(run.folder, kind, kind.schema.names)).combine_chunks()
        for kind in kinds_in(run)
    }
    if not tables:
        raise ValueError(f"run: expected measurements in {run.folder}, got none")
    temporary = unfinished(folder.absolute())
    with telling(folder, "export", "nothing of it is left"):
        try:
            (temporary / "data").mkdir(parents=True)
            for stem, table in tables.items():
                write_part(iter([temporary / "data" / f"{subset_of(stem)}.parquet"]), table, "")
            (temporary / "README.md").write_text(card(run, tables), encoding="utf-8")
            temporary.rename(folder.absolute())
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return [folder / "README.md", *(folder / "data" / f"{subset_of(stem)}.parquet" for stem in tables)]
