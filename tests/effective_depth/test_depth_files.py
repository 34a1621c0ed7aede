"""CSV files and TensorBoard folders of depths: rows, full disks, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cases import SMALL
from helpers.full_disk import largest_file
from torch import nn

from pathnet import EffectiveDepth
from pathnet.effective_depth import Depth, read
from pathnet.effective_depth.rows import HEADER

ALWAYS = math.inf
"""Share of the time that lets every step be measured."""


class Board:
    """Stand-in for TensorBoard's writer."""

    def __init__(self, folder: Path | None = None, purge_step: int | None = None) -> None:
        self.seen: list[tuple[str, float, int]] = []
        self.folder, self.purge_step, self.flushed = folder, purge_step, 0
        boards.append(self)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.seen.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        self.flushed = len(self.seen)


boards: list[Board] = []


@pytest.fixture
def board_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: "here" if name == "tensorboard" else find_spec(name)
    )
    boards.clear()
    yield


@pytest.mark.parametrize("begin", [0, 3, 5])
def test_another_training_does_not_go_on_behind_the_rows_of_a_file(tmp_path: Path, begin: int) -> None:
    net, batch, path = SMALL[0].net(), SMALL[0].images(), tmp_path / "depth.csv"
    for step in (5, 10):
        assert EffectiveDepth(batch, path, net, every=5, share=ALWAYS)(step) is not None
    kept = path.read_bytes()
    with pytest.raises(
        ValueError, match=f"depth.csv already holds steps 5 to 10 .* begins at step {begin}; give another"
    ):
        EffectiveDepth(batch, path, net, every=5, share=ALWAYS)(begin)
    with pytest.raises(
        ValueError, match="every: expected a divisor of the steps in .*depth.csv, got 10, and the file hol"
    ):
        EffectiveDepth(batch, path, net, every=10)
    assert path.read_bytes() == kept
    resumed = EffectiveDepth(batch, path, net, every=5, share=ALWAYS)
    with warnings.catch_warnings(action="error"):
        assert resumed(10) is None and resumed(15) is not None
    assert [row.step for row in read(path)] == [5, 10, 15]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_row_that_was_cut_short_is_measured_again(tmp_path: Path, cut: int) -> None:
    net, batch = SMALL[0].net(), SMALL[0].images()
    path = tmp_path / "deep" / "depth.csv"
    first = EffectiveDepth(batch, path, net, every=1, share=ALWAYS)
    rows = [first(step) for step in range(3)]
    path.write_bytes(path.read_bytes()[:-cut])
    assert read(path) == rows[:2]
    again = EffectiveDepth(batch, path, net, every=1, share=ALWAYS)
    assert again(1) is None and again(2) is not None and again(3) is not None
    assert [row.step for row in read(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("left", ["", "step,dep", "step,depth,first,last,half,loss,seconds\n0,1."])
def test_a_file_without_a_whole_row_begins_anew(tmp_path: Path, left: str) -> None:
    path = tmp_path / "depth.csv"
    path.write_text(left)
    row = EffectiveDepth(SMALL[0].images(), path, SMALL[0].net())(0)
    assert read(path) == [row]


def test_a_full_disk_is_told_and_the_rows_before_stay(tmp_path: Path) -> None:
    path = tmp_path / "depth.csv"
    callback = EffectiveDepth(SMALL[0].images(), path, SMALL[0].net(), every=1, share=ALWAYS)
    callback(0)
    first = read(path)
    with largest_file(path.stat().st_size + 20), pytest.raises(OSError) as failure:
        callback(1)
    assert str(failure.value) == (
        f"out: {path} cannot be written (File too large); the depth at step 1 is lost, the rows before it stay"
    )
    assert read(path) == first
    callback(2)
    assert read(path)[:1] == first and [row.step for row in read(path)] == [0, 2]


@pytest.mark.parametrize("left", [b"", b"5,0.", b"5,0.5,1,2,3,0.1"])
def test_cutting_a_row_short_writes_no_row_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bytes) -> None:
    """Rows written anew would all be lost to a full disk, or to a kill in between."""
    path = tmp_path / "depth.csv"
    callback = EffectiveDepth(SMALL[0].images(), path, SMALL[0].net(), every=1, share=ALWAYS)
    callback(0)
    first, before = read(path), path.read_bytes()
    path.write_bytes(before + left)
    with largest_file(0), pytest.raises(OSError):
        callback(1)
    assert path.read_bytes() == before and read(path) == first


def test_a_file_that_is_no_csv_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "depth.csv"
    path.write_text(",".join(field.name for field in dataclasses.fields(Depth)) + "\n" + "1" * 200_000 + "\n")
    with pytest.raises(ValueError, match="^out: expected columns step, depth, .* got field larger than field limit"):
        read(path)


def test_tensorboard_gets_every_number_at_once(tmp_path: Path, board_installed: None) -> None:
    net, batch = SMALL[0].net(), SMALL[0].images()
    writer = Board()
    for out in (writer, tmp_path / "board"):
        callback = EffectiveDepth(batch, out, net, every=3, share=ALWAYS)
        for step in range(3, 8):
            row = callback(step)
            assert (row is None) == bool(step % 3)
            if row is not None:
                scalars = {tag: (value, at) for tag, value, at in boards[-1].seen[-6:]}
                for name, value in list(dataclasses.asdict(row).items())[1:]:
                    assert scalars[f"effective depth/{name}"] == (value, step)
                assert boards[-1].flushed == len(boards[-1].seen)
    assert len(boards) == 2 and boards[1].folder == tmp_path / "board" and boards[1].purge_step == 3


def test_a_real_tensorboard_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    net, batch = SMALL[0].net(), SMALL[0].images()
    rows = [EffectiveDepth(batch, tmp_path, net, every=1, share=ALWAYS)(step) for step in (1, 2)]
    rows[1] = EffectiveDepth(batch, tmp_path, net, every=1, share=ALWAYS)(2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    depths = events.Scalars("effective depth/depth")
    assert [(event.step, event.value) for event in depths] == [
        (row.step, pytest.approx(row.depth)) for row in rows if row
    ]


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    batch, out = SMALL[0].images(), tmp_path / "depth.csv"
    with pytest.raises(ValueError, match="every: expected an integer of at least 1, got 0"):
        EffectiveDepth(batch, out, every=0)
    for share in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"share: expected a finite number above 0, got {share}"):
            EffectiveDepth(batch, out, share=share)
    with pytest.raises(ValueError, match="bn: expected 'running' or 'batch', got 'frozen'"):
        EffectiveDepth(batch, out, bn="frozen")  # type: ignore[arg-type]
    way_out = r"pathnet.adapt\(model, images\) makes one"
    with pytest.raises(
        ValueError, match=f"net: expected a pathnet ResidualNet, or one wrapped, got a Linear; {way_out}"
    ):
        EffectiveDepth(batch, out, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="images: expected finite values"):
        EffectiveDepth((batch[0] * math.nan, batch[1]), out)
    for pair in (batch[0], (batch[0].numpy(), batch[1])):
        with pytest.raises(ValueError, match=r"batch\[\d\]: expected a tensor|batch: expected a pair of tensors"):
            EffectiveDepth(pair, out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="net: expected a network, here or in the constructor"):
        EffectiveDepth(batch, out)(0)
    header = ",".join(HEADER)
    for text in ("epoch,loss\n1,2\n", f"{header}\n1,x,2,3,4,5,6\n", "a note", f"{header}s", "\n1,2", "\xff\n"):
        out.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="out: expected columns step, .*depth.csv, got.*; give another file"):
            EffectiveDepth(batch, out)
        assert out.read_bytes() == text.encode("latin-1")
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ValueError, match="board would be a folder for TensorBoard, which is not installed"):
            EffectiveDepth(batch, tmp_path / "board")


