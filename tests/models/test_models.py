from __future__ import annotations

import itertools
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import SMALL, Case, shaken
from helpers.oracles import in_float64, relative_error
from helpers.tolerances import EXACT_WALK, FLOAT32_BATCH_NORM
from torch import nn

import pathnet
from pathnet import models, native
from pathnet.engines.fallback import through_shared_prefixes
from pathnet.models import Block, ResidualNet, highway, preact_resnet, preact_resnet_imagenet, vgg


def shapes(net: ResidualNet, images: torch.Tensor) -> list[torch.Size]:
    y, output_shapes = net.stem(images), []
    for block in net.blocks:
        y = block(y)
        output_shapes.append(y.shape[1:])
    return output_shapes


def test_the_110_layer_network_of_the_paper() -> None:
    net = preact_resnet(110).eval()
    assert net.n == 54
    with torch.no_grad():
        output_shapes = shapes(net, torch.randn(1, 3, 32, 32))
    assert output_shapes == [(16, 32, 32)] * 18 + [(32, 16, 16)] * 18 + [(64, 8, 8)] * 18
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
def test_forward_is_skip_plus_residual_and_both_are_functions_of_the_input(case: Case) -> None:
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


def test_training_updates_shared_statistics_once_per_step() -> None:
    net = preact_resnet(8, 4).train()
    net(torch.randn(2, 3, 8, 8))
    assert {int(m.num_batches_tracked) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 111}, r"depth: basic blocks need a depth of 6n \+ 2 \(such as 110 or 116\), got 111"),
        ({"depth": 2}, "depth: basic blocks need"),
        ({"depth": 111, "block": "bottleneck"}, r"depth: bottleneck blocks need a depth of 9n \+ 2"),
        ({"depth": 8, "block": "wide"}, "block: expected 'basic' or 'bottleneck', got 'wide'"),
        ({"depth": 8, "shortcut": "none"}, "shortcut: expected 'projection' or 'pad'"),
        ({"depth": 8, "width": 0}, "width: expected an integer from 1 to 65536, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preact_resnet(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth: expected 50, 101, 152, 200, got 34"):
        preact_resnet_imagenet(34)
    with pytest.raises(ValueError, match="blocks: expected at least one"):
        ResidualNet(nn.Identity(), [], nn.Identity())


