"""What one forward pass leaves behind for the walks back: the data of a tape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet import scaling
from pathnet.models.residual_net import ResidualNet

__all__ = [
    "At",
    "BatchNormMode",
    "BlockRecord",
    "Loss",
    "Precision",
    "Record",
    "cross_entropy",
    "full_precision",
    "one_of",
    "snapshot",
]

BatchNormMode = Literal["running", "batch"]
Precision = Literal["float32", "bfloat16", "float64"]
At = Literal["y0", "image", "stem_weight"]
Loss = Callable[[Tensor, Tensor], Tensor]


class BlockRecord(Protocol):
    """What an engine keeps of the forward pass through the blocks; only that engine looks inside."""

    @property
    def tensors(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Record:
    """One forward pass, independent of the network it was taken from.

    Attributes:
        net: a frozen copy of the network, in the precision of the walk's type.
        images: [B, C, H, W]
        y0: [B, C_0, H_0, W_0], the stem's output.
        blocks: what the engine kept of the blocks.
        output: the head's output, [B, ...].
        loss: of (output, target).
        grad: [B, *y_n.shape[1:]], with ``exponent`` the gradient dL/dy_n that every walk starts from.
        exponent: int32 [B] in BN mode ``running``, [1] in ``batch``, where the batch is one object.
    """

    net: ResidualNet
    images: Tensor
    y0: Tensor
    blocks: BlockRecord
    output: Tensor
    loss: float
    grad: Tensor
    exponent: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and of the network's copy."""
        own = [self.images, self.y0, self.output, self.grad, self.exponent]
        owned = [*own, *self.blocks.tensors, *self.net.state_dict().values()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in owned}.values())


def one_of(name: str, value: str, literal: object) -> None:
    """Raises ValueError unless ``value`` is among the strings of a Literal type."""
    allowed = get_args(literal)
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")


@contextmanager
def full_precision() -> Iterator[None]:
    """Arithmetic as it is written, whatever mode the caller is in: no autocast, no TF32, and with autograd.

    On a GPU TF32 is cuDNN's default, and its 10 bits would flip ReLU bits.
    """
    cudnn = torch.backends.cudnn
    with (
        cudnn.flags(enabled=True, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.inference_mode(False),
    ):
        yield


def snapshot(net: ResidualNet, bn: BatchNormMode, dtype: torch.dtype) -> ResidualNet:
    """A copy that later changes of ``net`` do not reach, and whose forward passes leave ``net`` as it is.

    Everything is in evaluation mode, but for batch normalisation where ``bn`` is ``batch``.
    """
    copied = copy.deepcopy(net).to(dtype).eval().requires_grad_(False)
    if bn == "batch":
        for module in copied.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
    return copied


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """The mean over the batch, in float64: a well-fitted sample's gradient would be rounded to 0 in float32.

    Args:
        output: [B, classes]
        target: int64 [B]

    Raises:
        ValueError: a label is not among the classes.
    """
    classes = output.shape[-1]
    if target.min() < 0 or target.max() >= classes:
        raise ValueError(f"target: expected labels 0 to {classes - 1}, got {target.min()} to {target.max()}")
    return F.cross_entropy(output.double(), target)


def output_gradient(
    net: ResidualNet, y_n: Tensor, target: Tensor, loss: Loss, bn: BatchNormMode
) -> tuple[Tensor, float, Tensor, Tensor]:
    """Output, loss, and dL/dy_n as a scaled pair: the gradient [B, ...] and its exponents [B] or [1].

    Raises:
        ValueError: the loss is not one finite number.
    """
    y_n = y_n.detach().requires_grad_()
    with torch.enable_grad():
        # A copy, since a head may begin with an in-place ReLU; so may blocks and stems.
        output = net.head(y_n.clone())
        result = loss(output, target)
        if not isinstance(result, Tensor) or result.numel() != 1:
            raise ValueError(f"loss: expected one number a batch, got {getattr(result, 'shape', type(result))}")
        if not torch.isfinite(result):
            raise ValueError(f"net: its loss on these images is {result.item()}")
        (grad,) = torch.autograd.grad(result, y_n)
    slots = len(grad) if bn == "running" else 1
    exponent = torch.zeros(1, slots, dtype=torch.int32, device=grad.device)
    scaled, exponent = scaling.rescale(grad[None], exponent)
    return output.detach(), result.item(), scaled[0], exponent[0]
