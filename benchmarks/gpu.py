"""Everything that only a GPU can show, in one command: ``make gpu``, or ``python -m benchmarks.gpu [STEP ...]``.

Each step runs in a process of its own, since a kernel that goes wrong takes its process's GPU with it, and its
findings are on disk before the next begins. Results go to ``benchmarks/results``, one file a device, day and commit;
running single steps again adds to it. The exit status is 1 where a step failed; a goal missed is no failure.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import fused, host, kernels, measurements, processes, tools
from benchmarks.budget import CORES, REHEARSAL_LIMIT_S, RUN_S, limit_s, native_s
from benchmarks.cases import FULL, REHEARSAL, Setup
from benchmarks.facts import commit_here, device_name, facts
from benchmarks.outcome import Failed, Found, Unavailable
from benchmarks.report import goals, show
from benchmarks.results import FOLDER, ROOT, file_name, kernel_hashes, read, write
from pathnet import engines, native

__all__ = ["STEPS", "main"]

LEAST_S = 8.0

ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1"}
"""Of all steps. It enters the keys of Triton's cache, so that one step finds what another compiled."""


def build(setup: Setup) -> Found:
    """What the native library holds; fails where it is not there, or lacks CUDA on a GPU."""
    if not native.LOADED:
        raise Failed(native.WHY_NOT, {})
    found: Found = {"build": native.build_facts(), "engines": engines.available()}
    if setup.cuda and found["build"]["without_cuda"]:
        raise Failed(f"no CUDA in the build: {found['build']['without_cuda']}", found)
    return found


