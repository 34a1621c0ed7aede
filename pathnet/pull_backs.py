"""Pull-backs of gradients from where an engine's walk ends to the image or to a parameter, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines.reference import LIFT
from pathnet.places import Front, Place
from pathnet.scaling import ScaledGradient
from pathnet.walks import Record

__all__ = ["PullBack", "Rows", "place_shape"]

Row = Sequence[float]
Rows = Sequence[Row]
"""A block's coefficients for each of several gradients, see `Block.coefficients`; empty where no block needs any."""

Product = Callable[[Tensor, Row], Tensor | None]


def place_shape(record: Record, place: Place) -> torch.Size:
    """Return the shape of one gradient at a place."""
    if place.leaf is not None:
        return place.leaf.shape
    return record.images.shape if place.at == "image" else record.y0_shape


class PullBack:
    """Pull-back of scaled gradients from the input of block `Place.start` to a place.

    It runs the network up to the place once, and keeps that graph.

    Raises:
        ValueError: the parameter belongs to the operations after a block's addition.
    """

    def __init__(self, record: Record, place: Place) -> None:
        self._is_parameter, self._in_block = place.leaf is not None, place.block is not None
        self._shape = place_shape(record, place)
        self._product: Product | None = None
        with torch.enable_grad(), record.autocast.entered() if record.autocast is not None else nullcontext():
            if place.block is not None:
                self._product = _of_block(record, place, place.block)
            elif place.parameter or place.at == "image":
                self._product = _of_stem(record, place)

    def __call__(self, grads: ScaledGradient, rows: Rows) -> ScaledGradient:
        """Return the scaled gradients at the place.

        Args:
            grads: mantissa [p, B, ...], exponent int32 [p, B] or [p, 1].
            rows: for each gradient the coefficients of the block with the parameter, see `Block.coefficients`; empty
                at other places.

        Returns:
            Mantissa [p, *shape], exponent as before. A parameter has no samples: mantissa [p, 1, N] for a parameter
            of N numbers, exponent [p, 1].
        """
        if self._product is None:
            return grads
        if not self._is_parameter:
            pulled = [self._product(mantissa, ()) for mantissa in grads.mantissa]
            return scaling.rescale(self._stacked(pulled, grads.mantissa), grads.exponent)
        mantissas, exponents = scaling.align(*grads)
        pulled = [self._product(*pair) for pair in zip(mantissas, rows or [()] * len(mantissas), strict=True)]
        if not self._in_block:
            return scaling.rescale(self._stacked(pulled, mantissas), exponents)
        return self._in_range(self._product, pulled, ScaledGradient(mantissas, exponents), rows)

    def of_sample(self, grads: ScaledGradient, rows: Rows, sample: int) -> ScaledGradient:
        """Return the part of a parameter's gradient that comes through one sample's slice of ``grads``."""
        mantissa, exponent = grads
        alone = torch.zeros_like(mantissa)
        alone[:, sample] = mantissa[:, sample]
        return self(
            ScaledGradient(alone, exponent[:, sample : sample + 1] if exponent.shape[1] > 1 else exponent), rows
        )

    def _stacked(self, pulled: Sequence[Tensor | None], like: Tensor) -> Tensor:
        shape = (1, self._shape.numel()) if self._is_parameter else self._shape
        stacked = like.new_zeros(len(pulled), *shape)
        for position, grad in enumerate(pulled):
            if grad is not None:
                stacked[position] = grad.reshape(shape)
        return stacked

    def _in_range(
        self, product: Product, pulled: Sequence[Tensor | None], grads: ScaledGradient, rows: Rows
    ) -> ScaledGradient:
        """Return the gradients of a block's parameter, rescaled; one out of its type's range is computed again.

        A block may shrink a gradient by 2^200. To see that, this waits for a GPU.
        """
        mantissas, exponents = grads
        stacked, lift = self._stacked(pulled, mantissas), LIFT[mantissas.dtype]
        largest = scaling.largest(stacked, exponents)
        faint = (largest < 2.0 ** (-lift // 2)) & mantissas.flatten(1).any(1, keepdim=True)
        lifts = torch.where(torch.isfinite(largest), lift * faint.int(), -lift)
        for path in lifts.any(1).nonzero().flatten().tolist():
            if pulled[path] is not None:
                lifted = scaling.times_power_of_two(mantissas[path], lifts[path])
                again = self._stacked([product(lifted, rows[path] if rows else ())], mantissas)[0]
                if torch.isfinite(again).all():
                    stacked[path] = again
                    continue
            lifts[path] = 0
        return scaling.rescale(stacked, exponents - lifts)


def _of_stem(record: Record, place: Place) -> Product:
    """Return the vector-Jacobian product of the stem."""
    images = record.images.detach()
    leaf = images.requires_grad_() if place.leaf is None else place.leaf
    y0 = record.net.stem(images.clone())
    return lambda grad, _: torch.autograd.grad(y0, leaf, grad.to(y0.dtype), retain_graph=True)[0]


def _of_block(record: Record, place: Place, number: int) -> Product:
    """Return the vector-Jacobian product of one block, from its output to one of its parameters."""
    front = record.net.stem
    assert isinstance(front, Front)
    block, leaf = list(front.whole)[number], place.leaf
    assert leaf is not None
    with torch.no_grad():
        x = front.input_of(number, record.images.clone())
    # Copies, since a branch or a join may begin with an in-place ReLU.
    parts = block.parts(x.clone())
    z = block.summed(parts).detach().requires_grad_()
    y = block.join(z.clone())
    if torch.autograd.grad(y.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None:
        raise ValueError(
            f"at: expected a parameter of a skip connection or a residual module, got {place.at!r}, which block "
            f"{number} uses after its addition"
        )

    def product(grad: Tensor, row: Row) -> Tensor | None:
        (grad,) = torch.autograd.grad(y, z, grad.to(y.dtype), retain_graph=True)
        entered = [
            (part, factor * grad)
            for factor, part in zip(block.coefficients(row), parts, strict=True)
            if factor != 0 and part is not None and part.requires_grad
        ]
        if not entered:
            return None
        outputs, grads = zip(*entered, strict=True)
        return torch.autograd.grad(outputs, leaf, grads, retain_graph=True, allow_unused=True)[0]

    return product
