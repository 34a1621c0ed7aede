"""The effective depth over training: its numbers, its file, its bound, and that training is as it would have been."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import SMALL, shaken
from helpers.full_disk import largest_file
from helpers.oracles import detach_loop
from torch import Tensor, nn
from typer.testing import CliRunner

from pathnet import EffectiveDepth, cli, data, effective_depth, models, paths, training
from pathnet.effective_depth import Depth, read
from pathnet.engines import reference
from pathnet.figures import figure_depth
from pathnet.models import ResidualNet

RECIPE = training.Recipe(epochs=2, batch_size=32, learning_rate=0.05, warmup_steps=3)
ALL = math.inf


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


def fresh(**settings: Any) -> ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(8, 4, **settings)


def without_seconds(rows: list[Depth]) -> list[Depth]:
    return [dataclasses.replace(row, seconds=0) for row in rows]


# The numbers


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[4]], ids=lambda case: case.id)
def test_depth_run_and_half_are_those_of_all_single_paths(case: Any, bn: Any, tmp_path: Path) -> None:
    net, (batch, labels) = case.net(), case.images()
    row = EffectiveDepth((batch, labels), tmp_path / "depth.csv", net, bn=bn, engine="reference")(0)
    assert row is not None
    sums = [torch.zeros(1, dtype=torch.float64)] * (net.n + 1)
    for path in paths.enumerate_all(net.n):
        length = int(path.sum())
        sums[length] = sums[length] + detach_loop(net, batch, labels, path, bn)
    norms, full = np.array([own.norm().item() for own in sums]), sum(sums)
    shares = norms / norms.sum()
    assert row.depth == pytest.approx((np.arange(net.n + 1) * shares).sum(), rel=1e-4)
    runs = [(j - i, i, j) for i in range(net.n + 1) for j in range(i, net.n + 1) if shares[i : j + 1].sum() >= 0.95]
    assert (row.last - row.first, row.first, row.last) in runs and row.last - row.first == min(runs)[0]
    explained = np.cumsum([float((own * full).sum() / (full * full).sum()) for own in sums])
    assert row.half == int(np.argmax(explained >= 0.5))
    assert row.loss > 0 and row.seconds > 0 and read(tmp_path / "depth.csv") == [row]


@pytest.mark.parametrize(
    ("shares", "run"),
    [
        ([0.5, 0.5], (0, 1)),
        ([0.0, 0.0, 1.0, 0.0], (2, 2)),
        ([0.04, 0.5, 0.45, 0.01], (1, 2)),
        ([0.48, 0.48, 0.04, 0.0], (0, 1)),
        ([0.2, 0.2, 0.2, 0.2, 0.2], (0, 4)),
    ],
)
def test_the_shortest_run(shares: list[float], run: tuple[int, int]) -> None:
    assert effective_depth._shortest_run(shares) == run


# Training is as it would have been


class Noisy(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.3), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(x))


def test_a_loop_of_ones_own_goes_on_as_without_it(tmp_path: Path) -> None:
    batch, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 10, (6,))
    ends = []
    for measured in (False, True):
        net = shaken(fresh()).train()
        net.head = Noisy(net.head)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        calls = [0]
        for module in (net.stem, net.blocks[1], net.head.head):  # of which some engine runs each
            module.register_forward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
            if module is not net.stem:
                module.register_full_backward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        callback = EffectiveDepth((batch[:3], labels[:3]), tmp_path / "depth.csv", every=1, share=ALL)
        torch.manual_seed(5)
        np.random.seed(5)
        for step in range(4):
            if measured:
                assert callback(step, net) is not None
                assert read(tmp_path / "depth.csv")[-1].step == step, "a row waits in a buffer"
            optimizer.zero_grad()
            F.cross_entropy(net(batch), labels).backward()
            if measured:  # gradients are left as they are
                before = [parameter.grad.clone() for parameter in net.parameters()]
                effective_depth.EffectiveDepth((batch, labels), tmp_path / f"{step}.csv", net)(0)
                assert all(torch.equal(p.grad, own) for p, own in zip(net.parameters(), before, strict=True))
            optimizer.step()
        assert net.training and calls == [20]
        ends.append((net.state_dict(), torch.get_rng_state(), np.random.get_state()[1]))
    (plain, rng, numpy_rng), (own, own_rng, own_numpy_rng) = ends
    assert all(torch.equal(own[name], tensor) for name, tensor in plain.items())
    assert torch.equal(rng, own_rng) and (numpy_rng == own_numpy_rng).all()


@pytest.mark.parametrize(("survival", "modules"), [(1.0, 0), (1.0, 2), (0.4, 0)])
def test_training_ends_with_the_same_bits(images: data.Data, tmp_path: Path, survival: float, modules: int) -> None:
    recipe = dataclasses.replace(RECIPE, modules=modules)
    plain, measured = fresh(survival=survival), fresh(survival=survival)
    history = training.train(plain, images, recipe)
    callback = EffectiveDepth(images.random_batch(8, 0, 0), tmp_path / "depth.csv", every=2, share=ALL, bn="running")
    own = training.train(measured, images, recipe, callback=callback)
    assert models.fingerprint(plain) == models.fingerprint(measured)
    assert [dataclasses.replace(epoch, seconds=0) for epoch in own] == [
        dataclasses.replace(epoch, seconds=0) for epoch in history
    ]
    assert [row.step for row in read(tmp_path / "depth.csv")] == [0, 2, 4, 6, 8]


def test_a_wrapped_network_is_measured_as_it_is(tmp_path: Path) -> None:
    net, (batch, labels) = SMALL[0].net(), SMALL[0].images()
    compiled = torch.compile(net, backend="eager")
    rows = [
        EffectiveDepth((batch, labels), tmp_path / f"{i}.csv", given)(0, later)
        for i, (given, later) in enumerate([(net, None), (compiled, None), (None, compiled), (fresh(), net)])
    ]
    assert len(set(without_seconds([row for row in rows if row is not None]))) == 1 and len(rows) == 4


def test_weights_that_are_not_finite_leave_a_row_and_not_an_error(tmp_path: Path) -> None:
    net, (batch, labels) = SMALL[0].net(), SMALL[0].images()
    nn.init.constant_(net.head.linear.weight, math.nan)
    callback = EffectiveDepth((batch, labels), tmp_path / "depth.csv", net, every=1, share=ALL)
    row = callback(0)
    assert row is not None and (row.first, row.last, row.half) == (-1, -1, -1)
    assert math.isnan(row.depth) and math.isnan(row.loss) and math.isnan(read(tmp_path / "depth.csv")[0].depth)
    nn.init.zeros_(net.head.linear.weight)  # no gradient arrives
    row = callback(1)
    assert row is not None and math.isnan(row.depth) and row.loss > 0
    with pytest.raises(ValueError, match="target: expected labels"):
        EffectiveDepth((batch, labels + 5), tmp_path / "other.csv", net)(0)
    own = EffectiveDepth((batch, labels), tmp_path / "own.csv", net, loss=lambda output, _: output.sum() * math.inf)(
        0
    )
    assert own is not None and math.isnan(own.depth)


# The file


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resumed_training_measures_what_is_missing_and_nothing_twice(
    images: data.Data, tmp_path: Path, stop: int
) -> None:
    few = images.random_batch(8, 0, 0)

    def callback(name: str) -> EffectiveDepth:
        return EffectiveDepth(few, tmp_path / name, every=1, share=ALL)

    def interrupt(done: int, steps: int, note: str) -> None:
        if done == stop:
            raise Interrupt

    training.train(fresh(), images, RECIPE, callback=callback("straight.csv"))
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupt):
        training.train(fresh(), images, RECIPE, checkpoint, interrupt, callback("resumed.csv"))
    early = checkpoint.read_bytes()
    assert [row.step for row in read(tmp_path / "resumed.csv")] == list(range(stop + 1))
    training.train(fresh(), images, RECIPE, checkpoint, callback=callback("resumed.csv"))
    straight, resumed = (without_seconds(read(tmp_path / f"{name}.csv")) for name in ("straight", "resumed"))
    assert resumed == straight and [row.step for row in straight] == list(range(9))
    # A checkpoint from before the last rows: its steps are taken again, and not measured again.
    checkpoint.write_bytes(early)
    with pytest.warns(RuntimeWarning, match=rf"resumed.csv goes up to step 8, .* goes on from step {stop}"):
        training.train(fresh(), images, RECIPE, checkpoint, callback=callback("resumed.csv"))
    assert without_seconds(read(tmp_path / "resumed.csv")) == straight


@pytest.mark.parametrize("begin", [0, 3, 5])
def test_another_training_does_not_go_on_behind_the_rows_of_a_file(tmp_path: Path, begin: int) -> None:
    net, batch, path = SMALL[0].net(), SMALL[0].images(), tmp_path / "depth.csv"
    for step in (5, 10):
        assert EffectiveDepth(batch, path, net, every=5, share=ALL)(step) is not None
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=f"depth.csv holds steps 5 to 10 .* begins at step {begin}; give another"):
        EffectiveDepth(batch, path, net, every=5, share=ALL)(begin)
    with pytest.raises(ValueError, match="every: expected what divides the steps in .*depth.csv, got 10, and it hol"):
        EffectiveDepth(batch, path, net, every=10)
    assert path.read_bytes() == kept
    resumed = EffectiveDepth(batch, path, net, every=5, share=ALL)
    with warnings.catch_warnings(action="error"):
        assert resumed(10) is None and resumed(15) is not None
    assert [row.step for row in read(path)] == [5, 10, 15]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_row_that_was_cut_short_is_measured_again(tmp_path: Path, cut: int) -> None:
    net, batch = SMALL[0].net(), SMALL[0].images()
    path = tmp_path / "deep" / "depth.csv"
    first = EffectiveDepth(batch, path, net, every=1, share=ALL)
    rows = [first(step) for step in range(3)]
    path.write_bytes(path.read_bytes()[:-cut])
    assert read(path) == rows[:2]
    again = EffectiveDepth(batch, path, net, every=1, share=ALL)
    assert again(1) is None and again(2) is not None and again(3) is not None
    assert [row.step for row in read(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("left", ["", "step,dep", "step,depth,first,last,half,loss,seconds\n0,1."])
def test_a_file_without_a_whole_row_begins_anew(tmp_path: Path, left: str) -> None:
    path = tmp_path / "depth.csv"
    path.write_text(left)
    row = EffectiveDepth(SMALL[0].images(), path, SMALL[0].net())(0)
    assert read(path) == [row]


class Board:
    def __init__(self, folder: Path | None = None, purge_step: int | None = None) -> None:
        self.seen: list[tuple[str, float, int]] = []
        self.folder, self.purge_step, self.flushed = folder, purge_step, 0
        boards.append(self)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.seen.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        self.flushed = len(self.seen)


boards: list[Board] = []


def test_a_full_disk_is_told_and_the_rows_before_stay(tmp_path: Path) -> None:
    path = tmp_path / "depth.csv"
    callback = EffectiveDepth(SMALL[0].images(), path, SMALL[0].net(), every=1, share=ALL)
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
    """Otherwise a full disk, or a kill in between, would take them all."""
    path = tmp_path / "depth.csv"
    callback = EffectiveDepth(SMALL[0].images(), path, SMALL[0].net(), every=1, share=ALL)
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


@pytest.fixture
def board_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "here" if name == "tensorboard" else found(name))
    boards.clear()
    yield


def test_tensorboard_gets_every_number_at_once(tmp_path: Path, board_installed: None) -> None:
    net, batch = SMALL[0].net(), SMALL[0].images()
    own = Board()
    for out in (own, tmp_path / "board"):
        callback = EffectiveDepth(batch, out, net, every=3, share=ALL)
        for step in range(3, 8):
            row = callback(step)
            assert (row is None) == bool(step % 3)
            if row is not None:
                given = {tag: (value, at) for tag, value, at in boards[-1].seen[-6:]}
                for name, value in list(dataclasses.asdict(row).items())[1:]:
                    assert given[f"effective depth/{name}"] == (value, step)
                assert boards[-1].flushed == len(boards[-1].seen)
    assert len(boards) == 2 and boards[1].folder == tmp_path / "board" and boards[1].purge_step == 3


def test_a_real_tensorboard_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    net, batch = SMALL[0].net(), SMALL[0].images()
    rows = [EffectiveDepth(batch, tmp_path, net, every=1, share=ALL)(step) for step in (1, 2)]
    rows[1] = EffectiveDepth(batch, tmp_path, net, every=1, share=ALL)(2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = events.Scalars("effective depth/depth")
    assert [(own.step, own.value) for own in scalars] == [(row.step, pytest.approx(row.depth)) for row in rows if row]


# How much it costs


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_measuring_takes_no_more_than_its_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: int, share: float
) -> None:
    """Time is the number of module backwards, each one's work by its images."""
    case = dataclasses.replace(SMALL[0], batch=8)
    net, (batch, labels) = case.net(), case.images()
    clock = [0.0]
    through = reference._through

    def counted(block: Any, x: Tensor, grads: Tensor, *further: Any) -> Any:
        clock[0] += len(grads) * len(x)
        return through(block, x, grads, *further)

    monkeypatch.setattr(reference, "_through", counted)
    monkeypatch.setattr(effective_depth, "_now", lambda: clock[0])
    callback = EffectiveDepth((batch, labels), tmp_path / "depth.csv", net, every, share, engine="reference")
    # A step of training on 32 images, each module backward twice what one to the input alone is.
    step_work, training_work, measuring, steps = 32 * net.n * 2.0, 0.0, [], []
    for step in range(200):
        before = clock[0]
        row = callback(step)
        if row is not None:
            measuring.append(clock[0] - before)
            steps.append(step)
            assert row.seconds == measuring[-1]
            if len(steps) > 1:
                assert sum(measuring) <= share * training_work
        else:
            assert clock[0] == before, "a step between cost something"
        clock[0] += step_work
        training_work += step_work
    # n (n + 1) modules' worth of one branch each: every length comes out of a block by its skip and by its module.
    assert set(measuring) == {len(batch) * net.n * (net.n + 1)}
    assert steps[0] == 0 and all(step % every == 0 for step in steps)
    allowed = max(every, measuring[0] / step_work / share)
    assert len(steps) >= 0.9 * 200 / (math.ceil(allowed / every) * every)


