"""Each instruction set of this processor in turn."""

from __future__ import annotations

import pytest
from helpers.walk_cases import (
    INSTRUCTION_SETS,
)

from pathnet import native


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PATHNET_ISA", request.param)
    assert native.build_facts()["selected_instruction_set"] == request.param
    return str(request.param)
