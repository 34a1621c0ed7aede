"""The command line, run in this process."""

from __future__ import annotations

import dataclasses

from typer.testing import CliRunner

from pathnet import cli


@dataclasses.dataclass
class Ended:
    status: int
    out: str
    err: str


def pathnet_(*arguments: object) -> Ended:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)
