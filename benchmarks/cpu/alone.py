"""Measurements in a separate process: with another instruction set, and of peak memory. Prints one line of JSON."""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import batch, network, path_flops
from benchmarks.cpu.budget import Budget
from benchmarks.cpu.cases import FULL, SMALL, Sizes, codes_of_any_length, with_batch
from benchmarks.cpu.competitors import PRECISIONS, recorder
from benchmarks.cpu.peaks import Peaks, matrix_product
from benchmarks.outcome import Findings
from pathnet import native

__all__ = ["forget_peak", "peak_bytes"]

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_share(sizes: Sizes, budget: Budget) -> Findings:
    """Time the backward pass through all modules in turn with the peaks; return median operations a second.

    Rounds stop when no time for another is left, but not before the first. The operations of a backward pass are
    those of direct convolutions; minimal filtering needs fewer, so it can exceed a peak.
    """
    net, peaks = network(sizes.setup), Peaks.compile()
    path = torch.ones(1, net.n, dtype=torch.uint8)
    flops = path_flops(net, sizes.setup.side, path) * sizes.setup.batch
    tapes = {precision: recorder(net, "running", precision)(*batch(sizes.setup)) for precision in PRECISIONS}
    rates: dict[str, list[float]] = {}
    began, done = budget.clock(), 0
    for round_ in range(sizes.setup.rounds + 1):
        if done > 0 and (budget.clock() - began) / round_ > budget.left:
            break
        done = round_
        measured: dict[str, float] = {}
        for precision, tape in tapes.items():
            start = time.perf_counter()
            tape.path_gradient_norms(path)
            measured[f"walk, {precision}"] = flops / (time.perf_counter() - start)
            measured[f"matrix product, {precision}"] = matrix_product(PRECISIONS[precision], sizes.peak_seconds)
        for name, peak in (("multiply-adds, float32", peaks.fma), ("dot products, bfloat16", peaks.dot)):
            if peak is not None:
                measured[name] = peak(sizes.peak_seconds)
        for name, rate in measured.items():
            # The first round warms up.
            rates.setdefault(name, []).extend([rate] if round_ else [])
    medians = {name: float(np.median(repeats)) for name, repeats in rates.items()}
    loops = {"float32": "multiply-adds, float32", "bfloat16": "dot products, bfloat16"}
    best = {p: loops[p] if loops[p] in medians else f"matrix product, {p}" for p in loops}
    return {
        "rounds": done,
        "instruction_set": native.build_facts()["selected_instruction_set"],
        "flops_per_s": medians,
        "no_loop_because": peaks.why_not,
        "peak": best,
        "share_of_peak": {p: medians[f"walk, {p}"] / medians[peak] for p, peak in best.items()},
        "share_of_matrix_product": {p: medians[f"walk, {p}"] / medians[f"matrix product, {p}"] for p in loops},
    }


def memory(sizes: Sizes, count: int) -> Findings:
    """Return the peak of resident memory, in bytes, before and after norms along ``count`` paths."""
    net = network(sizes.setup)
    tape = recorder(net, "running", "float32")(*batch(sizes.setup))
    tape.path_gradient_norms(codes_of_any_length(net.n, 1))
    forget_peak()
    before, start = peak_bytes(), time.perf_counter()
    tape.path_gradient_norms(codes_of_any_length(net.n, count))
    walks_s, after = time.perf_counter() - start, peak_bytes()
    grown = {"peak_bytes_before": before, "peak_bytes": after, "growth_bytes": after - before}
    return {"paths": count, **grown, "walks_s": walks_s}


def forget_peak() -> None:
    """Reset the peak to the memory resident now, if the system can: the forward pass takes more than backward
    ones.

    Memory that was freed goes back to the system first, or what follows would use it without growing.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        FORGET.write_text("5")


def peak_bytes() -> int:
    # Not by getrusage: on Linux a program inherits the maximum of the process that started it.
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.alone", description=__doc__)
    parser.add_argument("what", choices=["peak_share", "memory"])
    parser.add_argument("count", type=int, nargs="?", help="number of paths, for memory")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="number of images")
    parser.add_argument("--seconds", type=float, required=True, help="time limit")
    options = parser.parse_args()
    budget = Budget(options.seconds)
    torch.set_num_threads(options.threads)
    sizes = with_batch(SMALL if options.small else FULL, options.batch)
    print(json.dumps(peak_share(sizes, budget) if options.what == "peak_share" else memory(sizes, options.count)))


if __name__ == "__main__":
    main()
