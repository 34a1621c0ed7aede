"""Gradients of a training step against float64 with the same ReLU bits.

The truth is the plain network in float64, whose ReLUs multiply by the bits of the judged run: another rounding of the
forward pass flips some bits, and one flipped bit outweighs all rounding. It shares no code with fused kernels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cpu.training.forms import Drawn, Form, Trainer
from benchmarks.outcome import Failed, Findings
from pathnet.models import ResidualNet

__all__ = ["Step", "check_gradients", "gradient_errors"]

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
"""Largest relative error of a gradient; in float64 both run the same operations."""
TIMES_OF_AUTOCAST = 2.0
"""Largest error of a gradient in bfloat16, in times of its error in PyTorch under autocast."""

Step = tuple[Tensor, Tensor, Drawn | None]
"""Images, labels, and the modules that are drawn; None for all."""
Errors = dict[str, float]
"""Relative error of each gradient, and of each running statistic, by name."""


def check_gradients(net: ResidualNet, steps: Sequence[Step]) -> Findings:
    """Return the largest errors of plain steps in float64, of pathnet's in both precisions, and of autocast's.

    In bfloat16 a gradient's error is compared with autocast's as root of the mean square over all steps, since that
    of a few numbers in one step is a matter of chance.

    Raises:
        Failed: an error is beyond its limit; the findings hold those up to it.
    """
    findings: Findings = {}
    for form, judged in ((Form("torch", "float64"), copy.deepcopy(net).double()), (Form("pathnet", "float32"), net)):
        errors = [gradient_errors(form, judged, *step) for step in steps]
        _judge(findings, f"{form.by}, {form.precision}", errors, TOLERANCE[form.precision])
    eager, fused = (
        [gradient_errors(Form(by, "bfloat16"), net, *step) for step in steps] for by in ("torch", "pathnet")
    )
    _judge(findings, "torch, bfloat16", eager, math.inf)
    _judge(findings, "pathnet, bfloat16", fused, math.inf)
    times = {name: _times(_mean(fused, name), _mean(eager, name)) for name in eager[0]}
    _judge(findings, "pathnet, bfloat16, in times of autocast's error", [times], TIMES_OF_AUTOCAST)
    return findings


def _judge(findings: Findings, name: str, errors: Sequence[Errors], limit: float) -> None:
    """Add the largest error to the findings; raise Failed if it is not below a finite limit."""
    # Not max(), which ignores a NaN.
    error = float(torch.tensor([value for entry in errors for value in entry.values()]).max())
    # A string, since JSON has neither NaN nor infinity.
    findings[name] = error if math.isfinite(error) else str(error)
    if limit < math.inf and not error < limit:
        raise Failed(f"gradients of {name}, are off by {error:.2g}, hence not timed", {"error": findings})


def _mean(errors: Sequence[Errors], name: str) -> float:
    return math.sqrt(sum(entry.get(name, math.inf) ** 2 for entry in errors) / len(errors))


def _times(error: float, other: float) -> float:
    if other == 0:
        return 0.0 if error == 0 else math.inf
    return error / other


def gradient_errors(form: Form, net: ResidualNet, images: Tensor, labels: Tensor, drawn: Drawn | None) -> Errors:
    """Return the errors of a step's gradients and running statistics; infinite where one side has no gradient."""
    images = images.to(next(net.parameters()).dtype)
    trainer = Trainer(form, net, images, labels)
    with _Recorded() as recorded:
        trainer.backward_alone(drawn)
    truth = copy.deepcopy(net).double().train()
    with _Masked(recorded.bits) as masked:
        loss = F.cross_entropy(_output(truth, images.double(), drawn), labels)
    if masked.bits:
        return {"ReLUs that should not run": math.inf}
    loss.backward()  # type: ignore[no-untyped-call]
    measured = {name: parameter.grad for name, parameter in trainer.net.named_parameters()}
    expected = {name: parameter.grad for name, parameter in truth.named_parameters()}
    for values, judged in ((measured, trainer.net), (expected, truth)):
        values |= {name: buffer for name, buffer in judged.named_buffers() if buffer.is_floating_point()}
    return {name: _error(measured.get(name), value) for name, value in expected.items()}


def _output(net: ResidualNet, images: Tensor, drawn: Drawn | None) -> Tensor:
    y = net.stem(images)
    for block, active in zip(net, drawn or [True] * net.n, strict=True):
        if active:
            skip, residual = block.branches(y)
            y = skip + residual
        else:
            y = block.skip(y)
    return torch.as_tensor(net.head(y))


class _Recorded(TorchDispatchMode):
    """Records the ReLU bits of forward passes in their order, of PyTorch's ReLUs and inside fused blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.bits: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.relu.default:
            self.bits.append(result > 0)
        elif func._schema.name == "pathnet::cpu_fused_residual":
            self.bits += _unit_bits(*args, inner=result[1])
        return result


def _unit_bits(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    strides: Sequence[int],
    epsilons: Sequence[float],
    *ignored: Any,
    inner: Tensor,
) -> Iterator[Tensor]:
    """Yield the bits of each unit of a fused block, from the inputs of its BNs as the block stored them."""
    each = len(norms) // len(epsilons)
    sizes, height, width = [x.numel()], *x.shape[2:]
    inputs = [x]
    for weight, stride in zip(weights[: len(epsilons) - 1], strides, strict=False):
        height, width = -(-height // stride), -(-width // stride)
        shape = len(x), height, width, len(weight)
        start = sum(sizes[1:])
        sizes.append(shape[0] * shape[1] * shape[2] * shape[3])
        inputs.append(inner[start : start + sizes[-1]].view(shape).permute(0, 3, 1, 2))
    for unit, (values, epsilon) in enumerate(zip(inputs, epsilons, strict=True)):
        gain, bias, *statistics = (norm.double() for norm in norms[each * unit : each * (unit + 1)])
        mean, variance = statistics or (None, None)
        yield F.batch_norm(values.double(), mean, variance, gain, bias, mean is None, 0.0, epsilon) > 0


class _Masked(TorchFunctionMode):
    """Replaces each ReLU by a product with the next of the bits, or with NaN if they are not of its shape."""

    def __init__(self, bits: Sequence[Tensor]) -> None:
        super().__init__()
        self.bits = list(bits)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.relu:
            return func(*args, **(kwargs or {}))
        fitting = self.bits and self.bits[0].shape == args[0].shape
        return args[0] * (self.bits.pop(0) if fitting else math.nan)


def _error(measured: Tensor | None, expected: Tensor | None) -> float:
    if measured is None or expected is None:
        return 0.0 if measured is expected else math.inf
    return float((measured.double() - expected).norm() / expected.norm())
