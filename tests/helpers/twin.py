"""The cuda engine's kernels on the host, by their twin; the small arguments that its ops are tried with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import pathnet
from helpers.cases import Case
from pathnet.engines import cuda
from pathnet.engines.cuda import CudaEngine, CudaWalk
from pathnet.engines.engine import Job
from pathnet.engines.forms import unsupported_form
from pathnet.models import ResidualNet


class Twin(CudaEngine):
    """The engine with its kernels on the host, for networks on the CPU."""

    name = "twin"
    device_type = "cpu"

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, job: Job) -> str | None:
        return unsupported_form(job.net, job.bn) or cuda.refusal(job, self.shared_bytes(job.device))


def job_of(net: ResidualNet, y0_shape: Sequence[int], precision: Any) -> Job:
    return Job(net, "running", precision, y0_shape, torch.device("cpu"))


GPUS = {"99 KB": 101376, "163 KB": 166912, "227 KB": 232448}
"""Shared memory of a thread block, in bytes: of RTX 30, 40 and 50, L4, L40S; of an A100; of H100, H200, B200."""


GPU = os.environ.get("PATHNET_GPU")
"""A key of `GPUS`: then every test here runs at that size, and not at the one that it is for."""


FEW = 57344
"""Bytes that suffice for every network here: less than any GPU has, so small images use windows too."""


def taking_turns(seeds: int, all_seeds: int) -> pytest.MarkDecorator:
    """Parametrise by the first seeds with few bytes and with those of each GPU in turn; on one GPU by all seeds."""
    if GPU:
        cases = [(seed, GPUS[GPU]) for seed in range(all_seeds)]
    else:
        cases = [(seed, size) for seed in range(seeds) for size in (FEW, list(GPUS.values())[seed % 3])]
    return pytest.mark.parametrize(("seed", "shared_bytes"), cases, indirect=["shared_bytes"])


SMALL = Case("small", 14, width=16, side=6, batch=3, shortcut="pad")


def small_tape(precision: Any = "float32") -> pathnet.Tape:
    net, (images, labels) = SMALL.net(), SMALL.images()
    return pathnet.record(net, images, labels, engine="twin", precision=precision)


def arguments(precision: Any = "float32", gradients: bool = True, routing: Tensor | None = None) -> dict[str, Any]:
    """Return arguments of `ops.cuda_backward_running`, by name."""
    tape = small_tape(precision)
    record = tape._record
    assert isinstance(record.walk, CudaWalk)
    program = record.walk.network.backward
    routing = torch.randn(3, tape.n, 2) if routing is None else routing
    return {
        "grad": record.start.mantissa[None],
        "exponent": record.start.exponent[None],
        "routing": routing,
        "schedule": scheduled(torch.arange(len(routing)), torch.zeros(len(routing))),
        "program": program.host,
        "packed": program.device,
        "relu_bits": record.walk.relu_bits,
        "gradients": gradients,
    }


def scheduled(order: Tensor, starts: Tensor) -> Tensor:
    """Return int32 [2, P]: the order of the paths, and the gradient that each starts from."""
    return torch.stack([order.int(), starts.int()])


def sample(inputs: dict[str, Any], part: slice) -> dict[str, Any]:
    """Return the arguments that have samples, for a slice of the samples."""
    chosen = {name: inputs[name][:, part].contiguous() for name in ("grad", "exponent")}
    return {**chosen, "relu_bits": inputs["relu_bits"][part]}


def forward_arguments(record: bool) -> dict[str, Any]:
    tape = small_tape()
    network = tape._record.walk.network  # type: ignore[attr-defined]
    program = network.forward
    routing = torch.ones(1, tape.n, 2) if record else torch.randn(2, tape.n, 2)
    return {
        "y0": tape._record.y0,
        "routing": routing,
        "order": torch.arange(len(routing), dtype=torch.int32),
        "program": program.host,
        "packed": program.device,
        "affine": network.affine,
        "record": record,
    }
