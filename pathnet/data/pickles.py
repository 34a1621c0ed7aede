"""The original batches of CIFAR-10: pickles, read without executing them and in memory bounded by their size."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np

from pathnet.checks import described
from pathnet.data.decoding import check_regular

__all__ = ["read_batch"]

PIXELS = 3 * 32 * 32
MOST_BYTES = 1 << 28
MOST_OPCODES = 1_000_000
MOST_TUPLES = 1_000
MEMO_WRITES = {"PUT", "BINPUT", "LONG_BINPUT"}
TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
"""Hashable containers, which can be nested: C computes their hash by recursion, without a limit."""


def read_batch(file: Path) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], list[object]]:
    """Return the images of a batch, uint8 [N, 3, 32, 32], and N labels, which are not checked.

    Raises:
        ValueError: the file is not such a batch, is larger than 256 MiB, or requests more memory than its size.
    """
    check_regular(file, MOST_BYTES)
    content = file.read_bytes()
    try:
        _check_opcodes(content)
        batch = _ArrayUnpickler(content).load()
        if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
            raise ValueError(f"expected a dictionary with b'data' and b'labels', got {described(batch)}")
        images, labels = batch[b"data"], batch[b"labels"]
        if not isinstance(images, _PickledArray) or not isinstance(labels, list):
            raise ValueError(f"expected an array and a list of labels, got {described(images)}, {described(labels)}")
        pixels = images.pixels()
    except MemoryError:
        raise ValueError(f"data: {file}: not enough memory to read it") from None
    except (
        pickle.UnpicklingError,
        struct.error,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        ImportError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"data: {file} is not a readable CIFAR-10 batch ({reason})") from None
    if not len(pixels) == len(labels) > 0:
        raise ValueError(
            f"data: {file}: expected as many labels as images, got {len(labels)} labels and {len(pixels)} images"
        )
    return pixels, labels


def _check_opcodes(content: bytes) -> None:
    """Raise ValueError for opcodes that request memory beyond the file's size, before the unpickler allocates it.

    `pickletools` itself compares the length of every string with the remainder of the file.
    """
    tuples = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        tuples += opcode.name in TUPLES
        if number >= MOST_OPCODES or tuples > MOST_TUPLES:
            raise ValueError(f"expected at most {MOST_OPCODES:,} opcodes, and {MOST_TUPLES:,} of tuples, got more")
        if opcode.name in MEMO_WRITES and not 0 <= int(argument or 0) < MOST_OPCODES:
            raise ValueError(f"expected a memo of at most {MOST_OPCODES:,} entries, got the index {argument}")


class _PickledArray:
    """A stand-in for numpy.ndarray in a pickle that keeps the raw buffer of a contiguous uint8 array."""

    shape: tuple[int, ...] = (0, PIXELS)
    buffer: bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, buffer = state
        if dtype != "u1" or fortran:
            raise pickle.UnpicklingError(f"expected a C-ordered uint8 array, got {dtype} (Fortran order: {fortran})")
        if not isinstance(shape, tuple) or not isinstance(buffer, bytes):
            raise pickle.UnpicklingError(
                f"expected a shape and bytes, got {described(shape)} and {described(buffer)}"
            )
        self.shape, self.buffer = shape, buffer

    def pixels(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the array, of shape [N, 3072], as images, uint8 [N, 3, 32, 32]."""
        images = len(self.buffer) // PIXELS
        if self.shape != (images, PIXELS) or len(self.buffer) != images * PIXELS:
            raise ValueError(
                f"expected an array of the shape (N, {PIXELS}), got {self.shape} with {len(self.buffer):,} bytes"
            )
        return np.frombuffer(self.buffer, np.uint8).reshape(-1, 3, 32, 32)


class _PickledDtype(str):
    """A stand-in for numpy.dtype in a pickle: the code of the type. Its byte order is ignored."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of lists, dictionaries and uint8 arrays; it rejects all other globals without running them."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.copies = len(content)

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return lambda *_: _PickledArray()
            case ("numpy", "ndarray"):
                return _PickledArray
            case ("numpy", "dtype"):
                return self._dtype
            case ("_codecs", "encode"):
                return self._encoded
        raise pickle.UnpicklingError(f"refused to run {module}.{name}")

    def _dtype(self, code: object, *_: object) -> _PickledDtype:
        text = code.decode() if isinstance(code, bytes) else code
        if not isinstance(text, str) or len(text) > 8:
            raise pickle.UnpicklingError(f"expected the code of a type, got {described(code)}")
        return _PickledDtype(text)

    def _encoded(self, text: object, *_: object) -> bytes:
        if not isinstance(text, str):
            raise pickle.UnpicklingError(f"expected text to encode, got {described(text)}")
        # A pickle can encode one text of its memo any number of times.
        self.copies -= len(text)
        if self.copies < 0:
            raise pickle.UnpicklingError("requests more bytes than the file contains")
        return text.encode("latin-1")
