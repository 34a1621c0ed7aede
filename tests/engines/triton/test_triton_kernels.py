"""Single launches in Triton's interpreter: with fewer rows than there is room for, and at places beyond 2**31."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import memory_bounds
from torch import Tensor, nn

from pathnet.models import PostactBlock, PreactBlock, ResidualNet

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/triton")

from pathnet.engines.triton import launch as launches  # noqa: E402
from pathnet.engines.triton.arrivals import arrived, squared_norms  # noqa: E402
from pathnet.engines.triton.configurations import FOLDED, ROWS  # noqa: E402
from pathnet.engines.triton.dgrad import dgrad, dgrad_point_tiles, dgrad_tile  # noqa: E402
from pathnet.engines.triton.endings import ending_backward, ending_point_tiles, joined  # noqa: E402
from pathnet.engines.triton.folding import constants_size, folded_size, taps_of  # noqa: E402
from pathnet.engines.triton.forward import forward_tile, forward_unit  # noqa: E402
from pathnet.engines.triton.launch import Tile  # noqa: E402
from pathnet.engines.triton.network import TritonNetwork, network_of  # noqa: E402
from pathnet.engines.triton.plan import NOTHING, Launch  # noqa: E402
from pathnet.engines.triton.state import Activations, Gradients, Kept  # noqa: E402
from pathnet.engines.triton.statistics import take_statistics  # noqa: E402
from pathnet.engines.triton.sums import take_means  # noqa: E402
from pathnet.engines.triton.tiles import points_of  # noqa: E402

BATCH, CAPACITY, STATES, FIRST = 3, 8, 12, 3
"""Of a launch: images, rows that it has room for, states, and rows before its own."""

GARBAGE = 1 << 28
"""In place of a state, where no kernel may look."""

LIVE = [(0, 6, 2, 0.5, -2.0), (1, 7, 3, 0.0, 1.5), (0, 8, 4, -1.0, 0.25)]
"""Rows of a launch: source, target, the block's own state, a and c."""


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import interpreter

    interpreter.correct()
    memory_bounds.watch(monkeypatch)


def network_of_a_block(kind: type[PreactBlock | PostactBlock], shape: Sequence[int] = (4, 5, 6)) -> TritonNetwork:
    torch.manual_seed(0)
    channels = shape[0]
    block = kind(channels, (3, 3), (channels, channels), 1, "projection")
    return network_of(ResidualNet(nn.Identity(), [block], nn.Identity()), "batch", "float32", shape)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def tables(rows: Sequence[tuple[int, int, int, float, float]], count: int) -> tuple[Tensor, Tensor]:
    """Rows behind some of another launch and before garbage, and the launch."""
    table = np.full((FIRST + CAPACITY, 5), GARBAGE, dtype=np.int32)
    for place, row in enumerate(rows, FIRST):
        table[place] = [*row[:3], *np.array(row[3:], dtype=np.float32).view(np.int32)]
    return torch.from_numpy(table), torch.tensor([[FIRST, count]], dtype=torch.int32)


def kept_by(network: TritonNetwork) -> Kept:
    begin = network.normalized_starts(BATCH)
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 256, network.bits_starts(BATCH)[-1], dtype=np.uint8))
    scales = numbers(len(network.affine), network.widest)
    starts = torch.tensor(begin[:-1])
    return Kept(bits, network.bits_starts(BATCH), numbers(begin[-1]), begin, starts, scales)


