"""Float32 arithmetic in full precision, whatever PyTorch's switches say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch

__all__ = ["Autocast", "full_precision"]

EXACT, INHERITED = "ieee", "none"

# A signal handler may walk too, in a thread that holds the lock. It then enters and leaves between two statements
# below, whose order is such that it leaves everything as it was.
_lock = RLock()
_inside = 0
_before: Callable[[], None] | None = None


@dataclass(frozen=True)
class Autocast:
    """The automatic mixed precision of a device at some moment.

    Attributes:
        device: type of the device, such as ``cpu``.
        dtype: the type that products are computed in; None where autocast is off.
    """

    device: str
    dtype: torch.dtype | None = None

    @classmethod
    def active(cls, device: str) -> Autocast:
        """Return the one that is active in this thread."""
        enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return cls(device, torch.get_autocast_dtype(device) if enabled else None)

    def entered(self) -> AbstractContextManager[Any]:
        """Return a context manager in which it is active again, whatever is outside."""
        if not torch.amp.is_autocast_available(self.device):
            return nullcontext()
        # Without the cache, whose copies of weights would belong to the outermost context.
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None, cache_enabled=False)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in float32 without TF32 or bfloat16 products and without autocast; with autograd.

    On a GPU TF32 is cuDNN's default, and its 10 bits would flip ReLU bits; training scripts often turn it on for
    matrix products too. The switches belong to the process: they are set when the first thread enters, and restored
    when the last one leaves.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            restore = _set_exact()
            _inside = 1
            _before = restore
        else:
            _inside += 1
    try:
        with (
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.inference_mode(False),
        ):
            yield
    finally:
        with _lock:
            if _inside == 1 and _before is not None:
                restore, _before = _before, None
                _inside = 0
                restore()
            else:
                _inside -= 1


def _set_exact() -> Callable[[], None]:
    """Set every operator to IEEE arithmetic; return a function that restores the switches.

    PyTorch keeps older switches as well (`allow_tf32`, `float32_matmul_precision`). Reading one that contradicts the
    newer ones raises an error, and PyTorch's own compiler does read them. So the older ones are set too, and stay
    readable inside wherever they were readable outside; writing one writes the newer ones as well, hence the order.
    A convolution of cuDNN that inherits its backend's switch is left to inherit. Once `allow_tf32` was written, a
    convolution whose switch was never set no longer inherits and is TF32 by itself: PyTorch has no way back,
    and its own `cudnn.flags` ends that way too.
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    convolutions = [cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
    products = [torch.backends.cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]  # type: ignore[attr-defined]
    cudnn_inherits, *inherits = _inheriting([cudnn, *convolutions, *products])
    switches: list[tuple[Any, bool]] = [(cudnn, cudnn_inherits)]
    switches += [pair for pair in zip(convolutions, inherits, strict=False) if not pair[1]]
    switches += zip(products, inherits[len(convolutions) :], strict=True)
    before = [INHERITED if inherited else switch.fp32_precision for switch, inherited in switches]
    older_tf32 = _readable(lambda: cudnn.allow_tf32) is True
    older_products = _readable(torch.get_float32_matmul_precision)

    def write(allow_tf32: bool, matmul: str, precisions: Sequence[str]) -> None:
        if older_tf32:
            cudnn.allow_tf32 = allow_tf32
        if older_products not in (None, "highest"):
            torch.set_float32_matmul_precision(matmul)
        for (switch, _), precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision

    write(False, "highest", [EXACT] * len(switches))
    return lambda: write(True, str(older_products), before)


def _inheriting(switches: Sequence[Any]) -> list[bool]:
    """Return whether each switch, cuDNN's the first, inherits from the process's or from cuDNN's.

    To read a switch gives the inherited value. oneDNN's, whose setter does not work, counts as one never set.
    """
    inherits = _following(torch.backends, switches)
    if not inherits[0]:
        inherits = [a or b for a, b in zip(inherits, [False, *_following(switches[0], switches[1:])], strict=True)]
    return inherits


def _following(parent: Any, switches: Sequence[Any]) -> list[bool]:
    """Return whether each switch changes with ``parent``, which is set and restored."""
    value, before = parent.fp32_precision, [switch.fp32_precision for switch in switches]
    changed = [False] * len(switches)
    # Both values, since a switch whose parent is unset has a default, which may be either of them.
    for precision in (EXACT, "tf32"):
        parent.fp32_precision = precision
        after = [switch.fp32_precision for switch in switches]
        changed = [so_far or new != old for so_far, new, old in zip(changed, after, before, strict=True)]
    parent.fp32_precision = value
    return changed


def _readable(read: Callable[[], Any]) -> Any:
    """Return a switch's value; None where PyTorch refuses to read it."""
    try:
        return read()
    except RuntimeError:
        return None
