"""The plain C interface of twin_abi.cpp in ctypes."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_char_p, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Image(Structure):
    """Image of image.h."""

    _fields_ = [("channels", c_int32), ("height", c_int32), ("width", c_int32)]

    @property
    def strip_rows(self) -> int:
        return 8 if self.channels == 16 else 4


class PlanTables(Structure):
    """A plan without ReLU bits, as twin_abi.cpp takes it."""

    _fields_ = [
        ("blocks", c_void_p),
        ("block_count", c_int64),
        ("units", c_void_p),
        ("unit_count", c_int64),
        ("weights", c_void_p),
        ("scales", c_void_p),
    ]


POINTERS_BACKWARD = ["program", "weights", "relu_bits", "grad", "exponent", "starts", "routing", "order", "counter"]
POINTERS_FORWARD = ["program", "weights", "affine", "y0", "routing", "order", "counter"]


class PathBackward(Structure):
    """PathBackward of routed_backward.h."""

    _fields_ = [
        *((name, c_void_p) for name in POINTERS_BACKWARD),
        ("bits_stride", c_int64),
        ("gradients", c_int32),
        ("batch", c_int32),
        ("paths", c_int32),
        *((name, c_void_p) for name in ("images", "norms", "grad_input", "exponent_input")),
    ]


class PathForward(Structure):
    """PathForward of routed_forward.h."""

    _fields_ = [
        *((name, c_void_p) for name in POINTERS_FORWARD),
        ("batch", c_int32),
        ("paths", c_int32),
        *((name, c_void_p) for name in ("scratch", "images", "output", "relu_bits")),
    ]


def pointer(array: Array) -> int:
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def load(library: str) -> ctypes.CDLL:
    """Load a build of the twin."""
    twin = ctypes.CDLL(library)
    twin.twin_program.restype = c_int64
    for run in (twin.twin_backward, twin.twin_forward):
        run.restype = c_char_p
    return twin
