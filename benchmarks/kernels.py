"""The Triton kernels of each step of a run, listed without a launch, and their parallel compilation.

A piece of work is a step's use of the triton engine, in the step's own shapes. Its results mean nothing while kernels
are not launched, so it calls the engine directly, below the checks of values.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import pathnet
from benchmarks.cases import FULL, Setup
from benchmarks.fused import IMAGENET_PRECISION, imagenet_network
from benchmarks.outcome import Failed, Findings, Unavailable
from benchmarks.results import ROOT
from pathnet.chunks import in_chunks
from pathnet.engines.engine import Job
from pathnet.engines.self_check import trial_run
from pathnet.engines.triton import TritonEngine
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.packing import block_network, norm_tensors
from pathnet.models import ResidualNet, preact_resnet
from pathnet.models.residual_net import Block, FusedForm
from pathnet.recording import BatchNormMode, Precision, snapshot
from pathnet.scaling import ScaledGradient

if TYPE_CHECKING:
    from pathnet.engines.triton.ahead import Kernel

__all__ = ["compilations", "compile_ahead", "counted", "new_kernels"]

Work = Callable[[], object]

MOST_BLOCKS = 6
"""Largest number of blocks of networks whose sums by length are computed. Deeper ones take minutes on a CPU, and the
same
kernels."""


def compile_ahead(setup: Setup) -> Findings:
    """Compile all kernels of all steps on all cores, before any of them is timed."""
    if reason := TritonEngine().unavailable():
        raise Unavailable(reason)
    from pathnet.engines.triton.ahead import compile_all

    began = time.perf_counter()
    new = new_kernels(setup)
    findings: Findings = {"kernels": {step: len(kernels) for step, kernels in new.items()}}
    findings["collecting_s"], began = time.perf_counter() - began, time.perf_counter()
    compile_all([kernel for kernels in new.values() for kernel in kernels])
    findings["compiling_s"] = time.perf_counter() - began
    if left := sum(map(len, new_kernels(setup).values())):
        raise Failed(f"{left} kernels are not compiled", findings)
    return findings


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the engine's kernels that this process compiles inside the context, because the cache on disk lacks
    them."""
    compiled: list[str] = []
    if importlib.util.find_spec("triton") is None:
        yield compiled
        return
    from triton import knobs

    def note(**compilation: Any) -> None:
        function = getattr(compilation["src"], "fn", None)
        if not compilation["cache_hit"] and getattr(function, "module", "").startswith("pathnet."):
            compiled.append(compilation["src"].name)

    before, knobs.compilation.listener = knobs.compilation.listener, note
    try:
        yield compiled
    finally:
        knobs.compilation.listener = before


def new_kernels(setup: Setup) -> dict[str, list[Kernel]]:
    """Return the kernels of each step that are not on disk and that no earlier step launches."""
    from pathnet.engines.triton.ahead import missing_for

    known: set[Kernel] = set()
    new: dict[str, list[Kernel]] = {}
    for step, step_works in works(setup).items():
        launched = dict.fromkeys(kernel for work in step_works for kernel in missing_for(work))
        new[step] = [kernel for kernel in launched if kernel not in known]
        known |= launched.keys()
    return new


