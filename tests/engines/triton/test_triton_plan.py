"""Rows of a plan: none for blocks that are skipped, one for tails that agree; and the results of those rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.cases import Case, post_activation_net, random_net
from numpy.typing import NDArray
from torch import nn

from pathnet.models import PostactBlock, ResidualNet

pytest.importorskip("triton")

from helpers.walked_rows import SIZE, Maps, brute_force, row_results  # noqa: E402

from pathnet.engines.triton.network import FusedBlock  # noqa: E402
from pathnet.engines.triton.packing import network_of  # noqa: E402
from pathnet.engines.triton.plan import LaunchPlan, plan_backward, plan_forward, plan_launches  # noqa: E402
from pathnet.engines.triton.routed_backward import _room, schedule_backward  # noqa: E402
from pathnet.engines.triton.schedule import NOTHING, Schedule  # noqa: E402
from pathnet.engines.triton.state import PlanBuffer, allocate_on  # noqa: E402
from pathnet.engines.triton.steps import (  # noqa: E402
    ALL_EXITS,
    USUAL_BACKWARD,
    USUAL_FORWARD,
    steps_backward,
    steps_forward,
)


def blocks_of(case: Case) -> list[FusedBlock]:
    return list(network_of(case.net(), "running", "float32", (case.width, case.side, case.side)).blocks)


def along(*paths: list[int]) -> NDArray[np.float64]:
    codes = np.array(paths, dtype=np.float64)
    return np.stack([1 - codes, codes], 2)


def rows_by_block(plan: LaunchPlan) -> dict[int, int]:
    counts: dict[int, int] = {}
    for launch in plan.needed():
        live = int((plan.rows_of(launch)[:, 1] != NOTHING).sum())
        counts[launch.block] = counts.get(launch.block, 0) + live
    return counts


BLOCKS = blocks_of(Case("plan", 20, width=4, side=8))
"""Nine blocks; the fourth and the seventh change the shape."""


def one_a_tile(block: int, unit: int) -> int:
    return 1


def test_a_module_is_launched_for_the_paths_that_enter_it_alone() -> None:
    paths = [[1, 0, 0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0]]
    plan = plan_backward(BLOCKS, along(*paths), False, one_a_tile)
    # Each module has two units; the blocks that change the shape also launch the other path's skip.
    assert rows_by_block(plan) == {8: 2, 6: 2, 3: 3, 0: 2}
    assert rows_by_block(plan_backward(BLOCKS[7:], along([0, 0]), False, one_a_tile)) == {}


def test_equal_tails_and_heads_are_walked_once() -> None:
    paths = [[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]]
    back = plan_backward(BLOCKS, along(*paths), True, one_a_tile)
    assert rows_by_block(back) == dict.fromkeys(range(9), 2)
    assert back.finals[0] == back.finals[2] != back.finals[1]
    deletions = np.ones((9, 9, 2))
    deletions[np.arange(9), np.arange(9), 1] = 0
    counts = rows_by_block(plan_forward(BLOCKS, deletions))
    # Block i (from 0) runs once for all later deletions together, and once for each earlier one.
    changes = {3, 6}
    assert counts == {i: 2 * (i + (i < 8)) + (i in changes) if i else 2 for i in range(9)}


def test_a_post_activation_block_is_launched_for_all_since_its_join_is_no_identity() -> None:
    net, images, _ = post_activation_net(0)
    blocks = network_of(net, "running", "float32", net.stem(images).shape[1:]).blocks
    assert [block.projection is None and block.input == block.output for block in blocks] == [True, True]
    skips = along([0, 0], [0, 0])
    for plan in (plan_backward(blocks, skips, False, one_a_tile), plan_forward(blocks, skips)):
        assert rows_by_block(plan) == {0: 1, 1: 1}
    assert rows_by_block(plan_backward(blocks, along([1, 0], [0, 0], [0, 1]), False, one_a_tile)) == {0: 4, 1: 3}
    by_batch = network_of(net, "batch", "float32", net.stem(images).shape[1:]).blocks
    # Each module has one more launch, for the BN after it.
    assert rows_by_block(plan_backward(by_batch, along([1, 0], [0, 1]), True, one_a_tile)) == {0: 4, 1: 4}
    assert rows_by_block(plan_forward(by_batch, along([1, 0], [0, 1]))) == {0: 4, 1: 4}


def test_rows_of_a_tile_wait_for_the_same_means() -> None:
    rng = np.random.default_rng(0)
    plan = plan_backward(BLOCKS, along(*rng.integers(0, 2, (40, 9)).tolist()), True, lambda block, unit: 4)
    fillings = 0
    for launch in plan.needed():
        assert launch.count % 4 == 0 and launch.count <= plan.schedule.launches[launch.index].count
        for tile in plan.rows_of(launch).reshape(-1, 4, 5):
            sources = tile[tile[:, 1] != NOTHING, 0]
            assert len(sources) > 0 and len(np.unique(plan.states[sources, 1])) == 1
            fillings += 4 - len(sources)
    assert fillings < 0.4 * len(plan.rows)


def test_room_for_the_sums_of_the_largest_launch_behind_a_block() -> None:
    torch.manual_seed(0)
    block = PostactBlock(64, (3, 3), (64, 64), 1, "projection")
    network = network_of(ResidualNet(nn.Identity(), [block], nn.Identity()), "batch", "float32", (64, 7, 5))
    steps = steps_backward(network.blocks, np.array([[(1.0, 0.5 + path)] for path in range(3)]))
    schedule = schedule_backward(network, 3, steps.exits)
    # A program takes 1,024 elements, hence 16 pixels; each of 64 channels has a sum, and one with x_hat.
    assert [launch.count for launch in schedule.launches if launch.ending] == [3]
    assert _room(network, schedule, 4)[0] == 3 * -(-4 * 7 * 5 // 16) * 2 * 64


def routings(rng: np.random.Generator, count: int, n: int) -> NDArray[np.float64]:
    """Return paths, zeros, equal tails and heads, and factors, in any order."""
    coefficients = rng.choice([0.0, 0.0, 1.0, 1.0, -1.0, 0.5], (count, n, 2))
    paths = coefficients[: count // 2]
    paths[..., 0] = 1 - paths[..., 1]
    tail, head = rng.integers(0, n + 1, 2)
    coefficients[: count // 3, tail:] = coefficients[:1, tail:]
    coefficients[-count // 3 :, :head] = coefficients[-1:, :head]
    coefficients[rng.random(count) < 0.1, int(rng.integers(n))] = 0
    coefficients[0, :, 1] *= -0.0 if count % 2 else 1.0
    return rng.permutation(coefficients)


@pytest.mark.parametrize("seed", range(24))
def test_rows_come_to_what_routings_come_to_one_by_one(seed: int) -> None:
    """Rows equal brute force for random networks in both BN modes, in tiles of one to three rows, with room for more
    routings. No state is overwritten before its last reader, and readers subtract the means that a state awaits."""
    net, images, _ = post_activation_net(seed) if seed % 2 else random_net(seed)
    rng = np.random.default_rng(seed)
    bn, shape = ("running", "batch")[seed // 2 % 2], net.stem(images).shape[1:]
    blocks = list(network_of(net, bn, "float32", shape).blocks)  # type: ignore[arg-type]
    assert any(block.ends for block in blocks) == (seed % 4 == 3)
    maps = Maps(blocks, seed)
    for count in (1, 7, 40, 200):
        coefficients = routings(rng, count, net.n)
        start = rng.normal(size=(1, SIZE))
        for back, usual, steps_of in (
            (True, USUAL_BACKWARD, steps_backward),
            (False, USUAL_FORWARD, steps_forward),
        ):
            steps, batch_mode = steps_of(blocks, coefficients), back and bn == "batch"
            expected = brute_force(maps, coefficients, start.repeat(count, 0), back, batch_mode)
            for capacity, exits in ((count, steps.exits), (count + 5, usual | steps.exits), (count, ALL_EXITS)):
                tile = 1 + (seed + capacity) % 3 if back else 1
                schedule = Schedule(blocks, back, capacity, exits, 1, batch_mode, lambda block, unit, t=tile: t)  # type: ignore[misc]
                plan = plan_launches(schedule, steps)
                np.testing.assert_allclose(row_results(maps, plan, start, back), expected, rtol=1e-5, atol=1e-6)
                _fits(plan)


def _fits(plan: LaunchPlan) -> None:
    """A buffer returns the plan unchanged, copied or packed."""
    copied = PlanBuffer(plan.schedule, allocate_on(torch.device("cpu")))
    copied.copy(plan)
    packed = PlanBuffer(plan.schedule, lambda shape, dtype: torch.from_numpy(copied.pack(plan)))
    count = len(plan.finals)
    for buffer in (copied, packed):
        for tensor, values in (
            (buffer.mantissas[:count], plan.mantissas),
            (buffer.exponents[:count], plan.exponents),
            (buffer.finals[:count], plan.finals),
            (buffer.launches, plan.launches),
            (buffer.states, plan.states),
            (buffer.rows[: len(plan.rows)], plan.rows),
        ):
            assert np.array_equal(tensor.numpy(), values)
        assert (buffer.finals[count:] == NOTHING).all() and (buffer.mantissas[count:] == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_routings_that_start_from_gradients_of_their_own(seed: int) -> None:
    net, images, _ = random_net(seed)
    rng = np.random.default_rng(seed)
    blocks = list(network_of(net, "batch", "float32", net.stem(images).shape[1:]).blocks)
    maps, coefficients = Maps(blocks, seed), routings(rng, 20, net.n)
    starts = rng.normal(size=(4, SIZE))
    which = rng.integers(0, 4, 20)
    which[-1] = 3
    plan = plan_backward(blocks, coefficients, True, lambda block, unit: 2, which.tolist())
    expected = brute_force(maps, coefficients, starts[which], True, True)
    np.testing.assert_allclose(row_results(maps, plan, starts, True), expected, rtol=1e-5, atol=1e-6)


def test_a_plan_of_no_routings() -> None:
    none = np.zeros((0, len(BLOCKS), 2))
    for plan in (plan_backward(BLOCKS, none, True, lambda block, unit: 2), plan_forward(BLOCKS, none)):
        assert plan.needed() == [] and len(plan.rows) == len(plan.finals) == 0
        assert not plan.launches.any()
    schedule = Schedule(BLOCKS, True, 8, USUAL_BACKWARD)
    plan = plan_launches(schedule, steps_backward(BLOCKS, none))
    assert not plan.launches.any() and len(plan.launches) == len(schedule.launches)


def test_a_thousand_blocks_that_are_passed_leave_their_factor_in_range() -> None:
    coefficients = np.zeros((2, 3000, 2))
    coefficients[..., 0] = 1e-300
    coefficients[1, 7] = 1.0, 0.0
    steps = steps_backward([BLOCKS[0]] * 3000, coefficients)
    exact = 3000 * np.log2(1e-300)
    np.testing.assert_allclose(np.log2(steps.mantissas) + steps.exponents, [exact, exact * 2999 / 3000], rtol=1e-12)


def test_what_a_network_launches_depends_on_no_routing() -> None:
    """One captured graph can serve all sets of paths of one size."""
    rng = np.random.default_rng(0)
    launches, sizes = set(), set()
    for _ in range(5):
        codes = rng.integers(0, 2, (int(rng.integers(30, 48)), 9))
        steps = steps_backward(BLOCKS, along(*codes.tolist()))
        schedule = Schedule(BLOCKS, True, 48, USUAL_BACKWARD | steps.exits, 1, True, lambda block, unit: 2)
        plan = plan_launches(schedule, steps)
        assert (plan.launches[:, 1] <= [launch.count for launch in schedule.launches]).all()
        launches.add(tuple(schedule.launches))
        sizes.add((schedule.state_count, schedule.slot_count, schedule.row_count))
    assert len(launches) == len(sizes) == 1


def test_coefficients_keep_their_size_aside() -> None:
    routing = np.array(
        [[(2.0**-200 * 3, 2.0**-201), (1.0, 0.0)], [(2.0**500, 0.0), (-(2.0**-500), 0.0)], [(0, 0)] * 2]
    )
    plan = plan_backward(BLOCKS[7:], routing, False, one_a_tile)
    (exit_row,) = plan.rows_of(plan.needed()[-1])
    a, c = exit_row[3:].copy().view(np.float32)
    assert (a * 2.0 ** plan.exponents[0], c * 2.0 ** plan.exponents[0]) == tuple(routing[0, 0])
    assert plan.mantissas[0] == 1
    assert plan.mantissas[1] * 2.0 ** plan.exponents[1] == -1.0
    assert plan.finals[1] == 0 and plan.finals[2] == NOTHING
