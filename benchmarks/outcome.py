"""The outcomes of a step besides success."""

from __future__ import annotations

from typing import Any

__all__ = ["Failed", "Findings", "Unavailable"]

Findings = dict[str, Any]
"""The findings of a step, as JSON holds them."""


class Failed(Exception):
    """A step found an error; its findings go to the results all the same."""

    def __init__(self, reason: str, findings: Findings) -> None:
        super().__init__(reason)
        self.findings = findings


class Unavailable(Exception):
    """This machine lacks or refuses something that a step needs: recorded, and not a failure."""
