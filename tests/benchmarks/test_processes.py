"""The helper of tests with several processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers import processes


def stuck(rank: int, folder: Path) -> None:
    with processes.together(rank, folder, count=1, hang_s=1):
        time.sleep(600)


def test_a_process_that_hangs_is_ended_and_told(tmp_path: Path) -> None:
    """It reports where it hung; on a busy machine it may not have got there yet."""
    begun = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="(do not end|exit code 1), where they were:"):
        processes.run(stuck, tmp_path, count=1, hang_s=1)
    assert time.monotonic() - begun < 60
