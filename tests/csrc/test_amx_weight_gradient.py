"""The weight gradient on AMX tiles by itself, on random convolutions, judged by plain loops in double."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from amx.build import emulator, has_amx, why_not
from helpers import ROOT

WHY_NOT = None if has_amx() and shutil.which("g++") else why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")

SOURCES = ["tests/csrc/amx/weight_gradient.cpp", "csrc/cpu/layout.cpp"]
FLAGS = ["-std=c++17", "-O1", "-Icsrc", "-DPATHNET_ISA_NAMESPACE=amx", "-mfma", "-mamx-tile", "-mamx-bf16"]
AVX512 = [f"-mavx512{part}" for part in ("f", "vl", "bw", "dq", "bf16")]


def test_weight_gradients_on_tiles_are_those_of_plain_loops(tmp_path: Path) -> None:
    program = tmp_path / "weight_gradient"
    subprocess.run(["g++", *FLAGS, *AVX512, *SOURCES, "-o", program], cwd=ROOT, check=True)
    emulated = {} if has_amx() else {"LD_PRELOAD": str(emulator(tmp_path))}
    done = subprocess.run(
        [program, "150"], env={**os.environ, **emulated}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("weight_gradient: 150 convolutions")
