"""Matrix products with weights: PyTorch's own, or oneDNN's, whichever is faster on this machine.

PyTorch takes MKL for float32 products, which on some processors uses half of their vector width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pathnet.engines.autograd.timing import fastest

__all__ = ["Product", "chosen"]


class Product:
    """``x @ weight + bias`` by one of several implementations.

    Attributes:
        run: the implementation, a function of x [m, k].
        held: the tensors that it keeps alive.
    """

    __name__ = "product"

    def __init__(self, run: Callable[[Tensor], Tensor], *held: Tensor) -> None:
        self.run, self.held = run, held

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)


def products(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Product]:
    """Return the implementations for an example [m, k] and a weight [k, n], PyTorch's own the first."""

    def plain(x: Tensor) -> Tensor:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    candidates = [Product(plain)]
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if x.device.type != "cpu" or x.dtype != torch.float32 or not has_onednn:
        return candidates
    transposed = weight.t()
    linear = torch.ops.mkldnn._linear_pointwise.default

    def by(stored: Tensor) -> Product:
        return Product(lambda x: linear(x, stored, bias, "none", [], ""), stored)

    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(transposed.contiguous(), len(x))
        expected = candidates[0](x)
        size = expected.abs().amax()
        # From rows that are apart in memory, oneDNN's product takes a thousand times as long.
        dense = weight.is_contiguous() or transposed.is_contiguous()
        for candidate in (*[by(transposed)] * dense, by(packed)):
            if (candidate(x) - expected).abs().amax() <= 1e-5 * size:
                candidates.append(candidate)
    except (RuntimeError, AttributeError, NotImplementedError):
        pass
    return candidates


def chosen(x: Tensor, weight: Tensor, bias: Tensor | None, known: dict[object, int]) -> Product:
    """Return the fastest implementation; measured once for each size."""
    candidates = products(x, weight, bias)
    key = (tuple(x.shape), tuple(weight.shape), weight.stride(), bias is None, x.dtype, len(candidates))
    if key not in known:
        known[key] = fastest([partial(candidate, x) for candidate in candidates], x.device)
    return candidates[known[key]]