SAVED = {
    "bottleneck": lambda: preact_resnet(11, 3, block="bottleneck", shortcut="pad", in_channels=1),
    "stochastic depth": lambda: preact_resnet(8, 3, in_channels=1, survival=0.3),
    "vgg": lambda: vgg(7, 3, num_classes=4, in_channels=1, stages=3),
    "highway": lambda: highway(14, 3, num_classes=4, in_channels=1, gate_bias=-2.5, shortcut="pad"),
    "imagenet": lambda: preact_resnet_imagenet(50, 4, 2),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_network_is_rebuilt_bit_for_bit(tmp_path: Path, kind: str) -> None:
    net = shaken(SAVED[kind]()).eval()
    models.save(net, tmp_path / "net.safetensors")
    again = models.load(tmp_path / "net.safetensors")
    assert models.fingerprint(again) == models.fingerprint(net) and again.config == net.config
    assert [block.survival for block in again] == [block.survival for block in net]
    images = torch.randn(2, net.stem_weight().shape[1], 8, 8)
    assert torch.equal(again(images), net(images)) and not again.training
    next(net.blocks[0].parameters()).data.view(-1)[0] += 1e-6
    assert models.fingerprint(again) != models.fingerprint(net)


def test_the_configuration_contains_survival_if_it_is_not_1() -> None:
    assert preact_resnet(8, 4, survival=0.5).config == {**(preact_resnet(8, 4).config or {}), "survival": 0.5}
    assert "survival" not in (preact_resnet(8, 4, survival=1).config or {})


def test_kernels_saved_in_float16_are_loaded_as_the_rounded_network(tmp_path: Path) -> None:
    net = shaken(preact_resnet(8, 4)).eval()
    for dtype in (None, torch.float16):
        models.save(net, tmp_path / f"{dtype}.safetensors", dtype)
    again = models.load(tmp_path / "torch.float16.safetensors").state_dict()
    for name, tensor in net.state_dict().items():
        rounded = tensor.half().float() if tensor.ndim > 1 else tensor
        assert torch.equal(again[name], rounded) and again[name].dtype == tensor.dtype
    sizes = [(tmp_path / f"{dtype}.safetensors").stat().st_size for dtype in (torch.float16, None)]
    assert sizes[0] < 0.8 * sizes[1]


def test_unreadable_weights_are_reported_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(ValueError, match="weights: .*net.safetensors does not exist$"):
        models.load(path)
    torch.save(preact_resnet(8, 4).state_dict(), path)
    with pytest.raises(
        ValueError, match="weights: .*net.safetensors is a file of torch.save; read it with torch.load"
    ):
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


# VGG


def test_the_vgg_of_the_paper() -> None:
    net = vgg().eval()
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 15 and net.n == 13 and net.parts == 2
    assert all(m.out_channels == 128 for m in layers if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        output_shapes = shapes(net, torch.randn(1, 3, 32, 32))
    # Stages of 4, 3, 3 and 4 layers, of which the stem is the first.
    assert [size[1] for size in output_shapes] == [32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 4, 4]
    assert all(size == (128, size[1], size[1]) for size in output_shapes)


def test_a_deleted_layer_passes_its_input_on_pooled_if_it_pools() -> None:
    net = shaken(vgg(8, 5, stages=3)).eval()
    assert [block.pool for block in net.blocks] == [True, False, False, True, False, False]
    y = net.stem(torch.randn(2, 3, 12, 12))
    with torch.no_grad():
        for block in net.blocks:
            expected = F.relu(block.bn(F.conv2d(y, block.conv.weight, padding=1)))
            if block.pool:
                expected = expected.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
                assert torch.equal(block.lesioned(y), y.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1)))
            else:
                assert torch.equal(block.lesioned(y), y)
            torch.testing.assert_close(block(y), expected)
            assert block.lesioned(y).any() and not block.skip(y).any()
            torch.testing.assert_close(block.skip(y) + block.residual(y), expected)
            y = block(y)


def test_a_vgg_has_one_path() -> None:
    net, (images, labels) = shaken(vgg(6, 4, num_classes=5, stages=2)).eval(), Case("", 8).images()
    tape = pathnet.record(net, images, labels, engine="reference", precision="float64")
    paths = torch.tensor(list(itertools.product(range(2), repeat=4)))
    norms = tape.path_gradient_norms(paths)
    assert norms[-1] > 0 and not norms[:-1].any()
    assert relative_error(tape.path_gradients(paths)[-1], tape.gradient()) < EXACT_WALK


