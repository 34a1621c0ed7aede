"""The cpu engine's ops by themselves: every instruction set, any number of threads, no read out of bounds."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.oracles import relative_error
from helpers.plans import (
    ACTIVATED,
    BACKWARD,
    BEFORE_RELU,
    BEHIND_RELU,
    FORWARD,
    GROUP,
    IDENTITY,
    PAD,
    PROJECTION,
    SUMS,
    Plan,
    Recorded,
    by_pixel,
    make_plan,
    plan_of,
    random_plan,
    random_routings,
    truth_back,
    truth_forward,
    walked,
)
from helpers.tolerances import FLOAT32_WALK, ROUNDED_WALK
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pathnet import native
from pathnet.engines.cpu import ops

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

INSTRUCTION_SETS = native.build_facts()["instruction_sets"] if native.LOADED else []
MODES = ["running", "batch"]
SEEDS = 30
EMULATED_SEEDS = 6
"""AMX may run in software."""

FEWEST_VALUES = 8
"""Of a channel, for statistics of a batch: of two values, mean and variance leave nothing but rounding errors."""


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PATHNET_ISA", request.param)
    assert native.build_facts()["selected_instruction_set"] == request.param
    return str(request.param)


def seeds(isa: str) -> range:
    return range(EMULATED_SEEDS if isa == "amx" else SEEDS)


@functools.cache
def plan(seed: int, wide: bool, behind_relu: bool = False, bn: str = "running") -> Plan:
    """Skips behind the ReLU are in BN mode ``batch`` those of closed blocks."""
    kinds = BEHIND_RELU if behind_relu else BEFORE_RELU
    return random_plan(seed, wide, kinds, closed=behind_relu and bn == "batch")


def sizes(gradients: Tensor, bn: str) -> Tensor:
    """The norms of what is one object: [P, B] of every sample's gradient, or [P, 1] of the batch's."""
    flat = gradients.flatten(2) if bn == "running" else gradients.flatten(1)[:, None]
    # Squares of 1e-160 would leave float64.
    largest = flat.abs().amax(2, keepdim=True).clamp_min(1e-300)
    return (flat / largest).norm(dim=2) * largest[..., 0]


# Walks back


@functools.cache
def judged(seed: int, wide: bool, bn: str, terms: int = 0, behind_relu: bool = False) -> Tensor:
    return truth_back(plan(seed, wide, behind_relu, bn), bn, terms)


def terms_of(isa: str, bf16: bool) -> int:
    """How many bfloat16 terms a number has in products; 0 where it is not rounded to any."""
    if bf16 and isa in ("avx512bf16", "amx"):
        return 1
    return 2 if isa == "amx" else 0


def admitted(expected: Tensor, rounded: Tensor, bn: str, terms: int) -> Tensor:
    """float64 [P, B] or [P, 1]: how far off a walk may be, given the walk that rounds to so many terms."""
    floor = (2.0**-7 if terms == 1 else FLOAT32_WALK) * sizes(expected, bn)
    return floor if terms == 0 else floor + ROUNDED_WALK * sizes(rounded - expected, bn)


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_random_plans_walk_back_like_autograd(isa: str, bf16: bool, bn: str, wide: bool) -> None:
    """Each (path, sample) by the norm of its difference, so that a small one cannot hide behind a large one."""
    kinds, terms = torch.zeros(3), terms_of(isa, bf16)
    for seed in seeds(isa):
        given = plan(seed, wide)
        if bn == "batch" and given.least_values < FEWEST_VALUES:
            continue
        expected = judged(seed, wide, bn)
        own, norms = walked(given, bn, bf16)
        error = sizes(own - expected, bn)
        assert (error <= admitted(expected, judged(seed, wide, bn, terms), bn, terms)).all(), f"seed {seed}"
        torch.testing.assert_close(norms, own.flatten(2).norm(dim=2), rtol=1e-12, atol=0)
        kinds += torch.bincount(given.blocks[:, 2], minlength=3)
    assert kinds.min() >= (1 if isa == "amx" else 5), kinds


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_plans_with_skips_behind_the_relu_walk_back_like_autograd(isa: str, bf16: bool, bn: str, wide: bool) -> None:
    kinds, terms = torch.zeros(5), terms_of(isa, bf16)
    for seed in seeds(isa):
        given = plan(seed, wide, True, bn)
        if bn == "batch" and given.least_values < FEWEST_VALUES:
            continue
        expected, rounded = (judged(seed, wide, bn, own, True) for own in (0, terms))
        own, _ = walked(given, bn, bf16)
        assert (sizes(own - expected, bn) <= admitted(expected, rounded, bn, terms)).all(), f"seed {seed}"
        kinds += torch.bincount(given.blocks[:, 2], minlength=5)
    assert kinds[list(BEHIND_RELU)].min() >= (1 if isa == "amx" else 5), kinds


@functools.cache
def judged_sums(seed: int, wide: bool, bn: str, behind_relu: bool, terms: int) -> Tensor:
    """float64 [n + 1, B, C, H, W]: for each length the sum over the paths, of the last routing's factors."""
    own = plan(seed, wide, behind_relu, bn)
    codes = torch.tensor(list(itertools.product((0, 1), repeat=len(own.blocks))))
    factors = torch.stack([1 - codes, codes], 2) * own.routing[-1]
    every = truth_back(replace(own, routing=factors), bn, terms)
    lengths = codes.sum(1)
    return torch.stack([every[lengths == k].sum(0) for k in range(len(own.blocks) + 1)])


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("behind_relu", [False, True], ids=["before_relu", "behind_relu"])
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_sums_by_length_are_those_of_every_path(isa: str, bf16: bool, bn: str, behind_relu: bool, wide: bool) -> None:
    terms = terms_of(isa, bf16)
    for seed in seeds(isa):
        given = plan(seed, wide, behind_relu, bn)
        if bn == "batch" and given.least_values < FEWEST_VALUES:
            continue
        expected, rounded = (judged_sums(seed, wide, bn, behind_relu, own) for own in (0, terms))
        norms, grad, exponent = SUMS[bn](*given.sums_arguments(bn, bf16))
        own = torch.ldexp(grad.double(), exponent[:, :, None, None, None])
        # Where the paths of a length cancel, rounding is measured by what they come to one by one.
        limit = admitted(expected, rounded, bn, terms) + 1e-6 * sizes(expected.abs().sum(0)[None], bn)
        assert (sizes(own - expected, bn) <= limit).all(), f"seed {seed}"
        torch.testing.assert_close(norms, own.flatten(2).norm(dim=2), rtol=1e-12, atol=0)
        alone, none, _ = SUMS[bn](*given.sums_arguments(bn, bf16, gradients=False))
        assert torch.equal(alone, norms) and len(none) == 0


