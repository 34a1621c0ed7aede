"""Results of a run of path gradients by method, and the methods compared."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from math import comb
from pathlib import Path

import numpy as np
import pytest
from helpers.gradient_runs import BLOCKS, EXACT, SAMPLED, SIGNED, measure_small

import pathnet
from pathnet import results
from pathnet.experiments import comparison
from pathnet.experiments.by_length import ExactSum, SignedDraw
from pathnet.experiments.comparison import compare
from pathnet.experiments.findings import cancelled, findings_of
from pathnet.paper import claims
from pathnet.signed import judge


def test_means_are_over_batches(whole: results.Run) -> None:
    result, rows = compare(whole), whole.rows(ExactSum)
    exact, signed = result.exact, result.signed
    assert exact is not None and signed is not None and exact.batches == signed.batches == 5

    def of(name: str, length: int) -> list[float]:
        return [getattr(row, name) for row in rows if row.length == length]

    for k in range(BLOCKS + 1):
        for name in ("norm", "full_cosine", "share", "left"):
            means = getattr(exact, name)
            assert means.mean[k] == pytest.approx(np.mean(of(name, k)))
            assert np.isnan(means.low[k]) and np.isnan(means.high[k]), "of five batches there is no interval"
        if k < BLOCKS:
            assert exact.next_cosine.mean[k] == pytest.approx(np.mean(of("next_cosine", k)))
    assert exact.explained.mean == pytest.approx(exact.share.mean.cumsum())
    assert exact.full_norm == pytest.approx(np.mean(of("full_norm", 0)))
    assert exact.product == pytest.approx(exact.norm.mean[1:] / exact.norm.mean[1:].sum())
    first = exact.first_to_explain(0.5)
    assert (exact.explained.mean[first:] >= 0.5).all() and exact.explained.mean[first - 1] < 0.5
    draws = np.array([row.squared_norm for row in whole.rows(SignedDraw)]).reshape(10, BLOCKS + 1)
    squares = np.array([row.norm for row in rows]).reshape(5, BLOCKS + 1) ** 2
    expected = judge(draws, np.repeat(squares, 2, 0), np.repeat(np.arange(5), 2))
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(getattr(signed.judgement, field.name), getattr(expected, field.name))
    counts = np.array([comb(BLOCKS, k) for k in range(BLOCKS + 1)])
    assert signed.rms == pytest.approx(np.sqrt(draws.mean(0) / counts))
    assert signed.total == pytest.approx(np.sqrt(counts * draws.mean(0)))


def test_what_cancels_is_the_sum_beside_the_norms_on_the_same_batches(whole: results.Run, tmp_path: Path) -> None:
    norms = whole.measurements().norm.reshape(5, BLOCKS)
    sums = np.array([row.norm for row in whole.rows(ExactSum)]).reshape(5, BLOCKS + 1)[:, 1:]
    counts = np.array([comb(BLOCKS, k) for k in range(1, BLOCKS + 1)])
    result = compare(whole)
    assert result.cancelling is not None
    np.testing.assert_allclose(result.cancelling.mean, sums.mean(0) / counts / norms.mean(0))
    assert result.cancelling.mean[-1] == pytest.approx(1, rel=1e-5), "there is one path of length n"
    assert (result.cancelling.mean < 1.5).all() and np.isnan(result.cancelling.low).all()
    measure_small(SAMPLED, tmp_path)
    fewer = compare(measure_small(dataclasses.replace(EXACT, batches=2), tmp_path))
    assert fewer.cancelling is not None
    np.testing.assert_allclose(fewer.cancelling.mean, sums[:2].mean(0) / counts / norms[:2].mean(0))


def test_the_cost_is_compared_by_relative_deviations_on_the_same_batches(whole: results.Run, tmp_path: Path) -> None:
    norms = whole.measurements().norm.reshape(5, BLOCKS) ** 2
    draws = np.array([row.squared_norm for row in whole.rows(SignedDraw)]).reshape(10, BLOCKS + 1)[:, 1:]
    cost = compare(whole).cost
    assert cost is not None and cost.batches == 5
    np.testing.assert_allclose(cost.sampled, norms.std(0, ddof=1) / norms.mean(0))
    np.testing.assert_allclose(cost.signed, draws.std(0, ddof=1) / draws.mean(0))
    assert not cost.settled.any(), "five batches are too few to know a tail"
    measure_small(SIGNED, tmp_path)
    fewer = compare(measure_small(dataclasses.replace(SAMPLED, batches=3), tmp_path)).cost
    assert fewer is not None and fewer.batches == 3
    np.testing.assert_allclose(fewer.signed, draws[:6].std(0, ddof=1) / draws[:6].mean(0))


def test_only_a_light_tail_of_what_varied_less_settles_it() -> None:
    rng = np.random.default_rng(0)
    little, much = rng.uniform(0.9, 1.1, (400, 1)), rng.uniform(0.1, 2, (400, 1))
    heavy = rng.pareto(0.4, (400, 1))
    norms = np.sqrt(np.concatenate([much, much, little, heavy, heavy], 1))
    draws = np.concatenate([little, little, much, much, heavy * heavy], 1)
    cost = comparison._cost(norms, draws, np.array([True, False, False, True, False]))
    assert (cost.signed < cost.sampled).tolist() == [True, True, False, True, False]
    assert cost.settled.tolist() == [True, False, True, True, False]


def test_each_method_comes_to_something_alone(tmp_path: Path) -> None:
    parts = {"exact": "exact", "signed": "signed", "sampled": "sampled"}
    for plan in (EXACT, SIGNED, SAMPLED):
        run = measure_small(plan, tmp_path / plan.method)
        result = compare(run)
        assert [name for name in parts if getattr(result, name) is not None] == [plan.method]
        assert result.cancelling is None and result.cost is None and cancelled(result) is None
        json.dumps(result.as_json(), allow_nan=False)
        assert len(claims(run)) == {"exact": 1, "signed": 0, "sampled": 2}[plan.method]


def test_one_batch_and_one_draw_come_to_something(tmp_path: Path) -> None:
    for plan in (EXACT, SIGNED, SAMPLED):
        run = measure_small(dataclasses.replace(plan, batches=1, draws=1), tmp_path)
    result = compare(run)
    assert result.exact is not None and np.isnan(result.exact.norm.low).all()
    assert result.signed is not None and not result.signed.judgement.trusted.any()
    json.dumps(result.as_json(), allow_nan=False)
    assert not any("nan" in line for line in findings_of(result))


def test_an_empty_run_is_an_error(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathnet.Recorder, "__call__", stop)
        measure_small(EXACT, tmp_path)
    with pytest.raises(ValueError, match="run: .* holds no measurements yet; start its command again"):
        compare(results.read(tmp_path))


@pytest.mark.parametrize("batches", [1, 2])
def test_a_batch_without_a_gradient_has_no_say_in_what_is_explained(tmp_path: Path, batches: int) -> None:
    """Give the first batch a loss of 0 whatever the weights are."""
    run = measure_small(dataclasses.replace(EXACT, batches=batches), tmp_path)
    _replace_sums(run, [_without_gradient(row) if row.batch == 0 else row for row in run.rows(ExactSum)])
    if batches == 1:
        with pytest.raises(ValueError, match="run: expected a gradient above zero on some batch, got none on 1"):
            compare(run)
        return
    exact, rows = compare(run).exact, run.rows(ExactSum)[BLOCKS + 1 :]
    assert exact is not None and exact.explained.mean[-1] == pytest.approx(1)
    assert exact.share.mean.tolist() == pytest.approx([row.share for row in rows])
    assert exact.left.mean.tolist() == pytest.approx([row.left for row in rows], abs=1e-9)
    assert exact.norm.mean.tolist() == pytest.approx([row.norm / 2 for row in rows])
    assert "explain" in findings_of(compare(run))[0]


def _without_gradient(row: ExactSum) -> ExactSum:
    """Return the row that `Tape.compare_lengths` gives for a gradient of zero."""
    nothing = dict.fromkeys(("next_cosine", "full_cosine", "share", "left"), math.nan)
    return dataclasses.replace(row, norm=0.0, full_norm=0.0, **nothing)


def _replace_sums(run: results.Run, rows: Sequence[ExactSum]) -> None:
    """Replace the exact sums of a run by these rows."""
    for part in (run.folder / "measurements").glob("exact-*.parquet"):
        part.unlink()
    run.add_rows(rows)


def test_a_batch_with_some_lengths_only_is_an_error(tmp_path: Path) -> None:
    run = measure_small(dataclasses.replace(EXACT, batches=1), tmp_path)
    run.add_rows([dataclasses.replace(run.rows(ExactSum)[0], batch=7)])
    with pytest.raises(ValueError, match="hold a batch that lacks some lengths"):
        compare(run)
