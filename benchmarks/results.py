"""Results files, one JSON object for each device, day and commit, and the kernels that they verify.

A GPU's file holds the device, the hashes of the sources, and the findings of each step; see `benchmarks.gpu`. Files
of runs on a processor, which verify no kernel, are in a separate folder; see `benchmarks.cpu`. Reading either
needs no GPU, torch or git.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

__all__ = [
    "CPU_FOLDER",
    "FOLDER",
    "PAPERS_MODE",
    "ROOT",
    "changed_kernels",
    "file_name",
    "kernel_hashes",
    "newest",
    "read",
    "read_cpu",
    "read_object",
    "write",
]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
CPU_FOLDER = FOLDER / "cpu"
PAPERS_MODE = "running"
"""Batch normalisation of the paper's own measurements, by the name of its mode."""
KERNELS = ("csrc/plan.h", "csrc/cuda/*", "pathnet/engines/triton/*.py")


def file_name(device: str, date: str, commit: str) -> str:
    """Return a name such as ``nvidia-h100-80gb-hbm3-2026-11-23-16c0608.json``."""
    return f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{date}-{commit}.json"


def kernel_hashes(root: Path = ROOT) -> dict[str, str]:
    """Return the SHA-256 of every kernel source, by its path below the repository's root."""
    files = sorted(file for pattern in KERNELS for file in root.glob(pattern) if file.is_file())
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read(file: Path) -> dict[str, Any]:
    """Return the results in a file of a GPU run.

    Raises:
        ValueError: the file holds none.
    """
    results = read_object(file)
    if not {"began", "kernels", "rehearsal", "steps"} <= results.keys():
        raise ValueError(f"results: {file} holds no results of a GPU run")
    return results


def read_cpu(file: Path) -> dict[str, Any]:
    """Return the results in a file of a run on a processor.

    Raises:
        ValueError: the file holds none.
    """
    results = read_object(file)
    if results.get("kind") != "cpu":
        raise ValueError(f"results: {file} holds no results of a run on a processor")
    return results


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file holds another value."""
    try:
        content = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"results: {file} cannot be read ({error})") from None
    return content if isinstance(content, dict) else {}


def write(file: Path, results: dict[str, Any]) -> None:
    """Replace the file's results, completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    with temporary.open("w") as handle:
        handle.write(json.dumps(results, indent=1, allow_nan=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def newest(folder: Path = FOLDER) -> Path | None:
    """Return the latest file of a real run whose GPU tests passed; only that one verifies kernels."""
    verifying = []
    for file in folder.glob("*.json"):
        results = read(file)
        steps = results["steps"]
        tests = [steps.get(name, {}).get("status") for name in ("cuda_tests", "triton_tests")]
        if not results["rehearsal"] and tests == ["passed", "passed"]:
            verifying.append((results["began"], file))
    return max(verifying)[1] if verifying else None


def changed_kernels(folder: Path = FOLDER, root: Path = ROOT) -> list[str]:
    """Return the kernel sources that no GPU has run in their current state: new, changed or removed since the newest
    results.
    """
    file = newest(folder)
    known: dict[str, str] = read(file)["kernels"] if file else {}
    now = kernel_hashes(root)
    return sorted(path for path in now.keys() | known.keys() if now.get(path) != known.get(path))