@pytest.mark.parametrize("bn", MODES)
def test_a_nan_among_zeros_is_not_taken_for_zero(isa: str, bn: str) -> None:
    own = plan_of_kind(IDENTITY, blocks=2)
    grad, bits = torch.zeros_like(own.grad), [None if bit is None else torch.ones_like(bit) for bit in own.bits]
    grad[0, 0, 2, 2] = torch.nan
    own = replace(own, grad=grad, bits=bits, routing=torch.ones_like(own.routing))
    norms, _, _ = SUMS[bn](*own.sums_arguments(bn))
    assert norms[:, 0].isnan().all()


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_the_path_through_identity_skips_alone_changes_no_bit(isa: str, bf16: bool, bn: str) -> None:
    own = plan_of_kind(IDENTITY, blocks=4)
    own = replace(own, routing=torch.tensor([1.0, 0.0]).expand(1, 4, 2).contiguous())
    exponent = own.exponent if bn == "running" else own.exponent[:1]
    result, _ = walked(own, bn, bf16)
    assert torch.equal(result[0], torch.ldexp(own.grad.double(), exponent[:, None, None, None]))


def plan_of_kind(kind: int, blocks: int, seed: int = 0) -> Plan:
    """One whose every skip is of a kind, and at whose every BN a channel has values enough for statistics."""
    for attempt in itertools.count():
        own = make_plan(np.random.default_rng([seed, attempt]), 3, (5, 9, 10), blocks, kinds=[kind])
        if own.least_values >= 4 * FEWEST_VALUES:
            return own
    raise AssertionError


@functools.cache
def long_plan(kind: int, factor: float) -> Plan:
    """16 blocks whose modules, and projections, multiply by a factor each."""
    own = plan_of_kind(kind, blocks=16)
    weights, last = own.weights.clone(), own.blocks[:, 0] + own.blocks[:, 1] - 1
    for u in [*last.tolist(), *own.blocks[own.blocks[:, 3] >= 0, 3].tolist()]:
        weights[own.weights_of(u)] *= factor
    return replace(own, weights=weights, routing=own.routing[[0, 1, 2, 6, 8]].contiguous())


@functools.cache
def judged_long(kind: int, factor: float, bn: str, terms: int = 0) -> Tensor:
    return truth_back(long_plan(kind, factor), bn, terms)


