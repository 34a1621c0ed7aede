"""The command line, run in this process."""

from __future__ import annotations

import dataclasses

from typer.testing import CliRunner

from pathnet.commands.app import app

DIGITS_NET = ["--data", "digits", "--depth", "8", "--width", "4"]
QUICK = ["--epochs", "1", "--batch-size", "400", "--warmup-steps", "1"]
FEW = ["--batches", "3", "--batch-size", "8"]

STUDY = {"seeds": 1, "depth": 14, "width": 2, "vgg-depth": 6, "vgg-width": 2, "vgg-stages": 2, "highway-depth": 8}
RECIPE = {"epochs": 1, "batch-size": 400, "warmup-steps": 1, "lr": 0.01, "seed": 3}
PLAN = {"draws": 1, "deletions": 2, "swaps": 2, "batches": 1, "exact-batches": 1, "modules": 2, "images": 50}
PLAN |= {"gate-batches": 1, "gate-batch-size": 16, "plan-seed": 7}
TINY = [word for name, value in {**STUDY, **RECIPE, **PLAN}.items() for word in (f"--{name}", value)]
"""Settings of a study of a few steps of training."""


@dataclasses.dataclass
class Ended:
    status: int
    out: str
    err: str


def pathnet_(*arguments: object) -> Ended:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def assert_one_line(ended: Ended, *words: object) -> None:
    assert ended.status == 1 and ended.out == ""
    (line,) = (line for line in ended.err.splitlines() if not line.startswith(("path gradients:", "training:")))
    assert line.startswith("pathnet: ") and all(str(word) in line for word in words), line
