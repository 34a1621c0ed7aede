"""Invariants of every pass: threads, grouping, denormal numbers, memory."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plans import (
    BACKWARD,
    FORWARD,
    GROUP,
    IDENTITY,
    PROJECTION,
    Plan,
)
from helpers.random_plans import random_routings
from helpers.walk_cases import (
    MODES,
    plan,
    plan_of_kind,
)
from torch import Tensor

from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def walk_back(network: Plan, bn: str, bf16: bool) -> tuple[Tensor, ...]:
    return BACKWARD[bn](*network.backward_arguments(bn, bf16))


def walk_forward(network: Plan, bn: str) -> tuple[Tensor, ...]:
    return FORWARD[bn](*network.forward_arguments(bn))[:1]


WALKS: dict[str, Callable[[Plan], tuple[Tensor, ...]]] = {
    **{f"back-{bn}-float32": functools.partial(walk_back, bn=bn, bf16=False) for bn in MODES},
    **{f"back-{bn}-bfloat16": functools.partial(walk_back, bn=bn, bf16=True) for bn in MODES},
    **{f"forward-{bn}": functools.partial(walk_forward, bn=bn) for bn in MODES},
}
"""Walks whose results have one row for each routing."""


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def with_many_routings(network: Plan) -> Plan:
    """Return the plan with an odd number of routings, which have tails and heads in common."""
    rng = np.random.default_rng(5)
    more = [random_routings(rng, len(network.blocks)) for _ in range(2)]
    return replace(network, routing=torch.cat([network.routing, *more])[:-2].contiguous())


@pytest.mark.parametrize("walk", WALKS)
def test_results_are_bit_equal_for_any_number_of_threads(
    isa: str, walk: str, set_threads: Callable[[int], None]
) -> None:
    for seed in (1, 4):
        network = with_many_routings(plan(seed, wide=seed == 4))
        set_threads(1)
        whole = WALKS[walk](network)
        for count in (2, 3, 5):
            set_threads(count)
            assert all(map(torch.equal, whole, WALKS[walk](network)))


@pytest.mark.parametrize("bn", MODES)
def test_records_are_bit_equal_for_any_number_of_threads(
    isa: str, bn: str, set_threads: Callable[[int], None]
) -> None:
    arguments = plan_of_kind(PROJECTION, blocks=3).forward_arguments(bn, record=True)
    set_threads(1)
    whole = FORWARD[bn](*arguments)
    for count in (2, 3, 5):
        set_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(whole, FORWARD[bn](*arguments), strict=True))


@pytest.mark.parametrize("walk", WALKS)
def test_results_are_bit_equal_for_any_grouping_and_order(isa: str, walk: str) -> None:
    network, call = with_many_routings(plan(1, wide=False)), WALKS[walk]
    whole, count = call(network), len(network.routing)
    shuffled = np.random.default_rng(0).permutation(count)
    twice = np.repeat(np.arange(count), 2)
    for order in (shuffled, twice, *np.split(np.arange(count), [7, 8, 19]), *np.arange(0, count, 4)[:, None]):
        part = call(replace(network, routing=network.routing[order].contiguous()))
        assert all(torch.equal(a[order], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("bn", MODES)
def test_norms_alone_are_those_beside_the_gradients(isa: str, bn: str) -> None:
    network = plan(2, wide=False)
    both, alone = (BACKWARD[bn](*network.backward_arguments(bn, gradients=wanted)) for wanted in (True, False))
    assert torch.equal(both[0], alone[0]) and len(alone[1]) == len(alone[2]) == 0


@pytest.mark.parametrize("bn", MODES)
def test_no_paths_and_no_samples(bn: str) -> None:
    network = plan(2, wide=False)
    none = replace(network, routing=network.routing[:0])
    assert [len(result) for result in BACKWARD[bn](*none.backward_arguments(bn))] == [0, 0, 0]
    assert FORWARD[bn](*none.forward_arguments(bn))[0].shape == (0, *network.grad.shape)
    empty, exponents = network.without_samples(), 0 if bn == "running" else 1
    walked_back = BACKWARD[bn](*empty.backward_arguments(bn))
    assert [list(result.shape[:2]) for result in walked_back] == [[9, 0], [9, 0], [9, exponents]]
    assert FORWARD[bn](*empty.forward_arguments(bn))[0].shape == (9, *empty.grad.shape)


def flushes_denormals() -> bool:
    """Return whether this thread treats denormal numbers as zeros."""
    least, one = 5e-324, 1.0
    return least * one == 0.0


@pytest.mark.parametrize("walk", WALKS)
def test_the_callers_treatment_of_denormals_is_left_as_it_was(isa: str, walk: str) -> None:
    network = plan(1, wide=False)
    try:
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            before = flushes_denormals()
            WALKS[walk](network)
            assert flushes_denormals() == before == flush
    finally:
        torch.set_flush_denormal(False)


def peak_bytes() -> int:
    """Return the largest memory that this process has held since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def growth(call: Callable[[], Any]) -> int:
    """Return by how many bytes a call's peak exceeds the memory that was held before it."""
    forget_peak()
    before = peak_bytes()
    call()
    return peak_bytes() - before


@pytest.mark.parametrize("bn", MODES)
def test_norms_of_many_paths_take_no_more_memory_than_those_of_few(bn: str) -> None:
    """BN mode ``batch`` runs as many passes side by side as 256 MB hold: here four."""
    try:
        forget_peak()
    except OSError:
        pytest.skip("the peak of a process's memory is measured through /proc")
    # In a process of its own, since a call grows by less where earlier tests have left memory to the process.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown, gradient, further = pool.apply(grown_by_few_and_many, (bn,))
    assert grown[1] < grown[0] + 3 * gradient and further * gradient > 6 * gradient


def grown_by_few_and_many(bn: str) -> tuple[list[int], int, int]:
    """Return the growth for few paths and for many, a gradient's bytes, and how many more the many are."""
    side = 48 if bn == "running" else 256
    blocks = torch.tensor([[i, 1, IDENTITY, -1, 1, side, side, 1, side, side, 0] for i in range(6)])
    network = one_channel(blocks, batch=4)
    few, many = (6, 60) if bn == "running" else (6, 24)
    codes = np.stack([np.unpackbits(np.uint8([i]))[2:] for i in range(64)])
    paths = torch.from_numpy(np.stack([1 - codes, codes], 2)).float()
    calls = [
        replace(network, routing=paths[:count].contiguous()).backward_arguments(bn, gradients=False)
        for count in (few, many)
    ]
    BACKWARD[bn](*calls[0])
    grown = [growth(lambda arguments=arguments: BACKWARD[bn](*arguments)) for arguments in calls]
    return grown, network.grad.numel() * GROUP * 4, many - few


def one_channel(blocks: Tensor, batch: int) -> Plan:
    """Return a plan whose blocks have one 1x1 convolution of one channel each."""
    n, (height, width) = len(blocks), blocks[0, 5:7].tolist()
    bits = height * width * 2
    units = [[1, height, width, 1, height, width, 1, 1, 0, i, i, i * bits] for i in range(n)]
    ones = torch.ones(batch, 1, height, width, dtype=torch.float64)
    images = torch.randn(batch, 1, height, width, generator=torch.Generator().manual_seed(0))
    return Plan(
        blocks,
        torch.tensor(units),
        *(torch.full((n,), value) for value in (0.5, 1.0, 0.0, 1e-5, 0.0)),
        [ones] * n,
        [0 * ones] * n,
        images,
        images,
        torch.zeros(batch, dtype=torch.int32),
        torch.tensor([0.0, 1.0]).expand(1, n, 2).contiguous(),
    )