@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("factor", [1e-11, 1e11])
@pytest.mark.parametrize("kind", [IDENTITY, PROJECTION, PAD], ids=["identity", "projection", "pad"])
def test_values_keep_their_relative_precision_far_beyond_float32(isa: str, kind: int, factor: float, bn: str) -> None:
    expected, terms = judged_long(kind, factor, bn), terms_of(isa, False)
    length_n = sizes(expected, bn)[1]
    assert (length_n < 1e-160).all() if factor < 1 else (length_n > 1e150).all()
    error = sizes(walked(long_plan(kind, factor), bn)[0] - expected, bn)
    assert (error <= admitted(expected, judged_long(kind, factor, bn, terms), bn, terms)).all()


@pytest.mark.parametrize("bn", MODES)
def test_values_that_leave_float32_are_kept_and_others_pass_through(isa: str, bn: str) -> None:
    own = plan_of_kind(PROJECTION, blocks=2)
    plain, _ = walked(own, bn)
    tiny, _ = walked(replace(own, grad=own.grad * 2.0**-100, exponent=own.exponent - 800), bn)
    torch.testing.assert_close(torch.ldexp(tiny, torch.tensor(900)), plain, rtol=1e-5, atol=1e-6 * plain.abs().max())
    zeros, norms = walked(replace(own, grad=torch.zeros_like(own.grad)), bn)
    assert not zeros.any() and not norms.any()
    own.grad[1, 0, 0, 0] = torch.nan
    spoiled, norms = walked(own, bn)
    assert spoiled[:, 1].isnan().any(-1).any(-1).any(-1)[1:].all() and norms[1:, 1].isnan().all()
    if bn == "running":
        assert torch.equal(spoiled[:, [0, 2]], plain[:, [0, 2]])


# Walks forward


@functools.cache
def judged_forward(seed: int, wide: bool, bn: str, behind_relu: bool) -> Recorded:
    own = plan(seed, wide, behind_relu, bn)
    return truth_forward(own, bn, torch.ones(own.routing.shape[1:]))


@functools.cache
def judged_outputs(seed: int, wide: bool, bn: str, behind_relu: bool, dtype: torch.dtype) -> Tensor:
    """float64 [P, B, C, H, W], under all of the plan's routings."""
    own = plan(seed, wide, behind_relu, bn)
    return torch.stack([truth_forward(own, bn, routing, dtype).output.double() for routing in own.routing])


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("behind_relu", [False, True], ids=["before_relu", "behind_relu"])
@pytest.mark.parametrize("bn", MODES)
def test_random_plans_walk_forward_like_pytorch(isa: str, bn: str, behind_relu: bool, wide: bool) -> None:
    for seed in seeds(isa):
        given = plan(seed, wide, behind_relu, bn)
        if bn == "batch" and given.least_values < FEWEST_VALUES:
            continue
        # What of the coefficients cancels is as far off as float32 is.
        expected, rounded = (judged_outputs(seed, wide, bn, behind_relu, d) for d in (torch.float64, torch.float32))
        outputs = FORWARD[bn](*given.forward_arguments(bn))[0].double()
        limit = FLOAT32_WALK * sizes(expected, bn) + ROUNDED_WALK * sizes(rounded - expected, bn)
        assert (sizes(outputs - expected, bn) <= limit).all(), f"seed {seed}"


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("behind_relu", [False, True], ids=["before_relu", "behind_relu"])
@pytest.mark.parametrize("bn", MODES)
def test_random_plans_are_recorded_like_pytorch(isa: str, bn: str, behind_relu: bool, wide: bool) -> None:
    for seed in seeds(isa):
        given = plan(seed, wide, behind_relu, bn)
        if bn == "batch" and given.least_values < FEWEST_VALUES:
            continue
        expected = judged_forward(seed, wide, bn, behind_relu)
        output, relu_bits, *statistics = FORWARD[bn](*given.forward_arguments(bn, record=True))
        assert relative_error(output[0], expected.output) <= FLOAT32_WALK, f"seed {seed}"
        # Bits of values that rounding may take across zero are not judged.
        own, sure = (
            replace(given, bits=[None if row[11] < 0 else judge(expected.values[u]) for u, row in rows(given)])
            for judge in (lambda x: x > 0, lambda x: x.abs() > 1e-4 * x.abs().mean())
        )
        assert not ((own.relu_bits() ^ relu_bits) & sure.relu_bits()).any(), f"seed {seed}"
        if bn == "batch":
            units = sorted(expected.normalized)
            normalized = torch.cat([by_pixel(expected.normalized[u]).flatten() for u in units])
            assert relative_error(statistics[0], normalized) <= FLOAT32_WALK, f"seed {seed}"
            scales = torch.cat([expected.scales[u] for u in units])
            torch.testing.assert_close(statistics[1].double(), scales, rtol=FLOAT32_WALK, atol=0)


def rows(given: Plan) -> list[tuple[int, list[int]]]:
    return [*enumerate(given.units.tolist())]


