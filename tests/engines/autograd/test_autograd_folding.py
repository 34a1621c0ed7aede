"""Routed forward passes that fold several states into one batch: the results of the passes one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.any_blocks import (
    IMAGE_NETS,
    TOKEN_NETS,
    Chooses,
    Counts,
    Gated,
    Masked,
    MaskedNet,
    Parallel,
    image_net,
    of_blocks,
    sequences,
)
from helpers.context_nets import scaled_inputs, scaled_net
from helpers.oracles import relative_error
from helpers.routed_networks import batch
from helpers.tolerances import EXACT_WALK
from torch import Tensor

import pathnet
from pathnet import chunks
from pathnet.engines.autograd import folding
from pathnet.models import Block, ResidualNet


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fold as many states as may be from the first visit of a block on; return what was chosen."""
    chosen: list[int] = []
    measured = folding.measured_width
    monkeypatch.setattr(folding, "VISITS", 0)
    monkeypatch.setattr(folding, "fastest", lambda candidates, *arguments: len(candidates) - 1)
    monkeypatch.setattr(
        folding, "measured_width", lambda *arguments: chosen.append(measured(*arguments)) or chosen[-1]
    )
    return chosen


def routings(n: int, parts: int = 2) -> Tensor:
    """Return routings that differ at the first three blocks and then share their steps, with zeros among them."""
    generator = torch.Generator().manual_seed(6)
    routing = torch.randn(2, n, parts, dtype=torch.float64, generator=generator)
    routing[0, :, 0] = 0
    routing[1, n // 2, 1:] = 0
    choices = torch.arange(40)[:, None] >> torch.arange(n).clamp(max=3) & 1
    choices[:, 3:] = 1
    return torch.cat(
        [routing[choices, torch.arange(n)], torch.randn(5, n, parts, dtype=torch.float64, generator=generator)]
    )


def compare(net: ResidualNet, inputs: Any, bn: Any = "running", parts: int = 2) -> None:
    routing = routings(net.n, parts)
    expected = pathnet.Recorder(net, bn, "reference", "float64").routed_outputs(inputs, routing)
    outputs = pathnet.Recorder(net, bn, "autograd", "float64").routed_outputs(inputs, routing)
    for output, truth in zip(outputs, expected, strict=True):
        assert relative_error(output, truth) < EXACT_WALK


@pytest.mark.parametrize("kind", IMAGE_NETS)
def test_convolutional_networks(kind: str, widths: list[int]) -> None:
    compare(image_net(kind, "running"), batch()[0])
    assert set(widths) == {8}


@pytest.mark.parametrize("kind", TOKEN_NETS)
def test_networks_of_sequences(kind: str, widths: list[int]) -> None:
    net = TOKEN_NETS[kind]()
    compare(net, sequences())
    assert widths.count(1) == sum(isinstance(block, Chooses) for block in net)
    assert widths.count(8) == net.n - widths.count(1)


def test_residual_modules_in_parallel(widths: list[int]) -> None:
    for parts in (2, 3):
        compare(of_blocks([Parallel(), Parallel(), Parallel()]), sequences(), parts=parts)
    assert set(widths) == {8}


def test_a_context_repeats_with_the_batch(widths: list[int]) -> None:
    net = of_blocks([Masked() for _ in range(4)])
    compare(
        MaskedNet(net.stem, list(net), net.head),  # type: ignore[arg-type]
        {"x": sequences(), "mask": sequences(9)[..., 0].abs()},
    )
    inputs, _ = scaled_inputs(3)
    compare(scaled_net(4).double(), tuple(tensor.double() for tensor in inputs))
    assert set(widths) == {8}


@pytest.mark.parametrize(("bn", "decides"), [("batch", False), ("running", True)])
def test_a_batch_that_is_one_object_never_folds(
    bn: Any, decides: bool, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = image_net("preact", bn)
    net.decides_by_batch = decides
    monkeypatch.setattr(folding, "_folded", lambda *arguments: pytest.fail("folded"))
    compare(net, batch()[0], bn)
    assert not widths


class Centres(Block):
    """A block that subtracts the mean of its batch: its samples depend on each other."""

    def residual(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Refuses(Block):
    """A block that takes batches of one size alone."""

    def residual(self, x: Tensor) -> Tensor:
        if len(x) != len(sequences()):
            raise KeyError("of whatever kind")
        return x.tanh()


@pytest.mark.parametrize("kind", [Centres, Refuses, Chooses, Counts])
def test_blocks_that_take_no_batch_of_several_states_run_one_by_one(kind: type[Block], widths: list[int]) -> None:
    compare(of_blocks([kind(), Gated(), kind(), Gated()]), sequences())
    assert widths == [1, 8, 1, 8]


def test_no_more_in_a_batch_than_memory_has_room_for(widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, sizes = sequences(), list[int]()
    folded = folding._folded
    monkeypatch.setattr(
        folding, "_folded", lambda block, states, row: sizes.append(len(states)) or folded(block, states, row)
    )
    for room, most in ((9, 8), (7, 4), (3, 2), (1, 1)):
        sizes.clear()
        monkeypatch.setattr(chunks, "CHUNK_BYTES", room * inputs.nbytes)
        net = TOKEN_NETS["language model"]()
        prepared = pathnet.Recorder(net, engine="autograd", precision="float64")
        prepared.routed_outputs(inputs, routings(net.n)[:room])
        walked = prepared._service.prepared.routed_forward(net.stem(inputs), routings(net.n))  # type: ignore[union-attr]
        assert len(walked) == len(routings(net.n))
        assert max(sizes, default=1) == most
    # A choice that was measured with more room.
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 9 * inputs.nbytes)
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64")
    for room in (9, 3, 1):
        recorder.routed_outputs(inputs, routings(net.n)[:9])
        prepared = recorder._service.prepared  # type: ignore[union-attr]
        monkeypatch.setattr(chunks, "CHUNK_BYTES", room * inputs.nbytes)
        sizes.clear()
        prepared.routed_forward(net.stem(inputs), routings(net.n))
        assert max(sizes, default=1) <= room and (max(sizes, default=1) > 1) == (room > 1)


def test_a_short_call_measures_nothing_and_a_long_one_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(folding, "measured_width", lambda *arguments: measured.append(1) or 1)
    net, inputs = TOKEN_NETS["gated"](), sequences()
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64")
    recorder.routed_outputs(inputs, routings(net.n))
    assert not measured
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(folding.VISITS + 20, net.n, 2, dtype=torch.float64, generator=generator)
    recorder.routed_outputs(inputs, many)
    assert len(measured) == net.n
