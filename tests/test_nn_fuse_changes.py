"""Blocks that change after their network was fused: what kernels cannot run falls back, and all else is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fused_networks import batch, count_runs, network
from torch import Tensor, nn

from pathnet import native
from pathnet.nn import fuse

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_runs(monkeypatch)


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def hooked(kind: str) -> Callable[[Any], Any]:
    return lambda block: getattr(block.convs[0], f"register_{kind}")(lambda *_: None)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward hook": hooked("forward_hook"),
    "forward pre-hook": hooked("forward_pre_hook"),
    "backward hook": hooked("full_backward_hook"),
    "backward pre-hook": hooked("full_backward_pre_hook"),
    "pruning": lambda block: nn.utils.prune.random_unstructured(block.convs[1], "weight", 0.5),
    "another class": lambda block: setattr(block.convs, "1", Halved(4, 4, 3, padding=1, bias=False)),
    "SyncBatchNorm": lambda block: setattr(block.bns, "0", nn.SyncBatchNorm(4).eval()),
    "a convolution with a bias": lambda block: setattr(block.convs, "0", nn.Conv2d(4, 4, 3, padding=1)),
    "a bias": lambda block: setattr(block.convs[1], "bias", nn.Parameter(torch.ones(4))),
    "dilation": lambda block: (
        setattr(block.convs[0], "dilation", (2, 2)),
        setattr(block.convs[0], "padding", (2, 2)),
    ),
    "a frozen BN": lambda block: block.bns[0].eval(),
    "dropout": lambda block: block.add_module("drop", nn.Dropout(0.5)),
    "a method": lambda block: setattr(block.bns[1], "forward", lambda x: x),
    "a class": lambda block: setattr(block.convs[0], "__class__", Halved),
    "a method of the block": lambda block: setattr(block, "branches", lambda x: (x, 0.5 * x)),
    "a scaled module": lambda block: (setattr(block, "survival", 0.5), setattr(block, "training", False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_changes_runs_its_modules_from_then_on(change: str, runs: list[str]) -> None:
    net, (x, _) = network(), batch()
    fused = fuse(net, "cpu")
    fused(x)
    expected = copy.deepcopy(net)
    for changed in (net, expected):
        torch.manual_seed(3)
        CHANGES[change](changed.blocks[0])
    runs.clear()
    assert fused.engines == ("none", *["cpu"] * 5) and list(fused.unfused) == [0]
    torch.testing.assert_close(fused(x), expected(x), rtol=1e-4, atol=1e-4)
    assert runs == ["cpu"] * 5


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "epsilon": lambda block: setattr(block.bns[0], "eps", 0.5),
    "momentum": lambda block: setattr(block.bns[1], "momentum", 0.9),
    "a parameter": lambda block: setattr(block.convs[0], "weight", nn.Parameter(torch.ones(4, 4, 3, 3))),
    "statistics": lambda block: setattr(block.bns[0], "running_mean", torch.ones(4)),
    "no statistics": lambda block: [
        setattr(bn, name, None) for bn in block.bns for name in ("running_mean", "running_var", "num_batches_tracked")
    ],
    "no count": lambda block: setattr(block.bns[0], "num_batches_tracked", None),
    "no count and no momentum": lambda block: [
        setattr(block.bns[0], name, None) for name in ("num_batches_tracked", "momentum")
    ],
    "tracking": lambda block: setattr(block.bns[0], "track_running_stats", False),
    "a module": lambda block: setattr(block.bns, "0", nn.BatchNorm2d(4, affine=False)),
    "a wider module": lambda block: (
        setattr(block.convs, "0", nn.Conv2d(4, 7, 3, padding=1, bias=False)),
        setattr(block.convs, "1", nn.Conv2d(7, 4, 3, padding=1, bias=False)),
        setattr(block.bns, "1", nn.BatchNorm2d(7)),
    ),
    "a parametrization": lambda block: nn.utils.parametrizations.weight_norm(block.convs[1]),
}


@pytest.mark.parametrize("change", NUMBERS)
def test_numbers_that_change_are_seen_by_the_next_call(change: str, runs: list[str]) -> None:
    net, (x, _) = network(), batch()
    fused = fuse(net, "cpu")
    fused(x)
    NUMBERS[change](net.blocks[0])
    expected = copy.deepcopy(net)
    runs.clear()
    torch.testing.assert_close(fused(x), expected(x), rtol=1e-4, atol=1e-4)
    assert runs == ["cpu"] * 6
    for buffer, other in zip(net.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-4, atol=1e-5)


def test_hooks_of_all_modules_run_while_they_are_there(runs: list[str]) -> None:
    net, (x, _) = network(), batch()
    fused = fuse(net, "cpu")
    fused(x)
    expected = copy.deepcopy(net)
    runs.clear()
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 0.5 * output if isinstance(module, nn.Conv2d) else None
    ):
        torch.testing.assert_close(fused(x), expected(x))
        assert fused.unfused[3] == "all modules have hooks, which fused kernels do not call" and runs == []
    fused(x)
    assert runs == ["cpu"] * 6
