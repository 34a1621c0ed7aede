"""Walks by graphs of autograd alone, and by programs captured from the blocks, whichever would be faster."""

from __future__ import annotations

import math

import pytest

from pathnet.engines.autograd import blocks, products, rewriting


@pytest.fixture(params=["plain", "captured"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force one of the two forms of pull-backs; captured ones from the first visit of a block on, rewritten by every
    rule, also where that is slower."""
    monkeypatch.setattr(blocks, "PATIENCE", math.inf if request.param == "plain" else 0.0)
    monkeypatch.setattr(blocks, "_is_faster", lambda *arguments: True)
    for module in (rewriting, products):
        monkeypatch.setattr(module, "fastest", lambda candidates, device: len(candidates) - 1)
    return str(request.param)
