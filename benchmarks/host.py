"""The host's time for a batch, measured without a GPU: ``python -m benchmarks.host``.

The code runs as on a GPU, with tensors on the CPU, but kernels are neither compiled nor run: Triton's driver, CUDA's
streams and graphs, and the native ops of the `cuda` engine are stubs. The figures include Python's time from the
routings to the last launch, Triton's for each launch, NumPy's for the plan and PyTorch's for each operation. A batch
has two small images, since a launch takes the host the same time for any size. Times are processor times of one core,
so that other programs on the machine do not count.

The figures do not include the driver's time for a launch, a copy or the launch of a graph; PyTorch's search for GPU
memory; head, loss and its gradient, which belong to the network; nor the GPU's time, which overlaps with the host's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pathnet
from benchmarks.cases import FULL, Setup
from benchmarks.outcome import Failed, Findings
from pathnet.engines.cuda import CudaEngine
from pathnet.engines.engine import Job, Walk
from pathnet.engines.triton import TritonEngine
from pathnet.models import ResidualNet, preact_resnet
from pathnet.places import locate
from pathnet.recording import snapshot
from pathnet.scaling import ScaledGradient
from pathnet.walks import Record

__all__ = ["GOALS_MS", "host", "measured"]

GOALS_MS = {"triton": 2.0, "cuda": 1.0}
"""Largest times of a batch's record and backward passes, by engine."""

BATCH, SIDE = 2, 8
WARM_UP = 3
ROUNDS = 15
LIMIT_S = 60.0


def host(setup: Setup) -> Findings:
    """Measure the host's milliseconds per batch in a new process, by engine, BN mode and precision."""
    command = [sys.executable, "-m", "benchmarks.host", "--json", "--depth", str(setup.depth)]
    # Triton decides at import whether to interpret kernels.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode != 0:
        raise Failed(f"its process ended with status {done.returncode}", {"output": done.stderr[-2000:]})
    findings: Findings = json.loads(done.stdout)
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=FULL.depth, help="depth of the pre-activation ResNet")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET: expected 0, since interpreted kernels are not launched, got 1")
    torch.set_num_threads(1)
    findings = measured(options.depth)
    if options.json:
        print(json.dumps(findings))
    else:
        _show(findings, Console(width=118))
    return 0


def measured(depth: int) -> Findings:
    """Return the findings of `host`. Replaces Triton's driver by a stub for the rest of the process."""
    net = preact_resnet(depth)
    codes = torch.cat([torch.zeros(1, net.n, dtype=torch.uint8), pathnet.paths.one_of_each_length(net.n)])
    _stub_triton()
    rows = []
    for bn in ("running", "batch"):
        for precision in ("bfloat16", "float32"):
            rows.append({"engine": "triton", "bn": bn, "precision": precision, **_triton(net, bn, precision, codes)})
    for precision in ("bfloat16", "float32"):
        rows.append({"engine": "cuda", "bn": "running", "precision": precision, **_cuda(net, precision, codes)})
    return {"depth": depth, "paths": len(codes), "batch": BATCH, "goals_ms": GOALS_MS, "rows": rows}


LAUNCHES, COMPILED = [0], [0]
"""Numbers of kernels launched and compiled so far."""


