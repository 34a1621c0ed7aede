"""All steps that need a GPU, in one command: ``make gpu``, or ``python -m benchmarks.gpu [STEP ...]``.

Each step runs in a separate process, since a kernel's error makes the GPU unusable to its process, and its findings
are on disk before the next step begins. Results go to ``benchmarks/results``, one file for each device, day and
commit; running single steps again adds to it. The exit status is 1 if a step failed; a missed goal is no failure.
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
from benchmarks.adapted.on_gpu import any_model
from benchmarks.budget import CORES, REHEARSAL_LIMIT_S, RUN_S, limit_s, native_s
from benchmarks.cases import FULL, REHEARSAL, Setup
from benchmarks.facts import commit_here, device_name, facts
from benchmarks.outcome import Failed, Findings, Unavailable
from benchmarks.report import goals, show
from benchmarks.results import FOLDER, ROOT, file_name, kernel_hashes, read, write
from pathnet import engines, native

__all__ = ["STEPS", "main"]

LEAST_S = 8.0
"""Seconds below which a step is not started."""

ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1"}
"""The environment of all steps. It is part of the keys of Triton's cache, so steps share compiled kernels."""


def build(setup: Setup) -> Findings:
    """Return the facts of the native library; fail if it is missing, or lacks CUDA on a GPU."""
    if not native.LOADED:
        raise Failed(native.WHY_NOT, {})
    findings: Findings = {"build": native.build_facts(), "engines": engines.available()}
    if setup.cuda and findings["build"]["without_cuda"]:
        raise Failed(f"no CUDA in the build: {findings['build']['without_cuda']}", findings)
    return findings


STEPS: dict[str, Callable[[Setup], Findings]] = {
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
    "models": any_model,
    "deletions": measurements.deletions,
    "sums": measurements.sums,
    "imagenet": fused.imagenet,
    "scaling": measurements.scaling,
    "host": host.host,
    "sanitizer": tools.sanitizer,
    "profile": tools.profile,
    "training_compiled": fused.training_compiled,
}
"""The steps, the most important first, should time run out: the correctness of `cuda` and its figures within two
minutes; then Triton's kernels, compiled all at once, and the steps that launch them. `benchmarks.budget` has their
time limits."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    setup = REHEARSAL if options.rehearse else FULL
    if setup.cuda and not torch.cuda.is_available():
        print("no GPU is usable here; --rehearse runs all steps in small on the CPU", file=sys.stderr)
        return 2
    began = time.monotonic()
    file, results = _open(options, setup)
    console = Console(width=120, quiet=options.file is not None)
    for name in options.steps or STEPS:
        remaining = 60 * options.minutes - (time.monotonic() - began)
        results["steps"].pop(name, None)
        _save(file, results)
        start = time.monotonic()
        entry = _perform(name, setup) if options.in_process else _apart(name, options, file, remaining)
        results["steps"][name] = {**entry, "seconds": time.monotonic() - start}
        _save(file, results)
        summary = f"{name}: {entry['status']}, {results['steps'][name]['seconds']:.1f} s"
        console.print(summary, entry.get("reason", ""), markup=False, highlight=False)
    show(results, console)
    if options.rehearse and not options.steps:
        # In a process without Triton's interpreter, which compiles no kernels to count.
        printed = processes.execute(
            [sys.executable, "-m", "benchmarks.budget"], REHEARSAL_LIMIT_S, {"TRITON_INTERPRET": "0"}
        )
        console.print(printed.output, soft_wrap=True, markup=False, highlight=False)
    console.print(str(file), soft_wrap=True)
    return int(any(results["steps"][name]["status"] == "failed" for name in options.steps or STEPS))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"among {', '.join(STEPS)}; all by default")
    parser.add_argument("--commit", help="the commit, if there is no git to tell it")
    parser.add_argument("--folder", type=Path, help="folder of the results")
    parser.add_argument(
        "--minutes",
        type=float,
        help="time limit after which steps are stopped or left out; by default the run's budget",
    )
    parser.add_argument("--rehearse", action="store_true", help="a tiny run on the CPU, to test the run itself")
    parser.add_argument("--in-process", action="store_true", help="run all steps in this process")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = (len(STEPS) * REHEARSAL_LIMIT_S if options.rehearse else RUN_S - native_s()) / 60
    for name in options.steps:
        if name not in STEPS:
            parser.error(f"expected steps among {', '.join(STEPS)}, got {name}")
    return options


def _open(options: argparse.Namespace, setup: Setup) -> tuple[Path, dict[str, Any]]:
    """Return the results file, and the results that it holds for the current kernels."""
    now, commit = datetime.now(UTC), options.commit or commit_here() or "unknown"
    date, device = now.date().isoformat(), device_name(setup.device)
    folder = options.folder or (ROOT / "build" / "rehearsal" if options.rehearse else FOLDER)
    file: Path = options.file or folder / file_name(device, date, commit)
    hashes = kernel_hashes()
    if file.exists():
        results = read(file)
        if results["kernels"] == hashes and results["rehearsal"] == options.rehearse:
            return file, results
    return file, {
        "device": device,
        "date": date,
        "began": now.isoformat(timespec="seconds"),
        "commit": commit,
        "rehearsal": options.rehearse,
        "facts": facts(setup.device),
        "kernels": hashes,
        "goals": [],
        "steps": {},
    }


def _save(file: Path, results: dict[str, Any]) -> None:
    results["goals"] = goals(results["steps"])
    write(file, _plain(results))


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it: NaN and infinity as words."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _perform(name: str, setup: Setup) -> dict[str, Any]:
    """Return the step's entry, with the number of the engine's kernels that this process compiled: usually none."""
    with kernels.compilations() as compiled:
        entry = _outcome(name, setup)
    return {**entry, "kernels_compiled": len(compiled)}


def _outcome(name: str, setup: Setup) -> dict[str, Any]:
    try:
        return {"status": "passed", "found": STEPS[name](setup)}
    except Unavailable as unavailable:
        return {"status": "unavailable", "reason": str(unavailable)}
    except Failed as failed:
        return {"status": "failed", "reason": str(failed), "found": failed.findings}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        trace = traceback.format_exc()[-processes.TAIL :]
        return {"status": "failed", "reason": reason, "found": {"traceback": trace}}


def _apart(name: str, options: argparse.Namespace, file: Path, remaining_s: float) -> dict[str, Any]:
    """Run the step in a separate process, which writes its entry into the file; return the entry."""
    cores = min(CORES, os.cpu_count() or 1)
    limit = min(REHEARSAL_LIMIT_S if options.rehearse else limit_s(name, cores), remaining_s)
    if limit < LEAST_S:
        return {"status": "failed", "reason": f"left out: the {options.minutes:g} minutes are over", "found": {}}
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--in-process", "--file", str(file.resolve())]
    done = processes.execute(command + (["--rehearse"] if options.rehearse else []), limit, ENVIRONMENT)
    entry: dict[str, Any] | None = read(file)["steps"].get(name)
    if entry is not None:
        return entry
    reason = f"stopped after {limit:.0f} s" if done.status is None else f"its process ended with status {done.status}"
    return {"status": "failed", "reason": reason, "found": {"output": done.tail}}


if __name__ == "__main__":
    sys.exit(main())
