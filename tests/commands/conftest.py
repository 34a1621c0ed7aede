"""Weights and a run that several tests of commands read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.command_line import FEW, pathnet_

from pathnet import models


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    models.save(models.preact_resnet(20, 4, in_channels=1), path)
    return path


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = pathnet_("gradients", "--data", "digits", "--weights", weights, "--run", folder, *FEW)
    assert ended.status == 0, ended.err
    return folder
