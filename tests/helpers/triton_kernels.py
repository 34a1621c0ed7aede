"""The Triton kernels, interpreted where there is no GPU."""

from __future__ import annotations

import importlib.util
import pkgutil

from pathnet.engines import triton

__all__ = ["import_kernels"]


def import_kernels() -> None:
    """Import the Triton kernels while the interpreter is on, which other tests in this process rely on."""
    if importlib.util.find_spec("triton") is not None:
        for module in pkgutil.iter_modules(triton.__path__):
            importlib.import_module(f"{triton.__name__}.{module.name}")