def test_the_default_leaves_at_least_hundred_steps_between(tmp_path: Path) -> None:
    net, batch = SMALL[0].net(), SMALL[0].images()
    callback = EffectiveDepth(batch, tmp_path / "depth.csv", net, share=ALL)
    assert [step for step in range(1, 301) if callback(step) is not None] == [100, 200, 300]


def test_other_processes_than_the_first_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    callback = EffectiveDepth(SMALL[0].images(), tmp_path / "depth.csv", SMALL[0].net())
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert callback(0) is None and not list(tmp_path.iterdir())
    monkeypatch.setattr("os.access", lambda *_: pytest.fail("asked of a disk that may be another machine's"))
    EffectiveDepth(SMALL[0].images(), tmp_path / "depth.csv", SMALL[0].net())


# Command line and figure


def test_the_command_measures_goes_on_and_draws(tmp_path: Path) -> None:
    out, file = tmp_path / "net.safetensors", tmp_path / "depth.csv"
    given = ["train", "--data", "synthetic", "--depth", "8", "--width", "2", "--epochs", "1", "--batch-size", "256"]
    given += ["--out", str(out), "--effective-depth", str(file), "--device", "cpu", "--json"]
    for _ in range(2):
        done = CliRunner().invoke(cli.app, given)
        assert done.exit_code == 0, done.output
        written = json.loads(done.stdout)["written"]
        assert written == [str(out), *(str(file.with_suffix(f".{kind}")) for kind in ("csv", "png", "svg"))]
        assert [row.step for row in read(file)] == [0]
    out.unlink()
    out.with_name("net.checkpoint.safetensors").unlink()
    done = CliRunner().invoke(cli.app, given)
    assert (
        done.exit_code == 1 and "effective_depth:" in done.output and "exists, and the training begins" in done.output
    )


