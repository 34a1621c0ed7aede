"""Cases, oracles and tolerances that several tests share, and stand-ins for missing hardware and packages."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
