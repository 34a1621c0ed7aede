"""Tests that need a GPU; without one they are skipped, and test_triton_*.py run the kernels in the interpreter."""

from pathlib import Path

import pytest
import torch

from pathnet.engines.triton import TritonEngine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = TritonEngine().unavailable()
    here = Path(__file__).parent
    for item in items:
        if reason is not None and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
