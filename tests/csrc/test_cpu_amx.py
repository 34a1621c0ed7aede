"""The AMX kernels on a processor without AMX: their tests, in a process that runs tile instructions in software."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from amx.build import emulator, why_not
from helpers import ROOT, TESTS

from pathnet import native

pytestmark = [
    pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    library = emulator(tmp_path_factory.mktemp("emulator"))
    inherited = {name: value for name, value in os.environ.items() if name != "PATHNET_ISA"}
    return {**inherited, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("files", "at_least"),
    [
        (["test_walks_back.py", "test_walks_forward.py", "test_any_walk.py", "test_packed_plan.py"], 50),
        (["test_cpu_engine.py", "test_cpu_sums.py", "test_cpu_post_activation.py"], 20),
        (["test_training_gradients.py"], 30),
    ],
    ids=["walks", "engine", "training"],
)
def test_what_other_instruction_sets_pass(files: list[str], at_least: int, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", "amx"]
    done = subprocess.run(
        [*command, *(f"tests/engines/cpu/{file}" for file in files)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert "skipped" not in summary and int(summary.split(" passed")[0].split()[-1]) >= at_least


def test_the_kernels_multiply_tiles(environment: dict[str, str]) -> None:
    """The tests above prove something only if tile instructions are executed."""
    script = """
import ctypes, torch, pathnet
from helpers.cases import SMALL
net, (images, labels) = SMALL[0].net(), SMALL[0].images()
executed = ctypes.CDLL(None).pathnet_amx_count
executed.restype = ctypes.c_uint64
for bn in ("running", "batch"):
    for precision in ("float32", "bfloat16"):
        before = executed(b"tdpbf16ps")
        pathnet.record(net, images, labels, bn, "cpu", precision).gradient()
        print(executed(b"tdpbf16ps") > before, pathnet.native.build_facts()["selected_instruction_set"])
"""
    assert output_of(script, environment) == ["True amx"] * 4


def test_training_multiplies_tiles(environment: dict[str, str]) -> None:
    """Expect the number of products that a basic block of 16 channels, on images of 8x8 pixels, has in bfloat16.

    Float32 convolves by minimal filtering, without tiles.
    """
    script = """
import ctypes, torch
from pathnet import native
executed = ctypes.CDLL(None).pathnet_amx_count
executed.restype = ctypes.c_uint64
def products(run):
    before = executed(b"tdpbf16ps")
    return run(), executed(b"tdpbf16ps") - before
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(2, 16, 8, 8).to(dtype, memory_format=torch.channels_last)
    block = ([torch.randn(16, 16, 3, 3)] * 2, [torch.ones(16)] * 4, [1, 1], [1e-5] * 2, [1.0, 1.0], 0)
    (output, *kept), forward = products(lambda: torch.ops.pathnet.cpu_fused_residual(x, *block))
    backward = products(lambda: torch.ops.pathnet.cpu_fused_residual_backward(output, x, *kept, *block))[1]
    print(forward, backward - forward)
"""
    # Two convolutions of 9 taps: both samples' 128 pixels are four products of 32 by 16 and 16 channels.
    weight_gradient = 2 * 9 * 4
    forward_and_weight_gradient = [tuple(map(int, line.split())) for line in output_of(script, environment)]
    float32, bfloat16 = forward_and_weight_gradient
    assert float32 == (0, 0)
    assert bfloat16[0] > 0 and bfloat16[1] == weight_gradient


def output_of(script: str, environment: dict[str, str]) -> list[str]:
    """Run a script in the tests' folder, and return the lines that it prints."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
