"""Wrong usage, bugs and interrupts: what the command prints, and its status."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import FEW, Ended, assert_one_line, pathnet_
from helpers.signals import heed
from typer.testing import CliRunner

import pathnet
from pathnet import results
from pathnet.commands import runs
from pathnet.commands.app import app


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["gradients"],
        ["gradients", "--data", "digits", "--out", "r", "--bn", "frozen"],
        ["gradients", "--data", "digits", "--out", "r", "--batches", "many"],
        ["gradients", "--data", "digits", "--out", "r", "--method", "guessed"],
        ["train", "--data", "digits", "--out", "w", "--block", "dense"],
        ["demo", "--speed", "fast"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    ended = pathnet_(*arguments)
    assert ended.status == 2 and ended.out == "" and "Usage: " in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--batches", "many", "expected an integer, got 'many'"),
        ("--lr", "fast", "expected a number, got 'fast'"),
        ("--method", "guessed", "expected sampled, exact or signed, got 'guessed'"),
        ("--schedule", "cosine", "expected steps or one-cycle, got 'cosine'"),
        ("--flips", "always", "expected random or alternating, got 'always'"),
    ],
)
def test_a_value_of_another_type_is_named_in_the_words_of_other_errors(flag: str, value: str, expected: str) -> None:
    command = ["gradients", "--out", "r"] if flag in ("--batches", "--method") else ["train", "--out", "w"]
    ended = pathnet_(*command, "--data", "digits", flag, value)
    words = " ".join(line.strip("\u2502 ") for line in ended.err.splitlines())
    assert ended.status == 2 and f"Invalid value for '{flag}': {expected} " in words


def test_a_bug_keeps_its_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(runs, "compare", bug)
    assert isinstance(CliRunner().invoke(app, ["figures", str(run)]).exception, AssertionError)


def test_an_interrupt_says_what_is_kept(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pathnet.Recorder, "__call__", interrupt)
    ended = pathnet_("gradients", "--data", "digits", "--weights", weights, "--out", tmp_path / "run", *FEW)
    assert ended.status == 130 and ended.out == ""
    kept = f"what was measured is kept in {tmp_path / 'run'}"
    assert ended.err == f"pathnet: interrupted; {kept}; the same command resumes from there\n"


def test_the_real_command_fails_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pathnet", "figures", str(tmp_path / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert_one_line(Ended(ended.returncode, ended.stdout, ended.stderr), "run: expected the folder of a run")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_real_command_keeps_what_it_measured_when_it_is_stopped(
    weights: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    script = "from pathnet import commands, progress; progress.LINE_SECONDS = 0; commands.main()"
    flags = ["--data", "digits", "--weights", str(weights), "--out", str(tmp_path), "--batch-size", "8"]
    command = [sys.executable, "-c", script, "gradients", *flags, "--engine", "reference", "--batches", "100000"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)
    assert process.stderr is not None
    seen = [process.stderr.readline() for _ in range(2)]
    process.send_signal(kind)
    out, err = process.communicate(timeout=120)
    assert seen[1].startswith("path gradients: 2/100000 batches, engine reference, ") and seen[1].endswith(" left\n")
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"pathnet: interrupted; what was measured is kept in {tmp_path}")
    assert len(results.read(tmp_path).measurements()) >= 2 * 9


def test_a_wrong_flag_is_told_by_one_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()

    def first(line: str) -> bool:
        said.append(line)
        return len(said) == 1

    monkeypatch.setattr("pathnet.commands.failures.is_first_to_say", first)
    loud, quiet = pathnet_("gradients", "--weihts", "file"), pathnet_("gradients", "--weihts", "file")
    assert loud.status == quiet.status == 2
    assert "--weihts" in loud.err and quiet.err == quiet.out == "" and said[0] == said[1]
