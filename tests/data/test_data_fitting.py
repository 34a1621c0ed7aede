"""A network that does not take the images of a data set is refused by name, whatever its stem looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pathnet
from pathnet import models, training
from pathnet.data import synthetic
from pathnet.data.fitting import check_fits
from pathnet.experiments import lesion_single, path_gradients
from pathnet.experiments.plans import PathGradients, Plan

GREY = synthetic(images=16, classes=2, shape=(1, 8, 8))
REFUSAL = r"^data: expected images of 3 channels \(the network's\), got 1 in synthetic$"


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.conv(x))


class Model(nn.Module):
    """A model whose modules are registered in another order than they run in."""

    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Adding(), Adding())
        self.stem = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)))
        self.linear = nn.Linear(4, 2)
        self.decides = decides

    def forward(self, x: Tensor) -> Tensor:
        # torch.fx does not trace this decision; torch.export does.
        if self.decides and x.shape[1] != 3:
            return x
        return self.linear(self.blocks(self.stem(x)).mean((2, 3)))


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(5, 4, 1)
        self.first = nn.Conv2d(3, 5, 1)
        self.calls: list[Tensor] = []
        self.register_forward_pre_hook(lambda _, inputs: HOOKED.append(inputs))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x)
        return self.second(self.first(input=x))


HOOKED: list[object] = []


class Squeezing(nn.Module):
    """A stem that takes images of any number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mean(1, keepdim=True).expand(-1, 3, -1, -1))


class Deciding(Squeezing):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def by_hand(stem: nn.Module) -> models.ResidualNet:
    blocks = [models.PreactBlock(4, (3, 3), (4, 4), stride=1, shortcut="projection") for _ in range(2)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return models.ResidualNet(stem, blocks, head).eval()


def adapted(decides: bool = False) -> models.ResidualNet:
    net = pathnet.adapt(Model(decides).eval(), torch.randn(2, 3, 8, 8))
    assert net.traced_by == ("torch.export" if decides else "torch.fx")
    return net


WITH_A_CONVOLUTION: dict[str, Callable[[], models.ResidualNet]] = {
    "adapted": adapted,
    "exported": lambda: adapted(decides=True),
    "nested": lambda: by_hand(nn.Sequential(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))),
    "custom": lambda: by_hand(nn.Sequential(Stem())),
    "bare": lambda: by_hand(nn.Conv2d(3, 4, 1)),
}


@pytest.fixture(params=WITH_A_CONVOLUTION)
def net(request: pytest.FixtureRequest) -> models.ResidualNet:
    torch.manual_seed(0)
    return WITH_A_CONVOLUTION[request.param]()


def test_images_of_other_channels_are_refused_before_anything_runs(net: models.ResidualNet, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=REFUSAL):
        training.train(net, GREY, training.Recipe(epochs=1, batch_size=8))
    with pytest.raises(ValueError, match=REFUSAL):
        lesion_single.measure({"residual": [net], "vgg": [net]}, GREY, Plan(), folder)
    with pytest.raises(ValueError, match=REFUSAL):
        path_gradients.measure(net, GREY, PathGradients(batches=1, batch_size=4), folder)
    assert not folder.exists()


def test_images_that_fit_pass(net: models.ResidualNet) -> None:
    data = synthetic(images=16, classes=2, shape=(3, 8, 8))
    check_fits(net, data)
    net(data.random_batch(2, seed=0, batch=0)[0])


@pytest.mark.parametrize(
    "stem",
    [
        nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 4, 1)),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.Unflatten(1, (4, 8, 8))),
        nn.LazyConv2d(4, 1),
        nn.Sequential(nn.LazyConv2d(4, 1)),
        Squeezing(),
        Deciding(),
    ],
    ids=lambda stem: type(stem[0] if isinstance(stem, nn.Sequential) else stem).__name__,
)
def test_a_stem_that_does_not_convolve_the_images_is_never_refused(stem: nn.Module) -> None:
    net = by_hand(stem)
    check_fits(net, GREY)
    net(GREY.random_batch(2, seed=0, batch=0)[0])


def test_the_check_leaves_the_stem_and_its_hooks_alone() -> None:
    stem = Stem()
    HOOKED.clear()
    with pytest.raises(ValueError, match=REFUSAL):
        check_fits(by_hand(stem), GREY)
    assert not stem.calls and not HOOKED