def test_a_place_that_cannot_be_written_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board_installed: None
) -> None:
    batch, file = SMALL[0].images(), tmp_path / "file"
    file.write_text("")
    (tmp_path / "folder.csv").mkdir()
    for out, reason in (
        (tmp_path / "folder.csv", r"folder.csv \(Is a directory\)"),
        (file / "depth.csv", "file is no folder"),
        (file / "deeper" / "depth.csv", "file is no folder"),
        (file, "file is no folder"),
        (tmp_path / f"{'long' * 99}.csv", r"\(File name too long\)"),
        (tmp_path / ("long" * 99), r"\(File name too long\)"),
    ):
        with pytest.raises(ValueError, match=f"out: cannot (read|write) {re.escape(str(out))[:60]}.*{reason}"):
            EffectiveDepth(batch, out)
    EffectiveDepth(batch, tmp_path / "new" / "depth.csv")
    (tmp_path / "depth.csv").write_text("")
    checked: list[tuple[Path, int]] = []
    monkeypatch.setattr("os.access", lambda path, mode: checked.append((path, mode)))
    for out in (tmp_path / "new" / "depth.csv", tmp_path / "depth.csv", tmp_path / "board"):
        with pytest.raises(ValueError, match=f"out: cannot write {out}, since .* is not writable"):
            EffectiveDepth(batch, out)
    into = os.W_OK | os.X_OK
    assert checked == [(tmp_path, into), (tmp_path / "depth.csv", os.W_OK), (tmp_path, into)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["depth.csv", "file", "folder.csv"]
