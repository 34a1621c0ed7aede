"""The native library: its ops as typed functions, and the facts of its build.

Importing this module never fails: where the library is not built, `LOADED` is False and `WHY_NOT` says so.

In the main thread the functions of the cpu engine answer signals while they compute, several times a second: Ctrl-C
ends them with its KeyboardInterrupt, and so does whatever else a signal's handler raises. A handler that returns only
delays them. (Of `torch.ops.pathnet` itself the exception is a RuntimeError.)
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

__all__ = [
    "LOADED",
    "WHY_NOT",
    "build_facts",
    "interruptible",
    "new_sizes",
]


LIBRARY = Path(__file__).with_name("_ops.so")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _load() -> str:
    """Why the library could not be loaded; empty where it was."""
    if not LIBRARY.exists():
        return "the native library is not built (make install builds it)"
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
        functions = ctypes.PyDLL(str(LIBRARY))
        functions.pathnet_answer_signals(ctypes.c_ulong(threading.main_thread().ident or 0))
    except (OSError, AttributeError) as error:  # The latter of an older build, without that function.
        return f"the native library does not load ({str(error).splitlines()[0]})"
    return ""


WHY_NOT = _load()
LOADED = not WHY_NOT


def interruptible(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Raise what a signal's handler raised in place of the error of the op that it ended."""

    @functools.wraps(function)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return function(*arguments, **named)
        except RuntimeError:
            # Does nothing where no handler has raised.
            ctypes.PyDLL(str(LIBRARY)).pathnet_raise_interruption()
            raise

    return call


def build_facts() -> dict[str, str | list[str]]:
    """What the build holds: compiler, the torch that it was compiled against and the one whose ABI it asks for, CUDA
    architectures or why there are none, instruction sets.

    Raises:
        RuntimeError: the library is not built, or PATHNET_ISA names an instruction set that is not there.
    """
    if not LOADED:
        raise RuntimeError(WHY_NOT)
    build = importlib.import_module("pathnet._build")
    return {
        "compiler": build.compiler,
        "torch_version": build.torch_version,
        "torch_target": build.torch_target,
        "cuda_compiler": build.cuda_compiler,
        "cuda_architectures": build.cuda_architectures.split(),
        "without_cuda": build.without_cuda,
        "instruction_sets": build.instruction_sets(),
        "selected_instruction_set": build.selected_instruction_set(),
    }


# Shapes that are data (a table's or program's own numbers) a fake tensor does not have.
def new_sizes(count: int) -> list[int | torch.SymInt]:
    context = torch.library.get_ctx()
    return [context.new_dynamic_size() for _ in range(count)]
