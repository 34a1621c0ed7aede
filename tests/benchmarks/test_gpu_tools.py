"""The steps that run compute-sanitizer and ncu, with fakes of both."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_rehearsal import rehearse

from benchmarks import gpu, tools
from benchmarks.cases import REHEARSAL
from pathnet import native

pytestmark = [
    pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT),
    pytest.mark.usefixtures("without_the_interpreter"),
]


def fake(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of a name on the PATH."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize("name", ["sanitizer", "profile"])
def test_a_missing_tool_is_recorded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "PLACES", ())
    status, recorded = rehearse(tmp_path, name)
    assert status == 0
    assert recorded["steps"][name]["status"] == "unavailable"
    assert "is not on this machine" in recorded["steps"][name]["reason"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "passed", None),
        ("echo '========= ERROR SUMMARY: 2 errors'; exit 66", "failed", "memcheck, racecheck: see the output"),
        ("echo '========= Error: Device not supported'; exit 1", "unavailable", "Error: Device not supported"),
        ("echo Traceback; exit 1", "failed", "memcheck, racecheck: see the output"),
        ("exit 0", "failed", "memcheck, racecheck: see the output"),
    ],
)
def test_what_compute_sanitizer_says(
    body: str, status: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, "compute-sanitizer", body, monkeypatch)
    exit_status, recorded = rehearse(tmp_path, "sanitizer")
    assert recorded["steps"]["sanitizer"]["status"] == status
    assert recorded["steps"]["sanitizer"].get("reason") == said
    assert exit_status == (status == "failed")


def test_the_sanitizer_runs_over_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command behind the tool's own flags runs all kernels."""
    fake(tmp_path, "compute-sanitizer", 'while [ "$1" != all ]; do shift; done; shift; exec "$@"', monkeypatch)
    monkeypatch.setattr(gpu, "REHEARSAL", replace(REHEARSAL, precisions=("float32",)))
    _, recorded = rehearse(tmp_path, "sanitizer")
    output = recorded["steps"]["sanitizer"]["found"]["memcheck"]["output"]
    assert output.count(": done") == 4


def test_what_ncu_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        '"ID","Kernel Name","lts__t_sectors.avg.pct_of_peak_sustained_elapsed","launch__registers"',
        '"","","%","register/thread"',
        '"0","routed_backward_kernel(Plan)","41.5","128"',
    ]
    body = "echo '==PROF== Connected'; cat <<'END'\n" + "\n".join(rows) + "\nEND"
    fake(tmp_path, "ncu", body, monkeypatch)
    _, recorded = rehearse(tmp_path, "profile")
    launch = {
        "Kernel Name": "routed_backward_kernel(Plan)",
        "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "41.5 %",
    }
    assert recorded["steps"]["profile"]["found"] == {"launches": [launch]}
    fake(tmp_path, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1", monkeypatch)
    assert rehearse(tmp_path, "profile")[1]["steps"]["profile"]["status"] == "unavailable"
