"""Makes ``cases``, ``oracles`` and ``tolerances`` importable by name from any test file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