def _stub_triton() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    def launched(*arguments: Any) -> None:
        LAUNCHES[0] += 1

    kernel = SimpleNamespace(
        function=None, packed_metadata=None, launch_metadata=lambda *arguments: None, run=launched
    )

    def compiled(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        COMPILED[0] += 1
        self.device_caches[device][0][key] = kernel
        return kernel

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    JITFunction._do_compile = compiled


@contextmanager
def _graphs() -> Iterator[None]:
    """Replace CUDA graphs by stubs."""
    from pathnet.engines.triton import graphs

    nothing = SimpleNamespace(
        replay=lambda: None,
        pool=lambda: None,
        record=lambda stream: None,
        wait_event=lambda event: None,
        synchronize=lambda: None,
    )

    def captured(job: Any, pool: Any) -> Any:
        job.run()
        return nothing

    device = SimpleNamespace(done=nothing, capture=captured)
    with (
        mock.patch.object(graphs, "_captures", lambda device: True),
        mock.patch.object(graphs._Device, "of", lambda place: device),
        mock.patch.object(torch.cuda, "current_stream", lambda place: nothing),
        mock.patch.object(Tensor, "record_stream", lambda tensor, stream: None),
    ):
        yield


def _triton(net: ResidualNet, bn: Any, precision: Any, codes: Tensor) -> Findings:
    from pathnet.engines.triton.graphs import capacity_for
    from pathnet.engines.triton.plan import plan_launches
    from pathnet.engines.triton.routed_backward import schedule_backward
    from pathnet.engines.triton.state import PlanBuffer, allocate_on
    from pathnet.engines.triton.steps import USUAL_BACKWARD, steps_backward

    engine, images = TritonEngine(), torch.randn(BATCH, 3, SIDE, SIDE)
    frozen = snapshot(net, bn, torch.float32)
    y0 = frozen.stem(images).detach()
    prepared = engine.prepare(Job(frozen, bn, precision, (16, SIDE, SIDE), y0.device))

    def record() -> pathnet.Tape:
        return _tape("triton", frozen, images, y0, *prepared.record(y0), bn)

    network = prepared.network
    schedule = schedule_backward(network, capacity_for(len(codes)), USUAL_BACKWARD)
    tables = PlanBuffer(schedule, allocate_on(y0.device))
    coefficients = pathnet.paths.routing(codes).numpy()

    def plan() -> None:
        tables.copy(plan_launches(schedule, steps_backward(network.blocks, coefficients)))

    compiled, tape = COMPILED[0], record()
    findings = {
        "plan_ms": _milliseconds(plan),
        "launched": {
            "record_ms": _milliseconds(record),
            "walk_ms": _milliseconds(lambda: tape.path_gradient_norms(codes)),
            "launches": _launches(lambda: tape.path_gradient_norms(codes)),
            "compiled": COMPILED[0] - compiled,
        },
    }
    compiled = COMPILED[0]
    with _graphs():
        # Once before the capture, and once for it.
        tapes = [record() for _ in range(2)]
        for tape in tapes:
            tape.path_gradient_norms(codes)

        def batch() -> None:
            record().path_gradient_norms(codes)

        findings["replayed"] = {
            "record_ms": _milliseconds(record),
            "walk_ms": _milliseconds(lambda: tape.path_gradient_norms(codes)),
            "batch_ms": _milliseconds(batch),
            "launches": _launches(batch),
            "operations": _operations(batch),
            "compiled": COMPILED[0] - compiled,
        }
    return findings


def _cuda(net: ResidualNet, precision: Any, codes: Tensor) -> Findings:
    engine, images = CudaEngine(), torch.randn(BATCH, 3, SIDE, SIDE)
    frozen = snapshot(net, "running", torch.float32)
    y0 = frozen.stem(images).detach()
    prepared = engine.prepare(Job(frozen, "running", precision, (16, SIDE, SIDE), y0.device))
    y, bits = torch.randn(1, BATCH, 64, SIDE // 4, SIDE // 4), torch.zeros(BATCH, 8, dtype=torch.uint8)
    norms, nothing = torch.zeros(len(codes), BATCH, dtype=torch.float64), torch.zeros(0)
    with (
        mock.patch("pathnet.engines.cuda.ops.cuda_forward_running", lambda *arguments: (y, bits)),
        mock.patch("pathnet.engines.cuda.ops.cuda_backward_running", lambda *arguments: (norms, nothing, nothing)),
    ):

        def record() -> pathnet.Tape:
            return _tape("cuda", frozen, images, y0, *prepared.record(y0), "running")

        def batch() -> None:
            record().path_gradient_norms(codes)

        tape = record()
        return {
            "launched": {
                "record_ms": _milliseconds(record),
                "walk_ms": _milliseconds(lambda: tape.path_gradient_norms(codes)),
                "batch_ms": _milliseconds(batch),
                "launches": 2,
                "operations": _operations(batch),
            }
        }


def _tape(engine: str, net: ResidualNet, images: Tensor, y0: Tensor, y: Tensor, walk: Walk, bn: str) -> pathnet.Tape:
    """Return the tape that a recorder makes for a loss with a known gradient."""
    exponent = torch.zeros(BATCH if bn == "running" else 1, dtype=torch.int32)
    start = ScaledGradient(torch.ones_like(y), exponent)
    record = Record(net, images, y0.shape, engine, walk, y, torch.zeros(()), start)
    return pathnet.Tape(record, locate(record.net, "y0"), lambda: record)


def _milliseconds(work: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        work()
    seconds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return 1e3 * median(seconds)


def _launches(work: Callable[[], object]) -> int:
    before = LAUNCHES[0]
    work()
    return LAUNCHES[0] - before


def _operations(work: Callable[[], object]) -> int:
    """Return the number of PyTorch's operations, views included."""

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        work()
    return counting.count


def _show(findings: Findings, console: Console) -> None:
    table = Table(title=f"ResNet-{findings['depth']}, {findings['paths']} paths: the host's milliseconds per batch")
    for column in ("engine", "BN", "precision"):
        table.add_column(column)
    for column in ("plan", "record", "walk", "launches", "record", "walk", "batch", "operations"):
        table.add_column(column, justify="right")

    def shown(part: Findings, *keys: str) -> list[str]:
        return [f"{part[key]:.2f}" if isinstance(part.get(key), float) else str(part.get(key, "")) for key in keys]

    for row in findings["rows"]:
        replayed = row.get("replayed", row["launched"])
        table.add_row(
            row["engine"],
            row["bn"],
            row["precision"],
            *shown(row, "plan_ms"),
            *shown(row["launched"], "record_ms", "walk_ms", "launches"),
            *shown(replayed, "record_ms", "walk_ms", "batch_ms", "operations"),
        )
    console.print(table)
    console.print("left: launched one by one; right: replayed as graphs, record and walk together in `batch`")
    goals = ", ".join(f"{engine} {limit:g}" for engine, limit in findings["goals_ms"].items())
    console.print(f"goals for a batch: {goals} ms")


if __name__ == "__main__":
    sys.exit(main())
