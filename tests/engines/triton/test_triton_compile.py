"""The machine code of the triton engine's kernels, for GPUs that are not there."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, TESTS

import pathnet.engines.triton

PACKAGE = Path(pathnet.engines.triton.__file__).parent

KERNELS = {
    path.name: kernels
    for path in sorted(PACKAGE.glob("*.py"))
    if (kernels := re.findall(r"@triton\.jit.*\ndef (_\w+_kernel)\(", path.read_text()))
}
"""Kernels by file."""

REGISTERS = 65536
"""Registers of a multiprocessor of an H100, an A100 and a consumer GPU."""

SHARED = {"sm_90": 228 << 10, "sm_80": 164 << 10}
"""Bytes of a multiprocessor's shared memory."""

SHARED_OF_PROGRAM, RESERVED = 99 << 10, 1 << 10
"""Maximum bytes of shared memory of one program on a consumer GPU (163 KB on an A100, 227 KB on an H100), and bytes
that each program takes in addition."""

PROJECTION = 2
"""Value of the constant SKIP, `tiles.PROJECTION`."""

Compiled = dict[str, Any]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Run `triton_compile`; return its report of the compiled kernels."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton is not installed")
    if not (Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this build of triton has no cuobjdump")
    # With several test processes, the second finds the kernels that the first has compiled.
    lock = ROOT / "build" / "triton.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return printed()


@pytest.fixture(scope="module")
def wanted() -> dict[str, set[str]]:
    """Return the kernels of some networks."""
    pytest.importorskip("triton")
    return {name: set(keys) for name, keys in printed("keys").items()}


def printed(*arguments: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / "helpers" / "triton_compile.py"), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def spills(kernel: Compiled) -> bool:
    """Return whether registers are spilled to a stack or local memory, or arrays are there."""
    return kernel["stack"] > 0 or kernel.get("local", 0) > 0 or kernel.get("spilled", 0) > 0


def fills_a_multiprocessor(kernel: Compiled, shared: int) -> bool:
    """Return whether a second program has no room next to the first, so nothing runs while one waits for loads.

    A warp takes registers in units of 256.

    Args:
        shared: bytes of a multiprocessor's shared memory.
    """
    registers = 2 * kernel["warps"] * 32 * (-(-kernel["registers"] // 8) * 8)
    return registers > REGISTERS or 2 * (kernel["shared"] + RESERVED) > shared


def multiplies(kernel: Compiled) -> bool:
    constants = kernel["constants"]
    return (
        kernel["kernel"] == "_wgrad_kernel"
        or kernel["kernel"] in ("_dgrad_kernel", "_forward_kernel")
        and (constants["RESIDUAL"] or constants["SKIP"] == PROJECTION)
    )


def judged(report: dict[str, Any], target: str, file: str, wrong: Callable[[Compiled], bool]) -> None:
    kernels = [kernel for kernel in report["kernels"][target] if kernel["file"] == file]
    assert kernels, f"no kernel of {file} was compiled"
    assert not [kernel for kernel in kernels if wrong(kernel)]


PRODUCTS = ["dgrad.py", "forward.py", "wgrad.py"]
COMPILED = [*(("sm_90", file) for file in KERNELS), *(("sm_80", file) for file in PRODUCTS)]


@pytest.mark.parametrize(("target", "file"), COMPILED)
def test_nothing_is_spilled(report: dict[str, Any], target: str, file: str) -> None:
    judged(report, target, file, spills)


@pytest.mark.parametrize("file", ["dgrad.py", "forward.py"])
def test_nothing_is_spilled_on_amd(report: dict[str, Any], file: str) -> None:
    judged(report, "gfx942", file, lambda kernel: spills(kernel) or kernel["products"] == 0)


@pytest.mark.parametrize(("target", "file"), COMPILED)
def test_a_program_fits_a_gpu_for_consumers(report: dict[str, Any], target: str, file: str) -> None:
    judged(report, target, file, lambda kernel: kernel["registers"] > 255 or kernel["shared"] > SHARED_OF_PROGRAM)


@pytest.mark.parametrize(("target", "file"), COMPILED)
def test_a_second_program_fits_beside_the_first(report: dict[str, Any], target: str, file: str) -> None:
    judged(report, target, file, lambda kernel: fills_a_multiprocessor(kernel, SHARED[target]))


@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("file", PRODUCTS)
def test_products_are_of_tensor_cores(report: dict[str, Any], file: str, target: str) -> None:
    judged(report, target, file, lambda kernel: multiplies(kernel) and kernel["products"] == 0)


@pytest.mark.parametrize("file", ["endings.py", "forward.py", "wgrad.py"])
def test_a_relu_passes_nan(report: dict[str, Any], file: str) -> None:
    """A NaN reaches the loss, as in PyTorch; Triton's interpreter always passes it."""
    judged(report, "sm_90", file, lambda kernel: kernel["maxima_without_nan"] > 0)


@pytest.mark.parametrize("target", SHARED)
def test_tensor_core_instructions_reach_the_machine_code(report: dict[str, Any], target: str) -> None:
    """Counted in one kernel of each kind."""
    counts = {
        (kernel["kernel"], kernel["type"]): kernel["instructions"]
        for kernel in report["kernels"][target]
        if kernel["instructions"] is not None
    }
    kernels = ("_dgrad_kernel", "_forward_kernel", "_wgrad_kernel")
    assert {(kernel, dtype) for kernel in kernels for dtype in ("bf16", "fp32")} == counts.keys()
    assert all(sum(instructions.values()) > 0 for instructions in counts.values())


def test_every_kernel_is_compiled(report: dict[str, Any]) -> None:
    compiled = {kernel["kernel"] for kernel in report["kernels"]["sm_90"]}
    assert {name for kernels in KERNELS.values() for name in kernels} <= compiled


def test_every_tile_is_compiled(report: dict[str, Any]) -> None:
    assert report["unused_tiles"] == dict.fromkeys(report["kernels"], [])


def test_a_tile_that_is_too_large_is_noticed(report: dict[str, Any]) -> None:
    assert spills(report["too_large"])


def test_more_than_a_multiprocessor_has_is_noticed() -> None:
    fits = {"warps": 4, "registers": 255, "shared": 100 << 10}
    assert not fills_a_multiprocessor(fits, SHARED["sm_90"])
    assert fills_a_multiprocessor({**fits, "warps": 8}, SHARED["sm_90"])
    assert fills_a_multiprocessor({**fits, "shared": 114 << 10}, SHARED["sm_90"])
    assert fills_a_multiprocessor(fits, SHARED["sm_80"])


MODES = ["batch, bfloat16", "running, bfloat16", "running, float32"]


@pytest.mark.parametrize("mode", MODES)
def test_another_side_or_batch_takes_kernels_that_are_there(wanted: dict[str, set[str]], mode: str) -> None:
    assert wanted[f"small, {mode}"]
    assert wanted[f"small at another side and batch, {mode}"] == wanted[f"small, {mode}"]


@pytest.mark.parametrize(("mode", "most"), [*zip(MODES, [25, 22, 22], strict=True)])
def test_how_many_kernels_a_first_number_of_resnet_110_takes(
    wanted: dict[str, set[str]], mode: str, most: int
) -> None:
    """The number is that of a network of one block per stage, plus units that only first blocks have."""
    assert 0 < len(wanted[f"ResNet-110, {mode}"]) <= most
