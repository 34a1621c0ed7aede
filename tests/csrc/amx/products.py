"""Products of tiles, with their exact results by numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROUND_TO_NEAREST, ROUND_TO_ZERO = 0x1F80, 0x7F80
"""Values of MXCSR."""


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Truncate to bfloat16; return its bits."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Product:
    """The product C += A * B: a [rows, 2 * pairs] and b [pairs, columns, 2] in bfloat16 bits, c [rows, columns] in
    float32.
    """

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    gaps: tuple[int, int, int] = (0, 0, 0)
    """Bytes between the rows of a, b and c."""
    repeats: int = 1
    mxcsr: int = ROUND_TO_NEAREST

    def data(self) -> bytes:
        matrices = [rows_of(self.a), rows_of(self.b), rows_of(self.c)]
        strides = [matrix.shape[1] + gap for matrix, gap in zip(matrices, self.gaps, strict=True)]
        header = np.array([len(self.a), len(self.b), self.c.shape[1], *strides, self.repeats, self.mxcsr])
        return b"".join([header.tobytes(), *map(with_gaps, matrices, strides)])

    def parse(self, output: bytes) -> tuple[np.ndarray, bytes]:
        """Return the result at the start of an output, and the bytes after it."""
        rows, width = self.c.shape[0], 4 * self.c.shape[1]
        stride = width + self.gaps[2]
        size = stride * (rows - 1) + width
        padded = np.frombuffer(output[:size] + b"\xaa" * self.gaps[2], dtype=np.uint8).reshape(rows, stride)
        assert (padded[:, width:] == 0xAA).all(), "written between the rows"
        return np.ascontiguousarray(padded[:, :width]).view(np.float32), output[size:]

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return A [rows, 2 * pairs] and B [2 * pairs, columns] in float64."""
        b = float32(self.b).transpose(0, 2, 1).reshape(-1, self.b.shape[1])
        return float32(self.a).astype(np.float64), b.astype(np.float64)

    def truth(self) -> np.ndarray:
        a, b = self.factors()
        return self.c + self.repeats * (a @ b)

    def scale(self) -> np.ndarray:
        """Return the sum of the terms' magnitudes."""
        a, b = self.factors()
        return np.abs(self.c) + np.abs(a) @ np.abs(b)

    def in_the_order_of_the_manual(self) -> np.ndarray:
        """Return the result bit for bit.

        Products of two bfloat16 are exact in float32, so a fused step rounds as two steps do.
        """
        a, b = (x.astype(np.float32) for x in self.factors())
        even, odd = np.zeros_like(self.c), np.zeros_like(self.c)
        for k in range(0, a.shape[1], 2):
            even += a[:, k, None] * b[k]
            odd += a[:, k + 1, None] * b[k + 1]
        return self.c + (even + odd)


def rows_of(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix).reshape(len(matrix), -1).view(np.uint8)


def with_gaps(rows: np.ndarray, stride: int) -> bytes:
    memory = np.full(stride * (len(rows) - 1) + rows.shape[1], 0xAA, dtype=np.uint8)
    for number, row in enumerate(rows):
        memory[number * stride :][: len(row)] = row
    return memory.tobytes()


def normal_product(shape: tuple[int, int, int], gaps: tuple[int, int, int] = (0, 0, 0)) -> Product:
    rows, pairs, columns = shape
    rng = np.random.default_rng(rows * 10000 + pairs * 100 + columns)
    a, b = (bfloat16(rng.normal(size=size)) for size in [(rows, 2 * pairs), (pairs, columns, 2)])
    return Product(a, b, rng.normal(size=(rows, columns)).astype(np.float32), gaps)


def integer_product(shape: tuple[int, int, int], repeats: int = 1) -> Product:
    rows, pairs, columns = shape
    rng = np.random.default_rng(sum(shape))
    a, b = (bfloat16(rng.integers(-9, 10, size)) for size in [(rows, 2 * pairs), (pairs, columns, 2)])
    return Product(a, b, rng.integers(-99, 100, (rows, columns)).astype(np.float32), repeats=repeats)
