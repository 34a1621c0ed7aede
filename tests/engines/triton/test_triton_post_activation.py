"""Post-activation networks by the triton engine, in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import post_activation_net, shaken
from helpers.interpreted import MODES, recorded, walk_of
from helpers.judging import check, check_sums, random_routings, reference_outputs
from helpers.model_cases import MODEL_CASES
from helpers.oracles import autograd, detach_loop, in_float64, relative_error
from helpers.tolerances import FLOAT32_SAMPLE_NORM, FORWARD
from torch import nn

import pathnet
from pathnet.models import PostactBlock, ResidualNet

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/gpu/triton"),
    pytest.mark.usefixtures("interpreted"),
]


def test_batch_normalisation_behind_convolutions_in_the_tiles_of_a_gpu() -> None:
    """Tiles that hold parts of images, and more channels than one tile holds."""
    torch.manual_seed(0)
    block = PostactBlock(5, (3,), (70,), 1, "projection")
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(70, 5))
    net = ResidualNet(nn.Conv2d(3, 5, 3, padding=1), [block], head).eval()
    images, labels = torch.randn(4, 3, 5, 3), torch.tensor([0, 1, 2, 3])
    check(recorded(net, images, labels, "batch"), random_routings(1, 0), "float32", gradients=False)


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(
    ("seed", "bn", "precision"),
    [
        (18, "running", "float32"),
        (16, "running", "bfloat16"),
        (12, "batch", "float32"),
        (3, "batch", "bfloat16"),
    ],
)
def test_post_activation_blocks(seed: int, bn: str, precision: str) -> None:
    """Check backward passes, sums by length, forward passes and records: skips, strides, bottlenecks, one sample."""
    net, images, labels = post_activation_net(seed)
    exact = in_float64(net, bn)
    recorder = pathnet.Recorder(net, bn, "interpreted", precision)  # type: ignore[arg-type]
    tape = recorder(images, labels)
    assert relative_error(tape.output, exact(images.double()).detach()) < FORWARD
    routing = random_routings(net.n, seed)
    check(tape, routing, precision)
    check_sums(tape, routing[3], precision)
    for output, expected in zip(
        recorder.routed_outputs(images, routing), reference_outputs(exact, images, routing), strict=True
    ):
        assert relative_error(output, expected) < FORWARD


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(
    ("seed", "bn", "open_stem"),
    [(7, "running", False), (16, "running", True), (7, "batch", True)],
)
def test_every_path_of_post_activation_networks(
    seed: int, bn: str, open_stem: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every path gradient equals the detach loop's, alone and among others; their sum is the ordinary gradient, their
    polynomial that of lengths. A stem may end without a ReLU: nothing clamps its output."""
    from helpers import interpreter

    net, images, labels = post_activation_net(seed)
    if open_stem:
        net.stem = nn.Sequential(*list(net.stem)[:2])  # type: ignore[arg-type, call-overload]
        assert (net.stem(images) < 0).any()
    tape = recorded(net, images, labels, bn)
    every = pathnet.paths.enumerate_all(net.n)
    gradients, lengths = tape.path_gradients(every), every.sum(1).double()
    for path, gradient in zip(every, gradients, strict=True):
        assert relative_error(gradient, detach_loop(net, images, labels, path, bn)) < FLOAT32_SAMPLE_NORM
    assert relative_error(gradients.sum(0), autograd(net, images, labels, bn)) < FLOAT32_SAMPLE_NORM
    points = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    routing = torch.stack([torch.ones(3, net.n, dtype=torch.float64), points[:, None].expand(3, net.n)], 2)
    for x, routed in zip(points, tape.routed_gradients(routing), strict=True):
        total = (gradients * (x**lengths)[:, None, None, None, None]).sum(0)
        assert relative_error(routed, total) < FLOAT32_SAMPLE_NORM
    interpreter.sum_in_order(monkeypatch)
    assert torch.equal(tape.path_gradients(every[1:3].flip(0)), tape.path_gradients(every)[1:3].flip(0))


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
def test_zero_channels_on_both_sides_of_the_input(bn: str) -> None:
    """Check every path, and forward passes under routings, of a block that adds one channel before and two after."""
    torch.manual_seed(0)
    blocks = [PostactBlock(3, (3,), (3,), 1, "pad"), PostactBlock(3, (3,), (6,), 2, "pad_around")]
    assert [block.pad_before for block in blocks] == [0, 1]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    net = shaken(ResidualNet(nn.Conv2d(3, 3, 3, padding=1), blocks, head)).eval()
    images, labels = torch.randn(3, 3, 7, 5), torch.tensor([0, 1, 2])
    recorder = pathnet.Recorder(net, bn, "interpreted")  # type: ignore[arg-type]
    tape, every = recorder(images, labels), pathnet.paths.enumerate_all(net.n)
    for path, gradient in zip(every, tape.path_gradients(every), strict=True):
        assert relative_error(gradient, detach_loop(net, images, labels, path, bn)) < FLOAT32_SAMPLE_NORM
    routing = random_routings(net.n, 1)
    expected = reference_outputs(in_float64(net, bn), images, routing)
    for output, truth in zip(recorder.routed_outputs(images, routing), expected, strict=True):
        assert relative_error(output, truth) < FORWARD


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize("bn", MODES)
def test_post_activation_blocks_of_a_third_party_model(bn: str) -> None:
    """A traced model from outside the package: convolutions with biases, blocks of a single convolution."""
    case = next(case for case in MODEL_CASES if case.name == "control flow")
    model, (images, labels) = case.model(3).float(), case.batch()
    images = images.float()
    net = pathnet.adapt(model, images)
    tape = recorded(net, images, labels, bn)
    every = pathnet.paths.enumerate_all(net.n)
    for path, gradient in zip(every, tape.path_gradients(every), strict=True):
        assert relative_error(gradient, detach_loop(net, images, labels, path, bn)) < FLOAT32_SAMPLE_NORM


def test_a_tape_of_a_post_activation_network_owns_the_last_joins_bits() -> None:
    net, images, labels = post_activation_net(23)
    record = walk_of(recorded(net, images, labels, "running"))
    assert record.last is not None and any(tensor is record.last for tensor in record.tensors)
    shifts = [conv.shift for block in record.network.blocks for conv in block.convolutions[-1:]]
    assert all(any(shift is tensor for tensor in record.tensors) for shift in shifts)
