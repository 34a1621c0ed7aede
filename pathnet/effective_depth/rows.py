"""Measured depths, and the CSV file that holds a row for each."""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from pathnet.checks import check_path

__all__ = ["HEADER", "Depth", "read"]


@dataclass(frozen=True)
class Depth:
    """One measurement of the effective depth, a row of its file.

    If the loss is not finite, or no gradient arrives, the lengths are -1 and the depth is NaN.

    Attributes:
        step: step of the training.
        depth: the effective depth, ``sum_k k |G_k| / sum_k |G_k|``, where G_k is the exact sum over all paths of
            length k. G, the sum of all G_k, is the gradient; in a highway network, that with frozen gates.
        first: first length of the shortest run of lengths that holds 95 % of ``sum_k |G_k|``.
        last: last length of that run.
        half: the least length up to which paths explain half of G, ``<G_0 + ... + G_k, G> >= |G|^2 / 2``.
        loss: loss of the batch.
        seconds: duration of the measurement, in seconds.

    Example:
        >>> import pathnet
        >>> from pathnet.effective_depth import Depth
        >>> rows = [Depth(0, 3.6, 1, 6, 4, 0.79, 0.03), Depth(100, 2.9, 1, 5, 3, 0.21, 0.03)]
        >>> max(rows, key=lambda row: row.depth).step
        0
    """

    step: int
    depth: float
    first: int
    last: int
    half: int
    loss: float
    seconds: float


HEADER = [field.name for field in fields(Depth)]
"""Names of the columns."""


def read(path: str | Path) -> list[Depth]:
    """Return the rows of a CSV file that an `EffectiveDepth` wrote, without a last row that was cut short.

    Args:
        path: path of the file. Its columns are the attributes of `Depth`.

    Raises:
        ValueError: the file holds something else.
        OSError: the file cannot be read.

    Example:
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=8, width=8, num_classes=2, in_channels=1)
        >>> measure = pathnet.EffectiveDepth(data.random_batch(16, seed=0, batch=0), "depth.csv", net, every=10)
        >>> measure(step=0) == pathnet.effective_depth.read("depth.csv")[0]
        True
    """
    path = check_path("path", path)
    expected = f"out: expected columns {', '.join(HEADER)} in {path}"
    remedy = "give another file, or move that one away"
    try:
        text = Path(path).read_text()
        lines = text.rpartition("\n")[0].splitlines()
        if not lines:
            if not ",".join(HEADER).startswith(text):
                raise ValueError(repr(text[:80]))
            return []
        header, *rows = csv.reader(lines)
        if header != HEADER:
            raise ValueError(f"columns {', '.join(header)}")
        return [
            Depth(int(step), float(depth), int(first), int(last), int(half), float(loss), float(seconds))
            for step, depth, first, last, half, loss, seconds in rows
        ]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{expected}, got {error}; {remedy}") from None
