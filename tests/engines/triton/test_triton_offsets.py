"""Single launches in Triton's interpreter at places beyond 2**31."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import memory_bounds
from torch import nn

from pathnet.models import PreactBlock, ResidualNet

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/gpu/triton"
)

from helpers.single_launches import network_of_a_block  # noqa: E402

from pathnet.engines.triton import launch as launches  # noqa: E402
from pathnet.engines.triton.configurations import FOLDED  # noqa: E402
from pathnet.engines.triton.dgrad import dgrad, dgrad_point_tiles, dgrad_tile  # noqa: E402
from pathnet.engines.triton.folding import constants_size, folded_size, taps_of  # noqa: E402
from pathnet.engines.triton.launch import Tile  # noqa: E402
from pathnet.engines.triton.packing import network_of  # noqa: E402
from pathnet.engines.triton.schedule import NOTHING, Launch  # noqa: E402
from pathnet.engines.triton.state import GradientStates, Saved  # noqa: E402


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import interpreter

    interpreter.correct()
    memory_bounds.watch(monkeypatch)


class Launched(Exception):
    """A kernel has run with these arguments."""


def stop_behind_the_launch(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    run = module.launch

    def launch(kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
        run(kernel, programs, tile, **arguments)
        raise Launched(arguments)

    monkeypatch.setattr(module, "launch", launch)


def test_parts_of_a_weight_gradient_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 channels, 28 x 28, 2,700 images: with spans of 2,048 points the last part begins at 2.4e9."""
    from pathnet.engines.triton import wgrad as module
    from pathnet.engines.triton.configurations import WGRAD

    network = network_of_a_block(PreactBlock, (512, 28, 28))
    conv, batch = network.blocks[0].convolutions[1], 2700
    points = batch * conv.output.pixels
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
    gradients = GradientStates(
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
    saved = Saved(nothing, [0, 0, 0], normalized, [0, 0], torch.zeros(2, dtype=torch.int64), torch.zeros(2, 512))
    affine = torch.stack([torch.ones(512), torch.zeros(512)])
    with pytest.raises(Launched) as launched:
        module.wgrad(gradients, saved, 0, conv, 1, affine)
    parts = launched.value.args[0]["parts_ptr"]
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
    gradients = GradientStates(
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
    gradients = GradientStates(
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
    saved = Saved(
        torch.zeros(batch, dtype=torch.uint8),
        [0, batch],
        torch.zeros(0),
        [0, 0],
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, 16),
    )
    memory_bounds.run_one_program(monkeypatch, tiles - 1, tiles)
    dgrad(gradients, saved, network.blocks[0], Launch(0, 0, True, True, count=paths))
    assert gradients.exponents[-1, -1] == 8
    assert gradients.largest[-1, -1].view(torch.float32) == gradients.values[1, -1].abs() == 0.125
