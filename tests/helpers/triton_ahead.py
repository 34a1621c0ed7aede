"""Compiles a network's kernels ahead of their launches, launches them, and prints as JSON where Triton found them.

A program of its own, since Triton decides on import whether it interprets. The GPU accepts every kernel and runs
none: everything from the engine to the launch is as on a real GPU, and so are the keys of Triton's cache.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402
import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import pathnet  # noqa: E402
from pathnet.engines.engine import Job  # noqa: E402
from pathnet.engines.self_check import trial_run  # noqa: E402
from pathnet.engines.triton import TritonEngine, ahead  # noqa: E402
from pathnet.models import ResidualNet, preact_resnet, resnet  # noqa: E402
from pathnet.recording import BatchNormMode, snapshot  # noqa: E402
from pathnet.scaling import ScaledGradient  # noqa: E402

CPU = torch.device("cpu")

launched: list[str] = []

make_launcher = None
"""Marks this module as one whose launchers are compiled for each signature."""


class Launcher:
    """A launcher that counts launches, and leaves a file when it is compiled."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.name
        (Path(os.environ["TRITON_CACHE_DIR"]) / f"launcher-{os.getpid()}-{metadata.hash}").touch()

    def __call__(self, *arguments: Any) -> None:
        launched.append(self.name)


class Killed:
    """A stand-in for a kernel, whose compilation kills its process."""

    @staticmethod
    def preload(specialization: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Talking:
    """A stand-in for a kernel, whose compilation prints, as with ``NVPTX_ENABLE_DUMP``, and fails."""

    @staticmethod
    def preload(specialization: str) -> None:
        print("// -----// NVPTX Dump //----- //")
        raise ValueError("no such kernel")


class Waiting:
    """A stand-in for a kernel, whose compilation leaves its process number and takes longer than any test."""

    @staticmethod
    def preload(specialization: str) -> None:
        Path(os.environ["TRITON_CACHE_DIR"], f"waiting-{os.getpid()}").touch()
        time.sleep(60)


def willing_gpu(launcher: Any) -> ahead.AbsentGpu:
    gpu = ahead.AbsentGpu(GPUTarget("cuda", 90, 32), launcher)
    gpu.utils = SimpleNamespace(  # type: ignore[attr-defined]
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda name, binary, shared, device: (1, 1, 32, 0, 1024),
    )
    return gpu


def job(net: ResidualNet, bn: BatchNormMode, channels: int, side: int) -> Job:
    return Job(snapshot(net, bn, torch.float32), bn, "bfloat16", (channels, side, side), CPU)


def walk(net: ResidualNet, bn: BatchNormMode, batch: int, side: int) -> None:
    """Run a record and norms, as a user's first number does."""
    channels = 4 if isinstance(net.stem, torch.nn.Identity) else net.stem_weight().shape[0]
    prepared = TritonEngine().prepare(job(net, bn, channels, side))
    y, walk = prepared.record(torch.ones(batch, channels, side, side))
    paths = torch.cat([pathnet.paths.one_of_each_length(net.n), torch.eye(net.n, dtype=torch.uint8)])
    exponent = torch.zeros(1 if bn == "batch" else batch, dtype=torch.int32)
    walk.norms(ScaledGradient(y, exponent), pathnet.paths.routing(paths))


def beside_the_check(net: ResidualNet, bn: BatchNormMode, side: int) -> dict[str, Any]:
    """Return the number of kernels of the engine's self-check, and the names of those that the network adds."""
    channels = net.stem_weight().shape[0]
    work = trial_run(TritonEngine(), job(net, bn, channels, side))
    checked = ahead.missing_for(work)
    added = set(ahead.missing_for(lambda: walk(net, bn, 128, side))) - set(checked)
    return {"checked": len(checked), "added": sorted(kernel.name for kernel in added)}


def main() -> None:
    from helpers import triton_ahead  # This file under the name that other processes import.

    torch.set_num_threads(1)
    # Set after Triton's import, as a program may do; part of the cache keys.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    triton.runtime.driver.set_active(willing_gpu(triton_ahead.Launcher))
    hits: list[bool] = []
    knobs.compilation.listener = lambda **details: hits.append(details["cache_hit"])
    block = ResidualNet(torch.nn.Identity(), [preact_resnet(8, 4).blocks[1]], torch.nn.Identity())  # type: ignore[list-item]

    def work() -> None:
        walk(block, "running", 8, 8)

    compiled = ahead.compile_for(work)
    report: dict[str, Any] = {"triton": triton.__version__, "compiled": compiled}
    report["launched_ahead"] = len(triton_ahead.launched)
    report["launchers_ahead"] = len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("launcher-*")))
    work()
    report |= {"hits": sum(hits), "misses": len(hits) - sum(hits), "launched": len(triton_ahead.launched)}
    report["missing"] = [kernel.name for kernel in ahead.missing_for(work)]
    wrong = ahead.Kernel("pathnet.engines.triton.sums", "_means_kernel", "{}")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ahead.compile_all([wrong])
        ahead.compile_all([ahead.Kernel("helpers.triton_ahead", "Killed", specialization) for specialization in "ab"])
        ahead.compile_all([ahead.Kernel("helpers.triton_ahead", "Talking", "")])
        sys.executable += "-that-is-not-there"
        ahead.compile_all([wrong])
    report["warnings"] = [str(warning.message) for warning in warned]
    nets = {
        "resnet-110, batch": (preact_resnet(110), "batch", 32),
        "resnet-110, running": (preact_resnet(110), "running", 32),
        "post-activation, batch": (resnet(20, shortcut="projection"), "batch", 28),
        "bottleneck, running": (preact_resnet(20, block="bottleneck", shortcut="pad"), "running", 17),
    }
    report["nets"] = {name: beside_the_check(net, bn, side) for name, (net, bn, side) in nets.items()}  # type: ignore[arg-type]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
