"""An engine's self-check: its blocks and images, the errors it notices, its resources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pathnet import native
from pathnet.engines import cuda, self_check
from pathnet.engines.cuda import CudaEngine, CudaPrepared, CudaWalk, ops, refusal
from pathnet.engines.engine import Job
from pathnet.engines.tables import UnitColumn
from pathnet.models import PreactBlock, ResidualNet, preact_resnet, preact_resnet_imagenet, resnet
from pathnet.recording import Precision, snapshot
from pathnet.scaling import ScaledGradient

CPU = torch.device("cpu")

on_the_twin = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def check(
    net: ResidualNet, shape: tuple[int, int, int], precision: Precision = "float32", engine: CudaEngine | None = None
) -> str | None:
    job = job_of(snapshot(net, "running", torch.float32), shape, precision)
    return self_check.disagreement(engine or CudaEngine(), job, small=False)


def job_of(net: ResidualNet, shape: tuple[int, int, int], precision: Precision = "float32") -> Job:
    return Job(net, "running", precision, shape, CPU)


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_reasons", {})


@pytest.mark.parametrize(
    ("net", "positions"),
    [
        (preact_resnet(110), [0, 18, 19, 36, 37]),
        # The first has no ReLU before it.
        (resnet(110), [0, 1, 18, 19, 36, 37]),
        (preact_resnet_imagenet(50, width=4), [0, 1, 3, 4, 7, 8, 13, 14]),
        (preact_resnet(8), [0, 1, 2]),
    ],
    ids=["preact-110", "resnet-110", "bottleneck-50", "preact-8"],
)
def test_each_form_of_block_is_taken_once(net: ResidualNet, positions: list[int]) -> None:
    assert self_check._distinct(net) == [net.blocks[position] for position in positions]


def test_a_form_that_comes_back_is_taken_again_where_shapes_need_it() -> None:
    def block(channels: int, width: int, kernel: int = 3) -> PreactBlock:
        return PreactBlock(channels, (kernel, 3), (width, width), 1, "projection")

    blocks = [block(4, 4), block(4, 4, 5), block(4, 6), block(6, 4), block(4, 4), block(4, 6)]
    net = ResidualNet(torch.nn.Identity(), blocks, torch.nn.Identity())
    assert self_check._distinct(net) == [*blocks[:4], blocks[5]]


@pytest.mark.parametrize(
    ("whole", "small"), [((16, 32, 32), (16, 19, 25)), ((16, 28, 32), (16, 19, 25)), ((16, 5, 8), (16, 5, 7))]
)
def test_images_are_small(whole: tuple[int, int, int], small: tuple[int, int, int]) -> None:
    assert self_check._small_shape(self_check._distinct(preact_resnet(20)), whole) == small


@on_the_twin
def test_the_check_agrees_and_draws_none_of_the_programs_numbers() -> None:
    large, small = preact_resnet(110), preact_resnet(20, 8)
    state = torch.random.get_rng_state()
    assert check(large, (16, 32, 32)) is check(small, (8, 9, 9), "bfloat16") is None
    assert torch.equal(torch.random.get_rng_state(), state)


@on_the_twin
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_networks_own_weights_do_not_count(precision: Precision) -> None:
    net = preact_resnet(14, 8)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    assert check(net, (8, 8, 8), precision) is None


@on_the_twin
def test_a_routing_that_nothing_comes_through_is_no_disagreement() -> None:
    """Use one channel and a few pixels, where a whole block's sum may be below zero."""
    blocks = [PreactBlock(1, (3, 3), (2, 1), 1, "pad"), PreactBlock(1, (3, 3), (3, 3), 2, "projection")]
    net = ResidualNet(torch.nn.Identity(), blocks, torch.nn.Identity())
    trial = self_check._trial(self_check._distinct(net), "running", (1, 1, 5))
    results = self_check._run(CudaEngine(), trial, job_of(net, (1, 1, 5)))
    nothing = results.outputs.flatten(1).norm(dim=1) == 0
    assert nothing.any()
    assert check(net, (1, 1, 5)) is None
    wrong = results.outputs + 1e-3 * nothing[:, None, None, None, None]
    assert self_check._largest_error(trial, replace(results, outputs=wrong)) > 1e-4


@on_the_twin
def test_networks_of_the_same_forms_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    right = CudaPrepared.record
    monkeypatch.setattr(CudaPrepared, "record", lambda *arguments: recorded.append(1) or right(*arguments))  # type: ignore[func-returns-value]
    for net, shape in (
        (preact_resnet(8, 4), (4, 8, 8)),
        (preact_resnet(8, 4), (4, 8, 8)),
        (preact_resnet(8, 4, shortcut="pad"), (4, 8, 8)),
        (preact_resnet(14, 4), (4, 8, 8)),
        (preact_resnet(20, 4), (4, 8, 8)),
    ):
        assert check(net, shape) is None
    assert len(recorded) == 3


