"""Image data sets written to disk, in each supported layout."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(folder: Path, images: np.ndarray, labels: list[int], kind: str = "PNG") -> None:
    for split in ("train", "test"):
        rows = [{"bytes": encoded(image, kind), "path": None} for image in images]
        table = pyarrow.table({"img": rows, "label": labels})
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def write_pickles(folder: Path, images: np.ndarray, labels: list[int], protocol: int = 2) -> None:
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {b"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1).copy(), b"labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))


def write_folders(folder: Path, images: np.ndarray) -> None:
    for split in ("train", "val"):
        for index, image in enumerate(images):
            target = folder / split / f"class{index % 2}" / f"{index}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(encoded(image))
