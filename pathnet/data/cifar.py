"""CIFAR-10 (Krizhevsky 2009), from Parquet files or from the original pickles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathnet.checks import check_flag, check_integer
from pathnet.data.decoding import BrokenImage, check_regular, decode
from pathnet.data.images import Data
from pathnet.data.layouts import LAYOUTS, contents, existing_folder, warn_of_skipped
from pathnet.data.pickles import read_batch
from pathnet.data.splits import InMemory, in_threads
from pathnet.extras import require

__all__ = ["cifar10"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MOST_BYTES = 1 << 32
"""Maximum number of bytes of a Parquet file, of its content, and of a split's decoded images."""
MOST_ROWS = 1_000_000
ROWS_PER_BATCH = 1024


def cifar10(folder: str | Path, skip_broken: bool = False) -> Data:
    """Return CIFAR-10 (Krizhevsky 2009) from a folder in either of two layouts.

    The layouts are Parquet files with encoded images (``train-*.parquet``, ``test-*.parquet``) and the original
    pickles of ``cifar-10-batches-py``, which are read without executing them.

    Args:
        folder: the folder with the files.
        skip_broken: leave out encoded images that cannot be read, warn about them, and list their names in
            ``skipped``. The pickles contain no encoded images.

    Raises:
        ValueError: the folder has neither layout, or a file, an image or a label cannot be read.
        ModuleNotFoundError: the files are Parquet, and pyarrow or pillow is not installed.

    Example:
        >>> import pickle
        >>> from pathlib import Path
        >>> import numpy
        >>> import pathnet
        >>> batch = {b"data": numpy.zeros((4, 3072), numpy.uint8), b"labels": [0, 1, 2, 3]}  # 10,000 in the real one
        >>> for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        ...     _ = Path(name).write_bytes(pickle.dumps(batch))
        >>> pathnet.data.cifar10(".")
        Data('CIFAR-10': 20 training and 4 test images of 3x32x32, 10 classes, in memory)
    """
    folder = existing_folder(folder)
    check_flag("skip_broken", skip_broken)
    if list(folder.glob("train-*.parquet")):
        splits = [_ParquetSplit(folder, name, skip_broken) for name in ("train", "test")]
        broken = {name: problem for split in splits for name, problem in split.broken.items()}
        skipped = warn_of_skipped(broken, sum(len(split.labels) for split in splits) + len(broken))
        name = "CIFAR-10 (JPEG)" if splits[0].jpeg else "CIFAR-10"
        train, test = (InMemory(split.images, torch.tensor(split.labels)) for split in splits)
        return Data(name, train, test, CIFAR10_CLASSES, skipped=skipped)
    for candidate in (folder, folder / "cifar-10-batches-py"):
        if (candidate / "data_batch_1").exists():
            train = _read_pickles([candidate / f"data_batch_{i}" for i in range(1, 6)])
            return Data("CIFAR-10", train, _read_pickles([candidate / "test_batch"]), CIFAR10_CLASSES)
    raise ValueError(f"data: {folder} contains no data set: expected {LAYOUTS}; got {contents(folder)}")


@dataclass(frozen=True)
class _Row:
    """A row of a Parquet file: its name in errors, the encoded image, and the label."""

    origin: str
    encoded: bytes | None
    label: int

    def decoded(self) -> np.ndarray[Any, Any]:
        """Return the pixels, uint8 [H, W, 3], or raise BrokenImage."""
        if self.encoded is None:
            raise BrokenImage(self.origin, "is null")
        return decode(self.encoded, self.origin)


