"""What several tests share: cases, oracles, tolerances, and stand-ins for what is not there."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
