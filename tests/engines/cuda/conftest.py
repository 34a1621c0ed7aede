"""Fixtures that run the cuda engine's kernels on the host."""

from __future__ import annotations

import pytest
from helpers.twin import (
    GPU,
    GPUS,
    Twin,
)

from pathnet import engines


@pytest.fixture(autouse=True)
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", (Twin(), *engines.ENGINES))
    monkeypatch.setattr(Twin, "twin_shared_bytes", GPUS[GPU or "227 KB"])


@pytest.fixture
def shared_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the bytes of shared memory that the twin imitates, by parameter."""
    size = GPUS[GPU] if GPU else int(request.param)
    monkeypatch.setattr(Twin, "twin_shared_bytes", size)
    return size
