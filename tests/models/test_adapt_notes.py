"""Additions that are no blocks, with the reason in the report, and blocks that are refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.model_cases import adapted_by_name
from helpers.oracles import relative_error
from helpers.third_party import Basic, Bottleneck, Preactivated, PreactResNet, ResNet
from torch import Tensor, nn

import pathnet


class Distilled(nn.Module):
    """A model with two classifiers, whose mean is its output, or one classifier and a residual block at the end."""

    def __init__(self, ends: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ends, self.layer, self.norm = (
            ends,
            nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)),
            nn.LayerNorm(4),
        )
        self.head, self.distilled = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x + self.layer(x))
        if self.ends == "classifiers":
            return (self.head(x[:, 0]) + self.distilled(x[:, 1])) / 2
        if self.ends == "projection":
            return self.head(x) + torch.tanh(self.distilled(x))
        return x + self.head(x)


def test_a_sum_of_classifiers_is_a_head_and_a_last_residual_block_is_a_block() -> None:
    x = torch.randn(3, 5, 4)
    net = pathnet.adapt(Distilled("classifiers"), x)
    assert net.n == 1
    assert "no blocks, since they add the outputs of linear classifiers: add (node 'add_1')" in str(net)
    assert str(net).startswith("1 residual block, found by torch.fx")
    for ends in ("projection", "identity"):
        net = pathnet.adapt(Distilled(ends), x)
        assert net.n == 2 and "no blocks" not in str(net)


class Additions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.last, self.fc = nn.Conv2d(3, 4, 1), Basic(4, 4), Basic(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        x = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)
        y = self.block(x) * (x + x.sin())
        return self.fc(self.last(y).mean((2, 3)))


def test_additions_that_are_no_blocks_are_listed_with_the_reason() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    report = str(pathnet.adapt(Additions(), x, blocks=["last"]))
    (line,) = (line for line in report.splitlines() if line.startswith("no blocks"))
    assert line.startswith("no blocks, since they are outside the modules named by blocks= or stream=: add (node ")
    assert line.count("add (node ") == 3 and "in module 'block')" in line
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Basic(4, 4))
    assert "no blocks" not in str(pathnet.adapt(model, x))
    report = str(adapted_by_name("language model"))
    (line,) = (line for line in report.splitlines() if line.startswith("no blocks"))
    assert line.startswith("no blocks, since they are inside the branches of a block: add (node ")
    # Two rotated vectors, and one sum in the polynomial GELU, in each of two layers; three are named.
    assert "in block 0" in line and line.endswith("and 3 more")


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(3, 4, 1), Basic(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.block(self.conv(x))
        return self.fc((F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)).mean((2, 3)))


def test_an_addition_without_weights_is_listed() -> None:
    report = str(pathnet.adapt(Pooled(), torch.randn(2, 3, 8, 8)))
    assert "no blocks, since no branch has weights: add (node 'add')" in report


class Strided(Preactivated):
    """A first block whose branches begin after BN and an activation that no fused form has."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(x))
        return self.shortcut(x) + self.conv2(F.relu(self.bn2(self.conv1(x))))


def test_operations_of_the_first_block_that_run_in_the_stem_are_named() -> None:
    x = torch.randn(2, 3, 9, 9)
    report = str(pathnet.adapt(PreactResNet([Strided(4, 6), Preactivated(6, 6)], 4, 6), x))
    assert "block 0: 'layers.0.bn1', gelu (node 'gelu' in module 'layers.0') run in the stem, since both " in report
    assert "run in the stem" not in str(adapted_by_name("pre-activation"))
    assert "run in the stem" not in str(adapted_by_name("basic"))


class Exchanging(nn.Module):
    """Two streams that exchange their features, as HRNet's stages do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c0, self.c1, self.c2, self.c3, self.c4, self.c5 = (nn.Conv2d(3, 3, 1) for _ in range(6))
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        a, b = self.c0(x), self.c1(x)
        a = a + self.c2(F.relu(b))
        b = b + self.c3(F.relu(a))
        return self.fc((self.c4(a) + self.c5(b)).mean((2, 3)))


class Tied(nn.Module):
    """Layers tied across blocks and with the head, and branches that share a normalisation."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight, self.inside = self.layer.weight, inside

    def forward(self, x: Tensor) -> Any:
        for _ in range(2):
            h = self.norm(x)
            x = (self.layer(h) if self.inside else h) + torch.tanh(self.layer(torch.sin(h)) * x)
        return self.head(x)


def test_branches_that_share_layers_are_refused_by_name() -> None:
    message = r"model: expected branches with weights of their own, got the layers c\d, .* in both .* meet at add"
    with pytest.raises(ValueError, match=message):
        pathnet.adapt(Exchanging(), torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match="got the layers layer in both"):
        pathnet.adapt(Tied(True), torch.randn(2, 4))
    x, model = torch.randn(2, 4), Tied(False)
    net = pathnet.adapt(model, x)
    assert net.n == 2 and relative_error(net(x).detach(), model(x).detach()) < 1e-6


def test_only_convolutional_networks_with_batch_normalisation_warn_about_faster_engines() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return self.fc((x + self.conv(self.norm(x))).mean((2, 3)))

    x, labels = torch.randn(2, 4, 6, 6), torch.tensor([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pathnet.record(pathnet.adapt(Normed(), x), x, labels)
    blocks = ResNet([Bottleneck(4, 3), Basic(6, 6)], 4, 6)
    blocks.layer1[1].conv1 = nn.Conv2d(6, 6, 3, 1, 1, groups=2)
    images = torch.randn(2, 3, 9, 9)
    with pytest.warns(RuntimeWarning, match="faster engines refuse the job"):
        pathnet.record(pathnet.adapt(blocks, images), images, labels)
