"""The steps that run other programs: the GPU tests, compute-sanitizer, ncu."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks.budget import REHEARSAL_LIMIT_S, TEST_PROCESSES, limit_s
from benchmarks.cases import Setup
from benchmarks.outcome import Failed, Findings, Unavailable
from benchmarks.processes import Done, execute

__all__ = ["cuda_tests", "profile", "sanitizer", "triton_tests"]

MARGIN_S = 4.0
"""Seconds by which a program is stopped before its step, to keep its output."""

BYTES_OF_PROCESS = 3 << 30
"""GPU memory of a process of tests: a context takes half a gigabyte, the largest test one and a half."""

ERROR_STATUS = 66
"""The exit status of compute-sanitizer if it reports an error."""

PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*", "/usr/local/cuda/nsight-compute*")
REFUSALS = (
    "Device not supported",
    "Internal Sanitizer Error",
    "Failed to initialize",
    "ERR_NVGPUCTRPERM",
    "Unable to find injection library",
    "The user does not have permission",
    "LibraryNotLoaded",
    "DriverNotLoaded",
    "not supported on this",
    "No kernels were profiled",
)
METRICS = re.compile(r"(tensor|shared|lts__|l1tex__data|dram__throughput|sm__throughput).*pct|gpu__time_duration.sum")


def cuda_tests(setup: Setup) -> Findings:
    """Run the cuda engine's tests that need a GPU."""
    return _tests(setup, setup.cuda_tests, _limit_s(setup, "cuda_tests"))


def triton_tests(setup: Setup) -> Findings:
    """Run the triton engine's tests that need a GPU."""
    return _tests(setup, setup.triton_tests, _limit_s(setup, "triton_tests"))


def _tests(setup: Setup, tests: str, limit_s: float) -> Findings:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            tests,
        ]
        done = execute([*command, *_processes(setup)], limit_s)
        if done.status is None:
            raise Failed(f"stopped after {limit_s:.0f} s", {"output": done.tail})
        if not report.exists():
            raise Failed(f"pytest ended with status {done.status}", {"output": done.tail})
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failing = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    findings: Findings = {**counts, "passed": passed, "failing": failing}
    if done.status != 0 or passed == 0:
        raise Failed(
            f"{len(failing)} of {counts['tests']} tests fail" if failing else "no test ran",
            {**findings, "output": done.tail},
        )
    return findings


def _limit_s(setup: Setup, step: str) -> float:
    return (limit_s(step) if setup.cuda else REHEARSAL_LIMIT_S) - MARGIN_S


def _processes(setup: Setup) -> list[str]:
    """Return pytest's options for several processes, as many as cores and memory allow; none without xdist."""
    if importlib.util.find_spec("xdist") is None:
        return []
    count = min(TEST_PROCESSES, (os.cpu_count() or 1) // 2)
    if setup.cuda:
        count = min(count, torch.cuda.mem_get_info(setup.device)[0] // BYTES_OF_PROCESS)
    return ["-n", str(count), "--dist", "worksteal"] if count > 1 else []


def sanitizer(setup: Setup) -> Findings:
    """Run compute-sanitizer's memcheck and racecheck over every kernel form on small shapes."""
    program = _find("compute-sanitizer")
    findings: Findings = {}
    limit = _limit_s(setup, "sanitizer") / 2
    for tool in ("memcheck", "racecheck"):
        done = execute(
            [
                *(program, "--tool", tool, "--error-exitcode", str(ERROR_STATUS), "--report-api-errors", "no"),
                # Only pathnet's kernels: instrumenting torch's too takes minutes.
                *("--kernel-name", "kns=pathnet", "--target-processes", "all"),
                *_case(setup, "small"),
            ],
            limit,
            # Memory that torch caches hides reads past the end of a tensor.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        findings[tool] = _outcome(tool, done)
    wrong = [tool for tool, result in findings.items() if result["status"] == "failed"]
    if wrong:
        raise Failed(f"{', '.join(wrong)}: see the output", findings)
    if all(result["status"] == "unavailable" for result in findings.values()):
        raise Unavailable(findings["memcheck"]["reason"])
    return findings


def _outcome(tool: str, done: Done) -> Findings:
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.output)
    result: Findings = {"summary": summary[-1] if summary else None}
    if refusal := _refusal(done):
        return {**result, "status": "unavailable", "reason": refusal}
    if done.status is None:
        return {**result, "status": "unavailable", "reason": "not done in time", "output": done.tail}
    if done.status == 0 and summary:
        return {**result, "status": "passed"}
    return {**result, "status": "failed", "reason": f"{tool} ended with status {done.status}", "output": done.tail}


def profile(setup: Setup) -> Findings:
    """Run ncu over the first launches of a backward pass of the paper's network: the use of its units and
    memories."""
    program = _find("ncu")
    done = execute(
        [
            *(program, "--target-processes", "all", "--kernel-name", "regex:routed_backward", "--launch-count", "2"),
            *("--section", "SpeedOfLight", "--section", "ComputeWorkloadAnalysis"),
            *("--section", "MemoryWorkloadAnalysis", "--section", "MemoryWorkloadAnalysis_Tables"),
            # The clock is not locked: that needs rights, and the timings were taken without it.
            *("--clock-control", "none", "--page", "raw", "--csv"),
            *_case(setup, "whole"),
        ],
        _limit_s(setup, "profile"),
    )
    if refusal := _refusal(done):
        raise Unavailable(refusal)
    if done.status is None:
        raise Unavailable("not done in time")
    launches = _launches(done.output)
    if done.status != 0 or not launches:
        raise Failed(f"ncu ended with status {done.status}", {"output": done.tail})
    return {"launches": launches}


def _launches(output: str) -> list[dict[str, str]]:
    """Return the metrics of interest, with their units, of each row of ncu's raw page."""
    start = output.find('"ID"')
    if start < 0:
        return []
    header, units, *rows = [row for row in csv.reader(io.StringIO(output[start:])) if len(row) > 1]
    return [
        {
            name: f"{value} {unit}".strip()
            for name, unit, value in zip(header, units, row, strict=False)
            if name in ("Kernel Name", "Block Size", "Grid Size") or METRICS.search(name)
        }
        for row in rows
        if len(row) == len(header)
    ]


def _refusal(done: Done) -> str | None:
    """Return the line in which the tool itself, not its program, says that it cannot work here; else None."""
    lines = (line.strip("= ") for line in done.output.splitlines())
    return next((line for line in lines if any(refusal in line for refusal in REFUSALS)), None)


def _find(name: str) -> str:
    folders = [str(folder) for place in PLACES for folder in sorted(Path("/").glob(place.lstrip("/")), reverse=True)]
    program = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if program is None:
        raise Unavailable(f"{name} is not on this machine")
    return program


def _case(setup: Setup, size: str) -> list[str]:
    options = ["--device", setup.device, "--engine", setup.engine, "--precisions", *setup.precisions]
    return [sys.executable, "-m", "benchmarks.sanitizer_case", size, *options]
