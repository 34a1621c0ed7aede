"""The interface of an engine: it prepares a job once, records each batch once, and runs passes over the record.

To add an engine, implement `Engine`, `Prepared` and `Walk` in ``engines/<name>`` and insert an instance in
``pathnet.engines.ENGINES``, which is ordered fastest first. An engine with its own kernels also returns the ReLU bits
that it recorded (``self_check.FusedWalk.bits``), on which it is checked; a GPU engine calls
``self_check.disagreement`` from ``unsupported``. ``fallback`` has sums by length and norms for engines without
kernels for them. Engines differ in speed, memory and rounding, never in what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pathnet.checks import check_integers, described, one_of
from pathnet.models.context import Context
from pathnet.models.residual_net import ResidualNet, check_net
from pathnet.recording import BatchNormMode, Precision
from pathnet.scaling import ScaledGradient

__all__ = ["Engine", "Job", "Prepared", "Walk"]


@dataclass(frozen=True, eq=False)
class Job:
    """The work that an engine is chosen for and prepared for.

    Attributes:
        net: a network that does not change any more.
        bn: ``running`` or ``batch``, the statistics of batch normalisation, see `pathnet.Recorder`.
        precision: ``float32``, ``bfloat16``, ``float64`` or ``network``, see `pathnet.Recorder`.
        y0_shape: (C_0, H_0, W_0) of the first block's input, or (T, C) of tokens.
        device: the device of the network and its inputs.

    Raises:
        ValueError: an attribute is out of its range.

    Example:
        >>> import torch
        >>> from pathnet import engines, models
        >>> net = models.preact_resnet(depth=14, width=8, in_channels=1).eval()
        >>> job = engines.Job(net, "running", "float64", (8, 8, 8), torch.device("cpu"))
        >>> engines.choose("auto", job).name
        'autograd'
    """

    net: ResidualNet
    bn: BatchNormMode
    precision: Precision
    y0_shape: Sequence[int]
    device: torch.device

    def __post_init__(self) -> None:
        check_net(self.net)
        one_of("bn", self.bn, BatchNormMode)
        one_of("precision", self.precision, Precision)
        check_integers("y0_shape", self.y0_shape, 0)
        if not isinstance(self.device, torch.device):
            raise ValueError(f"device: expected a torch.device, got {described(self.device)}")


class Walk(Protocol):
    """The record of a forward pass through the blocks, and the backward passes over it.

    A backward pass starts from ``start``, the scaled gradient at ``y_n``: mantissa [B, ...], exponent int32 [B], or
    [1] where the batch is one object. Coefficients may be on any device.

    Example:
        >>> import torch
        >>> from pathnet import ScaledGradient, engines, models
        >>> net = models.preact_resnet(depth=14, width=8, in_channels=1).eval()
        >>> job = engines.Job(net, "running", "float32", (8, 8, 8), torch.device("cpu"))
        >>> prepared = engines.choose("reference", job).prepare(job)
        >>> y_n, walk = prepared.record(torch.randn(4, 8, 8, 8))
        >>> start = ScaledGradient(torch.randn(y_n.shape), torch.zeros(4, dtype=torch.int32))
        >>> walk.routed_backward(start, torch.ones(2, net.n, 2)).mantissa.shape
        torch.Size([2, 4, 8, 8, 8])
        >>> walk.sums_by_length(start, torch.ones(net.n, 2)).exponent.shape
        torch.Size([7, 4])
    """

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All tensors that the record keeps alive, such as the blocks' inputs [B, ...]."""

    def max_routings(self) -> int | None:
        """Return the maximum number of routings per call, or None if only the memory for the results limits it.

        Whoever calls `routed_backward` or `norms` must not pass more; `pathnet.walks` sees to that.
        """

    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        """Compute ``g <- a J_skip^T g + c J_residual^T g`` from the last block to the first, once for every routing.

        Args:
            start: the scaled gradient at ``y_n``, see above.
            routing: [P, n, 2], the (a, c) of every block, or [P, n, parts] for blocks with gates or residual modules
                in parallel, see `pathnet.models.Block.coefficients`; no fused engine serves such blocks.

        Returns:
            The scaled gradients at ``y_0``: mantissa [P, B, ...], exponent int32 [P, B] or [P, 1].
        """

    def norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        """Return the norms of the samples' slices of `routed_backward`, in bounded memory.

        Args:
            start: as for `routed_backward`.
            routing: as for `routed_backward`, [P, n, 2 or parts].

        Returns:
            float64 [P, B]
        """

    def sums_by_length(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        """Return the coefficients by powers of x of ``prod_i (a_i J_skip^T + x c_i J_residual^T) g``, in one pass.

        With ones, coefficient k is the sum of the gradients of all paths of length k.

        Args:
            start: as for `routed_backward`.
            routing: [n, 2], the (a, c) of every block, or [n, 1 + m] for up to m residual modules in parallel; x
                multiplies all of them.

        Returns:
            The scaled coefficients at ``y_0``: mantissa [n + 1, B, ...], exponent int32 [n + 1, B] or [n + 1, 1].
        """

    def sums_by_length_norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        """Return the norms of the samples' slices of `sums_by_length`.

        Args:
            start: as for `routed_backward`.
            routing: as for `sums_by_length`, [n, 2 or 1 + m].

        Returns:
            float64 [n + 1, B]
        """


class Prepared(Protocol):
    """A network in the form that an engine's passes need, made once for all batches.

    Example:
        >>> import torch
        >>> from pathnet import engines, models
        >>> net = models.preact_resnet(depth=14, width=8, in_channels=1).eval()
        >>> job = engines.Job(net, "running", "float32", (8, 8, 8), torch.device("cpu"))
        >>> prepared = engines.choose("reference", job).prepare(job)
        >>> y_n, walk = prepared.record(torch.randn(4, 8, 8, 8))
        >>> y_n.shape
        torch.Size([4, 32, 2, 2])
        >>> prepared.routed_forward(torch.randn(4, 8, 8, 8), torch.ones(3, net.n, 2)).shape
        torch.Size([3, 4, 32, 2, 2])
    """

    def bound(self, context: Context) -> Prepared:
        """Return the network with a batch's context as constants; itself if its blocks read none, as fused ones.

        Args:
            context: what blocks read besides the residual stream, such as masks.
        """

    def max_routings(self, y0: Tensor) -> int | None:
        """Return the maximum number of routings per call of `routed_forward`, or None if only the memory for the
        outputs limits it.

        Args:
            y0: the blocks' input, ``[B, *y0_shape]``.
        """

    def record(self, y0: Tensor) -> tuple[Tensor, Walk]:
        """Run the forward pass from ``y_0``; return ``y_n`` [B, ...] and the record.

        Args:
            y0: the blocks' input, ``[B, *y0_shape]``.
        """

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        """Run ``y <- join(a skip(y) + c residual(y))`` from the first block to the last, once for every routing.

        Args:
            y0: the blocks' input, ``[B, *y0_shape]``.
            routing: [P, n, 2] with P >= 1, the (a, c) of every block, on any device; or [P, n, 1 + m] for up to m
                residual modules in parallel.

        Returns:
            ``[P, B, *y_n.shape[1:]]``
        """


class Engine(Protocol):
    """A way to run routed backward passes over recorded blocks, and routed forward passes through them.

    Example:
        >>> import torch
        >>> from pathnet import engines, models
        >>> net = models.preact_resnet(depth=14, width=8, in_channels=1).eval()
        >>> job = engines.Job(net, "running", "float32", (8, 8, 8), torch.device("cpu"))
        >>> engine = engines.choose("autograd", job)
        >>> engine.name, engine.device_type, engine.unavailable(), engine.unsupported(job)
        ('autograd', None, None, None)
        >>> y_n, walk = engine.prepare(job).record(torch.randn(4, 8, 8, 8))
        >>> y_n.shape
        torch.Size([4, 32, 2, 2])
    """

    name: str
    """Name of the engine in ``engine=`` and in reports."""
    device_type: str | None
    """``cpu`` or ``cuda`` if the engine is for networks on such a device; None for any device."""

    def unavailable(self) -> str | None:
        """Return why the engine cannot be used in this process, or None."""

    def unsupported(self, job: Job) -> str | None:
        """Return why the engine cannot run the job, or None.

        Args:
            job: the network and how its passes are to run.
        """

    def prepare(self, job: Job) -> Prepared:
        """Return the job's network in the form that all passes need.

        Args:
            job: a job that the engine supports.
        """
