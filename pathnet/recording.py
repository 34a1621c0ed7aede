"""Parts of a recording: a frozen copy of the network, the loss and its gradient, checks of the batch's values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet import scaling
from pathnet.checks import check_tensor, described
from pathnet.models.hooks import copy_without_hooks
from pathnet.models.residual_net import ResidualNet
from pathnet.scaling import ScaledGradient

__all__ = [
    "NAN",
    "NOT_FINITE",
    "NOT_FINITE_GRADIENT",
    "SMALLEST",
    "At",
    "BatchNormMode",
    "BatchNormPolicy",
    "Loss",
    "OutputGradient",
    "Precision",
    "ValueCheck",
    "check_differentiable",
    "check_labels",
    "check_loss",
    "cross_entropy",
    "model_loss",
    "output_gradient",
    "snapshot",
]

BatchNormMode = Literal["running", "batch"]
BatchNormPolicy = Literal["running", "batch", "recalibrated"]
"""Statistics by which lesioned networks normalise, see `pathnet.lesion.Errors`."""
Precision = Literal["float32", "bfloat16", "float64", "network"]
At = Literal["y0", "image", "stem_weight"]
Loss = Callable[[Tensor, Any], Tensor]

NOT_FINITE = "images: expected finite values, got NaN or infinity"
NAN = "{}: expected no NaN, got NaN"
NOT_FINITE_GRADIENT = "loss: expected a finite gradient at the network's output, got NaN or infinity"
IGNORED = -100
"""Label of positions of a sequence that the loss leaves out, the default of PyTorch's ``ignore_index``."""


