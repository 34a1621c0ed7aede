"""How long the paths are that the gradient comes by, over the course of training.

A callback for training loops that measures the exact sums of the gradients of all paths of each length
(`Tape.compare_lengths`) on a small batch that stays the same, and leaves the training as it was.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import math
import os
import time
import warnings
from collections import OrderedDict
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pathnet.checks import (
    MOST_INTEGER,
    check_callable,
    check_integer,
    check_number,
    check_path,
    check_tensor,
    described,
    one_of,
)
from pathnet.engines import check_engine
from pathnet.files import telling
from pathnet.full_precision import full_precision
from pathnet.gradients import LengthSums
from pathnet.models.residual_net import ResidualNet, unwrapped
from pathnet.recorder import record
from pathnet.recording import NOT_FINITE, BatchNormMode, Loss, cross_entropy, snapshot

__all__ = ["Depth", "EffectiveDepth", "read"]

MOST = 0.95


@dataclass(frozen=True)
class Depth:
    """What one measurement came to. Of a loss that is not finite, and where no gradient arrives, the lengths are -1
    and the depth is NaN.

    Attributes:
        step: of training.
        depth: the effective depth, ``sum_k k |G_k| / sum_k |G_k|``, G_k the exact sum over all paths of length k, and
            G all of them together: the gradient, in a network with gates (highway) with these frozen.
        first, last: the shortest run of lengths that holds 95 % of ``sum_k |G_k|``.
        half: the least length up to which paths explain half of G, ``<G_0 + ... + G_k, G> >= |G|^2 / 2``.
        loss: of the batch.
        seconds: that the measurement took.
    """

    step: int
    depth: float
    first: int
    last: int
    half: int
    loss: float
    seconds: float


HEADER = [field.name for field in fields(Depth)]


class Writer(Protocol):
    """What takes numbers by name and step, such as `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...

    def flush(self) -> Any: ...


class EffectiveDepth:
    """Measures the effective depth of a network every so many steps: ``callback(step)``, or ``callback(step, net)``.

    Nothing of the training changes, bit for bit: a copy of the network is measured, without hooks, and random
    numbers are drawn from no stream of its. Under `torch.distributed` the first process measures, the others go on.

    On two cores, a measurement of 32 images takes as long as 0.8 training steps of 128 with ResNet-110 by the ``cpu``
    engine in BN mode ``running`` and 2 in ``batch``, and 17 by ``reference``; so 100 steps lie between two, and more
    where they would take more than ``share`` of the time of training. The first one is always made.

    Args:
        batch: a few images [B, C, H, W], normalised, or what else the network's stem takes; and what the loss
            compares the output with.
        out: a CSV file, by its name that ends in ``.csv``; a folder for TensorBoard; or a writer such as its own.
            Each row is in the file before training goes on. A training that is resumed goes on behind the last row
            of its file: all rows stay, and steps that it takes once more are not measured again. A TensorBoard folder
            forgets what it holds from the first step measured on.
        net: a `ResidualNet`, or one within DistributedDataParallel or `torch.compile`.
        every: only steps that it divides are measured; the same for all rows of a file.
        share: of the time between, at most so much goes into measuring; infinity for all the steps.
        bn: statistics of the ``batch``, through which the gradient of training goes, or ``running`` ones, which are
            not the network's yet when training begins.
        engine: see `pathnet.Recorder`.
        loss: a differentiable function of (output, target); the mean cross-entropy by default.

    Raises:
        ValueError: an argument is out of its range, ``out`` is a file of something else or of another ``every``,
            cannot be written, or needs TensorBoard where that is not installed.
    """

    def __init__(
        self,
        batch: tuple[Tensor, Tensor],
        out: str | Path | Writer,
        net: nn.Module | None = None,
        every: int = 100,
        share: float = 0.05,
        bn: BatchNormMode = "batch",
        engine: str = "auto",
        loss: Loss = cross_entropy,
    ) -> None:
        every = check_integer("every", every, 1, MOST_INTEGER)
        if not isinstance(share, float) or share != math.inf:
            share = check_number("share", share, above=0)
        one_of("bn", bn, BatchNormMode)
        check_engine("engine", engine)
        check_callable("loss", loss)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"batch: expected a pair of tensors, images or tokens and targets, got {described(batch)}"
            )
        self._images, self._target = (check_tensor(f"batch[{place}]", own) for place, own in enumerate(batch))
        if not torch.isfinite(self._images).all():
            raise ValueError(NOT_FINITE)
        self._net = None if net is None else unwrapped(net)
        self._every, self._share = every, share
        self._bn, self._engine, self._loss = bn, engine, loss
        self._log = _log_to(out, every)
        if _is_first_process() and isinstance(out, str | Path):
            _check_writable(Path(out))
        self._began: float | None = None
        self._spent = self._took = 0.0

    def __call__(self, step: int, net: nn.Module | None = None) -> Depth | None:
        """Measures where it is time to, and writes; what was measured.

        Args:
            step: steps taken so far; rising.
            net: in place of the constructor's.

        Raises:
            ValueError: there is no network, or it and the batch do not go together; or the first step is one at or
                before the first row of the file, which is then of another training.
        """
        step = check_integer("step", step, 0, MOST_INTEGER)
        own = self._net if net is None else unwrapped(net)
        if own is None:
            raise ValueError("net: expected a network, here or in the constructor")
        if not _is_first_process():
            return None
        begun = _now()
        if self._began is None:
            self._log.begin(step)
        self._began = begun if self._began is None else self._began
        training = begun - self._began - self._spent
        if step % self._every or step <= self._log.last or self._spent + self._took > self._share * training:
            return None
        found = self._measure(own)
        self._took = _now() - begun
        self._spent += self._took
        row = Depth(step, *found, self._took)
        self._log.write(row)
        return row

    def _measure(self, net: ResidualNet) -> tuple[float, int, int, int, float]:
        device = next(net.parameters()).device
        images, target = self._images.to(device), self._target.to(device)
        own = _without_hooks(net)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                tape = record(own, images, target, self._bn, self._engine, loss=self._loss)
            except ValueError:
                if self._finite(own, images, target):
                    raise
                return math.nan, -1, -1, -1, math.nan
            return *_lengths(tape.compare_lengths()), tape.loss

    @full_precision()
    @torch.no_grad()
    def _finite(self, net: ResidualNet, images: Tensor, target: Tensor) -> bool:
        output = snapshot(net, self._bn, torch.float32)(images)
        # The default loss is NaN of labels out of range too, which are to be told.
        judged = output if self._loss is cross_entropy else self._loss(output, target)
        return bool(torch.isfinite(judged).all())


_now = time.perf_counter


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _without_hooks(net: ResidualNet) -> ResidualNet:
    """A copy that does not call what the training has hooked into the network, nor copies it."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return copy.deepcopy(net, {id(getattr(module, own)): OrderedDict() for module in net.modules() for own in hooks})


def _lengths(sums: LengthSums) -> tuple[float, int, int, int]:
    """The depth; first and last length of the shortest run; the length that explains half."""
    total = float(sums.norm.sum())
    if not (math.isfinite(total) and total > 0):
        return math.nan, -1, -1, -1
    shares = (sums.norm / total).tolist()
    depth = math.fsum(length * share for length, share in enumerate(shares))
    half = [length for length, explained in enumerate(sums.explained.tolist()) if explained >= 0.5]
    return depth, *_shortest_run(shares), half[0] if half else -1


def _shortest_run(shares: list[float]) -> tuple[int, int]:
    """First and last of the shortest run that holds 95 %; of equally short ones the fullest."""
    count = len(shares)
    for length in range(1, count):
        held = [math.fsum(shares[first : first + length]) for first in range(count - length + 1)]
        if max(held) >= MOST:
            return held.index(max(held)), held.index(max(held)) + length - 1
    return 0, count - 1


class _Csv:
    """Opened for each row, so that nothing of it waits in a buffer."""

    def __init__(self, path: Path, every: int) -> None:
        self._path = path
        steps = [row.step for row in _rows(path)]
        other = [step for step in steps if step % every]
        if other:
            raise ValueError(
                f"every: expected what divides the steps in {path}, got {every}, and it holds step {other[0]}; give "
                "the interval that it was measured at, or another file"
            )
        self.first, self.last = min(steps, default=None), max(steps, default=-1)

    def begin(self, step: int) -> None:
        """Tells a training that goes on, before the first of its steps, from another one."""
        if self.first is None:
            return
        if step <= self.first:
            raise ValueError(
                f"out: {self._path} holds steps {self.first} to {self.last} of a training already, and this one "
                f"begins at step {step}; give another file, or move that one away, or go on with its training from a "
                f"checkpoint behind step {self.first}"
            )
        if step < self.last:
            warnings.warn(
                f"out: {self._path} goes up to step {self.last}, and the training goes on from step {step}: the rows "
                "stay, and the steps between are not measured again",
                RuntimeWarning,
                stacklevel=3,
            )

    def write(self, row: Depth) -> None:
        lost = f"the depth at step {row.step} is lost, the rows before it stay"
        with telling(self._path, "out", lost):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _cut_short_row(self._path)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(",".join(map(str, astuple(row))) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.last = row.step


def _cut_short_row(path: Path) -> None:
    """Leave nothing of a last row that was not written whole, and a header in a file without rows."""
    content = path.read_bytes() if path.exists() else b""
    whole, end, _ = content.rpartition(b"\n")
    if not whole:
        with path.open("wb") as file:
            file.write((",".join(HEADER) + "\n").encode())
    elif len(whole) + len(end) < len(content):
        # The rows before it are not written anew, since the disk may be full.
        os.truncate(path, len(whole) + len(end))


class _Scalars:
    """To TensorBoard, whose writer is made at the first row, or to a writer of the caller's."""

    def __init__(self, out: Path | Writer) -> None:
        self._out, self.last = out, -1

    def begin(self, step: int) -> None:
        """TensorBoard is told by `write`."""

    def write(self, row: Depth) -> None:
        if isinstance(self._out, Path):
            from torch.utils.tensorboard import SummaryWriter

            self._out = SummaryWriter(self._out, purge_step=row.step)
        for name, value in zip(HEADER[1:], astuple(row)[1:], strict=True):
            self._out.add_scalar(f"effective depth/{name}", value, row.step)
        self._out.flush()
        self.last = row.step


def _log_to(out: str | Path | Writer, every: int) -> _Csv | _Scalars:
    if callable(getattr(out, "add_scalar", None)) and not isinstance(out, type):
        return _Scalars(out)  # type: ignore[arg-type]
    path = check_path("out", out)
    if path.suffix == ".csv":
        return _Csv(path, every)
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            f"out: {path} would be a folder for TensorBoard, which is not installed (from a checkout of pathnet: "
            'pip install --no-build-isolation -e ".[tensorboard]"); the name of a file of numbers ends in .csv'
        )
    return _Scalars(path)


def _rows(path: Path) -> list[Depth]:
    """Of a file that there may be."""
    try:
        return read(path) if path.exists() else []
    except OSError as error:
        raise ValueError(f"out: cannot read {path} ({error.strerror})") from None


def _check_writable(path: Path) -> None:
    """Now, and not after hours of training; nothing is made yet.

    Raises:
        ValueError: the file or the folder cannot be made there, or written to.
    """
    try:
        nearest = next(own for own in (path, *path.absolute().parents) if own.exists())
    except OSError as error:
        raise ValueError(f"out: cannot write {path} ({error.strerror})") from None
    is_file = nearest == path and path.suffix == ".csv"
    if not (is_file or nearest.is_dir()):
        raise ValueError(f"out: cannot write {path}, since {nearest} is no folder")
    if not os.access(nearest, os.W_OK if is_file else os.W_OK | os.X_OK):
        raise ValueError(f"out: cannot write {path}, since {nearest} may not be written to")


def read(path: str | Path) -> list[Depth]:
    """The rows of a CSV file that an `EffectiveDepth` wrote; a last one that was not written whole is left out.

    Raises:
        ValueError: the file is of something else.
    """
    path = check_path("path", path)
    expected = f"out: expected columns {', '.join(HEADER)} in {path}"
    remedy = "give another file, or move that one away"
    try:
        text = Path(path).read_text()
        whole = text.rpartition("\n")[0].splitlines()
        if not whole:
            if not ",".join(HEADER).startswith(text):
                raise ValueError(repr(text[:80]))
            return []
        header, *rows = csv.reader(whole)
        if header != HEADER:
            raise ValueError(f"columns {', '.join(header)}")
        return [
            Depth(int(step), float(depth), int(first), int(last), int(half), float(loss), float(seconds))
            for step, depth, first, last, half, loss, seconds in rows
        ]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{expected}, got {error}; {remedy}") from None
