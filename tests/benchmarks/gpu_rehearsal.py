"""A rehearsal of the run on a GPU, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import gpu, results


def rehearse(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Rehearse into a folder; return the exit status and the results."""
    status = gpu.main(["--rehearse", "--in-process", "--folder", str(folder), "--commit", "abc123", *arguments])
    (file,) = folder.glob("*.json")
    return status, results.read(file)
