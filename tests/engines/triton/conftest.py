"""Fixtures that run the triton engine's kernels in Triton's interpreter."""

from __future__ import annotations

import pytest

from pathnet import engines


@pytest.fixture
def correct_interpreter() -> None:
    """Correct the interpreter's bfloat16 arithmetic."""
    from helpers import interpreter

    interpreter.correct()


@pytest.fixture
def interpreted(correct_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the engine ``interpreted``, for networks on the CPU."""
    from helpers.interpreted import Interpreted

    monkeypatch.setattr(engines, "ENGINES", (Interpreted(), *engines.ENGINES))


@pytest.fixture
def big_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels in tiles that hold most of a small network's batch."""
    from helpers import interpreter

    interpreter.big_tiles(monkeypatch)
