"""An interrupt, whenever it comes, ends the command in one line."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.signals import heed

import pathnet
from pathnet import interrupts, models
from pathnet.commands.app import app

ROOT = Path(pathnet.__file__).resolve().parent.parent

WHILE_IMPORTING = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), getattr(signal, os.environ["KIND"]))

sys.meta_path.insert(0, Interrupting())
"""

SCRIPT = "import sys; from pathnet.commands import main; sys.exit(main())"
"""The script that installers write for an entry point."""


def ended(command: list[str], folder: Path, at: str, kind: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(WHILE_IMPORTING)
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "AT": at, "KIND": kind}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, preexec_fn=heed
    )


@pytest.mark.parametrize(
    ("at", "kind"),
    [("torch", "SIGINT"), ("torch", "SIGTERM"), ("torch", "SIGHUP"), ("pathnet.commands", "SIGINT")],
)
@pytest.mark.parametrize("script", [False, True], ids=["module", "script"])
def test_an_interrupt_during_the_imports_is_one_line(tmp_path: Path, script: bool, at: str, kind: str) -> None:
    command = [sys.executable, "-m", "pathnet"]
    if script:
        (tmp_path / "pathnet").write_text(SCRIPT)
        command = [sys.executable, "-P", str(tmp_path / "pathnet")]
    done = ended([*command, "--version"], tmp_path, at, kind)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "pathnet: interrupted\n")


def test_whoever_imports_the_package_keeps_handlers_of_their_own(tmp_path: Path) -> None:
    script = "import signal, sys; sys.argv = ['-m', 'pathnet']; before = signal.getsignal(signal.SIGINT)\n"
    script += "import pathnet; assert signal.getsignal(signal.SIGINT) is before"
    (tmp_path / "program.py").write_text(script)
    done = ended([sys.executable, str(tmp_path / "program.py")], tmp_path, "nothing", "SIGINT")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "of_python", "is_it"),
    [
        (["-m", "doctor"], ["python", "-X", "dev", "-m", "pathnet", "doctor"], True),
        (["-m"], ["python", "-mpathnet"], True),
        (["-m", "pathnet"], ["python", "-m", "another", "pathnet"], False),
        (["/usr/bin/pathnet", "doctor"], ["python", "/usr/bin/pathnet", "doctor"], True),
        (["program.py", "pathnet"], ["python", "program.py", "pathnet"], False),
        ([""], ["python"], False),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_the_command_is_told_from_programs_that_import_the_package(
    monkeypatch: pytest.MonkeyPatch, words: list[str], of_python: list[str], is_it: bool
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "orig_argv", of_python)
    assert interrupts.is_command() == is_it


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {kind: signal.getsignal(kind) for kind in interrupts.KINDS}
    try:
        heed()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupts.end_at_once()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with interrupts.raised(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def test_an_interrupted_command_does_not_end_by_a_search_for_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    weights = tmp_path / "net.safetensors"
    models.save(models.preact_resnet(8, 2), weights)
    monkeypatch.setattr(models, "load", interrupt)
    try:
        with pytest.raises(SystemExit) as end:
            app(["gradients", "--data", "synthetic", "--out", str(tmp_path / "run"), "--weights", str(weights)])
        assert end.value.code == interrupts.STATUS and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
