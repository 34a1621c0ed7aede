"""The command ``pathnet``. Results go to stdout, progress and failures to stderr.

Each command has a file: a dataclass of its settings, from which `flags` builds the command line, and the function
that runs it. `printing` and `runs` alone know how results are shown; `streams` and `failures` handle errors. Heavy
modules (figures, data, measurements) are imported inside functions, to keep ``--help`` fast.

To add a flag to ``pathnet train``, add a field with its `Help` to one of three dataclasses:

- `pathnet.training.Recipe`, if it changes the training itself: checkpoints store the recipe, and only an equal one
  resumes from them. Studies then have the flag too.
- `train.NetworkSettings`, if it is an argument of the constructors in `pathnet.models`.
- `train.TrainSettings`, otherwise.
"""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec

from pathnet import interrupts
from pathnet.commands.streams import fail, prepare_streams, warn
from pathnet.commands.watcher import watch
from pathnet.extras import EXTRA, advice

__all__ = ["main"]


def main() -> None:
    """Run the command that this process was started as.

    A termination counts as an interrupt, so it too leaves everything measured on disk.
    """
    interrupts.end_at_once()
    prepare_streams()
    watch(sys.argv[1:])
    missing = [package for module, package in EXTRA.items() if find_spec(module) is None]
    if missing:
        fail(f"commands need {', '.join(missing)}, not installed here: {advice(*missing)}", 1)
    from pathnet.commands.app import app

    warnings.showwarning = warn
    warnings.simplefilter("once", RuntimeWarning)
    app(prog_name="pathnet")
