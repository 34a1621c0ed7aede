"""The layouts of ReLU bits and weights, written a second time: they share no code with csrc/cuda."""

from __future__ import annotations

import numpy as np
from twin_abi import Array


def pad16(channels: int) -> int:
    """Round up to a multiple of 16."""
    return -(-channels // 16) * 16


# Layouts, written a second time


def packed_bits(bits: Array) -> Array:
    """Return uint8 [B, bytes] of bool [B, C, H, W]: [strip][lane][tile][rows * 2 bits], channels padded to 16."""
    batch, channels, height, width = bits.shape
    rows = 8 if pad16(channels) == 16 else 4
    down, across, tiles = -(-height // rows), -(-width // 8), pad16(channels) // 8
    full = np.zeros((batch, tiles * 8, down * rows, across * 8), bool)
    full[:, :channels, :height, :width] = bits
    # channel = tile, pair, parity; y = line, row; x = column, pixel
    parts = full.reshape(batch, tiles, 4, 2, down, rows, across, 8)
    ordered = parts.transpose(0, 4, 6, 7, 2, 1, 5, 3)  # batch, line, column, pixel, pair, tile, row, parity
    return np.packbits(ordered.reshape(batch, -1), axis=1, bitorder="little")


def bf16_terms(values: Array, parts: int) -> list[Array]:
    """Return uint16 arrays whose bf16 values add up to float32 ``values``: each is the remainder of those before it,
    rounded to nearest even.
    """
    terms, remainder = [], values.astype(np.float32)
    for _ in range(parts):
        raw = remainder.view(np.uint32).astype(np.uint64)
        term = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
        terms.append(term)
        remainder = remainder - (term.astype(np.uint32) << 16).view(np.float32)
    return terms


def packed_weights(weight: Array, scale: Array | None, parts: int, slices: int) -> Array:
    """Return weights [out, in, k, k] as uint8: [chunk][slice][part][tap of the slice][tile][lane][4] in bf16.

    With scales, they are the transposed convolution's.
    """
    if scale is not None:
        weight = (weight * scale[None, :, None, None]).transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    out, reduced, side, _ = weight.shape
    full = np.zeros((pad16(out), pad16(reduced), side, side), np.float32)
    full[:out, :reduced] = weight
    terms = np.stack(bf16_terms(full, parts))  # part, column, reduced, row of the kernel, column of the kernel
    lane, i = np.meshgrid(np.arange(32), np.arange(4), indexing="ij")
    k, n = lane % 4 * 2 + i % 2 + i // 2 * 8, lane // 4
    chunks, tiles = pad16(reduced) // 16, pad16(out) // 8
    split = terms.reshape(parts, tiles, 8, chunks, 16, side, side)
    fragments = split[:, :, n, :, k]  # lane, i, part, tile, chunk, row, column
    by_tap = fragments.transpose(4, 2, 6, 5, 3, 0, 1).reshape(chunks, parts, slices, -1)
    return by_tap.transpose(0, 2, 1, 3).copy().view(np.uint8).reshape(-1)