STEPS: dict[str, Callable[[Setup], Found]] = {
    "build": build,
    "cuda_tests": tools.cuda_tests,
    "accuracy": measurements.accuracy,
    "sweep": measurements.sweep,
    "compile": kernels.compile_ahead,
    "triton_tests": tools.triton_tests,
    "whole_sweep": measurements.whole_sweep,
    "batch_sweep": fused.batch_sweep,
    "running_triton": fused.running_triton,
    "training": fused.training,
    "paths": measurements.paths,
    "deletions": measurements.deletions,
    "sums": measurements.sums,
    "imagenet": fused.imagenet,
    "scaling": measurements.scaling,
    "host": host.host,
    "sanitizer": tools.sanitizer,
    "profile": tools.profile,
    "training_compiled": fused.training_compiled,
}
"""In this order, should time run out: whether `cuda` is right, and its figures, within two minutes; then Triton's
kernels, all at once, and what launches them. `benchmarks.budget` has what each may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parse(arguments)
    setup = REHEARSAL if asked.rehearse else FULL
    if setup.cuda and not torch.cuda.is_available():
        print("no GPU is usable here; --rehearse goes through the motions on the CPU", file=sys.stderr)
        return 2
    began = time.monotonic()
    file, results = _open(asked, setup)
    console = Console(width=120, quiet=asked.file is not None)
    for name in asked.steps or STEPS:
        remaining = 60 * asked.minutes - (time.monotonic() - began)
        results["steps"].pop(name, None)
        _save(file, results)
        start = time.monotonic()
        entry = _perform(name, setup) if asked.in_process else _apart(name, asked, file, remaining)
        results["steps"][name] = {**entry, "seconds": time.monotonic() - start}
        _save(file, results)
        said = f"{name}: {entry['status']}, {results['steps'][name]['seconds']:.1f} s"
        console.print(said, entry.get("reason", ""), markup=False, highlight=False)
    show(results, console)
    if asked.rehearse and not asked.steps:
        # In a process without Triton's interpreter, which has no kernels to count.
        told = processes.execute(
            [sys.executable, "-m", "benchmarks.budget"], REHEARSAL_LIMIT_S, {"TRITON_INTERPRET": "0"}
        )
        console.print(told.output, soft_wrap=True, markup=False, highlight=False)
    console.print(str(file), soft_wrap=True)
    return int(any(results["steps"][name]["status"] == "failed" for name in asked.steps or STEPS))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"among {', '.join(STEPS)}; all by default")
    parser.add_argument("--commit", help="the commit, where there is no git to ask")
    parser.add_argument("--folder", type=Path, help="where the results go")
    parser.add_argument(
        "--minutes", type=float, help="steps are cut short, and left out, beyond these; by default the run's budget"
    )
    parser.add_argument("--rehearse", action="store_true", help="a tiny run on the CPU, to try the run itself out")
    parser.add_argument("--in-process", action="store_true", help="no process of its own for each step")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.minutes is None:
        asked.minutes = (len(STEPS) * REHEARSAL_LIMIT_S if asked.rehearse else RUN_S - native_s()) / 60
    for name in asked.steps:
        if name not in STEPS:
            parser.error(f"expected steps among {', '.join(STEPS)}, got {name}")
    return asked


def _open(asked: argparse.Namespace, setup: Setup) -> tuple[Path, dict[str, Any]]:
    """The results file, and what it holds already of this very state of the kernels."""
    now, commit = datetime.now(UTC), asked.commit or commit_here() or "unknown"
    date, device = now.date().isoformat(), device_name(setup.device)
    folder = asked.folder or (ROOT / "build" / "rehearsal" if asked.rehearse else FOLDER)
    file: Path = asked.file or folder / file_name(device, date, commit)
    hashes = kernel_hashes()
    if file.exists():
        results = read(file)
        if results["kernels"] == hashes and results["rehearsal"] == asked.rehearse:
            return file, results
    return file, {
        "device": device,
        "date": date,
        "began": now.isoformat(timespec="seconds"),
        "commit": commit,
        "rehearsal": asked.rehearse,
        "facts": facts(setup.device),
        "kernels": hashes,
        "goals": [],
        "steps": {},
    }


def _save(file: Path, results: dict[str, Any]) -> None:
    results["goals"] = goals(results["steps"])
    write(file, _plain(results))


def _plain(value: Any) -> Any:
    """The same as JSON can hold it: NaN and infinity as words."""
    if isinstance(value, dict):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _perform(name: str, setup: Setup) -> dict[str, Any]:
    """The step's entry, with how many of the engine's kernels this process had to compile for it: none, as a rule."""
    with kernels.compilations() as compiled:
        entry = _outcome(name, setup)
    return {**entry, "kernels_compiled": len(compiled)}


def _outcome(name: str, setup: Setup) -> dict[str, Any]:
    try:
        return {"status": "passed", "found": STEPS[name](setup)}
    except Unavailable as unavailable:
        return {"status": "unavailable", "reason": str(unavailable)}
    except Failed as failed:
        return {"status": "failed", "reason": str(failed), "found": failed.found}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        where = traceback.format_exc()[-processes.TAIL :]
        return {"status": "failed", "reason": reason, "found": {"traceback": where}}


def _apart(name: str, asked: argparse.Namespace, file: Path, remaining_s: float) -> dict[str, Any]:
    """The step in a process of its own, which writes its entry into the file."""
    cores = min(CORES, os.cpu_count() or 1)
    limit = min(REHEARSAL_LIMIT_S if asked.rehearse else limit_s(name, cores), remaining_s)
    if limit < LEAST_S:
        return {"status": "failed", "reason": f"left out: the {asked.minutes:g} minutes are over", "found": {}}
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--in-process", "--file", str(file.resolve())]
    done = processes.execute(command + (["--rehearse"] if asked.rehearse else []), limit, ENVIRONMENT)
    entry: dict[str, Any] | None = read(file)["steps"].get(name)
    if entry is not None:
        return entry
    reason = f"stopped after {limit:.0f} s" if done.status is None else f"its process ended with status {done.status}"
    return {"status": "failed", "reason": reason, "found": {"output": done.tail}}


if __name__ == "__main__":
    sys.exit(main())