def snapshot(
    net: ResidualNet, bn: BatchNormMode, dtype: torch.dtype | None, unsettled: int | None = None
) -> ResidualNet:
    """Return a copy that neither later changes of ``net`` nor its own forward passes change.

    All modules are in evaluation mode, except batch normalisation where ``bn`` is ``batch``. A user's hooks are left
    out, and so are the kernels of fused blocks.

    Args:
        dtype: the type of its floating-point weights; None for that of each.
        unsettled: number of a block whose parameters stay those of ``net``, see `Block.settle`.

    Raises:
        ValueError: ``bn`` is ``batch``, and the network's statistics are fixed.
    """
    if bn == "batch" and net.frozen_statistics:
        where = ", ".join(net.frozen_statistics)
        raise ValueError(f"bn: expected 'running' for a network whose running statistics are fixed ({where})")
    copied = copy_without_hooks(net).to(dtype=dtype).eval().requires_grad_(False)
    copied.blocks = nn.ModuleList(block.plain() for block in copied)
    if bn == "batch":
        for module in copied.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
                module.track_running_stats = False
    for number, block in enumerate(copied):
        if number != unsettled:
            block.settle()
    return copied


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy over the batch, and over all positions of sequences.

    It is computed in float64: float32 would round a well-fitted sample's gradient to 0.

    Args:
        output: [B, classes], or [B, T, classes] for sequences.
        target: int64 [B]; or [B, T], where a position with -100 is left out, as PyTorch does.

    Returns:
        One number. It is NaN where all positions are left out, and where a label is not among the classes, which on a
        GPU would otherwise end the process.

    Raises:
        ValueError: there is not one label for each row of the output.
    """
    if target.shape != output.shape[:-1]:
        rows = f"a label for each row of the output {list(output.shape)}"
        what = "one label per image" if output.ndim == 2 else rows
        raise ValueError(f"target: expected shape {list(output.shape[:-1])} ({what}), got {list(target.shape)}")
    known = (target >= 0) & (target < output.shape[-1])
    mean = F.cross_entropy(
        output.double().flatten(0, -2), target.where(known, IGNORED).flatten(), ignore_index=IGNORED
    )
    return mean.where((known | _ignored(target)).all(), torch.nan)


def model_loss(output: Tensor, target: Any) -> Tensor:
    """Return the output itself, the loss that a model computes of targets among its inputs.

    Raises:
        ValueError: the output is not one number, or there is a target, which the model would not see.
    """
    if target is not None:
        raise ValueError(f"target: expected None where the loss is 'model', got {described(target)}")
    if output.numel() != 1:
        raise ValueError(
            "loss: expected a network whose output is one number where the loss is 'model', as "
            f"adapt(model, example, output='loss') gives, got an output of shape {list(output.shape)}"
        )
    return output


def _ignored(target: Tensor) -> Tensor:
    """Return bool, in the target's shape: the positions that the loss leaves out.

    Labels of images are never left out: a sample without a loss has no paths.
    """
    return target == IGNORED if target.ndim > 1 else torch.zeros_like(target, dtype=torch.bool)


SMALLEST = 2.0**-60
"""Magnitude below which a gradient may have lost digits between the loss and the blocks."""

POWERS = {torch.float64: range(100, 1001, 100), torch.float32: (100,), torch.bfloat16: (100,), torch.float16: (15,)}
"""Powers of two that a loss of each type can be multiplied or divided by."""


HALF_POWERS = (8, 16, 24)
"""Powers of two that the loss of a network with float16 in its head is multiplied by."""


def _has_halves(net: ResidualNet, y_n: Tensor) -> bool:
    types = {y_n.dtype, *(weight.dtype for weight in net.head.parameters())}
    device = y_n.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    return torch.float16 in types


@dataclass(frozen=True)
class OutputGradient:
    """A loss, and its gradient at the output of the last block.

    Attributes:
        output: [B, ...], the head's output.
        loss: []
        start: the gradient [B, ...], its exponent int32 [B] or, where the batch is one object, [1].
        least: [], the smallest of the samples' largest magnitudes before scaling; -1 where one is not finite.
    """

    output: Tensor
    loss: Tensor
    start: ScaledGradient
    least: Tensor


def output_gradient(
    net: ResidualNet, y_n: Tensor, target: Any, loss: Loss, bn: BatchNormMode, thorough: bool = False
) -> OutputGradient:
    """Differentiate the loss with respect to the output of the last block.

    Args:
        thorough: whether to multiply the loss by powers of two before its differentiation, where the gradient of a
            sample would leave the range of the network's type: a loss in float64 may scale it by 1e300. This reads
            values, which synchronises with the GPU.

    Raises:
        ValueError: the loss is not one number that depends on the output; or, with ``thorough``, its gradient is not
            finite.
    """
    y_n = y_n.detach().requires_grad_()
    slots = len(y_n) if bn == "running" else 1
    walked = torch.float64 if y_n.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        # A copy, since a head may begin with an in-place ReLU; so may blocks and stems.
        output = net.head(y_n.clone())
        result = check_differentiable(loss(output, target))

    def differentiated(power: int) -> tuple[Tensor, Tensor]:
        factor = torch.full_like(result, 2.0**power)
        (grad,) = torch.autograd.grad(result, y_n, factor, retain_graph=True, materialize_grads=True)
        magnitude = scaling.largest(grad[None], exponent)
        return grad[None].to(walked), magnitude.to(walked).where(torch.isfinite(magnitude), -1.0)

    def arriving(power: int) -> Tensor:
        """Return bool [1, slots], whether a finite gradient reaches the output; True where rows are no samples."""
        factor = torch.full_like(result, 2.0**power)
        (grad,) = torch.autograd.grad(result, output, factor, retain_graph=True, materialize_grads=True)
        by_sample = slots == 1 or grad.shape[:1] == (slots,)
        rows = grad.abs().reshape(slots, -1) if by_sample else grad.new_ones(slots, 1)
        largest = rows.amax(1)[None]
        return torch.as_tensor((largest > 0) & torch.isfinite(largest))

    exponent = torch.zeros(1, slots, dtype=torch.int32, device=y_n.device)
    grad, magnitude = differentiated(0)
    for power in HALF_POWERS if _has_halves(net, y_n) else ():
        # Type float16 ends at 2^-24, far above ordinary gradients of a mean loss.
        again, again_magnitude = differentiated(power)
        better = (again_magnitude > magnitude) & (again_magnitude < 2.0**12)
        grad = torch.where(scaling.beside(better, grad), again, grad)
        exponent, magnitude = torch.where(better, -power, exponent), again_magnitude.where(better, magnitude)
    for power in POWERS.get(result.dtype, ()) if thorough else ():
        for sign, short in ((1, (magnitude >= 0) & (magnitude < SMALLEST)), (-1, magnitude < 0)):
            # The output's gradient first, which costs little: a sample without any loss has no gradient at all.
            if not short.any() or not (short & arriving(sign * power)).any():
                continue
            again, again_magnitude = differentiated(sign * power)
            better = short & (again_magnitude > magnitude)
            grad = torch.where(scaling.beside(better, grad), again, grad)
            exponent = torch.where(better, -sign * power, exponent)
            magnitude = torch.where(better, again_magnitude, magnitude)
    if thorough and (magnitude < 0).any():
        raise ValueError(NOT_FINITE_GRADIENT)
    scaled, exponent = scaling.rescale(grad, exponent)
    start = ScaledGradient(scaled[0].contiguous(), exponent[0])
    return OutputGradient(output.detach(), result.detach().reshape(()), start, magnitude.amin())


def check_loss(value: object) -> Tensor:
    """Return ``value``, a loss; raise ValueError unless it is one real number."""
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        raise ValueError(f"loss: expected one real number per batch, got {described(value)}")
    return value


def check_differentiable(value: object) -> Tensor:
    """Return ``value``, a loss; raise ValueError unless it is one real number with a gradient."""
    number = check_loss(value)
    if not number.requires_grad:
        raise ValueError("loss: expected a differentiable function of the output, got one that is constant")
    return number


def check_labels(labels: object, device: torch.device) -> Tensor:
    """Return ``labels``, a dense int64 tensor on the device.

    Their shape and values depend on the output: `cross_entropy` and `ValueCheck` check them.

    Raises:
        ValueError: ``labels`` is no such tensor.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got, way_out = described(labels), ""
        if isinstance(labels, Tensor):
            got = str(labels.dtype)
            way_out = "; loss= takes another loss, such as a regression's"
            if not (labels.is_floating_point() or labels.is_complex()):
                way_out = "; target.long() is one"
        raise ValueError(f"target: expected an int64 tensor of class labels, got {got}{way_out}")
    if labels.device != device:
        raise ValueError(f"target: expected device {device} (the images'), got {labels.device}")
    return check_tensor("target", labels, "integer", device=device)


