"""The AMX emulator as a library to preload, for the tests that run AMX kernels."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("emulator.cpp", "detours.cpp", "instruction.cpp", "tiles.cpp")]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]


def processor_flags() -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split() for line in lines if line.startswith("flags")), [])


def has_amx() -> bool:
    return sys.platform == "linux" and "amx_bf16" in processor_flags()


def why_not() -> str | None:
    """Return why AMX cannot be emulated here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the AMX emulator needs Linux on x86-64"
    if shutil.which("g++") is None:
        return "the AMX emulator is compiled with g++"
    if has_amx():
        return "this processor has AMX itself, so no instruction reaches the emulator"
    if "avx512_bf16" not in processor_flags():
        return "the kernels that use AMX use avx512_bf16 as well, which this processor lacks"
    return None


def emulator(folder: Path) -> Path:
    """Compile the emulator into a folder; a process with it in LD_PRELOAD has AMX."""
    library = folder / "libamx_emulator.so"
    command = ["g++", *FLAGS, "-mavx512f", "-mfma", "-shared", *map(str, SOURCES), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return library