class _ParquetSplit:
    """The images of one split, from Parquet files.

    Attributes:
        images: the images that could be read, uint8 [N, 3, H, W].
        labels: their N labels.
        broken: why each other image is left out, by file and row.
        jpeg: whether the images are JPEG.
    """

    def __init__(self, folder: Path, split: str, skip_broken: bool) -> None:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            raise ValueError(f"data: {folder} has no {split}-*.parquet, got {contents(folder)}")
        rows = [row for file in files for row in _rows(file)]
        self.broken: dict[str, str] = {}
        # The first image is decoded alone: its size bounds the rest, before threads decode a thousand at once.
        first_image: np.ndarray[Any, Any] | None = None
        for number, row in enumerate(rows):
            try:
                first_image, rows = row.decoded(), rows[number:]
                break
            except BrokenImage as broken:
                self._leave_out(folder, row, broken, skip_broken)
        if first_image is None:
            raise ValueError(f"data: {files[0]}: expected images that can be read, got none among {len(rows):,} rows")
        if len(rows) * first_image.size > MOST_BYTES:
            raise ValueError(
                f"data: {rows[0].origin}: expected images of at most {MOST_BYTES:,} bytes in the split {split}, "
                f"got {len(rows):,} of {first_image.size:,} each"
            )
        first = rows[0]
        self.jpeg = (first.encoded or b"").startswith(b"\xff\xd8")

        def decoded(row: _Row) -> np.ndarray[Any, Any] | BrokenImage:
            try:
                image = row.decoded()
            except BrokenImage as broken:
                return broken
            if image.shape != first_image.shape:
                raise ValueError(
                    f"data: the images differ in size: {row.origin} has {_size(image)} pixels, "
                    f"{first.origin} has {_size(first_image)}"
                )
            return image

        images: list[np.ndarray[Any, Any]] = []
        self.labels: list[int] = []
        for row, image in zip(rows, in_threads(decoded, rows), strict=True):
            if isinstance(image, BrokenImage):
                self._leave_out(folder, row, image, skip_broken)
            else:
                images.append(image)
                self.labels.append(row.label)
        self.images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    def _leave_out(self, folder: Path, row: _Row, broken: BrokenImage, skip_broken: bool) -> None:
        if not skip_broken:
            raise broken
        self.broken[str(Path(row.origin).relative_to(folder))] = broken.problem


def _size(image: np.ndarray[Any, Any]) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _rows(file: Path) -> Iterator[_Row]:
    """Yield the rows of a Parquet file, with checked labels."""
    require("pyarrow", "pathnet.data.cifar10 reads Parquet files with pyarrow")
    import pyarrow
    import pyarrow.parquet

    check_regular(file, MOST_BYTES)
    images: list[bytes | None] = []
    labels: list[object] = []
    try:
        # read_table would add columns from folder names such as label=1.
        with pyarrow.parquet.ParquetFile(file) as parquet:
            column = _image_column(file, parquet.schema_arrow)
            if parquet.metadata.num_rows > MOST_ROWS:
                raise ValueError(f"expected at most {MOST_ROWS:,} rows, got {parquet.metadata.num_rows:,}")
            size = 0
            for batch in parquet.iter_batches(ROWS_PER_BATCH, columns=[column, "label"]):
                size += batch.nbytes
                if size > MOST_BYTES:
                    raise ValueError(f"expected at most {MOST_BYTES:,} bytes, got more")
                images += [entry and entry["bytes"] for entry in batch.column(column).to_pylist()]
                labels += batch.column("label").to_pylist()
    except _WrongColumns:
        raise
    except (OSError, ValueError, LookupError, RecursionError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"data: {file} is not a readable Parquet file ({reason})") from None
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield _Row(f"{file} row {row}", image, _label(f"data: {file} row {row}: label", label))


class _WrongColumns(ValueError):
    """A readable Parquet file with other columns than expected."""


def _image_column(file: Path, schema: Any) -> str:
    """Return the name of the column whose structs have an encoded image in the field ``bytes``."""
    import pyarrow

    column = next((name for name in ("img", "image") if name in schema.names), None)
    if column is None or schema.names.count(column) != 1 or schema.names.count("label") != 1:
        raise _WrongColumns(f"data: {file} needs the columns img (or image) and label, has {', '.join(schema.names)}")
    kind, types = schema.field(column).type, pyarrow.types
    field = kind.get_field_index("bytes") if types.is_struct(kind) else -1
    if field < 0 or not (types.is_binary(kind.field(field).type) or types.is_large_binary(kind.field(field).type)):
        raise _WrongColumns(f"data: {file}: {column}: expected a struct with binary bytes, got {kind}")
    if not types.is_integer(schema.field("label").type):
        raise _WrongColumns(f"data: {file}: label: expected integers, got {schema.field('label').type}")
    return column


def _label(name: str, value: object) -> int:
    return check_integer(name, value, 0, len(CIFAR10_CLASSES) - 1)


def _read_pickles(files: Sequence[Path]) -> InMemory:
    images, labels = [], []
    for file in files:
        pixels, values = read_batch(file)
        images.append(pixels)
        labels += [_label(f"data: {file} row {row}: label", value) for row, value in enumerate(values)]
    return InMemory(torch.from_numpy(np.concatenate(images)), torch.tensor(labels))
