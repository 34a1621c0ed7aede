"""Kernels compiled ahead of their first launch, on all cores, into the cache on disk that launches look into.

Triton compiles each kernel at its first launch, one after the other: 1.6 s of a core each, for 30 or more kernels of
a network. `compile_for` runs a piece of work without its launches, records their kernels, and passes those that are
not on disk to another process, which imports the kernels and forks one worker for each core. Threads would be slower:
a fifth of a compilation is Python, which runs one thread at a time, so 16 cores would do the work of five.

The workers know nothing of the GPU but its architecture. If Triton builds a launcher for each signature with the C
compiler, as version 3.6 does, they build it too.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.cache import get_cache_key, get_cache_manager, triton_key

from pathnet.engines.triton.launch import not_launching

__all__ = ["AbsentGpu", "Kernel", "compile_all", "compile_for", "missing_for"]

FEW = 2
"""Number of kernels that are compiled at their launch, since starting a process would take longer."""

_hooked = threading.Lock()


class AbsentGpu:
    """A Triton driver for a GPU of which only the architecture is known, so it can run nothing.

    Args:
        launcher_cls: class of the launchers, made from a compiled kernel's source and metadata.
    """

    def __init__(self, target: GPUTarget, launcher_cls: Any = None) -> None:
        self.target, self.launcher_cls = target, launcher_cls

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile.

    Attributes:
        module, name: its definition.
        specialization: signature, constants and options, in the format of `JITFunction.preload`.
    """

    module: str
    name: str
    specialization: str


def compile_for(work: Callable[[], object]) -> int:
    """Compile the kernels of ``work`` that are not on disk; return their number.

    Args:
        work: runs without launching kernels, so its results mean nothing.
    """
    if knobs.runtime.interpret:
        return 0
    missing = missing_for(work)
    if len(missing) > FEW:
        compile_all(missing)
    return len(missing)


def missing_for(work: Callable[[], object]) -> list[Kernel]:
    """Return the kernels of ``work`` that neither this process has compiled nor the cache on disk holds."""
    missing: dict[Kernel, None] = {}
    with _noting(missing), not_launching():
        work()
    return list(missing)


@contextmanager
def _noting(missing: dict[Kernel, None]) -> Iterator[None]:
    """Record each kernel that Triton is about to compile in this thread, and keep Triton from compiling it."""
    thread = threading.get_ident()

    def note(**details: Any) -> bool | None:
        if threading.get_ident() != thread:
            return None if before is None else before(**details)
        function, compilation = details["fn"], details["compile"]
        kernel = function.jit_function
        if not _on_disk(kernel, compilation):
            missing[Kernel(function.module, kernel.__name__, compilation["specialization_data"])] = None
        return True

    with _hooked:
        before = knobs.runtime.jit_cache_hook
        knobs.runtime.jit_cache_hook = note
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before


def _on_disk(kernel: Any, compilation: dict[str, Any]) -> bool:
    """Return whether `triton.compile` will find the kernel in its cache."""
    backend = make_backend(driver.active.get_current_target())
    stored = json.loads(compilation["specialization_data"])["options"].items()
    options = backend.parse_options({name: tuple(x) if isinstance(x, list) else x for name, x in stored})
    source = ASTSource(kernel, compilation["signature"], compilation["constants"], compilation["configs"][0])
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    file = f"{source.name[:150]}.json"
    group = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(file)
    return file in (group or {})


def compile_all(kernels: Sequence[Kernel]) -> None:
    """Compile kernels for the current device into the cache on disk.

    A failure is only a warning, since launches compile missing kernels.
    """
    order = {
        "parent": os.getpid(),
        "target": asdict(driver.active.get_current_target()),
        "launcher": _compiled_launcher(),
        # The largest first, to start none of them last.
        "kernels": [asdict(kernel) for kernel in sorted(kernels, key=lambda kernel: -len(kernel.specialization))],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            # An interrupt reaches only this process, which then ends the other.
            start_new_session=True,
        )
    except OSError as error:
        failures = [str(error)]
    else:
        lines = done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"]
        # The last line: Triton's environment may request dumps, which precede it.
        failures = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else lines[-1:]
    if failures:
        warnings.warn(
            f"ahead-of-time compilation failed ({failures[0]}); kernels will be compiled at their first launch",
            RuntimeWarning,
            stacklevel=2,
        )


def _compiled_launcher() -> list[str] | None:
    """Return module and name of the class that compiles a launcher for each signature; None if one serves all."""
    launcher = driver.active.launcher_cls
    compiles = hasattr(sys.modules[launcher.__module__], "make_launcher")
    return [launcher.__module__, launcher.__qualname__] if compiles else None


def main() -> None:
    """Compile the kernels that standard input lists; print a list of failures."""
    order = json.load(sys.stdin)
    _end_with(order["parent"])
    kernels = [Kernel(**fields) for fields in order["kernels"]]
    for module in {kernel.module for kernel in kernels}:
        importlib.import_module(module)
    launcher = None
    if order["launcher"] is not None:
        module, name = order["launcher"]
        launcher = getattr(importlib.import_module(module), name)
    driver.set_active(AbsentGpu(GPUTarget(**order["target"]), launcher))
    # Part of every kernel's cache key, a hash of hundreds of megabytes of Triton: computed once for all workers.
    triton_key()
    # Forked workers inherit the modules of this process, which holds no GPU and runs no other thread. If a worker is
    # killed, as by a system out of memory, an executor raises; a pool of `multiprocessing` would wait forever.
    context, workers = multiprocessing.get_context("fork"), min(len(kernels), _cores())
    with ProcessPoolExecutor(workers, context, _end_with, (os.getpid(),)) as pool:
        outcomes = list(pool.map(_compile, kernels))
    print(json.dumps([failure for failure in outcomes if failure is not None]))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with(parent: int) -> None:
    """Make the system end this process with its parent, which may be killed."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def _compile(kernel: Kernel) -> str | None:
    """Compile a kernel into the cache on disk; return the failure, or None."""
    try:
        compiled = getattr(importlib.import_module(kernel.module), kernel.name).preload(kernel.specialization)
        if driver.active.launcher_cls is not None:
            driver.active.launcher_cls(compiled.src, compiled.metadata)
    except Exception as error:
        return f"{kernel.name} failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    return None


if __name__ == "__main__":
    main()
