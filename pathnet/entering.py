"""The way of a batch into a network: checks and copies of its tensors, the stem, and the engine for the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.checks import check_tensor
from pathnet.engines import Job, Prepared, choose
from pathnet.engines.reference import ReferenceEngine
from pathnet.models.context import Context
from pathnet.models.inputs import map_tensors
from pathnet.models.residual_net import ResidualNet
from pathnet.recording import NAN, NOT_FINITE

__all__ = ["Service", "check_values", "copied_inputs", "served", "stem_output"]

INPUT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)


@dataclass(frozen=True)
class Service:
    """A job, and its network as prepared by the engine that serves it."""

    job: Job
    engine: str
    prepared: Prepared

    def suits(self, net: ResidualNet, y0: Tensor) -> bool:
        """Return whether the service is one for blocks of ``net`` whose input is ``y0``."""
        return self.job.net is net and self.job.y0_shape == y0.shape[1:] and self.job.device == y0.device


def served(job: Job, engine: str) -> Service:
    """Return the service for a job by the engine of a name, or for ``auto`` by the fastest.

    Raises:
        ValueError: no such engine serves the job.
    """
    # No engine has to walk through no block, which the plain one does.
    chosen = choose(engine, job) if job.net.n else ReferenceEngine()
    return Service(job, chosen.name, chosen.prepare(job))


@torch.no_grad()
def copied_inputs(
    net: ResidualNet, inputs: Any, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Tensor, Context]:
    """Return copies of a batch's inputs: all tensors by name, the main one with the batch first, and the context.

    Args:
        dtype: the type of the copies; None for that of each. Integers keep theirs.

    Raises:
        ValueError: the network does not take such inputs.
    """
    tensors = net.tensors(inputs)
    _check_images(net, tensors)

    def copied(tensor: Tensor) -> Tensor:
        to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(to, copy=True).contiguous()

    copies = map_tensors(inputs, copied)
    images, context = net.split(copies)
    return net.tensors(copies), images.contiguous(), context.detached()


@torch.no_grad()
def stem_output(net: ResidualNet, images: Tensor) -> Tensor:
    """Return ``y_0`` [B, ...], the input of the first block, for a batch of images or tokens.

    Raises:
        ValueError: the network refuses the batch.
    """
    try:
        y0 = torch.as_tensor(net.stem(images.clone()))
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:  # IndexError: a token outside the vocabulary.
        what = "shape" if images.is_floating_point() else "tokens of shape"
        reason = str(error).splitlines()[0]
        raise ValueError(f"images: the network refuses the {what} {list(images.shape)} ({reason})") from None
    if y0.shape[:1] != images.shape[:1]:
        raise ValueError(f"images: expected the batch first, got {list(images.shape)} (y_0 is {list(y0.shape)})")
    return y0


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the first tensor is finite, and none holds NaN: masks may hold infinities."""
    for i, (name, tensor) in enumerate(tensors.items()):
        if not (tensor.isfinite() if i == 0 else ~tensor.isnan()).all():
            raise ValueError(NOT_FINITE.replace("images", name, 1) if i == 0 else NAN.format(name))


def _check_images(net: ResidualNet, tensors: Mapping[str, Tensor]) -> None:
    """Check the inputs, the main one first, except their values, which `ValueCheck` checks."""
    device = next((parameter.device for parameter in net.parameters()), None)
    name, images = next(iter(tensors.items()))
    if images.dtype not in INPUT_TYPES:
        raise ValueError(
            f"{name}: expected a float32, float64, bfloat16 or float16 tensor (normalised images), or int64 or int32 "
            f"(tokens), got {images.dtype}"
        )
    for entry, tensor in tensors.items():
        check_tensor(entry, tensor, device=device)
    # A convolution would take an image without a batch too.
    convolves = images.is_floating_point() and any(isinstance(module, nn.Conv2d) for module in net.stem.modules())
    if images.ndim == 0 or len(images) == 0 or (convolves and images.ndim != 4):
        shape = "[B, C, H, W]" if convolves else "[B, ...]"
        raise ValueError(f"{name}: expected shape {shape} with B >= 1, got {list(images.shape)}")