def counted() -> tuple[dict[str, int], int]:
    """Return the numbers of an H100's kernels that each step needs first, and of those of a user's first number.

    The first number is of ResNet-110 in BN mode ``batch`` and bfloat16. The cache is empty; afterwards this process
    cannot launch kernels any more.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from pathnet.engines.triton.ahead import AbsentGpu, missing_for

    driver.set_active(AbsentGpu(GPUTarget("cuda", 90, 32)))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        setup = replace(FULL, device="cpu")
        steps = {step: len(kernels) for step, kernels in new_kernels(setup).items()}
        first = record_works(_network(setup), "batch", "bfloat16", setup.batch, setup.side, setup.side)
        return steps, len({kernel for work in first for kernel in missing_for(work)})


def works(setup: Setup) -> dict[str, list[Work]]:
    """Return the pieces of work of each step."""
    return {
        "triton_tests": list(_of_tests(setup.device)),
        "batch_sweep": list(_of_modes(setup, ("batch",))),
        "running_triton": list(_of_modes(setup, ("running",))),
        "training": list(_of_training(_network(setup).train(), setup.batch, setup.side, torch.bfloat16)),
        "imagenet": list(_of_imagenet(setup)),
    }


def _network(setup: Setup) -> ResidualNet:
    """Return the network of `benchmarks.cases.network` without its statistics, which take a forward pass."""
    return preact_resnet(setup.depth, setup.width).to(setup.device)


def _of_modes(setup: Setup, modes: tuple[BatchNormMode, ...]) -> Iterator[Work]:
    net = _network(setup)
    for bn in modes:
        for precision in setup.precisions:
            yield from record_works(net, bn, precision, setup.batch, setup.side, setup.side)  # type: ignore[arg-type]


def _of_imagenet(setup: Setup) -> Iterator[Work]:
    net, side, batch = imagenet_network(setup)
    for bn in ("running", "batch"):
        yield from record_works(net, bn, IMAGENET_PRECISION, batch, side, side)  # type: ignore[arg-type]


def _of_tests(device: str) -> Iterator[Work]:
    """Yield the works of the tests that need a GPU."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    from helpers.gpu_cases import FUSED, jobs

    for case, bn, precision in jobs():
        yield from record_works(case.net().to(device), bn, precision, case.batch, case.height, case.width)
    for case, training in FUSED:
        net = case.net().to(device).train(training)
        yield from _of_training(net, case.batch, case.side, torch.float32)


def record_works(
    net: ResidualNet, bn: BatchNormMode, precision: Precision, batch: int, height: int, width: int
) -> Iterator[Work]:
    """Yield the engine's self-check on such a network, and a record with all backward passes."""
    device = next(net.parameters()).device
    with torch.no_grad():
        y0 = net.stem(torch.zeros(batch, 3, height, width, device=device))
    job, engine = Job(snapshot(net, bn, torch.float32), bn, precision, y0.shape[1:], device), TritonEngine()
    yield trial_run(engine, job)

    def work() -> None:
        y, walk = engine.prepare(job).record(y0)
        exponent = torch.zeros(1 if bn == "batch" else batch, dtype=torch.int32, device=device)
        routing, start = pathnet.paths.routing(pathnet.paths.one_of_each_length(net.n)), ScaledGradient(y, exponent)
        for _ in in_chunks(routing, 1, partial(walk.norms, start), most=walk.max_routings()):
            pass
        if net.n <= MOST_BLOCKS:
            walk.sums_by_length_norms(start, routing[-1])

    yield work


def _of_training(net: ResidualNet, batch: int, side: int, dtype: torch.dtype) -> Iterator[Work]:
    """Yield a forward and backward pass of each block, to its parameters."""
    device = next(net.parameters()).device

    @torch.no_grad()
    def work() -> None:
        from pathnet.engines.triton.training import block_backward, block_forward, saved_for

        x = net.stem(torch.zeros(batch, 3, side, side, device=device)).to(dtype)
        for block in net:
            network = _block_network(block, x)
            forward = block_forward(network, x, 1.0, 1.0)
            saved = saved_for(network, batch, forward.bits, forward.normalized, forward.scales)
            block_backward(network, saved, forward.output, 1.0, 1.0)
            x = forward.output

    yield work


def _block_network(block: Block, x: torch.Tensor) -> TritonNetwork:
    """Return the network that `pathnet.nn.fused_residual` builds for an input [B, C, H, W]."""
    form = block.form()
    assert isinstance(form, FusedForm)
    convolutions = [unit.conv for unit in form.units]
    return block_network(
        x.shape[1:],
        x.dtype,
        [conv.weight for conv in convolutions + ([] if form.projection is None else [form.projection])],
        [tensor for unit in form.units for tensor in norm_tensors(unit, block.training)],
        [conv.stride[0] for conv in convolutions],
        [unit.bn.eps for unit in form.units],
    )