@pytest.mark.parametrize("stages", range(1, 9))
def test_a_vgg_pools_between_stages_or_is_rejected(stages: int) -> None:
    accepted = []
    for depth in range(2, 24):
        try:
            with torch.device("meta"):
                net = vgg(depth, 2, stages=stages)
        except ValueError as error:
            least = 1 + -(-3 * stages // 2)
            assert str(error) == f"depth: expected at least {least} layers for {stages} stages, got {depth}"
            continue
        accepted.append(depth)
        assert net.n == depth - 2 and sum(block.pool for block in net.blocks) == stages - 1
    assert accepted == list(range(1 + -(-3 * stages // 2), 24))


@pytest.mark.parametrize("name", ["width", "num_classes", "in_channels", "stages"])
def test_bad_arguments_of_a_vgg_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected an integer (from 1 to|of at least 1)"):
        vgg(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"config: expected arguments of vgg \(.*stages\), got 'block'"):
        models.build({"model": "vgg", "block": "basic"})


# Stochastic depth


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("bn", ["running", "batch"])
def test_every_path_of_a_network_with_stochastic_depth(bn: Any, shortcut: Any) -> None:
    """Check paths in evaluation mode, where the survival probability multiplies the residual branch."""
    torch.manual_seed(0)
    net = shaken(preact_resnet(14, 4, num_classes=5, shortcut=shortcut, survival=0.4)).train()
    images, labels = Case("", 14).images()
    paths = torch.tensor(list(itertools.product(range(2), repeat=6)))
    before, exact = models.fingerprint(net), in_float64(net, bn)

    def loop(path: list[int] | None) -> torch.Tensor:
        y = y0 = exact.stem(images.double())
        for i, block in enumerate(exact.blocks):
            first = F.relu(block.bns[0](y))
            residual = block.convs[1](F.relu(block.bns[1](block.convs[0](first)))) * (1 - (i + 1) / 6 * 0.6)
            skip = block.projection(first) if block.projection is not None else y
            if block.pad:
                skip = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1]))
            skip, residual = (
                output if path is None or path[i] == branch else output.detach()
                for branch, output in enumerate((skip, residual))
            )
            y = skip + residual
        return torch.autograd.grad(F.cross_entropy(exact.head(y), labels), y0)[0]

    expected = torch.stack([loop(path) for path in paths.tolist()])
    tape = pathnet.record(net, images, labels, bn, "reference", "float64")
    for grad, truth in zip(tape.path_gradients(paths), expected, strict=True):
        assert relative_error(grad, truth) < EXACT_WALK
    assert relative_error(tape.gradient(), loop(None)) < EXACT_WALK
    if native.LOADED:
        fast = pathnet.record(net, images, labels, bn, "cpu")
        for grad, truth in zip(fast.path_gradients(paths), expected, strict=True):
            assert relative_error(grad, truth) < 10 * FLOAT32_BATCH_NORM
    # Constants were folded into weights only in the tapes' copies.
    assert models.fingerprint(net) == before and net.training and [block.survival for block in net][-1] == 0.4


def test_a_block_has_a_fused_form_only_if_it_needs_no_factor() -> None:
    net = preact_resnet(8, 4, survival=0.5)
    assert all(block.form() is not None for block in net.train())
    assert all(block.form() is None for block in net.eval())
    x = net.stem(torch.randn(2, 3, 8, 8)).detach()
    first = next(iter(net))
    expected = first(x)
    with pytest.raises(ValueError, match="block: its residual module is scaled by a survival probability of 0.8"):
        pathnet.nn.fused_residual(first, x)
    first.settle()
    assert first.survival == 1 and first.form() is not None
    torch.testing.assert_close(first(x), expected)


# Sequences of steps with shared prefixes


@pytest.mark.parametrize("intact_first", [True, False])
def test_sequences_share_prefixes_and_few_inputs_are_alive_at_once(intact_first: bool) -> None:
    n, most, calls = 40, 0, 0
    inputs: list[weakref.ref[torch.Tensor]] = []
    sequences = [[i == deleted for i in range(n)] for deleted in range(n)]
    sequences = [[False] * n, *sequences] if intact_first else [*sequences, [False] * n]

    def apply(i: int, y: torch.Tensor, step: bool) -> torch.Tensor:
        nonlocal most, calls
        calls += 1
        y = y * 2 + step
        if i < n - 1:
            inputs.append(weakref.ref(y))
        most = max(most, sum(reference() is not None for reference in inputs))
        return y

    ends = through_shared_prefixes(torch.zeros(1, dtype=torch.float64), sequences, apply)
    assert [end.item() for end in ends] == [
        sum(2.0 ** (n - 1 - i) for i, step in enumerate(sequence) if step) for sequence in sequences
    ]
    # Each deletion runs from its block on; one sequence deletes nothing.
    assert calls == n * (n + 1) // 2 + n
    assert most <= 1 + math.log2(len(sequences))
