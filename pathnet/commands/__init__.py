"""The command ``pathnet``. Results go to stdout, progress and failures to stderr.

Each command has a file: a dataclass of its settings, of which `flags` makes the command line, and the function that
runs it. `printing` and `runs` alone know what results look like, `streams` and `failures` what becomes of errors.
Modules that draw, read data or measure are imported inside of functions, so that help comes at once.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec

from pathnet import interrupts
from pathnet.commands.streams import fail, prepare_streams, warn

__all__ = ["main"]

EXTRA = {
    "typer": "typer",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "pyarrow": "pyarrow",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "scipy": "scipy",
}
"""Packages of the extra ``paper``, by the modules that they install."""


def main() -> None:
    """Run the command that this process was started as.

    A termination is an interrupt, so that it too leaves everything measured on disk.
    """
    interrupts.end_at_once()
    prepare_streams()
    missing = [package for module, package in EXTRA.items() if find_spec(module) is None]
    if missing:
        fail(f"commands need {', '.join(missing)}, not installed here: pip install 'pathnet[paper]'", 1)
    from pathnet.commands.app import app

    warnings.showwarning = warn
    warnings.simplefilter("once", RuntimeWarning)
    app(prog_name="pathnet")
