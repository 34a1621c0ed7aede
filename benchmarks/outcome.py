"""How a step of a run can end other than well."""

from __future__ import annotations

from typing import Any

__all__ = ["Failed", "Found", "Unavailable"]

Found = dict[str, Any]
"""What a step found, as JSON holds it."""


class Failed(Exception):
    """A step found something wrong; what it found goes to the results all the same."""

    def __init__(self, reason: str, found: Found) -> None:
        super().__init__(reason)
        self.found = found


class Unavailable(Exception):
    """What a step needs is not on this machine, or the machine refuses it: recorded, and no failure."""
