"""Makes ``benchmarks`` importable from any test here."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="module")
def without_the_interpreter() -> Iterator[None]:
    """Let a rehearsal on a CPU run blocks' own modules, as it does for users."""
    with pytest.MonkeyPatch.context() as changed:
        changed.delenv("TRITON_INTERPRET", raising=False)
        yield
