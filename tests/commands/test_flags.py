"""Names of flags: none is one of torchrun's, and earlier names still work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers.command_line import FEW, assert_one_line, pathnet_
from torch.distributed.run import get_args_parser

from pathnet.commands.app import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TORCHRUN = [spelling for action in get_args_parser()._actions for spelling in action.option_strings]


def flags(command: Any) -> Iterator[str]:
    for option in command.params:
        if option.param_type_name == "option" and not option.hidden:
            yield from (*option.opts, *option.secondary_opts)


def taken_by_torchrun(flag: str) -> list[str]:
    """Return the options of torchrun that a word stands for: argparse takes the beginning of a name for the name."""
    return [spelling for spelling in TORCHRUN if spelling.startswith(flag)]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_flag_is_one_of_torchruns_or_the_beginning_of_one(name: str) -> None:
    assert not {flag: names for flag in flags(COMMANDS[name]) if (names := taken_by_torchrun(flag))}
    assert taken_by_torchrun("--run") == ["--run-path", "--run_path"]
    assert not [flag for flag in flags(COMMANDS[name]) if not flag.startswith("--")], "torchrun has single letters"


@pytest.mark.parametrize("name", COMMANDS)
def test_torchrun_hands_every_flag_on(name: str) -> None:
    words = ["pathnet", name, *flags(COMMANDS[name])]
    read = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", *words])
    assert [read.training_script, *read.training_script_args] == words


FORMER = {"gradients": "--run", "demo": "--run", "figures": "--folder", "lesion-many": "--folder"}
OTHERS = {"gradients": ["--data", "digits"], "figures": ["--all"]}


@pytest.mark.parametrize("name", FORMER)
def test_an_earlier_name_works_and_the_help_leaves_it_out(name: str, tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    former = FORMER[name]
    for words in ([former, file], [f"{former}={file}"], ["--out", file]):
        assert_one_line(
            pathnet_(name, *OTHERS.get(name, []), *words), f"out: expected a folder to write to, got '{file}'"
        )
    assert former not in pathnet_(name, "--help").out


@pytest.mark.parametrize("name", FORMER)
def test_both_names_are_one_too_many(name: str, tmp_path: Path) -> None:
    for words in (["--out", "a", FORMER[name], "b"], [FORMER[name], "a", "--out", "a"]):
        ended = pathnet_(name, *OTHERS.get(name, []), *words)
        assert (ended.status, ended.err) == (1, f"pathnet: out: expected --out or {FORMER[name]}, got both\n")


def test_a_required_folder_is_still_required() -> None:
    ended = pathnet_("gradients", "--data", "digits")
    assert ended.status == 2 and "Missing option '--out'" in ended.err


def test_a_run_under_its_earlier_name_is_the_same_run(weights: Path, tmp_path: Path) -> None:
    words = ["gradients", "--data", "digits", "--weights", weights, *FEW, "--json"]
    facts = [json.loads(pathnet_(*words, flag, tmp_path / "run").out) for flag in ("--run", "--out")]
    assert facts[0] == facts[1] and facts[0]["out"] == str(tmp_path / "run")
