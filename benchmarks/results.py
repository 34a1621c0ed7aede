"""The files in benchmarks/results: one a run on a device, and which kernels have changed since."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "kernel_hashes", "name", "newest", "unverified", "write"]

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"


def name(device: str, date: str, commit: str) -> str:
    """The file's name for a device such as "NVIDIA H100 80GB HBM3", an ISO date and a commit."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}-{date}-{commit[:12]}.json"


def write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def kernel_hashes() -> dict[str, str]:
    """SHA-256 of every source that runs on a GPU, or decides what does, by its path in the repository."""
    files = [ROOT / "csrc" / "plan.h", *(ROOT / "csrc" / "cuda").iterdir()]
    files += (ROOT / "pathnet" / "engines" / "triton").glob("*.py")
    return {str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def newest(folder: Path = FOLDER) -> dict[str, Any] | None:
    """The results of the last run on a GPU, or None."""
    runs = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return max(runs, key=lambda run: run["facts"]["started"], default=None)


def unverified(run: dict[str, Any] | None) -> list[str]:
    """Kernel sources that are not as they were in ``run``: all of them without one."""
    known = {} if run is None else run["facts"]["kernels"]
    return [file for file, digest in kernel_hashes().items() if known.get(file) != digest]
