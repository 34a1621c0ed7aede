"""Single launches in Triton's interpreter, with fewer rows than there is room for, and of awkward sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import memory_bounds
from torch import Tensor

from pathnet.models import PostactBlock, PreactBlock

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/gpu/triton"
)

from helpers.single_launches import (  # noqa: E402
    BATCH,
    CAPACITY,
    STATES,
    activations_of,
    gradients_of,
    network_of_a_block,
    random_numbers,
    row_table,
    saved_of,
)

from pathnet.engines.triton.arrivals import arrived, squared_norms  # noqa: E402
from pathnet.engines.triton.configurations import ROWS  # noqa: E402
from pathnet.engines.triton.dgrad import dgrad, dgrad_tile  # noqa: E402
from pathnet.engines.triton.endings import ending_backward, ending_forward  # noqa: E402
from pathnet.engines.triton.forward import forward_unit  # noqa: E402
from pathnet.engines.triton.schedule import NOTHING, Launch  # noqa: E402
from pathnet.engines.triton.state import ActivationStates, GradientStates  # noqa: E402
from pathnet.engines.triton.statistics import take_statistics  # noqa: E402
from pathnet.engines.triton.sums import take_means  # noqa: E402
from pathnet.engines.triton.tiles import points_of  # noqa: E402

LIVE = [(0, 6, 2, 0.5, -2.0), (1, 7, 3, 0.0, 1.5), (0, 8, 4, -1.0, 0.25)]
"""Rows of a launch: source, target, entered state, a and c."""


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import interpreter

    interpreter.correct()
    memory_bounds.watch(monkeypatch)


def launched_backward(
    kind: type[PreactBlock | PostactBlock], task: Launch, rows: Tensor, launch: Tensor
) -> GradientStates:
    network = network_of_a_block(kind)
    gradients = gradients_of(network, rows, launch, waiting=NOTHING if task.ending else 1)
    (ending_backward if task.ending else dgrad)(gradients, saved_of(network), network.blocks[0], task)
    return gradients


def launched_forward(
    kind: type[PreactBlock | PostactBlock], task: Launch, rows: Tensor, launch: Tensor
) -> ActivationStates:
    network = network_of_a_block(kind)
    activations = activations_of(network, rows, launch)
    (ending_forward if task.ending else forward_unit)(network, activations, task)
    return activations


Run = Callable[[Any, Launch, Tensor, Tensor], GradientStates | ActivationStates]

LAUNCHES: dict[str, tuple[Run, type[PreactBlock | PostactBlock], Launch]] = {
    "back, inside": (launched_backward, PreactBlock, Launch(0, 1, True, False, count=CAPACITY)),
    "back, end": (launched_backward, PreactBlock, Launch(0, 0, True, True, count=CAPACITY)),
    "back, behind a convolution": (launched_backward, PostactBlock, Launch(0, 0, True, False, True, count=CAPACITY)),
    "forward, inside": (launched_forward, PreactBlock, Launch(0, 0, True, False, count=CAPACITY)),
    "forward, end": (launched_forward, PreactBlock, Launch(0, 1, True, True, count=CAPACITY)),
    "forward, sum": (launched_forward, PostactBlock, Launch(0, 1, True, True, True, count=CAPACITY)),
}


def compare(
    states: GradientStates | ActivationStates, expected: GradientStates | ActivationStates, names: Sequence[str]
) -> None:
    for name in names:
        left, right = getattr(states, name), getattr(expected, name)
        assert torch.equal(left.nan_to_num(-7), right.nan_to_num(-7)), name


def results(states: GradientStates | ActivationStates) -> list[str]:
    tensors = [field.name for field in fields(states) if isinstance(getattr(states, field.name), Tensor)]
    return [name for name in tensors if name not in ("rows", "launches", "states")]


@pytest.mark.parametrize("name", LAUNCHES)
def test_rows_beyond_those_of_a_launch_are_not_looked_at(name: str) -> None:
    """The results of three rows do not depend on the room for eight, and nothing else is written."""
    run, kind, task = LAUNCHES[name]
    live = LIVE[:1] if name == "back, behind a convolution" else LIVE
    paths = dgrad_tile(network_of_a_block(kind).blocks[0].convolutions[0]).paths if run is launched_backward else 1
    filling = [(NOTHING, NOTHING, NOTHING, 0.0, 0.0)] * (0 if task.ending else -len(live) % paths)
    rows = [*live, *filling]
    roomy = run(kind, task, *row_table(rows, len(rows)))
    tight = run(kind, replace(task, count=len(rows)), *row_table(rows, len(rows)))
    compare(roomy, tight, results(roomy))
    untouched = run(kind, task, *row_table([], 0))
    for state in range(STATES):
        is_target = any(row[1] == state for row in live)
        assert torch.equal(roomy.values[state], untouched.values[state]) != is_target


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_without_rows_writes_nothing(name: str) -> None:
    run, kind, task = LAUNCHES[name]
    network = network_of_a_block(kind)
    empty = run(kind, task, *row_table([], 0))
    before = (
        gradients_of(network, *row_table([], 0), waiting=NOTHING if task.ending else 1)
        if run is launched_backward
        else activations_of(network, *row_table([], 0))
    )
    compare(empty, before, results(empty))


@pytest.mark.parametrize("tiles", [1, ROWS.points - 1, ROWS.points, ROWS.points + 1, 3 * ROWS.points + 5])
def test_sums_and_statistics_of_tiles_around_what_is_loaded_at_once(tiles: int) -> None:
    """11 channels take two tiles; means a thousand times as large as the deviations lose nothing."""
    channels, rows = 11, 2
    table, launch = row_table(LIVE[:rows], rows)
    task = Launch(0, 0, True, False, count=CAPACITY)
    network = network_of_a_block(PreactBlock, (channels, 5, 6))
    gradients = gradients_of(network, table, launch, NOTHING)
    sums = random_numbers(rows, tiles, 2, channels)
    gradients = replace(gradients, sums=sums.reshape(-1))
    take_means(gradients, task, tiles, torch.arange(1.0, channels + 1), channels, 30)
    for row in range(rows):
        expected = sums[row].double().sum(0) * torch.arange(1.0, channels + 1) / (BATCH * 30)
        means = gradients.corrections[LIVE[row][1], :, :channels]
        torch.testing.assert_close(means.double(), expected, rtol=1e-5, atol=1e-5)
    counts = torch.from_numpy(np.random.default_rng(tiles).integers(1, 128, (rows, tiles, 1, channels)))
    means = 1000 + random_numbers(rows, tiles, 1, channels)
    squares = random_numbers(rows, tiles, 1, channels).abs() * counts
    activations = activations_of(network, table, launch)
    moments = torch.cat([counts.float(), means, squares], 2)
    activations = replace(activations, moments=moments.reshape(-1))
    take_statistics(activations, task, tiles, channels)
    for row in range(rows):
        count, mean, square = (part[row, :, 0].double() for part in (counts, means, squares))
        total = (count * mean).sum(0) / count.sum(0)
        variance = (square + count * (mean - total) ** 2).sum(0) / count.sum(0)
        measured_mean, measured_variance = activations.statistics[LIVE[row][1], :, :channels].double()
        torch.testing.assert_close(measured_mean, total, rtol=1e-6, atol=0)
        torch.testing.assert_close(measured_variance, variance, rtol=1e-4, atol=0)


def test_gradients_of_more_channels_than_a_program_takes_at_a_time_arrive() -> None:
    """The means that they await are subtracted; a routing without a state gets zeros."""
    network = network_of_a_block(PreactBlock, (70, 5, 6))
    gradients, saved = gradients_of(network, *row_table([], 0), waiting=0), saved_of(network)
    finals, shape = torch.tensor([1, NOTHING, 3], dtype=torch.int32), network.blocks[0].input
    size = BATCH * shape.size
    x_hat = saved.normalized[:size].view(-1, 70).double()
    expected = torch.zeros(3, BATCH, 5, 6, 70, dtype=torch.float64)
    for place, state in ((0, 1), (2, 3)):
        mean, mean_x_hat = gradients.corrections[state, :, :70].double()
        values = gradients.values[state, :size].view(-1, 70).double()
        expected[place] = (values - mean - x_hat * mean_x_hat).view(BATCH, 5, 6, 70)
    measured = arrived(gradients, saved, finals, shape, torch.float32)
    torch.testing.assert_close(measured.double(), expected, rtol=1e-5, atol=1e-5)
    norms = squared_norms(gradients, saved, finals, shape)
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
    """Tiles of several images, tiles of parts of one, rows that end within a tile, and the longest row."""
    samples, pixels = tile
    pixel_tiles = -(-height * width // pixels)
    tiles = -(-batch // samples) * pixel_tiles
    points = torch.zeros(tiles * samples * pixels, 4, dtype=torch.int32)
    _points_kernel[(tiles,)](points, batch, height, width, 1 / width, pixel_tiles, samples, pixels)
    inside = points[points[:, 3] == 1]
    places = (inside[:, 0] * height + inside[:, 1]) * width + inside[:, 2]
    assert torch.equal(places.sort().values, torch.arange(batch * height * width))
    assert ((inside[:, 1] < height) & (inside[:, 2] >= 0) & (inside[:, 2] < width)).all()
