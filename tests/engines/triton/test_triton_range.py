"""Tiny and zero gradients by the triton engine, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import faint, post_activation_net
from helpers.interpreted import MODES, recorded, small_net, walk_of
from helpers.judging import check, check_sums, random_routings
from torch import Tensor, nn

import pathnet
from pathnet import scaling
from pathnet.models import PostactBlock, PreactBlock, ResidualNet

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/gpu/triton"),
    pytest.mark.usefixtures("interpreted"),
]


def wide_net(
    blocks: int, seed: int = 0, kind: type[PreactBlock | PostactBlock] = PreactBlock
) -> tuple[ResidualNet, Tensor, Tensor]:
    """Return a network of blocks of one shape, whose skips are all identities, and a batch."""
    torch.manual_seed(seed)
    chain = [kind(4, (3, 3), (4, 4), 1, "projection") for _ in range(blocks)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net = ResidualNet(nn.Conv2d(3, 4, 3, padding=1), chain, head).eval()
    return net, torch.randn(3, 3, 6, 6), torch.tensor([0, 1, 2])


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(("bn", "kind"), [(bn, kind) for bn in MODES for kind in (PreactBlock, PostactBlock)])
def test_range(bn: str, kind: type[PreactBlock | PostactBlock]) -> None:
    """Norms of 1e-190 have full relative precision, and so has one sample among much larger ones."""
    net, images, labels = wide_net(8, kind=kind)
    # One module may shrink a gradient to 1e-19; two are between one rescaling and the next.
    for block in net.blocks:
        block.convs[1].weight.data *= 1e-15
    tape = recorded(net, images, labels, bn)
    routing = pathnet.paths.routing(torch.ones(1, 8, dtype=torch.uint8)).double() * 1e-12
    routing = torch.cat([routing, routing * 1e40])
    norms, expected = check(tape, routing, "float32", gradients=False)
    assert float(expected[0].max()) < 1e-190 and float(expected[1].max()) > 1e30 * float(expected[0].max())
    if bn == "batch":
        tape._record.start.mantissa[1] *= 1e-12
        check(tape, routing[:1], "float32", gradients=False)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
def test_paths_without_modules_and_without_anything(bn: str) -> None:
    net, images, labels = wide_net(3)
    tape = recorded(net, images, labels, bn)
    skips = torch.zeros(1, 3, dtype=torch.uint8)
    start = scaling.value(tape._record.start.mantissa[None], tape._record.start.exponent[None])
    assert torch.equal(tape.path_gradients(skips), start)
    dead = torch.zeros(1, 3, 2)
    assert torch.equal(tape.routed_gradients(dead), torch.zeros_like(start))
    weighted = torch.tensor([[[3.0, 0], [-0.5, 0], [2.0**-100, 0]]])
    expected = start * (-1.5 * 2.0**-100)
    torch.testing.assert_close(tape.routed_gradients(weighted), expected, rtol=1e-6, atol=0)
    assert tape.path_gradient_norms(torch.zeros(0, 3, dtype=torch.uint8)).shape == (0,)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_what_a_module_shrinks_beyond_float32_is_kept(kind: str, bn: str) -> None:
    net, images, labels = small_net(1) if kind == "pre" else post_activation_net(23, bn)
    net = faint(net, 0)
    tape = recorded(net, images, labels, bn)
    assert walk_of(tape).network.magnitudes is not None
    check(tape, random_routings(net.n, 0), "float32")
    check_sums(tape, torch.ones(net.n, 2), "float32")
