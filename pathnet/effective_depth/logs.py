"""The places that measured depths are written to: a CSV file, or TensorBoard."""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import astuple
from pathlib import Path

from pathnet.checks import check_path
from pathnet.effective_depth.rows import HEADER, Depth, read
from pathnet.files import telling
from pathnet.writers import Scalars, Writer, is_writer

__all__ = ["CsvLog", "ScalarLog", "check_writable", "open_log"]


class CsvLog:
    """A CSV file, opened for each row, so no row waits in a buffer.

    Attributes:
        first, last: first and last step in the file; None and -1 if it holds none.
    """

    def __init__(self, path: Path, every: int) -> None:
        self._path = path
        steps = [row.step for row in _existing_rows(path)]
        other = [step for step in steps if step % every]
        if other:
            raise ValueError(
                f"every: expected a divisor of the steps in {path}, got {every}, and the file holds step {other[0]}; "
                "give the interval at which it was measured, or another file"
            )
        self.first, self.last = min(steps, default=None), max(steps, default=-1)

    def begin(self, step: int) -> None:
        """Check that the file belongs to the training that begins at ``step``, and not to another one.

        Raises:
            ValueError: the training begins at or before the first step in the file.
        """
        if self.first is None:
            return
        if step <= self.first:
            raise ValueError(
                f"out: {self._path} already holds steps {self.first} to {self.last} of a training, and this one "
                f"begins at step {step}; give another file, or move that one away, or resume its training from a "
                f"checkpoint after step {self.first}"
            )
        if step < self.last:
            warnings.warn(
                f"out: {self._path} goes up to step {self.last}, and the training resumes from step {step}: the rows "
                "stay, and the steps between are not measured again",
                RuntimeWarning,
                stacklevel=3,
            )

    def write(self, row: Depth) -> None:
        """Append a row."""
        consequence = f"the depth at step {row.step} is lost, the rows before it stay"
        with telling(self._path, "out", consequence):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _cut_partial_row(self._path)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(",".join(map(str, astuple(row))) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.last = row.step


def _cut_partial_row(path: Path) -> None:
    """Remove a last row that was cut short, and write the header to a file without rows."""
    content = path.read_bytes() if path.exists() else b""
    complete, end, _ = content.rpartition(b"\n")
    if not complete:
        with path.open("wb") as file:
            file.write((",".join(HEADER) + "\n").encode())
    elif len(complete) + len(end) < len(content):
        # Truncated in place, because the disk may be too full to write the earlier rows again.
        os.truncate(path, len(complete) + len(end))


class ScalarLog:
    """A TensorBoard folder, whose writer is created at the first row, or a writer of the caller's."""

    def __init__(self, out: Path | Writer) -> None:
        self._out, self.last = out, -1
        self._scalars = None if isinstance(out, Path) else Scalars("out", out)

    def begin(self, step: int) -> None:
        """Do nothing; `write` tells TensorBoard the step from which to discard older values."""

    def write(self, row: Depth) -> None:
        """Write the numbers of a row, and flush them."""
        if self._scalars is None:
            from torch.utils.tensorboard import SummaryWriter

            self._scalars = Scalars("out", SummaryWriter(self._out, purge_step=row.step))
        names = (f"effective depth/{name}" for name in HEADER[1:])
        self._scalars.write([(name, value, row.step) for name, value in zip(names, astuple(row)[1:], strict=True)])
        self.last = row.step


def open_log(out: str | Path | Writer, every: int) -> CsvLog | ScalarLog:
    """Return the log for an output: a writer, the name of a CSV file, or a folder for TensorBoard.

    Raises:
        ValueError: the file holds something else, or steps of another interval; or TensorBoard is not installed.
    """
    if is_writer(out):
        return ScalarLog(out)  # type: ignore[arg-type]
    path = check_path("out", out)
    if path.suffix == ".csv":
        return CsvLog(path, every)
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            f"out: {path} would be a folder for TensorBoard, which is not installed (pip install tensorboard); "
            "the name of a CSV file must end in .csv"
        )
    return ScalarLog(path)


def _existing_rows(path: Path) -> list[Depth]:
    try:
        return read(path) if path.exists() else []
    except OSError as error:
        raise ValueError(f"out: cannot read {path} ({error.strerror})") from None


def check_writable(path: Path) -> None:
    """Check that an output can be written, before hours of training, without creating anything.

    Raises:
        ValueError: the file or folder cannot be created or written to.
    """
    try:
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise ValueError(f"out: cannot write {path} ({error.strerror})") from None
    is_file = nearest == path and path.suffix == ".csv"
    if not (is_file or nearest.is_dir()):
        raise ValueError(f"out: cannot write {path}, since {nearest} is no folder")
    if not os.access(nearest, os.W_OK if is_file else os.W_OK | os.X_OK):
        raise ValueError(f"out: cannot write {path}, since {nearest} is not writable")
