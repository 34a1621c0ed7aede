"""The sanitized build of the cpu kernels, as CMake would make it; building and running it is `make sanitize`'s."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

JUDGES = ("truth.cpp", "training_truth.cpp")
TARGETS = {"sanitize": "address,undefined", "sanitize-threads": "thread"}


def dry_run(target: str) -> str:
    make = shutil.which("make")
    if make is None:
        pytest.skip("the targets are make's")
    # A make that runs these tests would have this one name its folder.
    command = [make, "-n", "--no-print-directory", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", TARGETS)
def test_make_builds_the_program_with_its_sanitizers_and_runs_it(target: str) -> None:
    *_, run = lines = dry_run(target).splitlines()
    assert any(f"-DPATHNET_SANITIZE={TARGETS[target]}" in line for line in lines)
    assert run.strip() == f"build/{target}/walks"


def test_ci_runs_the_memory_checks() -> None:
    assert "make sanitize" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("sanitizers", TARGETS.values())
def test_all_kernels_are_compiled_with_the_sanitizers_and_without_torch(sanitizers: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        pytest.skip("cmake and ninja are needed to configure a build")
    configure: list[str | Path] = [cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    options = [f"-DPATHNET_SANITIZE={sanitizers}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    subprocess.run([*configure, *options], check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    compiled = {Path(command["file"]).relative_to(ROOT).as_posix() for command in commands}
    kernels = {file for file in (ROOT / "csrc" / "cpu").rglob("*.cpp") if not file.name.endswith("ops.cpp")}
    assert {file.relative_to(ROOT).as_posix() for file in kernels} <= compiled
    for command in commands:
        options = shlex.split(command["command"])
        assert f"-fsanitize={sanitizers}" in options and "-O3" not in options
        # The judges alone are not watched.
        assert ("-fno-sanitize=all" in options) == (Path(command["file"]).name in JUDGES)