def test_bits_beyond_the_channels_are_zero(isa: str) -> None:
    given = plan_of_kind(IDENTITY, blocks=2)
    full = replace(given, bits=[None if own is None else torch.ones_like(own) for own in given.bits])
    for bn in MODES:
        relu_bits = FORWARD[bn](*given.forward_arguments(bn, record=True))[1]
        assert relu_bits.any() and not (relu_bits & ~full.relu_bits()).any()


# What holds for any walk


def walk_back(own: Plan, bn: str, bf16: bool) -> tuple[Tensor, ...]:
    return BACKWARD[bn](*own.backward_arguments(bn, bf16))


def walk_forward(own: Plan, bn: str) -> tuple[Tensor, ...]:
    return FORWARD[bn](*own.forward_arguments(bn))[:1]


WALKS: dict[str, Callable[[Plan], tuple[Tensor, ...]]] = {
    **{f"back-{bn}-float32": functools.partial(walk_back, bn=bn, bf16=False) for bn in MODES},
    **{f"back-{bn}-bfloat16": functools.partial(walk_back, bn=bn, bf16=True) for bn in MODES},
    **{f"forward-{bn}": functools.partial(walk_forward, bn=bn) for bn in MODES},
}
"""What gives tensors with one row a routing."""


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def with_many_routings(own: Plan) -> Plan:
    """An odd number, with tails and heads in common."""
    rng = np.random.default_rng(5)
    more = [random_routings(rng, len(own.blocks)) for _ in range(2)]
    return replace(own, routing=torch.cat([own.routing, *more])[:-2].contiguous())


@pytest.mark.parametrize("walk", WALKS)
def test_results_are_bit_equal_for_any_number_of_threads(
    isa: str, walk: str, set_threads: Callable[[int], None]
) -> None:
    for seed in (1, 4):
        own = with_many_routings(plan(seed, wide=seed == 4))
        set_threads(1)
        whole = WALKS[walk](own)
        for count in (2, 3, 5):
            set_threads(count)
            assert all(map(torch.equal, whole, WALKS[walk](own)))


@pytest.mark.parametrize("bn", MODES)
def test_records_are_bit_equal_for_any_number_of_threads(
    isa: str, bn: str, set_threads: Callable[[int], None]
) -> None:
    given = plan_of_kind(PROJECTION, blocks=3).forward_arguments(bn, record=True)
    set_threads(1)
    whole = FORWARD[bn](*given)
    for count in (2, 3, 5):
        set_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(whole, FORWARD[bn](*given), strict=True))


