"""Throughput of several processes: ``python -m benchmarks.workers``.

The same batches are measured by one process with two threads, by two processes with one thread each, and by four
processes, on two cores; repeats are interleaved. Start-up, such as imports and a first batch, is counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cpu.facts import processor
from benchmarks.elastic import environment, write_weights
from benchmarks.facts import commit_here
from benchmarks.results import FOLDER, file_name, write

WAYS = {"one": (1, 2), "two": (2, 1), "four": (4, 1)}
"""Processes, and threads of each, by name."""
GOALS = {"two": 1.0, "four": 0.8}
"""Least throughput over that of one process."""

MEASURE = """
import json, sys, time
import torch
import pathnet
from pathnet.experiments import PathGradients, path_gradients

weights, folder, batches, size, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
group = pathnet.workers.torchrun()
net, data = pathnet.models.load(weights), pathnet.data.digits()
plan = PathGradients(batches=int(batches), batch_size=int(size))
warm = PathGradients(batches=group.count, batch_size=int(size), seed=1)
path_gradients.measure(net, data, warm, folder + "-warm", workers=group)
group.gather(None)
group.agree(lambda: None)
began = time.monotonic()
path_gradients.measure(net, data, plan, folder, workers=group)
if group.leads:
    print(json.dumps({"seconds": time.monotonic() - began}))
"""


def seconds_of(way: str, place: Path, repeat: int, batches: int, size: int) -> dict[str, float]:
    """Return the seconds that the measuring takes in all, and those of the whole command."""
    processes, threads = WAYS[way]
    program = place / "measure.py"
    program.write_text(MEASURE)
    folder = place / f"{way}-{repeat}"
    line = [sys.executable, str(program)]
    if processes > 1:
        options = ["--nproc-per-node", str(processes), "--monitor-interval", "0.1", str(program)]
        line = [sys.executable, "-m", "torch.distributed.run", *options]
    line += list(map(str, (place / "net.safetensors", folder, batches, size, threads)))
    began = time.monotonic()
    done = subprocess.run(line, env=environment(threads), capture_output=True, text=True, check=True, timeout=1200)
    return {"measuring": json.loads(done.stdout)["seconds"], "command": time.monotonic() - began}


def measured(repeats: int, batches: int, size: int, depth: int, width: int) -> dict[str, Any]:
    """Return the seconds of every repeat, and the throughput of several processes over that of one.

    Raises:
        ValueError: several processes measured other bytes than one.
    """
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_weights(place / "net.safetensors", depth, width)
        for repeat in range(repeats):
            contents = set()
            for way, repeated in rows.items():
                repeated.append(seconds_of(way, place, repeat, batches, size))
                print(way, {key: round(value, 2) for key, value in repeated[-1].items()}, flush=True)
                folder = place / f"{way}-{repeat}" / "measurements"
                contents.add(b"".join(file.read_bytes() for file in sorted(folder.iterdir())))
            if len(contents) > 1:
                raise ValueError("workers: expected the same bytes from one, two and four processes")
    ratios = {
        way: statistics.median(
            one["measuring"] / several["measuring"] for one, several in zip(rows["one"], rows[way], strict=True)
        )
        for way in GOALS
    }
    return {
        "cores": len(os.sched_getaffinity(0)),
        "batches": batches,
        "batch_size": size,
        "network": {"depth": depth, "width": width},
        "seconds": rows,
        "throughput": ratios,
        "goals": GOALS,
        "reached": {way: ratios[way] >= goal for way, goal in GOALS.items()},
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path, default=FOLDER / "workers", help="folder of the results")
    settings = parser.parse_args()
    began = datetime.now(UTC)
    findings: dict[str, Any] = {"processor": processor(), "began": began.isoformat(timespec="seconds")}
    findings["commit"] = commit_here()
    findings |= measured(settings.repeats, settings.batches, settings.batch_size, settings.depth, settings.width)
    file = settings.out / file_name(processor(), f"{began:%Y-%m-%d}", str(findings["commit"])[:7])
    write(file, findings)
    print(json.dumps(findings["throughput"]), file)


if __name__ == "__main__":
    sys.exit(main())
