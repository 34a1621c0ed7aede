"""The engines that run fused blocks, and the devices that each serves."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Literal

from torch import Tensor

from pathnet import native
from pathnet.engines.cpu.training import cpu_fused_residual
from pathnet.engines.operands import BlockOperands
from pathnet.engines.triton.operators import triton_fused_residual
from pathnet.models.forms import FusedEngine

__all__ = ["FusedEngine", "Kernels", "run", "serving", "warn"]

Kernels = Literal["cpu", "triton"]


def serving(engine: FusedEngine, device: str) -> tuple[Kernels | None, str]:
    """Return the engine that runs blocks on a type of device, among those that ``engine`` admits.

    Returns:
        The engine, and an empty string; or None, and the reason why none serves.
    """
    if engine == "none":
        return None, 'engine="none" runs the modules'
    if engine == "cpu" or (engine == "auto" and device == "cpu"):
        if device != "cpu":
            return None, f"the cpu engine does not run on {device}"
        return ("cpu", "") if native.LOADED else (None, native.WHY_NOT)
    if not _has_triton():
        return None, "triton is not installed"
    if device in ("cuda", "xpu") or (device == "cpu" and _interpreted()):
        return "triton", ""
    return None, f"the triton engine does not run on {device}"


# As torch.compiler.assume_constant_result would mark it, without the second that importing the compiler takes.
serving._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(kernels: Kernels, x: Tensor, operands: BlockOperands) -> tuple[Tensor, Tensor]:
    """Return a block's output by an engine's kernels, and the statistics that its BNs used.

    Args:
        x: float32 or bfloat16 [B, C, H, W].

    Returns:
        [B, C', H', W'], in the type of ``x`` and channels_last; and mean and biased variance of each BN's input,
        float32 [units, 2, widest].
    """
    if kernels == "cpu":
        output, _, statistics = cpu_fused_residual(x, operands)
        return output, statistics
    return triton_fused_residual(x, operands)


@functools.cache
def warn(reason: str) -> None:
    """Warn once per process that a block's own modules run."""
    warnings.warn(f"fused_residual runs the block's own modules: {reason}", RuntimeWarning, stacklevel=4)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Return whether Triton interprets kernels in Python, as in tests."""
    import triton

    return bool(triton.knobs.runtime.interpret)