def scaled(factor: float) -> Callable[..., Any]:
    """Return a wrapper that multiplies results by a factor."""

    def wrap(right: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*arguments: Any) -> Any:
            result = right(*arguments)
            if isinstance(result, Tensor):
                return result * factor
            if isinstance(result, ScaledGradient):
                return result._replace(mantissa=result.mantissa * factor)
            return result[0] * factor, *result[1:]

        return wrong

    return wrap


@on_the_twin
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (CudaPrepared, "record"),
        (CudaWalk, "norms"),
        (CudaWalk, "routed_backward"),
        (CudaPrepared, "routed_forward"),
    ],
)
def test_each_part_that_is_wrong_is_noticed(kind: type, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, part, scaled(1.03)(getattr(kind, part)))
    said = check(preact_resnet(8, 4), (4, 8, 8))
    assert said == "it disagrees with the reference on a small input (relative error 0.03 in float32)"


@on_the_twin
def test_what_is_wrong_in_blocks_of_the_networks_own_width_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a width that a fixed network for the check would hardly have."""
    right = cuda.tables

    def wrong(net: ResidualNet, *job: Any) -> Any:
        network = right(net, *job)
        for channels, offset in network.units[:, [UnitColumn.CHANNELS, UnitColumn.WEIGHTS]].tolist():
            if channels == 24:
                network.weights[offset] += 1.0
        return network

    monkeypatch.setattr(cuda, "tables", wrong)
    assert check(preact_resnet(20), (16, 8, 8)) is None
    said = check(preact_resnet(20, 12), (12, 8, 8))
    assert said is not None and said.startswith("it disagrees with the reference on a small input")


@on_the_twin
def test_an_engine_that_fails_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered\nand more")

    monkeypatch.setattr(CudaWalk, "norms", fails)
    said = check(preact_resnet(8, 4), (4, 8, 8))
    assert said == "its self-check failed (an illegal memory access was encountered)"


@on_the_twin
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kilobytes", [48, 99, 163])
def test_the_check_needs_no_more_shared_memory_than_the_network(
    kilobytes: int, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that fit a GPU's shared memory pass their check there."""
    monkeypatch.setattr(CudaEngine, "twin_shared_bytes", kilobytes << 10)
    fitting = 0
    for width, side in ((4, 4), (4, 8), (4, 16), (8, 6), (8, 12), (16, 6), (16, 16)):
        net = preact_resnet(8, width)
        if refusal(job_of(net, (width, side, side), precision), kilobytes << 10) is None:
            assert check(net, (width, side, side), precision) is None, (width, side)
            fitting += 1
    assert fitting > 0


@on_the_twin
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_the_check_runs_the_forms_of_the_networks_programs(
    kilobytes: int, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the forms for every GPU: resident images or windows, whole or sliced weights."""
    monkeypatch.setattr(CudaEngine, "twin_shared_bytes", kilobytes << 10)
    monkeypatch.setattr(CudaEngine, "unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    net, shape, forms = preact_resnet(110), (16, 32, 32), []

    def noted(engine: CudaEngine, trial: Any, *job: Any) -> None:
        for copied, images in ((net, shape), (trial.net, trial.y0.shape[1:])):
            network = CudaEngine().prepare(job_of(copied, images, precision))
            forms.append([ops.cuda_form(program.host) for program in (network.backward, network.forward)])

    monkeypatch.setattr(self_check, "_check", noted)
    monkeypatch.setattr(CudaEngine, "shared_bytes", lambda self, device: kilobytes << 10)
    job = replace(job_of(net, shape, precision), device=torch.device("cuda"))
    assert CudaEngine().unsupported(job) is None
    assert forms[0] == forms[1]


def test_what_is_to_be_got_ready_is_the_work_itself() -> None:
    """The work runs twice, and the first run is not judged."""
    done: list[str] = []

    class Engine(CudaEngine):
        def prepare(self, job: Job) -> CudaPrepared:
            done.append("work")
            raise ValueError("no further")

    def ahead(work: Callable[[], object]) -> None:
        with pytest.raises(ValueError, match="no further"):
            work()
        done.append("ready")

    net = snapshot(preact_resnet(8, 4), "running", torch.float32)
    assert self_check.disagreement(Engine(), job_of(net, (4, 8, 8)), ahead) == "its self-check failed (no further)"
    assert done == ["work", "ready", "work"]