def test_the_figure_leaves_out_what_was_not_finite(tmp_path: Path) -> None:
    lost = Depth(200, math.nan, -1, -1, -1, math.nan, 0.1)
    rows = [Depth(0, 4.0, 2, 7, 4, 2.3, 0.1), Depth(100, 3.0, 1, 6, -1, 1.1, 0.1), lost]
    files = figure_depth(rows, "a training", tmp_path / "depth")
    assert [file.name for file in files] == ["depth.png", "depth.svg"] and all(file.stat().st_size for file in files)
    with pytest.raises(ValueError, match="rows: expected a measured depth, got none"):
        figure_depth([lost], "a training", tmp_path / "depth")


# Refusals


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    batch, out = SMALL[0].images(), tmp_path / "depth.csv"
    with pytest.raises(ValueError, match="every: expected an integer of at least 1, got 0"):
        EffectiveDepth(batch, out, every=0)
    for share in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"share: expected a finite number above 0, got {share}"):
            EffectiveDepth(batch, out, share=share)
    with pytest.raises(ValueError, match="bn: expected 'running' or 'batch', got 'frozen'"):
        EffectiveDepth(batch, out, bn="frozen")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="net: expected a pathnet ResidualNet, or one wrapped, got a Linear"):
        EffectiveDepth(batch, out, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="images: expected finite values"):
        EffectiveDepth((batch[0] * math.nan, batch[1]), out)
    for pair in (batch[0], (batch[0].numpy(), batch[1])):
        with pytest.raises(ValueError, match=r"batch\[\d\]: expected a tensor|batch: expected a pair of tensors"):
            EffectiveDepth(pair, out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="net: expected a network, here or in the constructor"):
        EffectiveDepth(batch, out)(0)
    header = ",".join(effective_depth.HEADER)
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
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append((path, mode)))
    for out in (tmp_path / "new" / "depth.csv", tmp_path / "depth.csv", tmp_path / "board"):
        with pytest.raises(ValueError, match=f"out: cannot write {out}, since .* may not be written to"):
            EffectiveDepth(batch, out)
    into = os.W_OK | os.X_OK
    assert asked == [(tmp_path, into), (tmp_path / "depth.csv", os.W_OK), (tmp_path, into)]
    assert sorted(own.name for own in tmp_path.iterdir()) == ["depth.csv", "file", "folder.csv"]


def test_the_command_names_its_own_argument(tmp_path: Path) -> None:
    (tmp_path / "depth.csv").mkdir()
    (tmp_path / "net.checkpoint.safetensors").touch()
    given = ["train", "--data", "synthetic", "--depth", "8", "--width", "2", "--device", "cpu"]
    given += ["--out", str(tmp_path / "net.safetensors"), "--effective-depth", str(tmp_path / "depth.csv")]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 1 and "effective_depth: expected a file" in done.output
