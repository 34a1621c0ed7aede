from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import SMALL, Case, shaken
from torch import nn

from pathnet import models
from pathnet.models import Block, ResidualNet, preact_resnet, preact_resnet_imagenet


def shapes(net: ResidualNet, images: torch.Tensor) -> list[torch.Size]:
    y, seen = net.stem(images), []
    for block in net.blocks:
        y = block(y)
        seen.append(y.shape[1:])
    return seen


def test_the_110_layer_network_of_the_paper() -> None:
    net = preact_resnet(110).eval()
    assert net.n == 54
    with torch.no_grad():
        seen = shapes(net, torch.randn(1, 3, 32, 32))
    assert seen == [(16, 32, 32)] * 18 + [(32, 16, 16)] * 18 + [(64, 8, 8)] * 18
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) + 1 == 110


def test_the_200_layer_imagenet_form() -> None:
    with torch.device("meta"):
        net = preact_resnet_imagenet(200)
    assert net.n == 66
    small = preact_resnet_imagenet(50, num_classes=7, width=4).eval()
    with torch.no_grad():
        assert small(torch.randn(2, 3, 64, 64)).shape == (2, 7)
        assert shapes(small, torch.randn(1, 3, 64, 64))[-1] == (128, 2, 2)


@pytest.mark.parametrize("depth", [11, 20, 164])
def test_bottleneck_depths(depth: int) -> None:
    with torch.device("meta"):
        assert preact_resnet(depth, block="bottleneck").n == (depth - 2) // 3


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_forward_is_skip_plus_residual_and_both_are_whole_functions(case: Case) -> None:
    net, (images, _) = case.net(), case.images()
    y = net.stem(images)
    for block in net.blocks:
        joined = block.skip(y) + block.residual(y)
        torch.testing.assert_close(block(y), joined, rtol=0, atol=0)
        y = joined
    torch.testing.assert_close(net(images), net.head(y), rtol=0, atol=0)


def test_a_projection_reads_the_preactivated_input_and_a_padding_the_raw_one() -> None:
    projected, padded = (
        preact_resnet(8, 4).eval().blocks[1],
        preact_resnet(8, 4, shortcut="pad").eval().blocks[1],
    )
    x = torch.randn(1, 4, 7, 7)
    preactivated = torch.relu(projected.bns[0](x))
    torch.testing.assert_close(projected.skip(x), projected.projection(preactivated))
    skip = padded.skip(x)
    assert torch.equal(skip[:, :4], x[:, :, ::2, ::2]) and not skip[:, 4:].any()


def test_training_updates_shared_statistics_once_a_step() -> None:
    net = preact_resnet(8, 4).train()
    net(torch.randn(2, 3, 8, 8))
    assert {int(m.num_batches_tracked) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 111}, r"depth: basic blocks need a depth of 6n \+ 2 \(such as 110 or 116\), got 111"),
        ({"depth": 2}, "depth: basic blocks need"),
        ({"depth": 111, "block": "bottleneck"}, r"depth: bottleneck blocks need a depth of 9n \+ 2"),
        ({"depth": 8, "block": "wide"}, "block: expected one of 'basic', 'bottleneck', got 'wide'"),
        ({"depth": 8, "shortcut": "none"}, "shortcut: expected one of"),
        ({"depth": 8, "width": 0}, "width: expected a positive integer, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preact_resnet(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth: expected one of 50, 101, 152, 200, got 34"):
        preact_resnet_imagenet(34)
    with pytest.raises(ValueError, match="blocks: expected at least one"):
        ResidualNet(nn.Identity(), [], nn.Identity())


def test_a_saved_network_is_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    net = shaken(preact_resnet(11, 3, block="bottleneck", shortcut="pad", in_channels=1)).eval()
    models.save(net, tmp_path / "net.safetensors")
    again = models.load(tmp_path / "net.safetensors")
    assert models.fingerprint(again) == models.fingerprint(net) and again.config == net.config
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), net(images))
    net.blocks[0].convs[0].weight.data[0, 0, 0, 0] += 1e-6
    assert models.fingerprint(again) != models.fingerprint(net)


def test_unreadable_weights_are_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(ValueError, match="weights: .* is not a readable safetensors file"):
        models.load(path)
    models.save(preact_resnet(8, 4), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="weights: .* is not a readable safetensors file"):
        models.load(path)
    with pytest.raises(OSError, match="weights: .* cannot be written"):
        models.save(preact_resnet(8, 4), "/proc/net.safetensors")
    with pytest.raises(ValueError, match="config: expected a model among"):
        models.build({"model": "alexnet"})
    with pytest.raises(ValueError, match="net: has no config"):
        models.save(ResidualNet(nn.Identity(), [Block()], nn.Identity()), path)
