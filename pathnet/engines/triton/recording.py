"""The forward pass that leaves a record: on an NVIDIA or AMD GPU one graph, captured once a batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pathnet import scaling
from pathnet.engines.triton.endings import joined
from pathnet.engines.triton.forward import forward_unit
from pathnet.engines.triton.launch import launching
from pathnet.engines.triton.network import TritonNetwork
from pathnet.engines.triton.plan import Plan, plan_forward
from pathnet.engines.triton.routed_forward import ends, start
from pathnet.engines.triton.state import Kept, Tables

__all__ = ["Recording", "recording"]


class Recording:
    """Takes ``y_0`` [B, C_0, H_0, W_0] of one size to ``y_n`` [B, C, H, W] and what the walks back need."""

    def __init__(self, network: TritonNetwork, y0: Tensor) -> None:
        self.network, self.batch, device = network, len(y0), y0.device
        self.plan = plan_forward(network.blocks, [[(1.0, 1.0)] * len(network.blocks)])
        self.tables = Tables(self.plan, device)
        self.sources = torch.tensor(_sources(network, self.plan), device=device)
        self.bits_starts = network.bits_starts(self.batch)
        self.normalized_begin = network.normalized_starts(self.batch)
        self.normalized_starts = torch.tensor(self.normalized_begin[:-1], device=device)
        self.scales = None if network.bn == "batch" else self._scales(network.statistics[:, 1])

    def __call__(self, y0: Tensor) -> tuple[Tensor, Kept]:
        network, by_batch = self.network, self.network.bn == "batch"
        kept = Kept(
            torch.empty(self.bits_starts[-1], dtype=torch.uint8, device=y0.device),
            self.bits_starts,
            torch.empty(self.normalized_begin[-1] if by_batch else 0, dtype=network.walk_dtype, device=y0.device),
            self.normalized_begin,
            self.normalized_starts,
            network.affine[:, 0] if self.scales is None else self.scales,
        )
        activations = start(network, self.plan, self.tables, y0)
        for task in self.plan.launches:
            (joined if task.ending else forward_unit)(network, activations, task, kept)
        if by_batch:
            kept = replace(kept, scales=self._scales(activations.statistics[self.sources, 1]))
        return ends(network, self.plan, activations)[0].contiguous(), kept

    def _scales(self, variances: Tensor) -> Tensor:
        """gain / deviation of all units, as the walk back takes them; variances float32 [units, widest]."""
        scales = self.network.affine[:, 0] * (variances + self.network.epsilon).rsqrt()
        exponents = self.network.scale_exponents
        return scales if exponents is None else scaling.times_power_of_two(scales, -exponents)


def _sources(network: TritonNetwork, plan: Plan) -> list[int]:
    """The states that units, and behind them blocks' ends, read; each launch has one row."""
    sources: dict[int, int] = {}
    for task in plan.launches:
        block, row = network.blocks[task.block], plan.rows[task.first]
        if task.ending:
            sources.update(zip(block.ends, (row[0], row[2]), strict=False))
        elif task.residual:
            sources[block.first + task.unit] = row[0]
    return [sources[unit] for unit in range(len(sources))]


class _Graph:
    """The same, captured: a hundred launches cost what one costs. What it leaves is copied for every record."""

    def __init__(self, run: Recording, y0: Tensor) -> None:
        self.y0 = y0.clone()
        # Once outside of the capture, in which nothing may be compiled or loaded.
        ahead = torch.cuda.Stream(y0.device)  # type: ignore[no-untyped-call]
        ahead.wait_stream(torch.cuda.current_stream(y0.device))
        with torch.cuda.stream(ahead):
            run(self.y0)
        torch.cuda.current_stream(y0.device).wait_stream(ahead)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.y, self.kept = run(self.y0)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def __call__(self, y0: Tensor) -> tuple[Tensor, Kept]:
        # On whatever stream the last record was made: the graph writes where that is copied from.
        torch.cuda.current_stream(y0.device).wait_event(self.copied)
        self.y0.copy_(y0)
        self.graph.replay()
        kept = self.kept
        copied = replace(kept, bits=kept.bits.clone(), normalized=kept.normalized.clone(), scales=kept.scales.clone())
        y = self.y.clone()
        self.copied.record()
        return y, copied


def recording(network: TritonNetwork, y0: Tensor) -> Callable[[Tensor], tuple[Tensor, Kept]]:
    """The recording pass for batches of the size of ``y0``."""
    run = Recording(network, y0)
    return _Graph(run, y0) if y0.device.type == "cuda" and launching() else run
