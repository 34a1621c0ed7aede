"""The forms of a training step: pathnet's fused blocks, and PyTorch's by layout, precision and compilation."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu.training.goals import PRECISIONS
from pathnet.models import ResidualNet
from pathnet.nn import fuse
from pathnet.training import Recipe

__all__ = ["FORMS", "Backend", "Drawn", "Form", "Trainer"]

LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}

RECOMPILES = 64
"""More programs than the blocks need in both precisions: beyond the limit torch goes on uncompiled."""

Drawn = Sequence[bool]
Backend = Literal["inductor", "eager"]


@dataclass(frozen=True)
class Form:
    """One way to run a training step.

    Attributes:
        by: ``pathnet`` for fused blocks, or ``torch``.
        precision: ``float32``, or ``bfloat16`` by autocast.
        layout: memory format of images, and of PyTorch's weights.
        compiled: whether each block is compiled.
    """

    by: Literal["pathnet", "torch"]
    precision: str
    layout: str = "channels_last"
    compiled: bool = False

    def __str__(self) -> str:
        if self.by == "pathnet":
            return f"pathnet, {self.precision}"
        return f"torch, {self.layout}{', compiled' if self.compiled else ''}, {self.precision}"


FORMS = (
    *(Form(by, precision) for precision, by in product(PRECISIONS, ("torch", "pathnet"))),  # type: ignore[arg-type]
    *(Form("torch", precision, "NCHW") for precision in PRECISIONS),
    *(Form("torch", precision, layout, True) for precision, layout in product(PRECISIONS, LAYOUTS)),
)
"""All forms; where time is short, the last ones are left out first."""


class Trainer:
    """A copy of a network that takes training steps on one batch, in one form.

    Attributes:
        net: the network whose steps are timed.
        engines: the engine of each of its blocks, for pathnet's form.
        parts: seconds of forward pass with loss, backward pass, and update of the weights, of each whole step.
    """

    def __init__(
        self, form: Form, net: ResidualNet, images: Tensor, labels: Tensor, backend: Backend = "inductor"
    ) -> None:
        layout, net = LAYOUTS[form.layout], copy.deepcopy(net).train()
        if form.by == "pathnet":
            # Its kernels take weights as they are, and would copy others in each call.
            net = fuse(net)
            self.engines: tuple[str, ...] = net.engines
        else:
            net = net.to(memory_format=layout)  # type: ignore[call-overload]
        self.net: ResidualNet = net
        if form.compiled:
            from torch._dynamo import config

            config.recompile_limit = RECOMPILES
            for block in self.net:
                block.compile(backend=backend)
        self.form, self.images, self.labels = form, images.contiguous(memory_format=layout), labels
        recipe = Recipe()
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=recipe.warmup_learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=True,
        )
        self.parts: list[tuple[float, float, float]] = []

    def step(self, drawn: Drawn | None = None) -> None:
        """Take one step; its gradients stay in the parameters until the next."""
        start = time.perf_counter()
        self.loss = self.backward_alone(drawn)
        self.optimizer.step()
        if drawn is None:
            ends = (self._forward, self._backward, time.perf_counter())
            self.parts.append((ends[0] - start, ends[1] - ends[0], ends[2] - ends[1]))

    def backward_alone(self, drawn: Drawn | None = None) -> Tensor:
        """Run the forward and the backward pass of a step without the update; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.form.precision == "bfloat16"):
            output = self.net(self.images, drawn)
        loss = F.cross_entropy(output.float() if self.form.precision == "bfloat16" else output, self.labels)
        self._forward = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        self._backward = time.perf_counter()
        return loss.detach()

    def gradient_norm(self) -> float:
        """Return the norm of the gradient of the last step, over all parameters."""
        grads = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]
        return float(torch.stack([grad.double().norm() for grad in grads]).norm())
