"""`pathnet.measure` on somebody's own model and batches: loaders, generators, mappings; what it returns is drawn."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pathnet
from pathnet import results
from pathnet.experiments import PathGradients


class Residual(nn.Module):
    """A block in plain PyTorch, with a ReLU behind its addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 4, 3), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return nn.Sequential(stem, *(Residual() for _ in range(3)), *head).eval()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 3, 6, 6), torch.randint(5, (32,))


def norm_along(model: nn.Sequential, images: Tensor, labels: Tensor, path: list[int]) -> float:
    """Return the norm of the gradient along a path, by a backward pass that `detach` cuts, in float64."""
    model = copy.deepcopy(model).double()
    y = y0 = model[0](images.double()).detach().requires_grad_()
    for block, enters in zip(model[1:4], path, strict=True):
        f = block.bn(block.conv(y))
        y = torch.relu(y.detach() + f if enters else y + f.detach())
    nn.functional.cross_entropy(model[4:](y), labels).backward()
    assert y0.grad is not None
    return float(y0.grad.norm())


def forms(images: Tensor, labels: Tensor) -> dict[str, Iterable[Any]]:
    pairs = [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 32, 8)]

    def generated() -> Iterator[dict[str, Tensor]]:
        for inputs, target in pairs:
            yield {"pixel_values": inputs, "labels": target}

    return {
        "a loader": DataLoader(TensorDataset(images, labels), batch_size=8),
        "pairs": pairs,
        "a generator of mappings": generated(),
        "batches of a data set": pathnet.data.Batches(pairs, pairs),
    }


@pytest.mark.parametrize("form", ["a loader", "pairs", "a generator of mappings", "batches of a data set"])
def test_any_batches_are_measured_into_a_run(
    model: nn.Sequential, images: tuple[Tensor, Tensor], tmp_path: Path, form: str
) -> None:
    example: Any = {"pixel_values": images[0][:8]} if "mappings" in form else images[0][:8]
    net = pathnet.adapt(Named(model).eval() if "mappings" in form else model, example)
    run = pathnet.measure(net, forms(*images)[form], PathGradients(batches=4), tmp_path / "run")
    measured = run.measurements()
    assert len(measured) == 4 * 3 and run.fact("batch_size") == 8
    for batch, path, norm in zip(measured.batch, measured.path.tolist(), measured.norm, strict=True):
        part = slice(8 * batch, 8 * batch + 8)
        assert norm == pytest.approx(norm_along(model, images[0][part], images[1][part], path), rel=1e-4)
    figure = pathnet.figures.figure_6(run)
    assert figure.get_suptitle().endswith("network, 3 blocks: 12 path gradients on 4 batches")
    again = pathnet.measure(net, forms(*images)[form], PathGradients(batches=4), tmp_path / "run")
    assert (again.measurements().norm == measured.norm).all() and len(again.parts) == len(run.parts)


class Named(nn.Module):
    """A model that takes its input by name, as models of transformers do."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values)


def test_it_refuses_what_it_cannot_measure(
    model: nn.Sequential, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    net, batches = pathnet.adapt(model, images[0][:8]), forms(*images)["pairs"]
    with pytest.raises(ValueError, match="^batches: expected at most 4 .*, got 1000$"):
        pathnet.measure(net, batches, PathGradients(), tmp_path / "run")
    with pytest.raises(ValueError, match="^plan: expected PathGradients, got 4$"):
        pathnet.measure(net, batches, 4, tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^net: expected a pathnet ResidualNet"):
        pathnet.measure(model, batches, PathGradients(batches=4), tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^data: expected .* element 0"):
        pathnet.measure(net, [7], PathGradients(batches=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_batches_are_refused_by_the_run(
    model: nn.Sequential, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    net, plan = pathnet.adapt(model, images[0][:8]), PathGradients(batches=4)
    pathnet.measure(net, forms(*images)["pairs"], plan, tmp_path / "run")
    with pytest.raises(ValueError, match=r"^run: .* holds another run \(data.hash"):
        pathnet.measure(net, forms(images[0] + 1, images[1])["pairs"], plan, tmp_path / "run")
    assert len(results.read(tmp_path / "run").measurements()) == 12
