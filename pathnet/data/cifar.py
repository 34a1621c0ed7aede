"""CIFAR-10 (Krizhevsky 2009) from Parquet files or from the original pickles."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathnet.data.images import Data, InMemory, decode, existing_folder

__all__ = ["cifar10"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(folder: str | Path) -> Data:
    """CIFAR-10 from a folder: Parquet files (``train-*.parquet``, ``test-*.parquet``, with encoded images), or
    the original ``cifar-10-batches-py`` pickles, which are read without executing them.

    Raises:
        ValueError: the folder holds neither, or a file of it cannot be read.
    """
    folder = existing_folder(folder)
    if list(folder.glob("train-*.parquet")):
        jpeg, train = _read_parquet(folder, "train")
        _, test = _read_parquet(folder, "test")
        return Data("CIFAR-10 (JPEG)" if jpeg else "CIFAR-10", train, test, CIFAR10_CLASSES)
    for candidate in (folder, folder / "cifar-10-batches-py"):
        if (candidate / "data_batch_1").is_file():
            train = _read_pickles([candidate / f"data_batch_{i}" for i in range(1, 6)])
            return Data("CIFAR-10", train, _read_pickles([candidate / "test_batch"]), CIFAR10_CLASSES)
    raise ValueError(
        f"data: {folder} holds no CIFAR-10: expected train-*.parquet and test-*.parquet, or data_batch_1 and its kin"
    )


def _read_parquet(folder: Path, split: str) -> tuple[bool, InMemory]:
    """Whether the images are JPEG, and the split."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"data: {folder} has no {split}-*.parquet")
    encoded: list[bytes] = []
    labels: list[int] = []
    for file in files:
        try:
            table = pyarrow.parquet.read_table(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"data: {file} is not a readable Parquet file ({error})") from None
        column = next((name for name in ("img", "image") if name in table.column_names), None)
        if column is None or "label" not in table.column_names:
            raise ValueError(f"data: {file} needs the columns img and label, has {', '.join(table.column_names)}")
        encoded += [entry["bytes"] for entry in table[column].to_pylist()]
        labels += table["label"].to_pylist()
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda item: decode(item[1], f"{files[0]} row {item[0]}"), enumerate(encoded)))
    if any(image.shape != images[0].shape for image in images):
        raise ValueError(f"data: the images of {files[0]} differ in size")
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return encoded[0].startswith(b"\xff\xd8"), InMemory(stacked, torch.tensor(labels))


def _read_pickles(files: Sequence[Path]) -> InMemory:
    batches = []
    for file in files:
        try:
            with file.open("rb") as handle:
                batch = _ArrayUnpickler(handle, encoding="bytes").load()
            images, labels = np.frombuffer(batch[b"data"].buffer, np.uint8), batch[b"labels"]
            batches.append((images.reshape(-1, 3, 32, 32), np.asarray(labels, dtype=np.int64)))
        except (
            OSError,
            EOFError,
            KeyError,
            ValueError,
            TypeError,
            AttributeError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(f"data: {file} is not a readable CIFAR-10 batch ({error})") from None
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return InMemory(torch.from_numpy(images.copy()), torch.from_numpy(labels))


class _PickledArray:
    """Stands in for numpy.ndarray in a pickle: keeps the raw buffer of a contiguous uint8 array."""

    buffer: bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, _, dtype, fortran, buffer = state
        if dtype != "u1" or fortran:
            raise pickle.UnpicklingError(f"expected a C-ordered uint8 array, got {dtype} (Fortran order: {fortran})")
        self.buffer = buffer


class _PickledDtype(str):
    """Stands in for numpy.dtype: the type's code, its byte order passed over."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


class _ArrayUnpickler(pickle.Unpickler):
    """Builds lists, dictionaries and uint8 arrays; any other global of the pickle is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return lambda *_: _PickledArray()
            case ("numpy", "ndarray"):
                return _PickledArray
            case ("numpy", "dtype"):
                return lambda code, *_: _PickledDtype(code.decode() if isinstance(code, bytes) else code)
            case ("_codecs", "encode"):
                return lambda text, _: text.encode("latin-1")
        raise pickle.UnpicklingError(f"refused to run {module}.{name}")
