"""Every file and folder that a command takes is looked at before it begins: one line, and nothing made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.command_line import pathnet_

from pathnet import models, study, training
from pathnet.commands import bench
from pathnet.commands.places import check_file_to_write
from pathnet.experiments import path_gradients

NET = ["--depth", "8", "--width", "2"]
WORDS = {
    "train": ["--data", "digits", "--out", "new/w.safetensors", *NET],
    "gradients": ["--data", "digits", "--out", "new", "--weights", "weights.safetensors"],
    "figures": ["--all", "--out", "new"],
    "demo": [],
    "bench": ["--small"],
    "lesion-many": ["--data", "digits", "--out", "new"],
}
FOLDERS_TO_WRITE = [
    ("gradients", "--out"),
    ("demo", "--out"),
    ("bench", "--out"),
    ("figures", "--out"),
    ("lesion-many", "--out"),
]
FILES_TO_WRITE = [("train", "--out"), ("train", "--effective-depth")]
FILES_TO_READ = [("gradients", "--weights"), ("lesion-many", "--weights")]
FOLDERS_TO_READ = [("train", "--data"), ("gradients", "--data"), ("lesion-many", "--data"), ("figures", "RUN")]

NOT_THERE = {"nowhere/at/all": "does not exist"}
NO_PLACES = {
    "": "expected a value, got ''",
    "-": "which means standard input or output",
    "file/a/b": "a path through file, a file",
    "n" * 300: "File name too long",
    "d/" * 2500: "File name too long",
    "loop": "symbolic links",
    "loop/a": "symbolic links",
    "dangling": "a link to nothing",
    "pipe": "a device, pipe or socket",
    "/dev/null": "a device, pipe or socket",
}
CANNOT_BE_WRITTEN = {"/proc/new/place": "nothing can go into /proc"} if Path("/proc/self").exists() else {}
A_FILE, A_FOLDER = {"file": "a file"}, {"folder": "a folder"}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with one of everything, in which whatever takes long is not begun."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no safetensors")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    os.mkfifo("pipe")
    torch.manual_seed(0)
    models.save(models.preact_resnet(8, 2, in_channels=1), "weights.safetensors")
    before = sorted(Path().rglob("*"))

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("what takes long has begun")

    for module, name in ((training, "train"), (path_gradients, "measure"), (study, "measured")):
        monkeypatch.setattr(module, name, begun)
    monkeypatch.setattr(study, "trained", begun)
    monkeypatch.setattr(bench, "_benchmarks", begun)
    yield
    assert sorted(Path().rglob("*")) == before


def cases() -> Iterator[tuple[str, str, str, str]]:
    kinds = [
        (FOLDERS_TO_WRITE, A_FILE | NO_PLACES | CANNOT_BE_WRITTEN),
        (FILES_TO_WRITE, A_FOLDER | NO_PLACES | CANNOT_BE_WRITTEN),
        (FILES_TO_READ, A_FOLDER | NO_PLACES),
        (FOLDERS_TO_READ, A_FILE | NO_PLACES | NOT_THERE),
    ]
    for flags, wrong in kinds:
        for (command, flag), (place, words) in ((words, case) for words in flags for case in wrong.items()):
            if flag == "--effective-depth" and place in A_FOLDER:
                words = "got folder, which exists"
            yield command, flag, place, words


@pytest.mark.parametrize(
    ("command", "flag", "place", "words"), list(cases()), ids=lambda value: value[:20] or "empty"
)
def test_a_place_that_cannot_serve_is_named_before_anything_begins(
    command: str, flag: str, place: str, words: str
) -> None:
    arguments = [command, place] if flag == "RUN" else [command, *WORDS[command], flag, place]
    ended = pathnet_(*arguments)
    (line,) = ended.err.splitlines()
    assert ended.status == 1 and ended.out == ""
    name = flag.removeprefix("--").replace("-", "_").lower()
    assert line.startswith(f"pathnet: {name}: ") or (flag == "RUN" and not place), line
    assert words in line and "Errno" not in line and len(line) < 400, line


def test_names_that_leave_no_room_for_what_lies_beside_them_are_refused() -> None:
    ended = pathnet_("train", *WORDS["train"], "--out", "n" * 240)
    assert ended.status == 1 and "no suffix can be added: of which the system says: File name too long" in ended.err


def test_a_folder_in_place_of_the_checkpoint_is_named_before_the_training() -> None:
    Path("folder/w.checkpoint.safetensors").mkdir()
    try:
        ended = pathnet_("train", *WORDS["train"], "--out", "folder/w.safetensors")
    finally:
        Path("folder/w.checkpoint.safetensors").rmdir()
    assert ended.err.startswith(
        "pathnet: out: expected a file to write, got 'folder/w.checkpoint.safetensors', a fol"
    )


def test_two_results_do_not_go_into_one_file() -> None:
    ended = pathnet_("train", *WORDS["train"], "--out", "new.csv", "--effective-depth", "folder/../new.csv")
    assert ended.err.startswith(
        "pathnet: effective_depth: expected a file that --out does not write, got folder/../new.csv"
    )


def test_a_run_without_weights_of_its_own_asks_for_weights() -> None:
    ended = pathnet_("gradients", "--data", "digits", "--out", "new")
    expected = "weights: expected --weights FILE, since new holds no weights of its own, got none"
    assert (ended.status, ended.err) == (1, f"pathnet: {expected}\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--width", "4611686018427387904"], "width: expected an integer from 1 to 1048576, got 4611686018427387904"),
        (
            ["--width", "16000"],
            "width: expected a network whose weights, gradients and momentum fit this machine's",
        ),
        (["--depth", "6000002"], "depth: expected an integer from 1 to 10000, got 6000002"),
        (["--model", "highway", "--gate-bias=nan"], "gate_bias: expected a finite number, got nan"),
        (["--survival=inf"], "survival: expected a finite number above 0 and at most 1, got inf"),
    ],
    ids=lambda flags: " ".join(flags) if isinstance(flags, list) else "",
)
def test_a_network_that_cannot_be_built_is_named_before_any_memory_is_taken(flags: list[str], words: str) -> None:
    ended = pathnet_("train", *WORDS["train"], *flags)
    assert ended.status == 1 and ended.err.startswith(f"pathnet: {words}"), ended.err


def test_a_study_of_numbers_that_are_none_is_refused() -> None:
    for flag in ("--survival=nan", "--survival=0", "--gate-bias=-inf", "--seeds=0"):
        ended = pathnet_("lesion-many", *WORDS["lesion-many"], flag)
        name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        assert ended.status == 1 and ended.err.startswith(f"pathnet: {name}: expected"), ended.err


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1", "0", "1e400"])
def test_a_benchmark_takes_a_number_of_minutes(minutes: str) -> None:
    ended = pathnet_("bench", f"--minutes={minutes}")
    assert ended.status == 1 and ended.err.startswith("pathnet: minutes: expected a finite number above 0, got")


def test_a_name_that_a_file_can_have_and_an_unfinished_one_cannot_is_refused_at_once(tmp_path: Path) -> None:
    """The refusal comes before any training, whose checkpoint would be written under a longer name."""
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    for room, refused in ((40, True), (80, False)):
        file = tmp_path / ("x" * (longest - room))
        if refused:
            with pytest.raises(ValueError, match=r"^out: expected a file to write, .* no suffix can be added"):
                check_file_to_write("out", file)
        else:
            check_file_to_write("out", file)
