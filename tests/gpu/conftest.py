"""Tests that need a GPU, in a folder for each engine; without one they are skipped.

On every machine tests/engines/cuda tests the twin of the cuda kernels, and tests/engines/triton runs those of Triton
in the interpreter.
"""

from pathlib import Path

import pytest
import torch

from pathnet import engines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    available, here = engines.available(), Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        reason = available[item.path.relative_to(here).parts[0]]
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
