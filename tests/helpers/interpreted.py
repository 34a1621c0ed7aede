"""The triton engine in Triton's interpreter, for networks on the CPU, and small networks for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import pathnet
from helpers.cases import measured_net
from pathnet.engines.engine import Job
from pathnet.engines.forms import unsupported_form
from pathnet.engines.triton import TritonEngine, TritonWalk
from pathnet.engines.triton.limits import unsupported_side
from pathnet.models import ResidualNet

__all__ = ["MODES", "Interpreted", "recorded", "small_net", "walk_of"]

MODES = ["running", "batch"]


class Interpreted(TritonEngine):
    """The engine for networks on the CPU."""

    name = "interpreted"
    device_type = "cpu"

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, job: Job) -> str | None:
        return unsupported_form(job.net, job.bn) or unsupported_side(job.net)


def recorded(net: ResidualNet, images: Tensor, labels: Tensor, bn: Any, precision: Any = "float32") -> pathnet.Tape:
    return pathnet.record(net, images, labels, bn=bn, engine="interpreted", precision=precision)


def walk_of(tape: pathnet.Tape) -> TritonWalk:
    assert isinstance(tape._record.walk, TritonWalk)
    return tape._record.walk


def small_net(seed: int, blocks: int = 3) -> tuple[ResidualNet, Tensor, Tensor]:
    """Return the first network from a seed on that is of a measured kind and has at most that many blocks."""
    for measured_seed in range(100 * seed, 100 * seed + 100):
        net, images, labels = measured_net(measured_seed, small=True)
        if net.n <= blocks:
            return net, images, labels
    raise AssertionError("no such network")
