"""The facts of a run: device, driver, versions, clocks, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.results import ROOT

__all__ = ["commit_here", "device_name", "facts"]

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine() + " cpu"


def commit_here(root: Path = ROOT) -> str | None:
    """Return the commit of the working tree, followed by ``-changed`` if tracked files differ; None without git."""
    if not (root / ".git").exists():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"])
    status = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return None if commit is None else commit + ("-changed" if status else "")


def facts(device: str) -> dict[str, object]:
    known: dict[str, object] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _nvidia_smi("driver_version"),
            "clocks": dict(zip(CLOCKS.split(","), (_nvidia_smi(CLOCKS) or "").split(", "), strict=False)),
        }
    return known


def _version(package: str) -> str | None:
    try:
        return str(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(query: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    return _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
