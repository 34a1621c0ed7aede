"""Kernels compiled ahead: launches find all of them, and the engine's self-check needs no others."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import TESTS


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run `triton_ahead` with an empty cache; return its report."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, str(TESTS / "helpers" / "triton_ahead.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    printed: dict[str, Any] = json.loads(run.stdout)
    return printed


def test_launches_find_what_was_compiled_ahead(report: dict[str, Any]) -> None:
    assert report["compiled"] > 3
    assert (report["hits"], report["misses"]) == (report["compiled"], 0)
    assert report["missing"] == []


def test_what_is_compiled_ahead_is_not_launched(report: dict[str, Any]) -> None:
    assert report["launched_ahead"] == 0
    assert report["launched"] >= report["compiled"]


def test_launchers_that_are_compiled_are_compiled_ahead(report: dict[str, Any]) -> None:
    assert report["launchers_ahead"] == report["compiled"]


def test_what_cannot_be_compiled_ahead_is_told(report: dict[str, Any]) -> None:
    warning = "ahead-of-time compilation failed ("
    wrong, killed, talking, absent = report["warnings"]
    assert wrong.startswith(f"{warning}_means_kernel failed (KeyError: ") and "No such file" in absent
    assert talking.startswith(f"{warning}Talking failed (ValueError: no such kernel")
    assert killed.startswith(warning) and "terminated abruptly" in killed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes with their parent")
def test_compilation_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    program = (
        "import triton; from helpers import triton_ahead; from pathnet.engines.triton import ahead;"
        "triton.runtime.driver.set_active(triton_ahead.willing_gpu(triton_ahead.Launcher));"
        "ahead.compile_all([ahead.Kernel('helpers.triton_ahead', 'Waiting', '')])"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    until = time.monotonic() + 50
    while not (waiting := list(tmp_path.glob("waiting-*"))) and time.monotonic() < until:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    worker = Path("/proc", waiting[0].name.removeprefix("waiting-"))
    while worker.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not worker.exists()


def test_a_network_takes_the_kernels_that_its_check_took(report: dict[str, Any]) -> None:
    for name, net in report["nets"].items():
        assert net["checked"] > 20, name
        assert net["added"] == [], name
