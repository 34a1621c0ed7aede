"""The networks that the cpu engine serves, and the memory that its tapes keep."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from helpers.cases import SMALL, Case
from helpers.cpu_networks import recorded
from helpers.judging import TOLERANCES
from helpers.walk_cases import MODES
from torch import nn

import pathnet
from pathnet import native
from pathnet.engines.cpu import CpuWalk
from pathnet.models import ResidualNet, resnet

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def test_a_tape_keeps_bits_not_activations() -> None:
    """Record ResNet-110 on 128 images: the bits are 16 MB, the activations would be half a gigabyte."""
    case = Case("resnet-110", 110, width=16, side=32, batch=128)
    net, (images, labels) = case.net(), case.images()
    tape = recorded(net, images, labels, "running", "float32")
    assert isinstance(tape._record.walk, CpuWalk)
    assert tape._record.walk.relu_bits.nbytes <= tape.nbytes < 40e6


def test_bits_are_a_channel_each() -> None:
    case = SMALL[3]
    net, (images, labels) = case.net(), case.images()
    record = recorded(net, images, labels, "running", "float32")._record
    assert isinstance(record.walk, CpuWalk)
    y = net.stem(images)
    for block, bits in zip(net.blocks, record.walk.bits(), strict=True):
        assert torch.equal(bits[0], block.bns[0](y) > 0)
        y = block(y)


def test_auto_takes_it_for_every_mode_and_precision_but_float64() -> None:
    net, (images, labels) = SMALL[0].net(), SMALL[0].images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bn in MODES:
            for precision in TOLERANCES:
                tape = pathnet.record(net, images, labels, bn, precision=precision)  # type: ignore[arg-type]
                assert tape.engine == "cpu"


def test_what_the_engine_lacks_is_named() -> None:
    net, (images, labels) = SMALL[0].net(), SMALL[0].images()
    net.blocks[1].convs[0].dilation = (2, 2)
    with pytest.raises(ValueError, match="cpu: block 1: it has a convolution that is grouped, dilated or not square"):
        pathnet.record(net, images, labels, engine="cpu")
    with pytest.raises(ValueError, match='cpu: no precision="float64"'):
        pathnet.record(net, images, labels, engine="cpu", precision="float64")
    for conv, message in (
        (torch.nn.Conv2d(4, 4, 3, padding=1), "it has a convolution with a bias"),
        (
            torch.nn.Conv2d(4, 4, 1, padding=1, bias=False),
            "it has a convolution whose padding reaches beyond its kernel",
        ),
    ):
        net = SMALL[0].net()
        net.blocks[0].convs[0] = conv
        with pytest.raises(ValueError, match=f"cpu: block 0: {message}"):
            pathnet.record(net, images, labels, engine="cpu")
    net = SMALL[0].net()
    net.blocks[2].bns[1] = torch.nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(ValueError, match="cpu: block 2: it keeps no running statistics"):
        pathnet.record(net, images, labels, engine="cpu")
    assert pathnet.record(net, images, labels, "batch", engine="cpu").engine == "cpu"


def test_one_value_a_channel_has_no_statistics() -> None:
    net, (images, labels) = SMALL[0].net(), SMALL[0].images()
    with pytest.raises(ValueError, match="images: expected more than one value per channel for batch statistics"):
        recorded(net, images[:1, :, :1, :1], labels[:1], "batch", "float32")


def test_what_post_activation_networks_are_refused() -> None:
    net, (images, labels) = resnet(8, width=4, shortcut="projection").eval(), SMALL[0].images()
    net.blocks[1].projection_bn = nn.Identity()
    form = net.blocks[1].form()
    net.blocks[1].form = lambda: replace(form, projection_bn=None)
    with pytest.raises(ValueError, match="cpu: block 1: its skip connection is a projection without batch norm"):
        recorded(net, images, labels, "batch", "float32")
    assert recorded(net, images, labels, "running", "float32").engine == "cpu"
    mixed = ResidualNet(net.stem, [*Case("pre", 8).net().blocks[:1], *net.blocks], net.head).eval()
    with pytest.raises(ValueError, match="cpu: block 0: it is a pre-activation block in a network of post"):
        recorded(mixed, images, labels, "running", "float32")
