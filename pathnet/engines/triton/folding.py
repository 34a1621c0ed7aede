"""Weights with BN's means folded in, one set per gradient, for convolutions that read a gradient once for every tap.

The gradient at a BN's input is ``g - mean - x_hat mean_x_hat``, with one number per channel for each mean.
Subtracting as the gradient is loaded costs arithmetic on every element for every tap, three times as much as all
else. The convolution is linear, so the subtraction can be done on the weights instead: the convolution of ``-x_hat``
with ``mean_x_hat W``, where one x_hat serves all gradients of a program and their weights are columns side by side,
plus ``-mean W``, one number per tap, wherever a tap reaches a pixel.

A tile is BLOCK_T taps of one row and BLOCK_N channels of the result; a program processes one after the other. The
number of a tap is stored as two terms of the gradients' type, since its rounding would be the same error at every
pixel. At 64 channels a row takes 74 KB of bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pathnet.engines.triton.configurations import FOLDED
from pathnet.engines.triton.launch import launch, power_of_two_from, programs_for
from pathnet.engines.triton.network import PackedConvolution
from pathnet.engines.triton.schedule import Launch
from pathnet.engines.triton.state import GradientStates
from pathnet.engines.triton.tiles import ROW_FIELDS, STATE_FIELDS

__all__ = ["constants_size", "fold_means", "folded_size", "taps_of"]


@triton.jit(do_not_specialize_on_alignment=["launch_ptr"])
def _fold_kernel(
    weights_ptr,
    rows_ptr,
    launch_ptr,
    states_ptr,
    corrections_ptr,
    corrections_width,
    folded_ptr,
    constants_ptr,
    C,
    OUT_C,
    TAPS: tl.constexpr,
    ALL_TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    channel_tiles = tl.cdiv(C, BLOCK_N)
    TAP_TILES: tl.constexpr = ALL_TAPS // BLOCK_T
    rows_ptr += tl.load(launch_ptr) * ROW_FIELDS
    rows = tl.load(launch_ptr + 1)

    for program in tl.range(
        tl.program_id(0), rows * TAP_TILES * channel_tiles, tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        channel = program % channel_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        tap = program // channel_tiles % TAP_TILES * BLOCK_T + tl.arange(0, BLOCK_T)
        path = program // channel_tiles // TAP_TILES
        source = tl.load(rows_ptr + path * ROW_FIELDS)
        waits = (source >= 0) & (tl.load(states_ptr + tl.maximum(source, 0) * STATE_FIELDS + 1) >= 0)
        means = corrections_ptr + tl.maximum(source, 0).to(tl.int64) * (2 * corrections_width)
        folded = folded_ptr + path.to(tl.int64) * (TAPS * OUT_C * C)
        constant = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for depth in tl.range(0, tl.cdiv(OUT_C, BLOCK_K)):
            deep = depth * BLOCK_K + tl.arange(0, BLOCK_K)
            known = (deep < OUT_C) & waits
            mean = tl.load(means + deep, mask=known, other=0.0)
            mean_x_hat = tl.load(means + corrections_width + deep, mask=known, other=0.0)
            within = (tap < TAPS)[:, None, None] & (deep < OUT_C)[None, :, None] & (channel < C)[None, None, :]
            places = (tap[:, None, None] * OUT_C + deep[None, :, None]) * C + channel[None, None, :]
            weights = tl.load(weights_ptr + places, mask=within, other=0.0).to(tl.float32)
            scaled = -mean_x_hat[None, :, None] * weights
            tl.store(folded + places, scaled.to(folded_ptr.dtype.element_ty), mask=within)
            constant -= tl.sum(mean[None, :, None] * weights, 1)
        terms_ptr = constants_ptr + path.to(tl.int64) * (2 * ALL_TAPS * C) + (tap * C)[:, None] + channel[None, :]
        first = constant.to(constants_ptr.dtype.element_ty)
        tl.store(terms_ptr, first, mask=(channel < C)[None, :])
        second = (constant - first.to(tl.float32)).to(constants_ptr.dtype.element_ty)
        tl.store(terms_ptr + ALL_TAPS * C, second, mask=(channel < C)[None, :])


def taps_of(conv: PackedConvolution) -> int:
    """Return the number of constants for a convolution's taps: a power of two that a matrix product accepts."""
    return max(16, power_of_two_from(conv.kernel**2))


def folded_size(conv: PackedConvolution) -> int:
    """Return the elements of a row's weights."""
    return conv.transposed.numel()


def constants_size(conv: PackedConvolution) -> int:
    """Return the elements of a row's constants."""
    return 2 * taps_of(conv) * conv.input.channels


def fold_means(gradients: GradientStates, conv: PackedConvolution, task: Launch) -> None:
    """Store every row's weights in ``gradients.folded`` [rows, taps, C_out, C], and its constants in
    ``gradients.constants`` [rows, 2, `taps_of`, C].

    Args:
        task: a launch that reads states through the convolution.
    """
    channels = conv.input.channels
    launch(
        _fold_kernel,
        programs_for(
            task.count * (taps_of(conv) // FOLDED.points) * -(-channels // FOLDED.channels), gradients.values.device
        ),
        FOLDED,
        weights_ptr=conv.transposed,
        rows_ptr=gradients.rows,
        launch_ptr=gradients.launches[task.index],
        states_ptr=gradients.states,
        corrections_ptr=gradients.corrections,
        corrections_width=gradients.corrections.shape[2],
        folded_ptr=gradients.folded,
        constants_ptr=gradients.constants,
        C=channels,
        OUT_C=conv.output.channels,
        TAPS=conv.kernel**2,
        ALL_TAPS=taps_of(conv),
        BLOCK_T=FOLDED.points,
        BLOCK_N=FOLDED.channels,
        BLOCK_K=FOLDED.depth,
    )
