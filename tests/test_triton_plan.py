"""Which rows a walk launches: none for blocks that are skipped, one for tails that agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Case, post_activation_net, random_net
from torch import nn

from pathnet.models import PostactBlock, ResidualNet

pytest.importorskip("triton")

from pathnet.engines.triton.network import FusedBlock, network_of  # noqa: E402
from pathnet.engines.triton.plan import NOTHING, Plan, plan_backward, plan_forward  # noqa: E402
from pathnet.engines.triton.routed_backward import _room  # noqa: E402


def blocks_of(case: Case) -> list[FusedBlock]:
    return list(network_of(case.net(), "running", "float32", (case.width, case.side, case.side)).blocks)


def along(*paths: list[int]) -> list[list[tuple[float, float]]]:
    return [[(1.0 - b, float(b)) for b in path] for path in paths]


def rows_by_block(plan: Plan) -> dict[int, int]:
    counts: dict[int, int] = {}
    for launch in plan.launches:
        own = plan.rows[launch.first : launch.first + launch.count]
        counts[launch.block] = counts.get(launch.block, 0) + sum(row[1] != NOTHING for row in own)
    return counts


BLOCKS = blocks_of(Case("plan", 20, width=4, side=8))
"""Nine blocks, of which the fourth and the seventh change the shape."""


def one_a_tile(block: int, unit: int) -> int:
    return 1


def test_a_module_is_launched_for_the_paths_that_enter_it_alone() -> None:
    paths = [[1, 0, 0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0]]
    plan = plan_backward(BLOCKS, along(*paths), False, one_a_tile)
    # Two units a module; the blocks that change the shape take the other path's skip.
    assert rows_by_block(plan) == {8: 2, 6: 2, 3: 3, 0: 2}
    assert rows_by_block(plan_backward(BLOCKS[7:], along([0, 0]), False, one_a_tile)) == {}


def test_equal_tails_and_heads_are_walked_once() -> None:
    paths = [[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]]
    back = plan_backward(BLOCKS, along(*paths), True, one_a_tile)
    assert rows_by_block(back) == dict.fromkeys(range(9), 2)
    assert back.finals[0] == back.finals[2] != back.finals[1]
    deletions = [[(1.0, 0.0 if i == deleted else 1.0) for i in range(9)] for deleted in range(9)]
    counts = rows_by_block(plan_forward(BLOCKS, deletions))
    # Block i (from 0) runs in one way for those deleted later, in one way for each deleted earlier.
    changes = {3, 6}
    assert counts == {i: 2 * (i + (i < 8)) + (i in changes) if i else 2 for i in range(9)}


def test_a_post_activation_block_is_launched_for_all_since_its_join_is_no_identity() -> None:
    net, images, _ = post_activation_net(0)
    blocks = network_of(net, "running", "float32", net.stem(images).shape[1:]).blocks
    assert [block.projection is None and block.given == block.made for block in blocks] == [True, True]
    skips = along([0, 0], [0, 0])
    for plan in (plan_backward(blocks, skips, False, one_a_tile), plan_forward(blocks, skips)):
        assert rows_by_block(plan) == {0: 1, 1: 1}
    assert rows_by_block(plan_backward(blocks, along([1, 0], [0, 0], [0, 1]), False, one_a_tile)) == {0: 4, 1: 3}
    by_batch = network_of(net, "batch", "float32", net.stem(images).shape[1:]).blocks
    # One launch more a module, for the BN behind it.
    assert rows_by_block(plan_backward(by_batch, along([1, 0], [0, 1]), True, one_a_tile)) == {0: 4, 1: 4}
    assert rows_by_block(plan_forward(by_batch, along([1, 0], [0, 1]))) == {0: 4, 1: 4}


def test_rows_of_a_tile_wait_for_the_same_means() -> None:
    rng = np.random.default_rng(0)
    plan = plan_backward(BLOCKS, along(*rng.integers(0, 2, (40, 9)).tolist()), True, lambda block, unit: 4)
    fillings = 0
    for launch in plan.launches:
        assert launch.count % 4 == 0
        for first in range(launch.first, launch.first + launch.count, 4):
            tile = [row for row in plan.rows[first : first + 4] if row[1] != NOTHING]
            assert tile
            assert len({plan.waiting[row[0]] for row in tile}) == 1
            fillings += 4 - len(tile)
    assert fillings < 0.4 * len(plan.rows)


def test_room_for_the_sums_of_the_largest_launch_behind_a_block() -> None:
    torch.manual_seed(0)
    block = PostactBlock(64, (3, 3), (64, 64), 1, "projection")
    network = network_of(ResidualNet(nn.Identity(), [block], nn.Identity()), "batch", "float32", (64, 7, 5))
    plan = plan_backward(network.blocks, [[(1.0, 0.5 + path)] for path in range(3)], True, one_a_tile)
    # 1,024 elements a program, hence 16 pixels; a sum and one with x_hat for each of 64 channels.
    assert [launch.count for launch in plan.launches if launch.ending] == [3]
    assert _room(network, plan, 4)[0] == 3 * -(-4 * 7 * 5 // 16) * 2 * 64


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_how_many_states_a_routing_has_at_a_time(bn: str) -> None:
    block = PostactBlock(4, (3, 3), (6, 6), 1, "projection")
    network = network_of(ResidualNet(nn.Identity(), [block], nn.Identity()), bn, "float32", (4, 7, 5))  # type: ignore[arg-type]
    way = [[(1.0, 0.5)]]
    plans = plan_backward(network.blocks, way, bn == "batch", one_a_tile), plan_forward(network.blocks, way)
    assert max(plan.slot_count for plan in plans) == network.most_states


@pytest.mark.parametrize("seed", range(20))
def test_no_state_is_overwritten_while_somebody_needs_it(seed: int) -> None:
    """The plan is run with a name in each slot, by whom it was made and from what."""
    net, images, _ = post_activation_net(seed) if seed % 2 else random_net(seed)
    shape = net.stem(images).shape[1:]
    # Whether blocks end in BNs of their own, which post-activation ones do in this mode.
    blocks = list(network_of(net, "batch", "float32", shape).blocks)
    assert any(block.ends for block in blocks) == bool(seed % 2)
    rng = np.random.default_rng(seed)
    coefficients = rng.choice([0.0, 0.0, 1.0, 1.0, 0.5], (7, net.n, 2)).tolist()
    for plan in (
        plan_backward(blocks, coefficients, True, lambda block, unit: 2),
        plan_forward(blocks, coefficients),
    ):
        holds = {plan.slots[0]: 0}
        for launch in plan.launches:
            rows = [row for row in plan.rows[launch.first : launch.first + launch.count] if row[1] != NOTHING]
            read = set()
            for source, _, block, _, c in rows:
                if launch.residual:
                    assert holds[plan.slots[source]] == source
                    read.add(plan.slots[source])
                assert holds[plan.slots[block]] == block
                read.add(plan.slots[block])
                assert (c != 0) == launch.residual or launch.unit not in (
                    0,
                    len(blocks[launch.block].convolutions) - 1,
                )
            written = [plan.slots[row[1]] for row in rows]
            assert len(set(written)) == len(written) and not read & set(written)
            holds |= {plan.slots[row[1]]: row[1] for row in rows}
        for final in plan.finals:
            assert final == NOTHING or holds[plan.slots[final]] == final
        assert max(plan.slots, default=0) < plan.slot_count


def test_coefficients_keep_their_size_aside() -> None:
    routing = [[(2.0**-200 * 3, 2.0**-201), (1.0, 0.0)], [(2.0**500, 0.0), (-(2.0**-500), 0.0)], [(0.0, 0.0)] * 2]
    plan = plan_backward(BLOCKS[7:], routing, False, one_a_tile)
    table = plan.row_table()
    exit_row = table[plan.launches[-1].first]
    a, c = exit_row[3:].copy().view(np.float32)
    assert (a * 2.0 ** plan.exponents[0], c * 2.0 ** plan.exponents[0]) == routing[0][0]
    assert plan.mantissas[1] * 2.0 ** plan.exponents[1] == -1.0
    assert plan.finals[1] == 0 and plan.finals[2] == NOTHING
    assert torch.from_numpy(plan.state_table()).shape == (len(plan.slots), 2)
