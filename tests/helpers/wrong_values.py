"""Arguments of a wrong kind or range, by name: whole values, and changes of a valid one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

__all__ = ["CHANGES", "TENSORS", "VALUES", "wrong"]


def _generator() -> Iterator[int]:
    yield 0
    yield 1


NUMBERS: dict[str, Any] = {
    **{repr(value): value for value in (None, True, False, 0, 1, 2, 7, -1, 1.0, 1.5, -0.5, 1e308, 3 + 4j)},
    **{repr(value): value for value in (float("nan"), float("inf"), -float("inf"))},
    **{f"2**{power}": 2**power for power in (31, 40, 63, 64, 100)},
    "-2**63": -(2**63),
    "10**5000": 10**5000,
    "np.int64(1)": np.int64(1),
    "np.float32(nan)": np.float32("nan"),
    "np.float64(1.5)": np.float64(1.5),
    "np.bool_(True)": np.bool_(True),
    "np.complex64(1)": np.complex64(1),
}

TEXTS: dict[str, Any] = {
    "''": "",
    "a name": "no such name",
    "a null byte": "a\0b",
    "bytes": b"running",
    "a path": Path("no/such/place"),
    "a long text": "x" * 5000,
}

CONTAINERS: dict[str, Any] = {
    "[]": [],
    "()": (),
    "{}": {},
    "set()": set(),
    "{'a': 1}": {"a": 1},
    "(1, 2)": (1, 2),
    "range(3)": range(3),
    **{repr(value): value for value in ([None], [True], [1.5], [-1], ["a"], [1], [0, 0], [[1]], [[]], [2**40])},
    "[nan]": [float("nan")],
    "nested lists": [[1.0, [2.0]], [3.0]],
    "deeply nested lists": [[[[[[1.0]]]]]],
    "pairs of lists": [([1.0], [2.0])],
    "pairs of tensors": [(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))],
    "an empty array": np.empty(0),
    "an array without dimensions": np.array(1.5),
    "an array": np.ones((2, 3)),
    "an array of numbers": np.arange(4),
    "an array with NaN": np.array([[np.nan, 1.0]]),
    "an array of objects": np.array([None, "a"], dtype=object),
}

OBJECTS: dict[str, Any] = {
    "object()": object(),
    "a class": int,
    "a module's class": nn.Linear,
    "a module": nn.Linear(3, 2),
    "a lambda": lambda *_: None,
    "...": ...,
    "a slice": slice(None),
    "a type of numbers": torch.float32,
}

TYPES = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn),
]
SHAPES = [(), (0,), (1,), (3,), (2, 3), (0, 3), (2, 3, 2), (2, 3, 4, 4), (2, 0, 4, 4), (1, 2, 3, 4, 5)]

TENSORS: dict[str, Callable[[], Tensor]] = {
    **{
        f"{str(dtype).removeprefix('torch.')} {list(shape)}": lambda dtype=dtype, shape=shape: torch.ones(shape).to(
            dtype
        )  # type: ignore[misc]
        for dtype in TYPES
        for shape in SHAPES
    },
    "a tensor of NaN": lambda: torch.full((2, 3), torch.nan),
    "a sparse tensor": lambda: torch.ones(3, 3).to_sparse(),
    "a compressed sparse tensor": lambda: torch.ones(3, 3).to_sparse_csr(),
    "a meta tensor": lambda: torch.ones(3, 3, device="meta"),
    "a meta number": lambda: torch.ones((), device="meta"),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "a quantised tensor": lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8),
}

VALUES: dict[str, Callable[[], Any]] = {
    **{
        name: lambda value=value: value  # type: ignore[misc]
        for name, value in {**NUMBERS, **TEXTS, **CONTAINERS, **OBJECTS}.items()
    },
    "a generator": _generator,
    "a loader": lambda: DataLoader([1, 2, 3]),  # type: ignore[arg-type]
    "a loader of pairs": lambda: DataLoader([(torch.ones(3, 4, 4), 0)] * 4),  # type: ignore[arg-type]
    **TENSORS,
}


def _stacked(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor])


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    **{f"as {dtype}": lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in TYPES},  # type: ignore[misc]
    "without its last dimension": lambda tensor: tensor[..., 0],
    "with a dimension more": _stacked,
    "of nothing": lambda tensor: tensor[:0],
    "with nothing in its last dimension": lambda tensor: tensor[..., :0],
    "longer": lambda tensor: torch.cat([tensor, tensor], -1),
    "more of them": lambda tensor: torch.cat([tensor, tensor]),
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
    "for oneDNN": lambda tensor: tensor.float().to_mkldnn(),
    "complex": lambda tensor: tensor + 1j,
    "conjugated": lambda tensor: (tensor + 1j).conj(),
    "requiring grad": lambda tensor: tensor.float().requires_grad_(),
    "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "transposed": lambda tensor: tensor.transpose(0, -1),
    "NaN": lambda tensor: torch.full(tensor.shape, torch.nan),
    "infinite": lambda tensor: torch.full(tensor.shape, torch.inf),
    "minus ones": lambda tensor: torch.full_like(tensor, -1) if tensor.dtype.is_signed else tensor,
    "large": lambda tensor: torch.full_like(tensor, 99),
    "huge": lambda tensor: torch.full(tensor.shape, 1e300, dtype=torch.float64),
    "as an array": lambda tensor: tensor.numpy(),
    "as lists": lambda tensor: tensor.tolist(),
    "in a list": lambda tensor: [tensor],
}


def wrong(name: str, valid: Any) -> Any:
    """Return the wrong value of a name in `VALUES`, or a valid tensor changed as in `CHANGES`.

    Where the name begins with ``inside:``, it takes the place of the last element of a list or tuple.

    Raises:
        KeyError: the name does not apply to the value.
    """
    if name.startswith("inside:"):
        if not isinstance(valid, list | tuple) or not valid:
            raise KeyError(name)
        return type(valid)([*valid[:-1], wrong(name.removeprefix("inside:"), valid[-1])])
    if name in VALUES:
        return VALUES[name]()
    if not isinstance(valid, Tensor):
        raise KeyError(name)
    return CHANGES[name](valid)
