"""The processor of a run, and its features."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from pathnet import native

__all__ = ["has_amx", "processor", "processor_facts"]

FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
)
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def processor() -> str:
    """Return the model's name from the system."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def has_amx() -> bool:
    """Return whether processor and operating system support AMX tiles; the goals are for such processors."""
    return "amx" in native.build_facts()["instruction_sets"]


def processor_facts() -> dict[str, object]:
    """Return the facts of the processor and the software, as JSON holds them."""
    flags, build = _cpuinfo().get("flags", "").split(), native.build_facts()
    return {
        "processor": processor(),
        "architecture": platform.machine(),
        "family": _cpuinfo().get("cpu family"),
        "model": _cpuinfo().get("model"),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "caches_of_a_core": _caches(),
        "amx": has_amx(),
        "instruction_sets": build["instruction_sets"],
        "instruction_set": build["selected_instruction_set"],
        "compiler": build["compiler"],
        "threads": torch.get_num_threads(),
        "load_before": list(os.getloadavg()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor; empty if the system has no such file."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    first = file.read_text().split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _caches() -> list[str]:
    """Return the caches of a core, such as ``L1 Data 32K``; other cores may share them."""
    folders = sorted(CACHES.glob("index*")) if CACHES.exists() else []
    read = [[(folder / name).read_text().strip() for name in ("level", "type", "size")] for folder in folders]
    return [f"L{level} {kind} {size}" for level, kind, size in read]
