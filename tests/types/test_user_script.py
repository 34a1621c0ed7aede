"""A user's script, which type checkers accept, runs as they understand it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def test_a_users_script_runs(tmp_path: Path) -> None:
    # Without Triton's interpreter, which other tests use.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("user_script.py")
    ran = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    refusals = ran.stdout.splitlines()
    assert [line.partition(":")[0] for line in refusals] == ["bn", "length", "lesions"]