def gradients_of(network: TritonNetwork, rows: Tensor, launch: Tensor, waiting: int) -> Gradients:
    """States that lie where their number says; sources wait for a unit's means."""
    block = network.blocks[0]
    tiles = [dgrad_point_tiles(conv, BATCH) for conv in block.convolutions]
    most = max(*tiles, ending_point_tiles(block, BATCH))
    conv = block.convolutions[0]
    states = torch.tensor([[state, waiting if state < 6 else NOTHING] for state in range(STATES)], dtype=torch.int32)
    magnitudes = numbers(STATES, 1).abs().view(torch.int32)
    return Gradients(
        numbers(STATES, -(-BATCH * network.largest // 16) * 16),
        rows,
        launch,
        states,
        torch.where(torch.arange(STATES)[:, None] < 6, magnitudes, 0),
        torch.arange(STATES, dtype=torch.int32)[:, None].contiguous(),
        numbers(STATES, 2, network.widest),
        torch.full([CAPACITY * most * 2 * network.widest], torch.nan),
        torch.full([CAPACITY * folded_size(conv)], torch.nan),
        torch.full([CAPACITY * constants_size(conv)], torch.nan),
        BATCH,
        True,
    )


def activations_of(network: TritonNetwork, rows: Tensor, launch: Tensor) -> Activations:
    block = network.blocks[0]
    tiles = max(forward_tile(conv).point_tiles(BATCH, conv.made.pixels) for conv in block.convolutions)
    states = torch.tensor([[state, NOTHING] for state in range(STATES)], dtype=torch.int32)
    return Activations(
        numbers(STATES, -(-BATCH * network.largest // 16) * 16),
        rows,
        launch,
        states,
        numbers(STATES, 2, network.widest).abs(),
        torch.full([CAPACITY * tiles * 3 * network.widest], torch.nan),
        BATCH,
    )


def walked(kind: type[PreactBlock | PostactBlock], task: Launch, rows: Tensor, launch: Tensor) -> Gradients:
    network = network_of_a_block(kind)
    gradients = gradients_of(network, rows, launch, waiting=NOTHING if task.ending else 1)
    (ending_backward if task.ending else dgrad)(gradients, kept_by(network), network.blocks[0], task)
    return gradients


def passed(kind: type[PreactBlock | PostactBlock], task: Launch, rows: Tensor, launch: Tensor) -> Activations:
    network = network_of_a_block(kind)
    activations = activations_of(network, rows, launch)
    (joined if task.ending else forward_unit)(network, activations, task)
    return activations


Run = Callable[[Any, Launch, Tensor, Tensor], Gradients | Activations]

LAUNCHES: dict[str, tuple[Run, type[PreactBlock | PostactBlock], Launch]] = {
    "back, inside": (walked, PreactBlock, Launch(0, 1, True, False, count=CAPACITY)),
    "back, end": (walked, PreactBlock, Launch(0, 0, True, True, count=CAPACITY)),
    "back, behind a convolution": (walked, PostactBlock, Launch(0, 0, True, False, True, count=CAPACITY)),
    "forward, inside": (passed, PreactBlock, Launch(0, 0, True, False, count=CAPACITY)),
    "forward, end": (passed, PreactBlock, Launch(0, 1, True, True, count=CAPACITY)),
    "forward, sum": (passed, PostactBlock, Launch(0, 1, True, True, True, count=CAPACITY)),
}


def compare(own: Gradients | Activations, other: Gradients | Activations, names: Sequence[str]) -> None:
    for name in names:
        left, right = getattr(own, name), getattr(other, name)
        assert torch.equal(left.nan_to_num(-7), right.nan_to_num(-7)), name


def results(own: Gradients | Activations) -> list[str]:
    tensors = [field.name for field in fields(own) if isinstance(getattr(own, field.name), Tensor)]
    return [name for name in tensors if name not in ("rows", "launches", "states")]


@pytest.mark.parametrize("name", LAUNCHES)
def test_rows_beyond_those_of_a_launch_are_not_looked_at(name: str) -> None:
    """What three of them give does not depend on the room that there is for eight, and nothing else is written."""
    run, kind, task = LAUNCHES[name]
    live = LIVE[:1] if name == "back, behind a convolution" else LIVE
    paths = dgrad_tile(network_of_a_block(kind).blocks[0].convolutions[0]).paths if run is walked else 1
    filling = [(NOTHING, NOTHING, NOTHING, 0.0, 0.0)] * (0 if task.ending else -len(live) % paths)
    rows = [*live, *filling]
    roomy = run(kind, task, *tables(rows, len(rows)))
    tight = run(kind, replace(task, count=len(rows)), *tables(rows, len(rows)))
    compare(roomy, tight, results(roomy))
    untouched = run(kind, task, *tables([], 0))
    for state in range(STATES):
        made = any(row[1] == state for row in live)
        assert torch.equal(roomy.values[state], untouched.values[state]) != made


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_without_rows_writes_nothing(name: str) -> None:
    run, kind, task = LAUNCHES[name]
    network = network_of_a_block(kind)
    empty = run(kind, task, *tables([], 0))
    before = (
        gradients_of(network, *tables([], 0), waiting=NOTHING if task.ending else 1)
        if run is walked
        else activations_of(network, *tables([], 0))
    )
    compare(empty, before, results(empty))


@pytest.mark.parametrize("tiles", [1, ROWS.points - 1, ROWS.points, ROWS.points + 1, 3 * ROWS.points + 5])
def test_sums_and_statistics_of_tiles_around_what_is_loaded_at_once(tiles: int) -> None:
    """Of 5 and 11 channels in two tiles; means a thousand times what deviates from them lose nothing."""
    channels, rows = 11, 2
    table, launch = tables(LIVE[:rows], rows)
    task = Launch(0, 0, True, False, count=CAPACITY)
    network = network_of_a_block(PreactBlock, (channels, 5, 6))
    gradients = gradients_of(network, table, launch, NOTHING)
    sums = numbers(rows, tiles, 2, channels)
    gradients = replace(gradients, sums=sums.reshape(-1))
    take_means(gradients, task, tiles, torch.arange(1.0, channels + 1), channels, 30)
    for row in range(rows):
        expected = sums[row].double().sum(0) * torch.arange(1.0, channels + 1) / (BATCH * 30)
        own = gradients.corrections[LIVE[row][1], :, :channels]
        torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-5)
    counts = torch.from_numpy(np.random.default_rng(tiles).integers(1, 128, (rows, tiles, 1, channels)))
    means = 1000 + numbers(rows, tiles, 1, channels)
    squares = numbers(rows, tiles, 1, channels).abs() * counts
    activations = activations_of(network, table, launch)
    moments = torch.cat([counts.float(), means, squares], 2)
    activations = replace(activations, moments=moments.reshape(-1))
    take_statistics(activations, task, tiles, channels)
    for row in range(rows):
        count, mean, square = (part[row, :, 0].double() for part in (counts, means, squares))
        total = (count * mean).sum(0) / count.sum(0)
        variance = (square + count * (mean - total) ** 2).sum(0) / count.sum(0)
        own_mean, own_variance = activations.statistics[LIVE[row][1], :, :channels].double()
        torch.testing.assert_close(own_mean, total, rtol=1e-6, atol=0)
        torch.testing.assert_close(own_variance, variance, rtol=1e-4, atol=0)


def test_gradients_of_more_channels_than_a_program_takes_at_a_time_arrive() -> None:
    """What they wait for taken off; nothing of a routing without a state."""
    network = network_of_a_block(PreactBlock, (70, 5, 6))
    gradients, kept = gradients_of(network, *tables([], 0), waiting=0), kept_by(network)
    finals, shape = torch.tensor([1, NOTHING, 3], dtype=torch.int32), network.blocks[0].given
    size = BATCH * shape.size
    x_hat = kept.normalized[:size].view(-1, 70).double()
    expected = torch.zeros(3, BATCH, 5, 6, 70, dtype=torch.float64)
    for place, state in ((0, 1), (2, 3)):
        mean, mean_x_hat = gradients.corrections[state, :, :70].double()
        values = gradients.values[state, :size].view(-1, 70).double()
        expected[place] = (values - mean - x_hat * mean_x_hat).view(BATCH, 5, 6, 70)
    own = arrived(gradients, kept, finals, shape, torch.float32)
    torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-5)
    norms = squared_norms(gradients, kept, finals, shape)
    torch.testing.assert_close(norms, expected.square().sum((2, 3, 4)), rtol=1e-5, atol=0)


@triton.jit
def _points_kernel(
    points_ptr, batch, height, width, inverse_width, pixel_tiles, SAMPLES: tl.constexpr, PIXELS: tl.constexpr
):
    sample, row, column, inside = points_of(
        tl.program_id(0), batch, height, width, inverse_width, pixel_tiles, SAMPLES, PIXELS
    )
    point = points_ptr + (tl.program_id(0) * SAMPLES * PIXELS + tl.arange(0, SAMPLES * PIXELS)) * 4
    tl.store(point, sample)
    tl.store(point + 1, row)
    tl.store(point + 2, column)
    tl.store(point + 3, inside.to(tl.int32))


@pytest.mark.parametrize(
    ("batch", "height", "width", "tile"),
    [(3, 5, 7, (4, 32)), (2, 41, 13, (1, 128)), (1, 3, 249, (1, 64)), (1, 1, 1 << 19, (1, 1 << 18))],
)
def test_the_points_of_tiles_are_those_of_the_images(
    batch: int, height: int, width: int, tile: tuple[int, int]
) -> None:
    """Several images a tile, parts of one, rows that end within a tile, and the longest row."""
    samples, pixels = tile
    pixel_tiles = -(-height * width // pixels)
    tiles = -(-batch // samples) * pixel_tiles
    points = torch.zeros(tiles * samples * pixels, 4, dtype=torch.int32)
    _points_kernel[(tiles,)](points, batch, height, width, 1 / width, pixel_tiles, samples, pixels)
    inside = points[points[:, 3] == 1]
    places = (inside[:, 0] * height + inside[:, 1]) * width + inside[:, 2]
    assert torch.equal(places.sort().values, torch.arange(batch * height * width))
    assert ((inside[:, 1] < height) & (inside[:, 2] >= 0) & (inside[:, 2] < width)).all()


class Launched(Exception):
    """A kernel has run; with its arguments."""


def stop_behind_the_launch(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    run = module.launch

    def launch(*arguments: Any, **constants: Any) -> None:
        run(*arguments, **constants)
        raise Launched(*arguments)

    monkeypatch.setattr(module, "launch", launch)


def test_parts_of_a_weight_gradient_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 channels, 28 x 28, 2,700 images: with spans of 2,048 points the last part begins at 2.4e9."""
    from pathnet.engines.triton import wgrad as module
    from pathnet.engines.triton.configurations import WGRAD

    network = network_of_a_block(PreactBlock, (512, 28, 28))
    conv, batch = network.blocks[0].convolutions[1], 2700
    points = batch * conv.made.pixels
    spans, row_tiles, column_tiles = -(-points // 2048), 512 // 64, 9 * 512 // 64
    assert (spans - 1) * 512 * 9 * 512 > 1 << 31
    monkeypatch.setattr(launches, "PROGRAMS", 1 << 40)
    for width in WGRAD[torch.float32]:
        monkeypatch.setitem(WGRAD[torch.float32], width, Tile(2048, 64, 32))
    # The last span, the last channels of the output, of the input those of the middle tap.
    program = ((spans - 1) * column_tiles + (4 * 512 + 448) // 64) * row_tiles + row_tiles - 1
    memory_bounds.run_one_program(monkeypatch, program, spans * row_tiles * column_tiles)
    stop_behind_the_launch(monkeypatch, module)
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *shape, device: memory_bounds.reserved(np.prod(shape).item(), torch.float32).view(shape),
    )
    values, normalized = (memory_bounds.reserved(points * 512, torch.float32) for _ in range(2))
    values[-512:], normalized[-512:] = 1, 1
    nothing, no_exponents = torch.zeros(0), torch.zeros(1, 1, dtype=torch.int32)
    gradients = Gradients(
        values[None],
        torch.zeros(1, 5, dtype=torch.int32),
        torch.zeros(1, 2, dtype=torch.int32),
        torch.tensor([[0, NOTHING]], dtype=torch.int32),
        no_exponents,
        no_exponents,
        torch.zeros(1, 2, 512),
        nothing,
        nothing,
        nothing,
        batch,
        True,
    )
    kept = Kept(nothing, [0, 0, 0], normalized, [0, 0], torch.zeros(2, dtype=torch.int64), torch.zeros(2, 512))
    affine = torch.stack([torch.ones(512), torch.zeros(512)])
    with pytest.raises(Launched) as launched:
        module.wgrad(gradients, kept, 0, conv, 1, affine)
    parts = launched.value.args[-1]
    assert parts.shape == (spans, 512, 9 * 512)
    assert (parts[-1, 448:, 4 * 512 + 448 : 5 * 512] == 1).all()


def test_constants_of_folded_means_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 channels have 16,384 constants a row: those of row 131,072 begin at 2**31."""
    from pathnet.engines.triton import folding as module

    torch.manual_seed(0)
    block = PreactBlock(512, (3,), (16,), 1, "projection")
    network = network_of(ResidualNet(nn.Identity(), [block], nn.Identity()), "batch", "float32", (512, 1, 1))
    conv, count = network.blocks[0].convolutions[0], (1 << 17) + 1
    assert (count - 1) * constants_size(conv) == 1 << 31
    programs = count * taps_of(conv) * (512 // FOLDED.channels)
    # The first channels of the middle tap.
    memory_bounds.run_one_program(monkeypatch, programs - (taps_of(conv) - 4) * (512 // FOLDED.channels), programs)
    gradients = Gradients(
        torch.zeros(1, 1),
        torch.zeros(count, 5, dtype=torch.int32),
        torch.tensor([[0, count]], dtype=torch.int32),
        torch.tensor([[0, 0]], dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.ones(1, 2, 512),
        torch.zeros(0),
        memory_bounds.reserved(count * folded_size(conv), torch.float32),
        memory_bounds.reserved(count * constants_size(conv), torch.float32),
        1,
        True,
    )
    module.fold_means(gradients, conv, Launch(0, 0, True, False, count=count))
    constants = gradients.constants.view(count, 2, taps_of(conv), 512)[-1, :, 4, : FOLDED.channels].sum(0)
    torch.testing.assert_close(constants, -conv.transposed[4, :, : FOLDED.channels].sum(0))


def test_exponents_of_states_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """32,768 images of one pixel: those of state 65,536 begin at 2**31."""
    batch, last = 1 << 15, 1 << 16
    torch.manual_seed(0)
    block = PreactBlock(1, (3,), (1,), 1, "projection")
    network = network_of(ResidualNet(nn.Identity(), [block], nn.Identity()), "running", "float32", (1, 1, 1))
    conv = network.blocks[0].convolutions[0]
    tiles = dgrad_point_tiles(conv, batch)
    largest, exponents = (memory_bounds.reserved((last + 2) * batch, torch.int32) for _ in range(2))
    # The last image's gradient is below 8, of exponent 5.
    largest[(last + 1) * batch - 1] = torch.tensor(5.0).view(torch.int32)
    exponents[(last + 1) * batch - 1] = 5
    states = torch.zeros(last + 2, 2, dtype=torch.int32)
    states[:, 1], states[last + 1, 0] = NOTHING, 1
    one = torch.tensor([1.0]).view(torch.int32).item()
    paths = dgrad_tile(conv).paths
    rows = torch.tensor(
        [[last, last + 1, last, one, one]] + [[NOTHING] * 3 + [0, 0]] * (paths - 1), dtype=torch.int32
    )
    gradients = Gradients(
        torch.ones(2, batch),
        rows,
        torch.tensor([[0, paths]], dtype=torch.int32),
        states,
        largest.view(last + 2, batch),
        exponents.view(last + 2, batch),
        torch.zeros(0, 2, 16),
        torch.zeros(0),
        torch.zeros(0),
        torch.zeros(0),
        batch,
        False,
    )
    kept = Kept(
        torch.zeros(batch, dtype=torch.uint8),
        [0, batch],
        torch.zeros(0),
        [0, 0],
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, 16),
    )
    memory_bounds.run_one_program(monkeypatch, tiles - 1, tiles)
    dgrad(gradients, kept, network.blocks[0], Launch(0, 0, True, True, count=paths))
    assert gradients.exponents[-1, -1] == 8
    assert gradients.largest[-1, -1].view(torch.float32) == gradients.values[1, -1].abs() == 0.125
