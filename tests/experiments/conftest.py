"""Fixtures that several files of tests of experiments share."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.gradient_runs import EXACT, SAMPLED, SIGNED, measure_small
from helpers.lesion_runs import nine_blocks
from helpers.lesioned import labelled_by

from pathnet import lesion, results
from pathnet.data import Data, synthetic
from pathnet.experiments import errors
from pathnet.models import ResidualNet
from pathnet.training import Progress


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> results.Run:
    """Return a run of path gradients by all three methods."""
    folder = tmp_path_factory.mktemp("run")
    for plan in (EXACT, SIGNED, SAMPLED):
        run = measure_small(plan, folder)
    return run


@pytest.fixture(scope="session")
def net() -> ResidualNet:
    """Return a network that nothing changes."""
    return nine_blocks()


@pytest.fixture(scope="session")
def data(net: ResidualNet) -> Data:
    """Return images labelled by `net`, which therefore makes no errors."""
    return labelled_by(net, synthetic(images=160, shape=(3, 8, 8)))


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> list[lesion.Lesion]:
    """Keep the drivers from measuring errors, and return the list of the lesions that they request."""
    requested: list[lesion.Lesion] = []

    def noted(
        net: ResidualNet, data: Data, lesions: list[lesion.Lesion], bn: str, images: int, progress: Progress
    ) -> lesion.Errors:
        requested.extend(lesions)
        progress(len(data.test) * len(lesions), len(data.test) * len(lesions), "")
        return lesion.Errors(np.zeros((len(lesions), len(data.test)), np.bool_), "running")

    monkeypatch.setattr(errors.lesion, "errors", noted)
    monkeypatch.setattr(errors, "TOGETHER", 10**6)
    return requested
