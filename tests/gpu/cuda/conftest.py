"""Tests that need a GPU; elsewhere they are skipped, and the kernels' twin is tested in tests/engines/cuda."""

from pathlib import Path

import pytest
import torch

from pathnet.engines.cuda import CudaEngine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = CudaEngine().unavailable()
    here = Path(__file__).parent
    for item in items:
        if reason is not None and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
