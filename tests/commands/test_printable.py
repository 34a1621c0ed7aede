"""Names may hold anything: what is shown of them obeys nothing, and is never a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import runs
from helpers.command_line import Ended, pathnet_

import pathnet
from pathnet import models, progress, report, results
from pathnet.commands.printing import print_claims
from pathnet.commands.streams import fail, warn
from pathnet.experiments.claims import Claim
from pathnet.experiments.run import title
from pathnet.figures import style
from pathnet.printable import printable

ROOT = Path(pathnet.__file__).resolve().parent.parent
ODD = "\x1b[31mred\x07 [bold]b[/bold] \udcff\u202e\r :smile: [/red]"
"""Colours and a bell for a terminal, markup, a byte that is not UTF-8, text from right to left, no closed tag."""
SHOWN = "\\x1b[31mred\\x07 [bold]b[/bold] \\xff\\u202e\\x0d :smile: [/red]"


def assert_shown(text: str) -> None:
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text and "\u202e" not in text
    assert SHOWN in text
    text.encode()


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable(ODD) == SHOWN
    assert printable("a\nb\tc", kept="\n") == "a\nb\\x09c"
    assert printable("Größe 画像\u3000\u00a0é \U0001f600") == "Größe 画像\u3000\u00a0é \U0001f600"
    assert printable("\U000e0001") == "\\U000e0001"
    assert printable(Path("a\x9bb")) == "a\\x9bb"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> results.Run:
    monkeypatch.setattr(style, "DOTS_PER_INCH", 20)
    return runs.gradient_run(tmp_path / "run", np.tile(0.3 ** np.arange(1.0, 7), (5, 1)), ODD)


def test_a_runs_own_names_are_shown_as_they_are(run: results.Run) -> None:
    ended = pathnet_("figures", run.folder)
    assert ended.status == 0, ended.err
    assert_shown(ended.out)
    assert ended.out.splitlines()[0].startswith(SHOWN)


def test_a_report_of_odd_names_is_a_page(run: results.Run, tmp_path: Path) -> None:
    page = report.write([run], f"All of {ODD}", tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count(SHOWN) >= 2 and "\x1b" not in page


def test_claims_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    claim = Claim(f"paper {ODD}", "where", "bound", f"measured {ODD}", "held")
    print_claims([claim])
    words = " ".join(capsys.readouterr().out.split())
    for word in ("[bold]b[/bold]", ":smile:", "\\x1b[31mred\\x07", "[/red]"):
        assert words.count(word) == 2


def test_errors_warnings_and_progress_are_escaped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = ODD.replace("\r", "")
    with pytest.raises(SystemExit):
        fail(odd, 1)
    warn(odd)
    with progress.reporter(odd) as show:
        show(1, 2, odd)
    err = capsys.readouterr().err
    assert err.count(SHOWN.replace("\\x0d", "")) == 4 and "\x1b" not in err


def test_a_job_goes_on_when_nobody_reads_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as unwritable, progress.reporter("job") as show:
        monkeypatch.setattr(sys, "stderr", unwritable)
        monkeypatch.setattr(progress, "LINE_SECONDS", 0)
        show(1, 2, "")


def test_wrong_usage_is_told_in_escapes() -> None:
    for arguments in (["\x1b[31mx"], ["doctor", "\x1b[31mx"], ["doctor", "--\x1b[31mx"], ["--\x1b[31mx"]):
        ended = pathnet_(*arguments)
        assert ended.status == 2 and "\x1b[31" not in ended.err and "\\x1b[31mx" in ended.err, arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name no encoding knows; weights lie beside it, since safetensors reads none from there."""
    name = os.fsdecode(b"f\xff\xfe\x1b[31m")
    folder = tmp_path_factory.mktemp("odd") / name
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("names are UTF-8 here")
    models.save(models.preact_resnet(8, 2, in_channels=1), folder.parent / "weights.safetensors")
    return folder


def measured(folder: Path, *flags: str) -> Ended:
    weights, few = folder.parent / "weights.safetensors", ["--batches", 1, "--batch-size", 4]
    return pathnet_("gradients", "--data", "digits", "--out", folder, "--weights", weights, *few, *flags)


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 on other systems")
def test_a_run_in_a_folder_that_is_not_utf_8(folder: Path) -> None:
    ended = measured(folder)
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-2].endswith("f\\xff\\xfe\\x1b[31m/figures/figure-6.png")
    again = measured(folder, "--json")
    assert again.status == 0, again.err
    assert json.loads(again.out.encode())["out"].endswith("f\\xff\\xfe\x1b[31m")
    assert pathnet_("figures", folder).out.splitlines()[-3:] == ended.out.splitlines()[-3:]


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 on other systems")
def test_weights_do_not_go_where_they_could_not_be_read_again(folder: Path) -> None:
    for name, words in (
        ("out", ["train", "--data", "digits", "--out", folder / "w.safetensors"]),
        ("out", ["demo", "--out", folder]),
        ("out", ["lesion-many", "--out", folder]),
    ):
        ended = pathnet_(*words)
        assert ended.status == 1 and ended.err.startswith(f"pathnet: {name}: expected a name in UTF-8"), ended.err


def test_a_title_of_odd_names_can_be_drawn() -> None:
    heading = title({"data": {"name": ODD}})
    figure, _ = style.panels(heading, 1)
    figure.savefig(file := io.BytesIO(), dpi=20)
    assert heading == SHOWN and file.getvalue()


# Standard streams


def streamed(shell: str, **environment: str) -> Ended:
    script = f"{sys.executable} -c 'import sys; from pathnet import commands; commands.main()' {shell}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("words", ["doctor", "--version"])
def test_a_full_disk_is_one_line(words: str) -> None:
    ended = streamed(f"{words} > /dev/full")
    expected = "pathnet: stdout: expected to write the results to it, got: No space left on device\n"
    assert (ended.status, ended.err) == (1, expected)


def test_whoever_reads_no_more_ends_the_command_quietly() -> None:
    ended = streamed("doctor | true")
    assert ended.err == "" and ended.status in (0, 1)


def test_closed_streams_swallow_what_is_printed() -> None:
    ended = streamed("doctor <&- >&- 2>&-")
    assert (ended.status, ended.out, ended.err) == (0, "", "")


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_a_stream_of_ascii_takes_every_name(environment: dict[str, str]) -> None:
    script = "from pathnet.commands.streams import prepare_streams, say, tell; prepare_streams(); "
    script += "say('\\xe9 \\xd7 \\u753b'); tell('\\xe9')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, timeout=120
    )
    assert (done.stdout, done.stderr) == (b"\\xe9 \\xd7 \\u753b\n", b"\\xe9\n")


def test_a_terminal_of_one_column_and_no_kind_takes_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    monkeypatch.delenv("TERM", raising=False)
    for words in (["doctor"], ["--help"], ["nothing"]):
        assert pathnet_(*words).status in (0, 2)
