"""Arithmetic as it is written, whatever PyTorch's switches for float32 say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

__all__ = ["full_precision"]

EXACT, INHERITED = "ieee", "none"

_lock = Lock()
_inside = 0
_before: Callable[[], None] | None = None


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in float32 as it is written: no TF32 or bfloat16 products, no autocast; with autograd.

    On a GPU TF32 is cuDNN's default, and its 10 bits would flip ReLU bits; training scripts often turn it on for
    matrix products too. The switches are the process's: they are set when the first thread enters, and are as they
    were when the last one has left.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _set_exact()
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
            _inside -= 1
            if _inside == 0 and _before is not None:
                _before()
                _before = None


def _set_exact() -> Callable[[], None]:
    """Set every operator to IEEE arithmetic; return what takes that back, so that each follows what it did before.

    PyTorch keeps older switches beside these (`allow_tf32`, `float32_matmul_precision`), and raises where one is read
    that contradicts them, as its own compiler does. So the older ones follow, and stay readable inside wherever they
    were so outside; writing one writes the newer ones too, hence the order. A convolution of cuDNN that follows its
    backend is left to that. One that nobody has ever set follows its backend no more where `allow_tf32` was written,
    and is TF32 by itself: PyTorch has no way back, and its own `cudnn.flags` ends so too.
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
    """Whether each switch, cuDNN's the first, follows the process's or cuDNN's; reading one gives what holds in the
    end. oneDNN's, which has no setter that works, is taken for one that was never set."""
    inherits = _following(torch.backends, switches)
    if not inherits[0]:
        inherits = [a or b for a, b in zip(inherits, [False, *_following(switches[0], switches[1:])], strict=True)]
    return inherits


def _following(parent: Any, switches: Sequence[Any]) -> list[bool]:
    """Whether each switch changes with ``parent``, which is set to a value of its own."""
    value, before = parent.fp32_precision, [switch.fp32_precision for switch in switches]
    changed = [False] * len(switches)
    # Both, since what follows a parent that says nothing has a default of its own, which may be either.
    for precision in (EXACT, "tf32"):
        parent.fp32_precision = precision
        seen = [switch.fp32_precision for switch in switches]
        changed = [so_far or new != old for so_far, new, old in zip(changed, seen, before, strict=True)]
    parent.fp32_precision = value
    return changed


def _readable(read: Callable[[], Any]) -> Any:
    """What a switch says, None where PyTorch refuses to tell."""
    try:
        return read()
    except RuntimeError:
        return None