class ValueCheck:
    """Check of the values of a forward pass, which are copied to the host asynchronously.

    All values are fetched in one copy, since reading a value on a GPU waits for all work launched before it. The copy
    starts on construction and `result` waits for it, so other work can be launched in between.

    Args:
        images: the network's input, or its tensors by name, the main one first.
        labels: int64 [B], expected to be among the classes of ``output`` [B, classes]; or [B, T] for [B, T, classes],
            where -100 is no label; None where the target has no labels.
        loss: []
        least_gradient: [], see `OutputGradient.least`; by default 1.
        name: name of the images in an error.
    """

    def __init__(
        self,
        images: Tensor | Mapping[str, Tensor],
        labels: Tensor | None,
        output: Tensor,
        loss: Tensor,
        least_gradient: Tensor | None = None,
        name: str = "images",
    ) -> None:
        extremes = []
        if labels is not None:
            ignored = _ignored(labels)
            counted = labels.where(~ignored, 0)
            extremes = [counted.min(), counted.max(), ignored.all()]
        least = torch.ones_like(loss) if least_gradient is None else least_gradient
        tensors = images if isinstance(images, Mapping) else {name: images}
        main = next(iter(tensors.values()))
        # Masks may hold infinities, but nothing may be NaN.
        finite = [(~t.isnan() if i else t.isfinite()).all() for i, t in enumerate(tensors.values())]
        facts = [loss, least, *finite, *extremes]
        self._values = torch.stack([fact.to(main.device, torch.float64) for fact in facts])
        self._arrived: torch.cuda.Event | None = None
        if self._values.is_cuda:
            arriving = torch.empty(self._values.shape, dtype=torch.float64, pin_memory=True)
            self._values = arriving.copy_(self._values, non_blocking=True)
            self._arrived = torch.cuda.current_stream(main.device).record_event()
        self._names, self._name = list(tensors), name
        self._classes = None if labels is None else output.shape[-1]

    def result(self) -> tuple[float, float]:
        """Return the loss, and `OutputGradient.least`.

        Raises:
            ValueError: an image is not finite, a label is not among the classes, there is no label, or the loss is
                not finite.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        value, least_gradient, *further = self._values.tolist()
        extremes = further[len(self._names) :]
        for i, (name, finite) in enumerate(zip(self._names, further, strict=False)):
            if not finite:
                raise ValueError(NOT_FINITE.replace("images", name, 1) if i == 0 else NAN.format(name))
        if self._classes is not None:
            least, most, nothing = map(int, extremes)
            if least < 0 or most >= self._classes:
                raise ValueError(f"target: expected labels 0 to {self._classes - 1}, got {least} to {most}")
            if nothing:
                raise ValueError(f"target: expected a label in at least one position, got {IGNORED} in all")
        if not math.isfinite(value):
            what = "images" if self._name == "images" else "inputs"
            raise ValueError(f"net: its loss on these {what} is {value}")
        return value, least_gradient