@pytest.mark.parametrize("walk", WALKS)
def test_results_are_bit_equal_for_any_grouping_and_order(isa: str, walk: str) -> None:
    own, call = with_many_routings(plan(1, wide=False)), WALKS[walk]
    whole, count = call(own), len(own.routing)
    shuffled = np.random.default_rng(0).permutation(count)
    twice = np.repeat(np.arange(count), 2)
    for order in (shuffled, twice, *np.split(np.arange(count), [7, 8, 19]), *np.arange(0, count, 4)[:, None]):
        part = call(replace(own, routing=own.routing[order].contiguous()))
        assert all(torch.equal(a[order], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("bn", MODES)
def test_norms_alone_are_those_beside_the_gradients(isa: str, bn: str) -> None:
    own = plan(2, wide=False)
    both, alone = (BACKWARD[bn](*own.backward_arguments(bn, gradients=wanted)) for wanted in (True, False))
    assert torch.equal(both[0], alone[0]) and len(alone[1]) == len(alone[2]) == 0


@pytest.mark.parametrize("bn", MODES)
def test_no_paths_and_no_samples(bn: str) -> None:
    own = plan(2, wide=False)
    none = replace(own, routing=own.routing[:0])
    assert [len(given) for given in BACKWARD[bn](*none.backward_arguments(bn))] == [0, 0, 0]
    assert FORWARD[bn](*none.forward_arguments(bn))[0].shape == (0, *own.grad.shape)
    empty, exponents = own.without_samples(), 0 if bn == "running" else 1
    walked_back = BACKWARD[bn](*empty.backward_arguments(bn))
    assert [list(given.shape[:2]) for given in walked_back] == [[9, 0], [9, 0], [9, exponents]]
    assert FORWARD[bn](*empty.forward_arguments(bn))[0].shape == (9, *empty.grad.shape)


def flushes_denormals() -> bool:
    """Whether this thread takes denormal numbers as zeros."""
    least, one = 5e-324, 1.0
    return least * one == 0.0


@pytest.mark.parametrize("walk", WALKS)
def test_the_callers_treatment_of_denormals_is_left_as_it_was(isa: str, walk: str) -> None:
    own = plan(1, wide=False)
    try:
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            before = flushes_denormals()
            WALKS[walk](own)
            assert flushes_denormals() == before == flush
    finally:
        torch.set_flush_denormal(False)


def peak_bytes() -> int:
    """Of memory that this process has held since the last reset; in megabytes of 2^20."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def growth(call: Callable[[], Any]) -> int:
    """How far a call's peak lies above what was held before it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of a process's memory is measured through /proc")
    before = peak_bytes()
    call()
    return peak_bytes() - before


@pytest.mark.parametrize("bn", MODES)
def test_norms_of_many_paths_take_no_more_memory_than_those_of_few(bn: str) -> None:
    """In BN mode ``batch`` some walks go side by side, as many as 256 MB hold: here four."""
    side = 48 if bn == "running" else 256
    blocks = torch.tensor([[i, 1, IDENTITY, -1, 1, side, side, 1, side, side] for i in range(6)])
    own = one_channel(blocks, batch=4)
    few, many = (6, 60) if bn == "running" else (6, 24)
    codes = np.stack([np.unpackbits(np.uint8([i]))[2:] for i in range(64)])
    paths = torch.from_numpy(np.stack([1 - codes, codes], 2)).float()
    given = [
        replace(own, routing=paths[:count].contiguous()).backward_arguments(bn, gradients=False)
        for count in (few, many)
    ]
    BACKWARD[bn](*given[0])
    grown = [growth(lambda arguments=arguments: BACKWARD[bn](*arguments)) for arguments in given]
    gradient = own.grad.numel() * GROUP * 4
    assert grown[1] < grown[0] + 3 * gradient and (many - few) * gradient > 6 * gradient


def one_channel(blocks: Tensor, batch: int) -> Plan:
    """Blocks of one 1x1 convolution each, of one channel."""
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


# Schemas, and arguments that are wrong


OPS: dict[str, tuple[Callable[..., Any], Callable[[Plan], tuple[Any, ...]]]] = {
    "cpu_pack": (
        ops.cpu_pack,
        lambda own: (own.blocks, own.units, own.weights, own.scales, True, True, False),
    ),
    "cpu_backward_running": (ops.cpu_backward_running, lambda own: own.backward_arguments("running")),
    "cpu_sums_by_length_running": (ops.cpu_sums_by_length_running, lambda own: own.sums_arguments("running")),
    "cpu_sums_by_length_batch": (ops.cpu_sums_by_length_batch, lambda own: own.sums_arguments("batch")),
    "cpu_backward_batch": (ops.cpu_backward_batch, lambda own: own.backward_arguments("batch")),
    "cpu_forward_running": (ops.cpu_forward_running, lambda own: own.forward_arguments("running")),
    "cpu_forward_batch": (ops.cpu_forward_batch, lambda own: own.forward_arguments("batch")),
}


BACK = {
    "cpu_backward_running": (True, True),
    "cpu_sums_by_length_running": (True, True),
    "cpu_backward_batch": (True, False),
    "cpu_sums_by_length_batch": (True, False),
}
"""How weights are packed for the walks back."""


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    own = plan(3, wide=False)
    arguments = OPS[name][1](own)
    op = getattr(torch.ops.pathnet, name).default
    torch.library.opcheck(op, arguments)
    if name in BACK:
        torch.library.opcheck(op, (*arguments[:-1], False))
    if "forward" in name:
        torch.library.opcheck(op, own.forward_arguments("batch" if "batch" in name else "running", record=True))


def given(name: str) -> dict[str, Any]:
    """Right arguments by name: of a transition block with a projection and one with identity skip."""
    call, arguments = OPS[name]
    return dict(zip(inspect.signature(call).parameters, arguments(two_blocks()), strict=True))


@functools.cache
def two_blocks() -> Plan:
    """3 channels of 9 x 7 to 6 of 5 x 4, and on."""
    blocks = torch.tensor([[0, 2, 1, 2, 3, 9, 7, 6, 5, 4], [3, 2, 0, -1, 6, 5, 4, 6, 5, 4]])
    rows = [[3, 9, 7, 5, 9, 7, 3, 1, 1], [5, 9, 7, 6, 5, 4, 3, 2, 1], [3, 9, 7, 6, 5, 4, 1, 2, 0]]
    rows += [[6, 5, 4, 2, 3, 2, 3, 1, 0], [2, 3, 2, 6, 5, 4, 3, 1, 2]]
    return plan_of(np.random.default_rng(0), 3, blocks, rows)


def test_shapes_and_devices_of_results_are_known_without_values() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        own = torch.empty(3, 5, 4, 4, device="cuda")
        routing, bits = torch.empty(7, 2, 2, device="cuda"), torch.empty(3, 40, dtype=torch.uint8, device="cuda")
        exponent = torch.empty(3, dtype=torch.int32, device="cuda")
        norms, grads, exponents = torch.ops.pathnet.cpu_backward_running(
            own, exponent, routing, exponent, exponent, bits, bits, True
        )
        assert norms.shape == (7, 3) and norms.dtype == torch.float64 and norms.device.type == "cuda"
        assert grads.shape[:2] == exponents.shape == (7, 3)


def test_an_unknown_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = plan(3, wide=False).backward_arguments("running")
    monkeypatch.setenv("PATHNET_ISA", "mmx")
    with pytest.raises(RuntimeError, match="PATHNET_ISA: this processor has .*base, got mmx"):
        ops.cpu_backward_running(*arguments)
    with pytest.raises(RuntimeError, match="PATHNET_ISA: this processor has .*base, got mmx"):
        plan(3, wide=False).pack(backward=True, fold_scales=True)


@pytest.mark.skipif(len(INSTRUCTION_SETS) < 2, reason="this processor has one instruction set")
@pytest.mark.parametrize("name", [name for name in OPS if name != "cpu_pack"])
def test_weights_packed_for_another_instruction_set_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for own, other in zip(INSTRUCTION_SETS, [*INSTRUCTION_SETS[1:], INSTRUCTION_SETS[0]], strict=True):
        monkeypatch.setenv("PATHNET_ISA", own)
        arguments = given(name)
        monkeypatch.setenv("PATHNET_ISA", other)
        with pytest.raises(RuntimeError, match=f"packed: expected weights for the instruction set {other}, got"):
            OPS[name][0](**arguments)


@pytest.mark.parametrize("name", [name for name in OPS if name != "cpu_pack"])
def test_weights_packed_for_another_walk_are_refused(name: str) -> None:
    own, right = two_blocks(), BACK.get(name)
    for backward, fold in itertools.product((False, True), repeat=2):
        if (backward, fold) == (right or (False, False)):
            continue
        with pytest.raises(RuntimeError, match="packed: expected weights for this walk, got another's"):
            OPS[name][0](**{**given(name), "packed": own.pack(backward, fold)})


@pytest.mark.parametrize("name", [name for name in OPS if name != "cpu_pack"])
def test_packed_weights_of_another_size_are_refused(isa: str, name: str) -> None:
    arguments = given(name)
    packed = arguments["packed"]
    longer = torch.cat([packed, packed.new_zeros(64)])
    for wrong in (packed[:-1], packed[:64], longer):
        with pytest.raises(RuntimeError, match=rf"packed: expected {len(packed)} bytes for this plan, got"):
            OPS[name][0](**{**arguments, "packed": wrong.clone()})
    for wrong, message in (
        (packed[:63].clone(), "packed: expected what cpu_pack made, got 63 bytes"),
        (packed[:0].clone(), "packed: expected what cpu_pack made, got 0 bytes"),
        (packed[None], r"packed: expected shape \[\*\]"),
        (packed.view(torch.int8), "packed: expected Byte, got Char"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS[name][0](**{**arguments, "packed": wrong})


@pytest.mark.parametrize("name", [name for name in OPS if name != "cpu_pack"])
def test_packed_weights_that_begin_between_two_floats_are_refused(name: str) -> None:
    arguments = given(name)
    memory = torch.cat([arguments["packed"].new_zeros(4), arguments["packed"]])
    expected = OPS[name][0](**arguments)
    assert all(map(torch.equal, expected, OPS[name][0](**{**arguments, "packed": memory[4:]})))
    for offset in (1, 2, 3):
        wrong = torch.cat([memory[4 - offset : 4], arguments["packed"]])[offset:]
        with pytest.raises(
            RuntimeError, match=f"packed: expected data aligned to 4 bytes, got it {offset} bytes off"
        ):
            OPS[name][0](**{**arguments, "packed": wrong})


def cell(row: int, column: int, value: int) -> Callable[[Tensor], Tensor]:
    """Sets one number of a table."""

    def change(table: Tensor) -> Tensor:
        table = table.clone()
        table[row, column] = value
        return table

    return change


def shorter(x: Tensor) -> Tensor:
    return x[..., :-1].contiguous()


def double(x: Tensor) -> Tensor:
    return x.double()


WRONG_TABLES = [
    ("blocks", lambda b: b.int(), "blocks: expected Long, got Int"),
    ("units", double, "units: expected Long, got Double"),
    ("blocks", lambda b: b[:0], "blocks: expected at least one row"),
    ("blocks", lambda b: b[:, :9].contiguous(), r"blocks: expected shape \[\*, 10\]"),
    ("units", lambda u: u[:, :11].contiguous(), r"units: expected shape \[\*, 12\]"),
    ("units", lambda u: u.t().contiguous().t(), "units: expected a contiguous tensor"),
    ("blocks", lambda b: b.flip(0), "blocks: expected row 1 to take what the row before it gives"),
    ("blocks", cell(0, 0, -1), "blocks: expected units within 5 in row 0"),
    ("blocks", cell(1, 1, 3), "blocks: expected units within 5 in row 1"),
    ("blocks", cell(1, 1, 0), "blocks: expected units within 5 in row 1"),
    ("blocks", cell(1, 2, 5), "blocks: expected skip 0 to 4 in row 1, got 5"),
    ("blocks", cell(0, 3, 5), "blocks: expected a projection unit within 5 in row 0, got 5"),
    ("blocks", cell(0, 2, 0), "blocks: expected no projection unit"),
    ("blocks", cell(0, 4, 4), "blocks: expected the shapes of row 0"),
    ("blocks", cell(0, 1, 1), "blocks: expected the shapes of row 0"),
    ("blocks", lambda b: cell(1, 2, 2)(cell(1, 3, 2)(b)), "blocks: expected no projection unit"),
    ("blocks", lambda b: b[:1], "units: expected row 3 to belong to one block, got 0"),
    ("units", cell(0, 0, 1 << 40), "units: expected sizes 1 to 32768 in row 0"),
    ("units", cell(1, 7, 0), "units: expected sizes"),
    ("units", cell(1, 7, 3), "units: expected the output side of row 1"),
    ("units", cell(4, 8, 3), "units: expected padding below the kernel in row 4, got 3"),
]
WRONG_OFFSETS = [
    ("units", cell(4, 9, -1), "units: expected a weight offset within"),
    ("units", cell(1, 10, -1), "units: expected a scale offset within"),
    ("units", cell(0, 10, -2), "units: expected -1 for no scale in row 0, got -2"),
    ("units", cell(0, 10, -1), r"units: expected in row 2 the BN \(kernel 0, no bits\) of what row 1 gives"),
    ("units", cell(0, 11, -2), "units: expected an even bits offset within"),
    ("units", cell(2, 10, 0), r"units: expected no scale and no bits \(-1\) for the projection in row 2"),
    ("units", cell(2, 11, 1 << 62), r"units: expected no scale and no bits \(-1\) for the projection in row 2"),
    ("units", cell(0, 11, 1), "units: expected an even bits offset within"),
]
WRONG: dict[str, list[tuple[str, Callable[[Tensor], Tensor], str]]] = {
    "cpu_pack": [
        ("weights", double, "weights: expected Float, got Double"),
        ("weights", shorter, "units: expected a weight offset within"),
        ("weights", lambda w: w[None], r"weights: expected shape \[\*\]"),
        ("scales", double, "scales: expected Float, got Double"),
        ("scales", shorter, "units: expected a scale offset within"),
        ("units", cell(0, 10, 1 << 62), "units: expected a scale offset within"),
        ("units", cell(4, 9, 10_000), "units: expected a weight offset within"),
        ("units", cell(0, 10, 100), "units: expected a scale offset within"),
    ],
    "back": [
        ("grad", double, "grad: expected Float, got Double"),
        ("grad", lambda g: g[:, :5].contiguous(), r"grad: expected shape \[3, 6, 5, 4\], got \[3, 5, 5, 4\]"),
        ("grad", lambda g: g[:2], r"grad: expected shape \[3, 6, 5, 4\], got \[2, 6, 5, 4\]"),
        ("grad", lambda g: g.transpose(2, 3), "grad: expected a contiguous tensor"),
        ("exponent", lambda e: e.long(), "exponent: expected Int, got Long"),
        ("exponent", lambda e: torch.cat([e, e]), r"exponent: expected shape \[\d\], got"),
        ("routing", double, "routing: expected Float, got Double"),
        ("relu_bits", lambda b: b.char(), "relu_bits: expected Byte, got Char"),
        ("relu_bits", lambda b: b[0], r"relu_bits: expected shape \[\*, \*\]"),
        ("relu_bits", lambda b: b[:, :-4].contiguous(), "units: expected an even bits offset within"),
        ("relu_bits", lambda b: b[:2], r"grad: expected shape \[2, 6, 5, 4\], got"),
        ("units", cell(0, 11, 1 << 62), "units: expected an even bits offset within"),
    ],
    **dict.fromkeys(
        ("cpu_sums_by_length_running", "cpu_sums_by_length_batch"),
        [("routing", lambda r: r[:1].contiguous(), r"routing: expected shape \[2, 2\], got \[1, 2\]")],
    ),
    "cpu_backward_running": [
        ("routing", lambda r: r[:, :1].contiguous(), r"routing: expected shape \[\*, 2, 2\]"),
    ],
    "cpu_backward_batch": [
        ("routing", lambda r: r[:, :1].contiguous(), r"routing: expected shape \[\*, 2, 2\]"),
        ("blocks", cell(1, 2, 3), "blocks: expected skip 0, 1 or 2 for this walk in row 1, got 3"),
        ("normalized", shorter, r"normalized: expected shape \[\d+\], got"),
        ("normalized", double, "normalized: expected Float, got Double"),
        ("scales", shorter, "units: expected a scale offset within"),
        ("scales", double, "scales: expected Float, got Double"),
        ("units", cell(0, 10, 1 << 62), "units: expected a scale offset within"),
    ],
    "forward": [
        ("y0", double, "y0: expected Float, got Double"),
        ("y0", lambda y: y[:, 1:].contiguous(), r"y0: expected shape \[\*, 3, 9, 7\], got \[3, 2, 9, 7\]"),
        ("y0", lambda y: y.transpose(2, 3), "y0: expected a contiguous tensor"),
        ("routing", lambda r: r[:, :1].contiguous(), r"routing: expected shape \[\*, 2, 2\]"),
        ("routing", double, "routing: expected Float, got Double"),
        ("record", lambda _: True, "routing: expected one to record, got 9"),
        ("units", cell(0, 10, 1 << 62), "units: expected a scale offset within"),
        ("scales", shorter, r"shifts: expected shape \[\d+\]"),
        ("shifts", shorter, r"shifts: expected shape \[\d+\]"),
        ("shifts", double, "shifts: expected Float, got Double"),
    ],
    "cpu_forward_running": [
        ("biases", lambda b: b[1:], r"biases: expected shape \[\d+\], got"),
        ("biases", double, "biases: expected Float, got Double"),
    ],
    "cpu_forward_batch": [
        ("blocks", cell(1, 2, 3), "blocks: expected skip 0, 1 or 2 for this walk in row 1, got 3"),
        ("epsilons", shorter, r"epsilons: expected shape \[5\], got \[4\]"),
        ("epsilons", double, "epsilons: expected Float, got Double"),
    ],
}


@pytest.mark.parametrize("name", OPS)
def test_wrong_arguments_are_named(name: str) -> None:
    kind = "back" if name in BACK else "forward" if "forward" in name else ""
    own = [*WRONG_TABLES, *WRONG_OFFSETS, *WRONG.get(name, []), *WRONG.get(kind, [])]
    right = given(name)
    OPS[name][0](**right)
    for argument, change, message in own:
        with pytest.raises(RuntimeError, match=message):
            OPS[name][0](**{**right, argument: change(right[argument])})


@functools.cache
def closed_plan() -> Plan:
    """One block that ends in a projection with its BN, behind no ReLU, and one behind it with an identity."""
    shape, out = (3, 9, 7), (6, 5, 4)
    blocks = torch.tensor([[0, 1, PROJECTION, 2, *shape, *out], [4, 1, ACTIVATED, -1, *out, *out]])
    ends = [*out, *out, 0, 1, 0]
    rows = [[*shape, *out, 3, 2, 1], ends, [*shape, *out, 1, 2, 0], ends, [*out, *out, 3, 1, 1], ends]
    return plan_of(np.random.default_rng(0), 3, blocks, rows, opens=True)


@pytest.mark.parametrize("name", OPS)
def test_what_closed_blocks_are_refused(name: str) -> None:
    call, arguments = OPS[name]
    if not name.endswith("batch"):
        with pytest.raises(RuntimeError, match="units: expected a scale for this walk in row 0"):
            call(*arguments(closed_plan()))
        return
    right = dict(zip(inspect.signature(call).parameters, arguments(closed_plan()), strict=True))
    call(**right)
    end = r"units: expected in row {} the BN \(kernel 0, no bits\)"
    for argument, change, message in (
        ("units", lambda u: u[:5], "units: expected a row for the BN that ends row 4"),
        ("units", cell(1, 6, 1), end.format(1)),
        ("units", cell(3, 0, 5), end.format(3)),
        ("units", cell(5, 11, 0), end.format(5)),
        ("units", cell(3, 10, -1), "units: expected a scale offset within"),
        ("units", cell(0, 10, -2), "units: expected -1 for no scale"),
        ("units", lambda u: cell(4, 10, 0)(u)[:5].contiguous(), "units: expected a scale in the first unit of every"),
        ("units", cell(4, 11, -1), "blocks: expected skip 0, 1 or 2 before a unit without ReLU in row 1, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**{**right, argument: change(right[argument])})
