"""Gradients at the end of a backward pass, with BN's means subtracted: copied, or only their norms.

A program takes POINTS pixels of one routing's sample to copy them, or a whole sample for its norm, one block of
channels after the other. Squares are added in float64, since samples of one batch share an exponent in BN mode
``batch``: 1.2 M values per routing, which even a GPU with 0.5 TFLOP/s in float64 adds in 5 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pathnet.engines.triton.configurations import ELEMENTS
from pathnet.engines.triton.launch import elements, launch
from pathnet.engines.triton.network import Shape
from pathnet.engines.triton.state import GradientStates, Saved
from pathnet.engines.triton.tiles import GradientMemory, load_gradients, load_means, locate

__all__ = ["arrived", "squared_norms"]


@triton.jit(do_not_specialize=["batch", "pixels"])
def _norms_kernel(
    gradients_ptr,
    slot_size,
    finals_ptr,
    states_ptr,
    batch,
    pixels,
    offsets_ptr,
    normalized_ptr,
    corrections_ptr,
    corrections_width,
    results_ptr,
    C: tl.constexpr,
    CORRECT: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    memory = GradientMemory(
        gradients_ptr, slot_size, states_ptr, offsets_ptr, normalized_ptr, corrections_ptr, corrections_width
    )
    pixel_tiles = tl.cdiv(pixels, POINTS)
    path, sample = tl.program_id(0) // batch, tl.program_id(0) % batch
    located = _located(memory, finals_ptr + path)
    total = tl.zeros([POINTS, BLOCK_N], tl.float64)
    for step in tl.range(0, pixel_tiles * CHANNEL_TILES):
        pixel = step // CHANNEL_TILES * POINTS + tl.arange(0, POINTS)
        channel = step % CHANNEL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        places = ((sample * pixels + pixel) * C)[:, None] + channel[None, :]
        within = (pixel < pixels)[:, None] & (channel < C)[None, :]
        values = _loaded(memory, located, places, within, channel, C, CORRECT).to(tl.float64)
        total += values * values
    tl.store(results_ptr + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=["batch", "pixels"])
def _arrivals_kernel(
    gradients_ptr,
    slot_size,
    finals_ptr,
    states_ptr,
    batch,
    pixels,
    offsets_ptr,
    normalized_ptr,
    corrections_ptr,
    corrections_width,
    results_ptr,
    C: tl.constexpr,
    CORRECT: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    memory = GradientMemory(
        gradients_ptr, slot_size, states_ptr, offsets_ptr, normalized_ptr, corrections_ptr, corrections_width
    )
    pixel_tiles = tl.cdiv(pixels, POINTS)
    program = tl.program_id(0)
    channel = program % CHANNEL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = program // CHANNEL_TILES % pixel_tiles * POINTS + tl.arange(0, POINTS)
    sample = program // CHANNEL_TILES // pixel_tiles % batch
    path = program // CHANNEL_TILES // pixel_tiles // batch
    located = _located(memory, finals_ptr + path)
    places = ((sample * pixels + pixel) * C)[:, None] + channel[None, :]
    within = (pixel < pixels)[:, None] & (channel < C)[None, :]
    values = _loaded(memory, located, places, within, channel, C, CORRECT).to(results_ptr.dtype.element_ty)
    tl.store(results_ptr + path.to(tl.int64) * batch * pixels * C + places, values, mask=within)


@triton.jit
def _located(memory, final_ptr):
    """Return the location of one final state, in blocks [1]."""
    state = tl.load(final_ptr + tl.zeros([1], tl.int32))
    return locate(memory, state, state >= 0)


@triton.jit
def _loaded(memory, located, places, within, channel, C: tl.constexpr, CORRECT: tl.constexpr):
    """Return [POINTS, BLOCK_N], one state's gradient."""
    means = load_means(memory, located, channel, channel < C, CORRECT)
    return tl.reshape(load_gradients(memory, located, places, within, means, CORRECT), places.shape)


def squared_norms(gradients: GradientStates, saved: Saved, finals: Tensor, shape: Shape) -> Tensor:
    """Return float64 [P, B], the squared norms of samples without their states' exponents.

    Args:
        finals: int32 [P], states; negative for a gradient that is zero.
        shape: shape of a sample's gradient.
    """
    norms = torch.empty(len(finals), gradients.batch, dtype=torch.float64, device=finals.device)
    _run(_norms_kernel, norms.numel(), gradients, saved, finals, shape, norms)
    return norms


def arrived(gradients: GradientStates, saved: Saved, finals: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return [P, B, H, W, C], the gradients of states without their exponents."""
    gradient = torch.empty(
        len(finals), gradients.batch, shape.height, shape.width, shape.channels, dtype=dtype, device=finals.device
    )
    points, channels = elements(ELEMENTS, shape.channels)
    tiles = -(-shape.pixels // points) * -(-shape.channels // channels)
    _run(_arrivals_kernel, len(finals) * gradients.batch * tiles, gradients, saved, finals, shape, gradient)
    return gradient


def _run(
    kernel: object,
    programs: int,
    gradients: GradientStates,
    saved: Saved,
    finals: Tensor,
    shape: Shape,
    results: Tensor,
) -> None:
    points, channels = elements(ELEMENTS, shape.channels)
    launch(
        kernel,
        programs,
        ELEMENTS,
        gradients_ptr=gradients.values,
        slot_size=gradients.values.shape[1],
        finals_ptr=finals,
        states_ptr=gradients.states,
        batch=gradients.batch,
        pixels=shape.pixels,
        offsets_ptr=saved.normalized_starts,
        normalized_ptr=saved.normalized,
        corrections_ptr=gradients.corrections,
        corrections_width=gradients.corrections.shape[-1],
        results_ptr=results,
        C=shape.channels,
        CORRECT=gradients.by_batch,
        POINTS=points,
        BLOCK_N=channels,
    )
