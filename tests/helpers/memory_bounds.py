"""Checks of the addresses that kernels access in Triton's interpreter, and memory that takes no room."""

from __future__ import annotations

import mmap
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["reserved", "run_one_program", "watch"]


def watch(monkeypatch: Any) -> None:
    """Raise where a kernel is about to read or write beyond its tensors."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    tensors: list[tuple[int, int]] = []
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    convert = executor._init_args_hst

    def check(pointers: Any, mask: Any) -> None:
        places = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].ravel()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        known = np.zeros(len(places), dtype=bool)
        for begin, end in tensors:
            known |= (places >= begin) & (places + size <= end)
        assert known.all(), f"{(~known).sum()} of {len(places)} places are outside of all tensors"

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def note(self: Any, arguments: Any, named: Any) -> Any:
        on_host = convert(self, arguments, named)
        passed = [*on_host[0], *on_host[1].values()]
        storages = [argument.untyped_storage() for argument in passed if isinstance(argument, Tensor)]
        tensors[:] = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        return on_host

    monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(builder, "create_masked_store", create_masked_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", create_atomic_rmw)
    monkeypatch.setattr(executor, "_init_args_hst", note)
    # The interpreter's copies of tensors on the CPU are the tensors themselves; copying them back would touch all.
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *arguments: None)


def reserved(size: int, dtype: torch.dtype) -> Tensor:
    """Return zeros in a file without contents, of which only those that are written take room."""
    with tempfile.TemporaryFile() as file:
        file.truncate(size * dtype.itemsize)
        return torch.frombuffer(mmap.mmap(file.fileno(), size * dtype.itemsize), dtype=dtype)


def run_one_program(monkeypatch: Any, program: int, programs: int) -> None:
    """Run a single program of each launch, which sees ``programs`` of them."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launch = GridExecutor.__call__

    def launch_one(self: Any, **arguments: Any) -> None:
        self.grid = (1,)
        launch(self, **arguments)

    def set_grid_dim(self: Any, *dimensions: int) -> None:
        self.grid_dim = (programs, 1, 1)

    def set_grid_idx(self: Any, *places: int) -> None:
        self.grid_idx = (program, 0, 0)

    monkeypatch.setattr(GridExecutor, "__call__", launch_one)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)
