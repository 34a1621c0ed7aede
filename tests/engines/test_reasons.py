"""Reasons for which fused engines refuse a network: each names the block that fails, from 0, and what it lacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.third_party import CifarResNet, OptionA, Preactivated, PreactResNet
from torch import Tensor, nn

import pathnet
from pathnet import native
from pathnet.engines.forms import unsupported_block, unsupported_form
from pathnet.models import Block, HighwayBlock, PostactBlock, PreactBlock, ResidualNet
from pathnet.models.residual_net import Form

PRE = PreactBlock(4, (3, 3), (4, 4), 1, "pad")
POST = PostactBlock(4, (3, 3), (4, 4), 1, "pad")
OTHER_SKIP = "its skip connection is neither the identity nor zero padding nor a projection by one convolution"


def net_of(*blocks: Block) -> ResidualNet:
    return ResidualNet(nn.Conv2d(3, 4, 3, padding=1), blocks, nn.Flatten()).eval()


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([POST, POST, PRE, POST], "block 2: it is a pre-activation block in a network of post-activation blocks"),
        ([PRE, POST, PRE, POST, PRE], "block 1: it is a post-activation block in a network of pre-activation blocks"),
        ([PRE, POST], "block 1: it is a post-activation block in a network of pre-activation blocks"),
        ([POST, PRE], "block 1: it is a pre-activation block in a network of post-activation blocks"),
        ([PRE, POST, Block(), PRE], "block 2: its class Block defines no fused form"),
        ([PRE, HighwayBlock(4, 4, 1, "pad")], "block 1: its gate multiplies skip connection and residual module"),
        ([PRE, PRE], None),
        ([POST, POST], None),
    ],
)
def test_the_block_that_differs_from_most_is_named(blocks: list[Block], reason: str | None) -> None:
    assert unsupported_form(net_of(*blocks), "running") == reason


def changed(block: Block, change: Callable[[Form], Form]) -> Block:
    """Return the block with another form."""
    form = block.form()
    assert form is not None
    other = change(form)
    block.form = lambda: other  # type: ignore[method-assign]
    return block


@pytest.mark.parametrize("kind", [PreactBlock, PostactBlock])
def test_padding_that_no_kernel_has_is_refused(kind: type[PreactBlock | PostactBlock]) -> None:
    first, narrower = kind(4, (3, 3), (4, 4), 1, "pad"), kind(4, (3, 3), (2, 2), 1, "pad")
    odd = [changed(kind(4, (3, 3), (7, 7), 2, "pad"), lambda form, n=n: replace(form, pad_before=n)) for n in (-1, 4)]
    unpadded = changed(kind(4, (3, 3), (4, 4), 1, "pad"), lambda form: replace(form, pad_before=1))
    for block, reason in (
        (narrower, "its skip connection drops channels"),
        (odd[0], "its skip connection adds 3 channels, -1 of them before the input's"),
        (odd[1], "its skip connection adds 3 channels, 4 of them before the input's"),
        (unpadded, "its skip connection adds 0 channels, 1 of them before the input's"),
    ):
        form = block.form()
        assert form is not None and unsupported_block(form) == reason
        assert unsupported_form(net_of(first, block), "running") == f"block 1: {reason}"


class Averaging(OptionA):
    """A block whose shortcut averages pixels before it adds channels."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__(inplanes, planes, 2)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.ZeroPad3d((0, 0, 0, 0, 1, 2)))


class Varied(OptionA):
    """A block with one part that fused engines cannot run."""

    def __init__(self, part: str) -> None:
        super().__init__(4, 4)
        self.part, self.projection = part, nn.Conv2d(4, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.part == "before":
            x = torch.tanh(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.gelu(out) if self.part == "residual" else out
        out = self.conv2(out) if self.part == "bare" else self.bn2(self.conv2(out))
        skip = self.projection(x) if self.part == "grouped" else x.flip(1) if self.part == "skip" else x
        return F.gelu(out + skip) if self.part == "after" else F.relu(out + skip)


@pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: Averaging(4, 7), OTHER_SKIP),
        (lambda: Varied("skip"), OTHER_SKIP),
        (lambda: Varied("grouped"), "its skip connection has a convolution that is grouped, dilated or not square"),
        (lambda: Varied("residual"), "its residual module is not a chain of convolutions, batch normalisations and"),
        (lambda: Varied("bare"), "its residual module is not convolutions with a batch normalisation each and ReLUs"),
        (lambda: Varied("after"), "its addition is followed by something other than a ReLU"),
        (lambda: Varied("before"), "its branches begin with other shared operations than a batch normalisation and"),
    ],
)
def test_the_part_of_a_traced_block_that_fails_is_named(block: Callable[[], OptionA], reason: str) -> None:
    torch.manual_seed(0)
    failing = block()
    width = failing.conv2.out_channels
    model = CifarResNet([OptionA(4, 4), OptionA(4, 4), failing, OptionA(width, width)]).eval()
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    net = pathnet.adapt(model, images)
    assert f"engine cpu: block 2: {reason}" in str(net)
    with pytest.warns(RuntimeWarning, match=rf"'autograd' was chosen; .*\(cpu: block 2: {reason}"):
        pathnet.record(net, images, labels)
    with pytest.raises(ValueError, match=f"got 'cpu' .cpu: block 2: {reason}"):
        pathnet.record(net, images, labels, engine="cpu")


@pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)
def test_the_part_of_a_traced_pre_activation_block_that_fails_is_named() -> None:
    torch.manual_seed(0)
    blocks = [Preactivated(4, 4), Preactivated(4, 4), Preactivated(4, 4)]
    blocks[1].bn2 = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    images = torch.randn(2, 3, 8, 8)
    net = pathnet.adapt(PreactResNet(blocks, 4, 4).eval(), images)
    reason = "its residual module does not repeat batch normalisation, ReLU, convolution"
    assert f"engine cpu: block 1: {reason}" in str(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pathnet.record(net, images, torch.tensor([0, 1]), engine="reference")
