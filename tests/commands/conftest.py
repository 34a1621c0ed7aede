"""Weights and a run that several tests of commands read, and figures that are quickly drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.command_line import FEW, pathnet_

from pathnet import models
from pathnet.experiments import remaining_paths
from pathnet.figures import style


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    models.save(models.preact_resnet(20, 4, in_channels=1), path)
    return path


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = pathnet_("gradients", "--data", "digits", "--weights", weights, "--out", folder, *FEW)
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remaining_paths, "DRAWS", 20)
        patch.setattr(style, "DOTS_PER_INCH", 30)
        yield


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "residual.safetensors"
    models.save(models.preact_resnet(14, 2, in_channels=1), file)
    return file
