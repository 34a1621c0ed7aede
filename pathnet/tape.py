"""`record` and `Tape`: one forward pass, and everything that can be asked of it afterwards."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from pathnet import gradients, paths, scaling
from pathnet.engines import Engine, choose
from pathnet.models.residual_net import ResidualNet
from pathnet.record import (
    At,
    BatchNormMode,
    Loss,
    Precision,
    Record,
    cross_entropy,
    full_precision,
    one_of,
    output_gradient,
    snapshot,
)
from pathnet.routed import check_paths, check_routing

__all__ = ["Tape", "record"]

Scaled = tuple[Tensor, Tensor]


class Tape:
    """A recorded forward pass; made by `record`.

    Gradients are of the loss, at the place that ``at`` names: ``y0`` [B, C_0, H_0, W_0], ``image``
    [B, C, H, W] or ``stem_weight`` [C_0, C, k, k]. They come back as float64, since along 54 modules they can
    leave the range of float32; or, with ``scaled=True``, as a pair (mantissa, int32 exponent broadcast to it).

    In BN mode ``batch`` the batch is one object, and ``per_sample`` norms are those of the samples' slices of
    the batch's gradient. Of ``stem_weight``, a sample's share is what comes through its slice of the gradient at
    ``y0``; it takes one backward of the stem a sample.
    """

    def __init__(self, engine: Engine, record: Record, at: At) -> None:
        self._engine, self._record, self.at = engine, record, at

    @property
    def engine(self) -> str:
        """The name of the engine that serves this tape."""
        return self._engine.name

    @property
    def n(self) -> int:
        """The number of blocks."""
        return self._record.net.n

    @property
    def loss(self) -> float:
        """The loss of the recorded batch."""
        return self._record.loss

    @property
    def output(self) -> Tensor:
        """The network's output for the recorded batch, [B, ...]."""
        return self._record.output

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tape holds."""
        return self._record.nbytes

    def path_gradient_norms(self, b: Tensor, per_sample: bool = False) -> Tensor:
        """Euclidean norms of the gradients along paths (Veit et al. 2016, section 5 and Figure 6 b).

        Args:
            b: integer or bool [P, n] of zeros and ones; see `pathnet.paths`.
            per_sample: the norm of each sample's slice of the gradient of the batch's loss.

        Returns:
            float64 [P], or [P, B] per sample; full relative precision down to 1e-300.

        Raises:
            ValueError: ``b`` is not such a tensor.
        """
        return gradients.norms(self._engine, self._record, self._routing(b), self.at, per_sample)

    @overload
    def path_gradients(self, b: Tensor, scaled: Literal[False] = False) -> Tensor: ...
    @overload
    def path_gradients(self, b: Tensor, scaled: Literal[True]) -> Scaled: ...
    def path_gradients(self, b: Tensor, scaled: bool = False) -> Tensor | Scaled:
        """The gradients along paths: through the residual module where ``b_i = 1``, the skip where it is 0.

        Args:
            b: integer or bool [P, n] of zeros and ones.

        Returns:
            float64 [P, *shape at the place]; or the scaled pair.

        Raises:
            ValueError: ``b`` is not such a tensor.
        """
        return self._gradients(self._routing(b), scaled)

    @overload
    def routed_gradients(self, routing: Tensor, scaled: Literal[False] = False) -> Tensor: ...
    @overload
    def routed_gradients(self, routing: Tensor, scaled: Literal[True]) -> Scaled: ...
    def routed_gradients(self, routing: Tensor, scaled: bool = False) -> Tensor | Scaled:
        """The gradients under routings: ``g <- a J_skip^T g + c J_residual^T g`` from the last block to the first.

        Args:
            routing: floating-point [P, n, 2], the (a, c) of every block. Ones give the ordinary gradient.

        Returns:
            float64 [P, *shape at the place]; or the scaled pair.

        Raises:
            ValueError: ``routing`` is not such a tensor.
        """
        check_routing(routing, self.n)
        return self._gradients(routing, scaled)

    def gradient(self) -> Tensor:
        """The ordinary gradient of the loss, float64: the sum over all 2^n paths."""
        everything = torch.ones(1, self.n, 2, dtype=torch.float64)
        return self._gradients(everything, scaled=False)[0]

    def _routing(self, b: Tensor) -> Tensor:
        check_paths(b, self.n)
        return paths.routing(b)

    @full_precision()
    def _gradients(self, routing: Tensor, scaled: bool) -> Tensor | Scaled:
        place, count = gradients.place_shape(self._record, self.at), len(routing)
        slots = 1 if self.at == "stem_weight" else len(self._record.exponent)
        like = self._record.grad
        mantissa = like.new_empty(count, *place, dtype=like.dtype if scaled else torch.float64)
        exponents = torch.empty(count, slots, dtype=torch.int32, device=like.device)
        for part, grad, exponent in gradients.scaled_gradients(self._engine, self._record, routing, self.at):
            mantissa[part] = grad if scaled else scaling.value(grad, exponent)
            exponents[part] = exponent
        return (mantissa, exponents.reshape(count, slots, *(1,) * (len(place) - 1))) if scaled else mantissa


@full_precision()
def record(
    net: ResidualNet,
    images: Tensor,
    target: Tensor,
    bn: BatchNormMode = "running",
    engine: str = "auto",
    precision: Precision = "float32",
    at: At = "y0",
    loss: Loss = cross_entropy,
) -> Tape:
    """Runs the network forward once and keeps what the walks back along its paths need.

    The network is left as it was, running statistics included, and later changes of it do not reach the tape.
    The forward pass is float32-accurate in every precision; ``precision`` is that of the walk.

    Args:
        images: floating-point [B, C, H, W], normalised, on the network's device.
        target: what ``loss`` compares the output with; int64 [B] class labels for the default loss.
        bn: ``running``, batch normalisation by running statistics, samples independent; or ``batch``, by the
            batch's own statistics, through which the gradient then also flows.
        engine: a name among `pathnet.engines.available`, or ``auto``: the fastest that serves.
        precision: ``float32``, ``bfloat16`` (fastest) or ``float64`` (engine ``reference``).
        at: where gradients are taken: the input of the first block (``y0``), the ``image``, or the first
            convolution's weight (``stem_weight``; "the first layer" of the paper's Figure 6).
        loss: a differentiable function of (output, target); the mean cross-entropy by default.

    Raises:
        ValueError: an argument is out of its range, or no engine serves the job.
    """
    one_of("bn", bn, BatchNormMode)
    one_of("precision", precision, Precision)
    one_of("at", at, At)
    dtype = torch.float64 if precision == "float64" else torch.float32
    _check_images(net, images)
    if loss is cross_entropy:
        _check_labels(images, target)
    # Copies, also of tensors made in inference mode, which autograd does not take.
    images = images.detach().to(dtype, copy=True).contiguous()
    target = target.clone() if isinstance(target, Tensor) else target
    chosen = choose(engine, net, bn, precision, images.device)
    copied = snapshot(net, bn, dtype)
    if at == "stem_weight":
        copied.stem_weight()
    y0 = _stem(copied, images)
    y_n, blocks = chosen.record(copied, y0)
    output, value, grad, exponent = output_gradient(copied, y_n, target, loss, bn)
    return Tape(
        chosen,
        Record(copied, images, y0, blocks, output, value, grad.contiguous(), exponent),
        at,
    )


@torch.no_grad()
def _stem(net: ResidualNet, images: Tensor) -> Tensor:
    try:
        return torch.as_tensor(net.stem(images.clone()))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"images: the network refuses the shape {list(images.shape)} ({reason})") from None


def _check_images(net: ResidualNet, images: Tensor) -> None:
    if not isinstance(net, ResidualNet):
        raise ValueError(f"net: expected a pathnet ResidualNet, got {type(net).__name__}")
    if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64):
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected a float32 or float64 tensor (normalised images), got {got}")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images: expected shape [B, C, H, W] with B >= 1, got {list(images.shape)}")
    device = next((parameter.device for parameter in net.parameters()), images.device)
    if images.device != device:
        raise ValueError(f"images: expected device {device} (the network's), got {images.device}")
    if not torch.isfinite(images).all():
        raise ValueError("images: expected finite values, got NaN or infinity")


def _check_labels(images: Tensor, labels: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"target: expected an int64 tensor of class labels, got {got}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"target: expected shape [{len(images)}] (a label an image), got {list(labels.shape)}")
    if labels.device != images.device:
        raise ValueError(f"target: expected device {images.device} (the images'), got {labels.device}")
