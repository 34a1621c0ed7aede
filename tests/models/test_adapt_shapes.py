"""The example, the output and the shapes of `adapt`, and parts that depend on more than their input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.model_cases import BY_NAME, adapted_by_name
from helpers.oracles import relative_error
from helpers.third_party import Basic, Bottleneck, ResNet
from helpers.third_party_transformers import LanguageModel, VisionTransformer
from torch import Tensor, nn

import pathnet


def test_wrong_outputs_and_examples_are_named() -> None:
    case = BY_NAME["two outputs"]
    model, (x, _) = case.model(), case.batch()
    with pytest.raises(ValueError, match="output: .*names 'features', 'prediction'"):
        pathnet.adapt(model, x)
    with pytest.raises(ValueError, match="output: the model has no output 'logits'"):
        pathnet.adapt(model, x, output="logits")
    features = pathnet.adapt(model, x, output="features")
    torch.testing.assert_close(features(x), model(x)["features"])
    with pytest.raises(ValueError, match=r"example: the model rejects the shape \[2, 5\]"):
        pathnet.adapt(model, torch.randn(2, 5))
    with pytest.raises(ValueError, match="example: expected a"):
        pathnet.adapt(model, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected a torch.nn.Module, got 3"):
        pathnet.adapt(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example: none could be guessed"):
        pathnet.adapt(nn.ReLU())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: ResNet([Bottleneck(4, 3)], 4, 6), (3, 32, 32)),
        (lambda: LanguageModel(), (8, 8)),
        (VisionTransformer, (5, 8)),
    ],
    ids=["images", "tokens", "patches"],
)
def test_the_example_is_guessed(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = make()
    if isinstance(model, LanguageModel):
        model.dummy_inputs = {"input_ids": torch.randint(0, 11, (2, 8))}
    if isinstance(model, VisionTransformer):
        model.default_cfg = {"input_size": (3, 8, 8)}
    net = pathnet.adapt(model)
    assert tuple(net.shapes[0]) == ((4, 32, 32) if shape == (3, 32, 32) else shape)


class Broadcast(nn.Module):
    """A model whose skip connection has one channel, the residual module several."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x + self.conv(x)).mean((2, 3)))


def test_the_report_says_what_is_fixed_for_the_examples_shape() -> None:
    net = pathnet.adapt(Broadcast(), torch.randn(2, 1, 6, 8))
    assert net.fixed and "for inputs of the example's shape: a branch is broadcast" in str(net)
    with pytest.raises(ValueError, match=r"images: expected those that give blocks an input of \[B, 1, 6, 8\]"):
        net(torch.zeros(2, 1, 6, 7))


@pytest.mark.parametrize("name", ["language model", "basic"])
def test_inputs_of_other_shapes_than_the_examples(name: str) -> None:
    case, net = BY_NAME[name], adapted_by_name(name)
    x = torch.randint(0, 11, (2, 5)) if name == "language model" else torch.randn(2, 3, 17, 12, dtype=torch.float64)
    assert not net.fixed
    torch.testing.assert_close(net(x), case.model()(x))


class Sized(nn.Module):
    """A model whose branches use sizes of its input, one of them twice the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        batch, _, rows, columns = x.shape
        halves = batch * 2
        x = self.conv(x)
        for layer in self.layers:
            x = x + layer(x.reshape(halves, 2 * rows, columns)).tanh().view(batch, -1, rows, columns)
        return self.fc(x.mean((2, 3)))


def test_sizes_from_outside_a_branch_follow_the_batch_size() -> None:
    torch.manual_seed(0)
    model = Sized()
    net = pathnet.adapt(model, torch.randn(2, 3, 6, 8))
    assert net.n == 2 and not net.fixed
    for x in (torch.randn(5, 3, 6, 8), torch.randn(3, 3, 10, 8)):
        torch.testing.assert_close(net(x), model(x))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 4, 3), Basic(4, 4), nn.Linear(4, 5)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.norm(self.conv(x))).mean((2, 3)))


class LaidEndToEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x).flatten(0, 1))
        return self.fc(torch.tanh(y + self.second(y)).unflatten(0, x.shape[:2]).mean(1))


class Remembering(nn.Module):
    """A model whose last block is masked by the signs of an earlier block's output, which a path may change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        y = x + torch.tanh(first(x))
        positive = y > 0
        y = y + torch.tanh(second(y))
        return self.out(y + torch.tanh(third(y)) * positive)


def test_context_from_inside_the_residual_stream_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(
        ValueError,
        match=r"model: the residual module of 'addition \(2\)' needs gt .*, which is computed from the residual",
    ):
        pathnet.adapt(Remembering(), torch.randn(3, 4))


def test_parts_that_cannot_be_cut_out_are_rejected() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="model: samples of a batch influence each other"):
        pathnet.adapt(Mixed(), torch.randn(2, 3, 9, 9))
    with pytest.raises(
        ValueError, match=r"model: expected the batch in one dimension \(2\) between blocks, got \[10,"
    ):
        pathnet.adapt(LaidEndToEnd(), torch.randn(2, 5, 4))


class ComputedStatistics(nn.Module):
    """Batch normalisation with computed statistics, which no module stores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 4, 3), Basic(4, 4), nn.Linear(4, 5)
        self.register_buffer("deviation", torch.rand(4) + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.deviation * 0, self.deviation**2)
        return self.fc(self.block(x).mean((2, 3)))


def test_frozen_statistics_cannot_be_batch_statistics() -> None:
    torch.manual_seed(0)
    model = ComputedStatistics().eval()
    net = pathnet.adapt(model, torch.randn(2, 3, 9, 9))
    images, labels = torch.randn(2, 3, 9, 9), torch.tensor([0, 1])
    assert pathnet.record(net, images, labels, engine="reference").n == 1
    with pytest.raises(ValueError, match="bn: expected 'running' for a network whose running statistics are fixed"):
        pathnet.record(net, images, labels, bn="batch", engine="reference")
    # A function of buffers is recomputed in every run.
    before = net(images).detach()
    model.deviation += 1
    torch.testing.assert_close(net(images), model(images))
    assert relative_error(before, net(images).detach().double()) > 1e-3
    for lesioned in (pathnet.lesion.delete(net, [0]), pathnet.lesion.reorder(net, [0])):
        with pytest.raises(ValueError, match="bn: expected 'running' for a network whose"):
            pathnet.record(lesioned, images, labels, bn="batch", engine="reference")
        with pytest.raises(ValueError, match="net: expected running statistics that can change, got fixed"):
            pathnet.lesion.recalibrated(lesioned, pathnet.data.synthetic())
