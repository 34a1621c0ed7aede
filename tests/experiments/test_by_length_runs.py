"""Exact sums and signed draws in a run: right, in one folder with sampled paths, and resumed to the same rows."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gradient_runs import BLOCKS, EXACT, SAMPLED, SIGNED, as_text, measure_small, small_data, small_net

import pathnet
from pathnet import gradients, results
from pathnet.experiments.by_length import MOST_DRAWS, ExactSum, SignedDraw
from pathnet.experiments.comparison import compare
from pathnet.experiments.path_gradients import PathGradients

KINDS: Sequence[tuple[PathGradients, Any]] = ((EXACT, ExactSum), (SIGNED, SignedDraw))


# What is measured


def test_a_row_is_what_the_tape_says_of_its_batch(whole: results.Run) -> None:
    rows = whole.rows(ExactSum)
    assert [(row.batch, row.length) for row in rows] == [(b, k) for b in range(5) for k in range(BLOCKS + 1)]
    for batch in (0, 4):
        tape = pathnet.record(small_net(), *small_data().random_batch(4, 0, batch), engine="reference")
        of_batch = rows[10 * batch : 10 * batch + 10]
        sums = tape.gradient_by_length().flatten(1)
        full = sums.sum(0)
        close = {"rel": 1e-6}
        assert [row.norm for row in of_batch] == pytest.approx(sums.norm(dim=1).tolist(), **close)
        assert [row.full_norm for row in of_batch] == pytest.approx([full.norm().item()] * 10, **close)
        cosines = torch.nn.functional.cosine_similarity
        assert [row.next_cosine for row in of_batch[:-1]] == pytest.approx(
            cosines(sums[:-1], sums[1:]).tolist(), abs=1e-6
        )
        assert math.isnan(of_batch[-1].next_cosine) and {row.engine for row in of_batch} == {"reference"}
        assert [row.full_cosine for row in of_batch] == pytest.approx(cosines(sums, full[None]).tolist(), abs=1e-6)
        assert [row.share for row in of_batch] == pytest.approx((sums @ full / full.dot(full)).tolist(), abs=1e-6)
        left = (full - sums.cumsum(0)).norm(dim=1) / full.norm()
        assert [row.left for row in of_batch] == pytest.approx(left.tolist(), abs=1e-6)


def test_a_draw_has_its_own_signs_on_every_batch(whole: results.Run) -> None:
    rows = whole.rows(SignedDraw)
    names = [(row.batch, row.draw, row.length) for row in rows]
    assert names == [(b, j, k) for b in range(5) for j in range(2) for k in range(BLOCKS + 1)]
    for batch, draw in ((0, 0), (3, 1)):
        tape = pathnet.record(small_net(), *small_data().random_batch(4, 0, batch), engine="reference")
        signs = pathnet.paths.signs(BLOCKS, 1, 0, batch * MOST_DRAWS + draw)
        expected = gradients.squared_norms_by_length(tape._record, signs[..., None], tape._place)[0]
        estimates = [row.squared_norm for row in rows if (row.batch, row.draw) == (batch, draw)]
        assert estimates == pytest.approx(expected.tolist(), rel=1e-9, abs=0)
    drawn = {
        tuple(pathnet.paths.signs(BLOCKS, 1, 0, b * MOST_DRAWS + j)[0].tolist()) for b in range(5) for j in range(2)
    }
    assert len(drawn) == 10


def test_all_methods_share_a_folder_and_nothing_is_lost(whole: results.Run, tmp_path: Path) -> None:
    alone = {plan.method: measure_small(plan, tmp_path / plan.method) for plan in (EXACT, SIGNED, SAMPLED)}
    assert as_text(whole.rows(ExactSum)) == as_text(alone["exact"].rows(ExactSum))
    assert as_text(whole.rows(SignedDraw)) == as_text(alone["signed"].rows(SignedDraw))
    np.testing.assert_array_equal(whole.measurements().norm, alone["sampled"].measurements().norm)
    assert all(run.identity == whole.identity for run in alone.values())
    assert whole.planned == {"batches": 5, "exact_batches": 5, "signed_batches": 5, "signed_draws": 2}
    assert "batches" not in alone["exact"].facts and "exact_batches" not in alone["sampled"].facts
    known = json.loads((whole.folder / "run.json").read_text())["results"]
    assert known == compare(whole).as_json() and {"exact", "signed", "cancelling", "cost", "decay"} < set(known)


# Resuming


@pytest.mark.parametrize(("plan", "kind"), KINDS, ids=["exact", "signed"])
def test_an_interrupted_run_goes_on_to_the_same_rows(
    plan: PathGradients, kind: Any, whole: results.Run, tmp_path: Path
) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_small(plan, tmp_path, stop)
    kept = results.read(tmp_path).rows(kind)
    assert {row.batch for row in kept} == {0, 1, 2} and as_text(kept) == as_text(whole.rows(kind))[: len(kept)]
    seen: list[tuple[int, int, str]] = []
    run = measure_small(plan, tmp_path, lambda *state: seen.append(state))
    assert seen == [(done, 5, "batches, engine reference") for done in (4, 5)]
    assert as_text(run.rows(kind)) == as_text(whole.rows(kind))


@pytest.mark.parametrize(("plan", "kind"), KINDS, ids=["exact", "signed"])
def test_a_lost_part_is_measured_again_and_nothing_else(
    plan: PathGradients, kind: Any, whole: results.Run, tmp_path: Path, monkeypatch: Any
) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == total:
            raise KeyboardInterrupt

    monkeypatch.setattr(import_module("pathnet.results.writing"), "PART_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        measure_small(plan, tmp_path, stop)
    parts = sorted((tmp_path / "measurements").glob(f"{kind.PART}-*.parquet"))
    assert len(parts) == 5
    parts[2].unlink()
    # An interrupt between a part and the end of its journal makes a second part of the same rows, with the same NaN.
    shutil.copy(parts[4], parts[4].with_name(f"{kind.PART}-000017.parquet"))
    seen: list[int] = []
    again = measure_small(plan, tmp_path, lambda done, *_: seen.append(done))
    assert seen == [5] and as_text(again.rows(kind)) == as_text(whole.rows(kind))


def test_more_batches_and_draws_extend_a_run_and_fewer_lose_nothing(whole: results.Run, tmp_path: Path) -> None:
    measure_small(dataclasses.replace(SIGNED, batches=2, draws=1), tmp_path)
    measure_small(dataclasses.replace(EXACT, batches=3), tmp_path)
    seen: list[int] = []
    run = measure_small(SIGNED, tmp_path, lambda done, *_: seen.append(done))
    assert seen == [1, 2, 3, 4, 5] and as_text(run.rows(SignedDraw)) == as_text(whole.rows(SignedDraw))
    run = measure_small(dataclasses.replace(SIGNED, batches=1, draws=1), tmp_path)
    assert as_text(run.rows(SignedDraw)) == as_text(whole.rows(SignedDraw))
    assert as_text(measure_small(EXACT, tmp_path).rows(ExactSum)) == as_text(whole.rows(ExactSum))


def test_a_folder_of_another_run_is_refused(whole: results.Run) -> None:
    for plan, _ in KINDS:
        with pytest.raises(ValueError, match="holds another run .seed: expected 1, found 0"):
            measure_small(dataclasses.replace(plan, seed=1), whole.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "guessed"}, "method: expected .*sampled.*exact.*signed.*, got 'guessed'"),
        ({"draws": 0}, "draws: expected an integer of at least 1, got 0"),
        ({"draws": 7}, "draws: expected 1 unless the method is signed, got 7 with sampled"),
        ({"method": "signed", "draws": MOST_DRAWS + 1}, "draws: expected at most 1,000,000 on a batch, got 1000001"),
    ],
)
def test_bad_plans_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PathGradients(**change)


@pytest.mark.parametrize("plan", [EXACT, SIGNED], ids=["exact", "signed"])
def test_what_is_not_finite_is_never_recorded(plan: PathGradients, tmp_path: Path, monkeypatch: Any) -> None:
    record = pathnet.Recorder.__call__

    def broken(recorder: pathnet.Recorder, images: torch.Tensor, target: torch.Tensor) -> pathnet.Tape:
        tape = record(recorder, images, target)
        start = tape._record.start
        nowhere = start._replace(mantissa=start.mantissa * torch.nan)
        tape._recorded = dataclasses.replace(tape._record, start=nowhere)
        return tape

    monkeypatch.setattr(pathnet.Recorder, "__call__", broken)
    with pytest.raises(
        ValueError, match=r"engine: expected finite norms, got nan from reference \(batch 0, length 0\)"
    ):
        measure_small(plan, tmp_path)
    assert not results.read(tmp_path).rows(ExactSum) and not results.read(tmp_path).rows(SignedDraw)
