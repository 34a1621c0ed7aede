"""The callback that measures the effective depth while a network is trained."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pathnet.checks import (
    MOST_INTEGER,
    check_callable,
    check_integer,
    check_number,
    check_tensor,
    described,
    one_of,
)
from pathnet.effective_depth.logs import check_writable, open_log
from pathnet.effective_depth.rows import Depth
from pathnet.engines import check_engine
from pathnet.full_precision import full_precision
from pathnet.gradients import LengthSums
from pathnet.models.hooks import copy_without_hooks
from pathnet.models.residual_net import ResidualNet
from pathnet.models.wrapped import unwrapped
from pathnet.recorder import record
from pathnet.recording import NOT_FINITE, BatchNormMode, Loss, cross_entropy, snapshot
from pathnet.writers import Writer

__all__ = ["EffectiveDepth"]

MOST = 0.95
"""Share of the gradient that the shortest run of lengths holds."""


class EffectiveDepth:
    """Measurement of a network's effective depth at intervals: ``callback(step)``, or ``callback(step, net)``.

    The training stays the same, bit for bit: a copy of the network without its hooks is measured, and no random
    number comes from the generators that training uses. Under `torch.distributed` only the first process measures.

    On two cores, a measurement of 32 images with ResNet-110 takes as long as 0.8 training steps of 128 images by the
    ``cpu`` engine in BN mode ``running``, 2 in mode ``batch``, and 17 by ``reference``. The first measurement always
    takes place, however long. A later one that would raise measuring above ``share`` of the training's time is
    skipped; the first skip raises a RuntimeWarning with the interval that ``share`` allows.

    A row is a `pathnet.effective_depth.Depth`, which gives the definitions. Its numbers differ from those of
    `pathnet.record`, which uses running statistics by default; early in training by much. To compare, give both the
    same ``bn``.

    Args:
        batch: a few normalised images [B, C, H, W], or other inputs of the network's stem; and the targets that the
            loss compares the output with.
        out: a CSV file, whose name ends in ``.csv``; a folder for TensorBoard; or a writer such as TensorBoard's:
            anything with a method ``add_scalar``. Each row is in the file before training continues. A resumed
            training appends to its file: all rows stay, and repeated steps are not measured again. A TensorBoard
            folder discards its values from the first step measured on; a writer gets those of repeated steps again.
            A writer that fails costs a warning, and not the training.
        net: a `ResidualNet`, or one wrapped by DistributedDataParallel or `torch.compile`.
        every: measure only at multiples of this number of steps; the same for all rows of a file.
        share: largest share of the training's time spent on measuring; infinity to measure at every multiple.
        bn: statistics of the ``batch``, as the gradient of training uses them, or ``running`` ones, the default of
            `pathnet.record`, which early in training are still close to their initial values.
        engine: see `pathnet.Recorder`.
        loss: a differentiable function of (output, target); the mean cross-entropy by default.

    Raises:
        ValueError: an argument is out of range, ``out`` holds something else or another ``every``, cannot be
            written, or is a folder for TensorBoard, which is not installed.

    Example:
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, num_classes=2, in_channels=1)
        >>> batch = data.random_batch(16, seed=0, batch=0)
        >>> measure = pathnet.EffectiveDepth(batch, "depth.csv", every=2, share=float("inf"))
        >>> recipe = pathnet.training.Recipe(epochs=2, batch_size=32, warmup_steps=0)
        >>> history = pathnet.training.train(net, data, recipe, callback=measure)
        >>> rows = pathnet.effective_depth.read("depth.csv")
        >>> [row.step for row in rows], all(0 <= row.depth <= net.n for row in rows)
        ([0, 2, 4], True)
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
        self._images, self._target = (check_tensor(f"batch[{place}]", part) for place, part in enumerate(batch))
        if not torch.isfinite(self._images).all():
            raise ValueError(NOT_FINITE)
        self._net = None if net is None else unwrapped(net)
        self._every, self._share = every, share
        self._bn, self._engine, self._loss = bn, engine, loss
        self._log = open_log(out, every)
        if _is_first_process() and isinstance(out, str | Path):
            check_writable(Path(out))
        self._began: float | None = None
        self._first_step = 0
        self._warned = False
        self._spent = self._took = 0.0

    def __repr__(self) -> str:
        settings = f"every={self._every}, share={self._share}, bn={self._bn!r}, engine={self._engine!r}"
        return f"EffectiveDepth(batch of {len(self._images)}, {settings})"

    def __call__(self, step: int, net: nn.Module | None = None) -> Depth | None:
        """Measure if a measurement is due, write it, and return it.

        Args:
            step: number of steps taken so far; increasing from call to call.
            net: replaces the constructor's network.

        Returns:
            The measurement; None if none was due, or if this is not the first process.

        Raises:
            ValueError: there is no network, or it does not take the batch; or the first step is not after the first
                row of the file, which then belongs to another training.
        """
        step = check_integer("step", step, 0, MOST_INTEGER)
        measured = self._net if net is None else unwrapped(net)
        if measured is None:
            raise ValueError("net: expected a network, here or in the constructor")
        if not _is_first_process():
            return None
        begun = _now()
        if self._began is None:
            self._log.begin(step)
            self._began, self._first_step = begun, step
        training = begun - self._began - self._spent
        if step % self._every or step <= self._log.last:
            return None
        if self._spent + self._took > self._share * training:
            self._warn_of_skips(step, training)
            return None
        lengths_and_loss = self._measure(measured)
        self._took = _now() - begun
        self._spent += self._took
        row = Depth(step, *lengths_and_loss, self._took)
        self._log.write(row)
        return row

    def _warn_of_skips(self, step: int, training: float) -> None:
        """Warn at the first skip.

        Args:
            training: seconds of training since the first call.
        """
        if self._warned:
            return
        self._warned = True
        # Rounding may leave no time at all between two calls.
        apart = math.ceil(self._took / self._share * (step - self._first_step) / max(training, 1e-9))
        warnings.warn(
            f"share: step {step} is not measured, since a measurement takes {self._took:.2g} s: {self._share:g} of "
            f"the training's time allows one in about {apart} steps; share=float('inf') measures at every multiple "
            f"of {self._every}",
            RuntimeWarning,
            stacklevel=3,
        )

    def _measure(self, net: ResidualNet) -> tuple[float, int, int, int, float]:
        device = next(net.parameters()).device
        images, target = self._images.to(device), self._target.to(device)
        copied = copy_without_hooks(net)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                tape = record(copied, images, target, self._bn, self._engine, loss=self._loss)
            except ValueError:
                if self._finite(copied, images, target):
                    raise
                return math.nan, -1, -1, -1, math.nan
            return *_lengths(tape.compare_lengths()), tape.loss

    @full_precision()
    @torch.no_grad()
    def _finite(self, net: ResidualNet, images: Tensor, target: Tensor) -> bool:
        output = snapshot(net, self._bn, torch.float32)(images)
        # The default loss is also NaN if labels are out of range, an error that must be raised.
        values = output if self._loss is cross_entropy else self._loss(output, target)
        return bool(torch.isfinite(values).all())


_now = time.perf_counter


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _lengths(sums: LengthSums) -> tuple[float, int, int, int]:
    """Return the depth, the first and last length of the shortest run, and the length that explains half."""
    total = float(sums.norm.sum())
    if not (math.isfinite(total) and total > 0):
        return math.nan, -1, -1, -1
    shares = (sums.norm / total).tolist()
    depth = math.fsum(length * share for length, share in enumerate(shares))
    half = [length for length, explained in enumerate(sums.explained.tolist()) if explained >= 0.5]
    return depth, *_shortest_run(shares), half[0] if half else -1


def _shortest_run(shares: list[float]) -> tuple[int, int]:
    """Return first and last length of the shortest run that holds 95 %, or of the fullest of equally short ones."""
    count = len(shares)
    for length in range(1, count):
        held = [math.fsum(shares[first : first + length]) for first in range(count - length + 1)]
        if max(held) >= MOST:
            return held.index(max(held)), held.index(max(held)) + length - 1
    return 0, count - 1
