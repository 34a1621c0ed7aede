"""Results files: one JSON object a device, day and commit, and which kernels they vouch for.

A GPU's file holds the device, the sources' hashes, and what each step found; see `benchmarks.gpu`. Those of runs on a
processor, which vouch for no kernel, lie in a folder of their own; see `benchmarks.cpu`. Reading any of them needs
neither a GPU nor torch nor git.
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
    "ROOT",
    "changed_kernels",
    "file_name",
    "kernel_hashes",
    "newest",
    "read",
    "read_cpu",
    "write",
]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
CPU_FOLDER = FOLDER / "cpu"
KERNELS = ("csrc/plan.h", "csrc/cuda/*", "pathnet/engines/triton/*.py")


def file_name(device: str, date: str, commit: str) -> str:
    """``nvidia-h100-80gb-hbm3-2026-11-23-16c0608.json``"""
    return f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{date}-{commit}.json"


def kernel_hashes(root: Path = ROOT) -> dict[str, str]:
    """The SHA-256 of every kernel source, by its path below the repository's root."""
    files = sorted(file for pattern in KERNELS for file in root.glob(pattern) if file.is_file())
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read(file: Path) -> dict[str, Any]:
    """The results in a file of a GPU run.

    Raises:
        ValueError: it holds none.
    """
    found = _object(file)
    if not {"began", "kernels", "rehearsal", "steps"} <= found.keys():
        raise ValueError(f"results: {file} holds no results of a GPU run")
    return found


def read_cpu(file: Path) -> dict[str, Any]:
    """The results in a file of a run on a processor.

    Raises:
        ValueError: it holds none.
    """
    found = _object(file)
    if found.get("kind") != "cpu":
        raise ValueError(f"results: {file} holds no results of a run on a processor")
    return found


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where it holds another value."""
    try:
        found = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"results: {file} cannot be read ({error})") from None
    return found if isinstance(found, dict) else {}


def write(file: Path, results: dict[str, Any]) -> None:
    """Puts the results in place of the file's, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    with temporary.open("w") as handle:
        handle.write(json.dumps(results, indent=1, allow_nan=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def newest(folder: Path = FOLDER) -> Path | None:
    """The latest file of a real run whose GPU tests passed: only that one vouches for kernels."""
    vouching = []
    for file in folder.glob("*.json"):
        results = read(file)
        steps = results["steps"]
        tests = [steps.get(name, {}).get("status") for name in ("cuda_tests", "triton_tests")]
        if not results["rehearsal"] and tests == ["passed", "passed"]:
            vouching.append((results["began"], file))
    return max(vouching)[1] if vouching else None


def changed_kernels(folder: Path = FOLDER, root: Path = ROOT) -> list[str]:
    """Kernel sources that no GPU has run as they are now: new or changed since the newest results, or gone."""
    file = newest(folder)
    known: dict[str, str] = read(file)["kernels"] if file else {}
    now = kernel_hashes(root)
    return sorted(path for path in now.keys() | known.keys() if now.get(path) != known.get(path))
