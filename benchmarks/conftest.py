"""Options of the benchmarks under pytest."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small", action="store_true", help="rehearse: takes seconds, its numbers mean nothing")
