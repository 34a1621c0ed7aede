"""The native library, and the facts of its build; the typed functions of its ops are in each engine's ``ops.py``.

Importing this module never fails: where the library is not built, `LOADED` is False and `WHY_NOT` gives the reason.

While an op of the cpu engine runs in the main thread, signal handlers run several times a second. An exception that a
handler raises (KeyboardInterrupt for Ctrl-C) ends the op; a handler that returns only delays it. `torch.ops.pathnet`
itself raises a RuntimeError instead.
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
    """Load the library; return the reason why it could not be loaded, or an empty string."""
    if not LIBRARY.exists():
        return "the native library is not built (make install builds it)"
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
        functions = ctypes.PyDLL(str(LIBRARY))
        functions.pathnet_answer_signals(ctypes.c_ulong(threading.main_thread().ident or 0))
    except (OSError, AttributeError) as error:  # AttributeError: an older build lacks the function.
        return f"the native library does not load ({str(error).splitlines()[0]})"
    return ""


WHY_NOT = _load()
LOADED = not WHY_NOT


def interruptible(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Have an op raise the exception of a signal's handler in place of the error with which the op ended."""

    @functools.wraps(function)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return function(*arguments, **named)
        except RuntimeError:
            # Does nothing if no handler has raised.
            ctypes.PyDLL(str(LIBRARY)).pathnet_raise_interruption()
            raise

    return call


def build_facts() -> dict[str, str | list[str]]:
    """Return the facts of the build: compiler, the torch that it was compiled against and the one whose ABI it needs,
    CUDA architectures or the reason why there are none, instruction sets.

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


def new_sizes(count: int) -> list[int | torch.SymInt]:
    """Return sizes for a fake's result that depend on data: on numbers in tables, plans and programs."""
    context = torch.library.get_ctx()
    return [context.new_dynamic_size() for _ in range(count)]
