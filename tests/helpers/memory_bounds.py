"""Watches over where kernels read and write in Triton's interpreter, and gives them memory that is not there."""

from __future__ import annotations

import mmap
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["reserved", "run_one_program", "watch"]


def watch(monkeypatch: Any) -> None:
    """Have whatever a kernel reads or writes beyond its tensors raise, before it is read or written."""
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
        assert known.all(), f"{(~known).sum()} of {len(places)} places lie outside of all tensors"

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def note(self: Any, arguments: Any, constants: Any) -> Any:
        given = convert(self, arguments, constants)
        storages = [own.untyped_storage() for own in given[0] if isinstance(own, Tensor)]
        tensors[:] = [(own.data_ptr(), own.data_ptr() + own.nbytes()) for own in storages]
        return given

    monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(builder, "create_masked_store", create_masked_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", create_atomic_rmw)
    monkeypatch.setattr(executor, "_init_args_hst", note)
    # The interpreter's copies of tensors on the CPU are the tensors, and to copy them back would touch all of them.
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *given: None)


def reserved(size: int, dtype: torch.dtype) -> Tensor:
    """So many zeros, in a file without contents: those alone take room that are written."""
    with tempfile.TemporaryFile() as file:
        file.truncate(size * dtype.itemsize)
        return torch.frombuffer(mmap.mmap(file.fileno(), size * dtype.itemsize), dtype=dtype)


def run_one_program(monkeypatch: Any, program: int, programs: int) -> None:
    """Have each launch run one program of so many."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launch = GridExecutor.__call__

    def launch_one(self: Any, *arguments: Any, **constants: Any) -> None:
        self.grid = (1,)
        launch(self, *arguments, **constants)

    def set_grid_dim(self: Any, *dimensions: int) -> None:
        self.grid_dim = (programs, 1, 1)

    def set_grid_idx(self: Any, *places: int) -> None:
        self.grid_idx = (program, 0, 0)

    monkeypatch.setattr(GridExecutor, "__call__", launch_one)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)
