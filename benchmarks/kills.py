"""Commands killed at random moments: ``python -m benchmarks.kills --single 50 --pair 20``.

A run of a single process is killed with SIGKILL at a random moment of its whole life, from its start to its results;
of two processes under torchrun, one is. Then the same command runs again, and every measurement must be there once,
bit for bit that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cpu.facts import processor
from benchmarks.elastic import children, command, environment, stop, write_weights
from benchmarks.facts import commit_here
from benchmarks.results import FOLDER, file_name, write
from pathnet import results

BLOCKS = 9
"""Blocks of the network, of depth 20."""
LONGEST = 120.0
"""Seconds that a command may take before it counts as hanging."""


def words(folder: Path, weights: Path, batches: int) -> list[str]:
    """Return the command line that measures a run."""
    amounts = ["--batches", str(batches), "--batch-size", "64"]
    return ["gradients", "--data", "digits", "--weights", str(weights), "--out", str(folder), "--json", *amounts]


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of measurements of a run, and check its ``run.json``."""
    results.read(folder)
    return {file.name: file.read_bytes() for file in (folder / "measurements").iterdir()}


def ended(line: list[str], kill: tuple[float, int] | None = None) -> tuple[int, float, bool]:
    """Run a command, and kill it or one of its processes.

    Args:
        line: the command line.
        kill: seconds after the start, and the process: -1 for the only one, or the rank of one under torchrun.

    Returns:
        The status, the seconds it took, and whether anything was killed.
    """
    began, killed = time.monotonic(), False
    process = subprocess.Popen(
        line, env=environment(1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        if kill is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(kill[0])
            if process.poll() is None and (victim := _victim(process.pid, kill[1])):
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    killed = True
        return process.wait(LONGEST), time.monotonic() - began, killed
    finally:
        stop(process)


def _victim(process: int, rank: int) -> int | None:
    """Return the process that measures: the command itself, or the child of the watcher of a rank."""
    if rank < 0:
        return process
    watchers = children(process)
    if len(watchers) <= rank:
        return None
    measuring = children(watchers[rank])
    return measuring[0] if measuring else watchers[rank]


def trials(kind: str, count: int, rng: random.Random, batches: int) -> dict[str, Any]:
    """Kill a command ``count`` times, each in a folder of its own, and check what it left.

    Raises:
        ValueError: a measurement is lost, twice or different, or a command hangs or fails.
    """
    outcomes, processes = Counter[str](), 1 if kind == "single" else 2
    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "net.safetensors"
        write_weights(weights, 20, 4)
        status, seconds, _ = ended(command(words(Path(place) / "whole", weights, batches), processes))
        expected = content(Path(place) / "whole")
        if status:
            raise ValueError(f"kills: an undisturbed command ended with status {status}")
        trial = kills = 0
        while kills < count:
            trial += 1
            folder = Path(place) / f"run-{trial}"
            restarts = trial % 2 if processes > 1 else 0
            line = command(words(folder, weights, batches), processes, restarts)
            rank = -1 if processes == 1 else rng.randrange(processes)
            when = rng.uniform(0, seconds)
            status, lasted, killed = ended(line, (when, rank))
            if not killed:  # it ended before, on a machine that is less busy than it was
                seconds = min(seconds, lasted)
                continue
            kills += 1
            rows = len(results.read(folder).measurements().norm) if (folder / "run.json").exists() else 0
            again, _, _ = ended(command(words(folder, weights, batches), processes))
            if again or content(folder) != expected:
                raise ValueError(
                    f"kills: {kind} {kills}, rank {rank} after {when:.3f} s: {rows} rows kept, status {status}, then "
                    f"{again}; expected the measurements of an undisturbed run"
                )
            amount = "all" if rows == batches * BLOCKS else "some" if rows else "no"
            outcomes[f"rank {max(rank, 0)}, restarts {restarts}, status {status}, {amount} rows"] += 1
            print(f"{kind} {kills}/{count}: after {when:.2f} of {seconds:.2f} s, {rows} rows kept", flush=True)
            shutil.rmtree(folder)
    return {"count": count, "seconds": round(seconds, 2), "batches": batches, "outcomes": dict(outcomes)}


def main() -> None:
    """Kill commands, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single", type=int, default=50, help="kills of single processes")
    parser.add_argument("--pair", type=int, default=20, help="kills of one of two processes")
    parser.add_argument("--batches", type=int, default=400, help="batches of each run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=FOLDER / "kills", help="folder of the results")
    settings = parser.parse_args()
    rng, began = random.Random(settings.seed), datetime.now(UTC)
    findings: dict[str, Any] = {"processor": processor(), "began": began.isoformat(timespec="seconds")}
    findings |= {"commit": commit_here(), "seed": settings.seed}
    for kind in ("single", "pair"):
        if count := getattr(settings, kind):
            findings[kind] = trials(kind, count, rng, settings.batches)
    file = settings.out / file_name(processor(), f"{began:%Y-%m-%d}", str(commit_here())[:7])
    write(file, findings)
    print(file)


if __name__ == "__main__":
    sys.exit(main())
