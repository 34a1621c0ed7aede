"""The native build: what it holds, and that kernels know nothing of torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import pathnet
from pathnet import native

SOURCES = sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file())

needs_native = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@needs_native
def test_the_facts_say_what_was_built() -> None:
    facts = native.build_facts()
    assert facts["torch_target"] == "0x020b000000000000"
    assert re.fullmatch(r"2\.\d+\.\w+(\+\w+)?", str(facts["torch_version"]))
    assert facts["instruction_sets"][-1] == "base"
    assert bool(facts["cuda_architectures"]) != bool(facts["without_cuda"])


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.name)
def test_only_ops_and_their_checks_include_torch(source: Path) -> None:
    includes_torch = "#include <torch" in source.read_text()
    assert includes_torch == (source.name in ("ops.cpp", "training_ops.cpp", "checks.h", "threads.h"))


def test_cmake_lists_the_sources_that_there_are() -> None:
    listed = set(re.findall(r"(?<!tests/)csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    assert listed == {str(file.relative_to(ROOT)) for file in SOURCES if file.suffix in (".cpp", ".cu")}


WITHOUT_TORCH = [
    file
    for file in SOURCES
    if file.suffix == ".cpp" and file.parent.name in ("cpu", "cuda") and not file.name.endswith("ops.cpp")
]


def test_no_class_is_defined_in_two_ways(tmp_path: Path) -> None:
    """The linker takes classes of one name for the same one, and keeps one body of each of their functions."""
    compiler = shutil.which("g++")
    version = "" if compiler is None else subprocess.run([compiler, "-v"], capture_output=True, text=True).stderr
    if compiler is None or "gcc version" not in version:
        pytest.skip("GCC compares classes as it links")
    whole = [compiler, "-std=c++17", "-O0", "-fPIC", "-flto", "-DPATHNET_ISA_NAMESPACE=base"]
    objects = [tmp_path / f"{source.parent.name}_{source.stem}.o" for source in WITHOUT_TORCH]
    for source, compiled in zip(WITHOUT_TORCH, objects, strict=True):
        subprocess.run([*whole, "-c", source, "-o", compiled], check=True, capture_output=True)
    link = [*whole, "-shared", "-Wodr", *objects, "-o", tmp_path / "linked.so"]
    linked = subprocess.run(link, capture_output=True, text=True, check=True)
    assert linked.stderr == ""


REGISTERS = {"routed_backward_kernel": 255, "routed_forward_kernel": 255}
"""Most registers of a thread. 255 leave one block of 256 threads to a multiprocessor, as shared memory does."""


def cuobjdump(*options: str) -> str:
    """Return what Triton's cuobjdump prints about the library's machine code."""
    facts, triton = native.build_facts(), importlib.util.find_spec("triton")
    if facts["without_cuda"]:
        pytest.skip(f"CUDA is not in this build: {facts['without_cuda']}")
    if triton is None or triton.origin is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    library = Path(pathnet.__file__).with_name("_ops.so")
    return subprocess.run([tool, *options, library], capture_output=True, text=True, check=True).stdout


def kernel_of(symbol: str) -> str:
    return next(name for name in REGISTERS if name in symbol)


@needs_native
def test_cuda_kernels_keep_to_their_registers_and_spill_nothing() -> None:
    printed = cuobjdump("-res-usage")
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed)
    assert {architecture for architecture in re.findall(r"arch = (sm_\w+)", printed)} >= {"sm_80", "sm_90a"}
    assert {kernel_of(symbol) for symbol, *_ in kernels} == set(REGISTERS)
    for symbol, registers, stack, shared, local in kernels:
        assert int(registers) <= REGISTERS[kernel_of(symbol)]
        # Shared memory is requested at the launch; a kilobyte is the driver's.
        assert (stack, local) == ("0", "0") and int(shared) <= 1024


OTHERS = os.environ.get("PATHNET_ARCHITECTURES", "").split()


@pytest.mark.skipif(
    not OTHERS, reason="architectures to compile for, like PATHNET_ARCHITECTURES='sm_86 sm_89 sm_120'"
)
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda file: file.stem)
@pytest.mark.parametrize("architecture", OTHERS)
def test_nothing_is_spilled_on_gpus_that_the_build_has_no_code_of_its_own_for(
    architecture: str, source: Path, tmp_path: Path
) -> None:
    """Half a minute each: a GPU of before sm_90 as nvcc has it, which may run the code for sm_80 as well, a later one
    through the PTX that the build holds."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc is on this machine")
    later = int(re.sub(r"\D", "", architecture)) > 90
    compile_ = [nvcc, "-std=c++17", "-O3", source, "-o", tmp_path / "compiled"]
    compile_ += ["-arch=compute_90", "-ptx"] if later else [f"-arch={architecture}", "-cubin", "-Xptxas=-v"]
    done = subprocess.run(compile_, capture_output=True, text=True, check=True)
    if later:
        ptxas = [Path(nvcc).with_name("ptxas"), f"-arch={architecture}", "-O3", "-v", tmp_path / "compiled"]
        done = subprocess.run([*ptxas, "-o", tmp_path / "cubin"], capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    kernels = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", said, re.DOTALL)
    print(architecture, [(kernel_of(symbol), int(registers), int(spilled)) for symbol, spilled, registers in kernels])
    assert kernels and all(spilled == "0" for _, spilled, _ in kernels)


@needs_native
def test_later_gpus_get_their_code_from_ptx() -> None:
    listed = cuobjdump("-lptx")
    assert len(re.findall(r"sm_90\.ptx", listed)) == 3


@needs_native
def test_a_warning_keeps_no_drivers_compiler_from_the_ptx() -> None:
    """A driver may read the options that the PTX was stored with."""
    stored = re.findall(r"ptxasOptions = (.*)", cuobjdump("-ptx"))
    assert len(stored) == 3
    for options in stored:
        assert "-warn-spills" in options and "error" not in options.lower()


@needs_native
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_walks_run_on_tensor_cores(architecture: str) -> None:
    functions = re.split(r"Function : ", cuobjdump("-sass", "-arch", architecture))[1:]
    for code in functions:
        counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HMMA.16816.F32.BF16", "LDSM.16.M88.4")}
        counts["copies"] = len(re.findall(r"\bLDGSTS\b", code))
        # A dense product of eight rows by two tiles alone has 48, from 10 readings; with two terms three times.
        assert counts["HMMA.16816.F32.BF16"] >= 100 and counts["LDSM.16.M88.4"] >= 30 and counts["copies"] >= 1
    # Back with one term and with two, and forward; each resident and windowed.
    assert len(functions) == 6


def test_a_build_asked_to_leave_cuda_out_says_so(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    beside = Path(sys.executable).parent
    cmake, ninja = (
        shutil.which(tool, path=f"{beside}{os.pathsep}{os.environ['PATH']}") for tool in ("cmake", "ninja")
    )
    if cmake is None or ninja is None:
        pytest.skip("cmake and ninja are needed to configure a build")
    configure = [cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DPATHNET_TORCH_DIR={Path(torch.__file__).parent}", f"-DPATHNET_OUTPUT_DIR={tmp_path}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    subprocess.run([*configure, "-DPATHNET_CUDA=OFF"], check=True, capture_output=True)
    rules = (tmp_path / "build.ninja").read_text()
    assert "PATHNET_CUDA=OFF" in rules and "routed_backward.cu" not in rules
