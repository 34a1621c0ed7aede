"""Runs of path gradients by all three methods: what is measured, one folder for all, resuming, what they come to."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from test_path_gradients import small_data, small_net

import pathnet
from pathnet import gradients, models, results
from pathnet.experiments import by_length, comparison, path_gradients
from pathnet.experiments.by_length import MOST_DRAWS, ExactSum, SignedDraw
from pathnet.experiments.comparison import Found, Signed, found
from pathnet.experiments.findings import cancelled, findings_of
from pathnet.experiments.path_gradients import PathGradients, measure
from pathnet.figures import sums
from pathnet.paper import claims
from pathnet.signed import judge

EXACT = PathGradients(batches=5, batch_size=4, engine="reference", method="exact")
SIGNED = dataclasses.replace(EXACT, method="signed", draws=2)
SAMPLED = dataclasses.replace(EXACT, method="sampled")
KINDS: Sequence[tuple[PathGradients, Any]] = ((EXACT, ExactSum), (SIGNED, SignedDraw))
N = 9


def measured(plan: PathGradients, folder: Path, progress: Any = None) -> results.Run:
    return measure(small_net(), small_data(), plan, folder, progress)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> results.Run:
    """By all three methods."""
    folder = tmp_path_factory.mktemp("run")
    for plan in (EXACT, SIGNED, SAMPLED):
        run = measured(plan, folder)
    return run


def said(rows: Sequence[Any]) -> list[str]:
    """Bit for bit, NaN being NaN."""
    return list(map(str, rows))


# What is measured


def test_a_row_is_what_the_tape_says_of_its_batch(whole: results.Run) -> None:
    rows = whole.rows(ExactSum)
    assert [(row.batch, row.length) for row in rows] == [(b, k) for b in range(5) for k in range(N + 1)]
    for batch in (0, 4):
        tape = pathnet.record(small_net(), *small_data().random_batch(4, 0, batch), engine="reference")
        own = rows[10 * batch : 10 * batch + 10]
        sums = tape.gradient_by_length().flatten(1)
        full = sums.sum(0)
        close = {"rel": 1e-6}
        assert [row.norm for row in own] == pytest.approx(sums.norm(dim=1).tolist(), **close)
        assert [row.full_norm for row in own] == pytest.approx([full.norm().item()] * 10, **close)
        cosines = torch.nn.functional.cosine_similarity
        assert [row.next_cosine for row in own[:-1]] == pytest.approx(cosines(sums[:-1], sums[1:]).tolist(), abs=1e-6)
        assert math.isnan(own[-1].next_cosine) and {row.engine for row in own} == {"reference"}
        assert [row.full_cosine for row in own] == pytest.approx(cosines(sums, full[None]).tolist(), abs=1e-6)
        assert [row.share for row in own] == pytest.approx((sums @ full / full.dot(full)).tolist(), abs=1e-6)
        left = (full - sums.cumsum(0)).norm(dim=1) / full.norm()
        assert [row.left for row in own] == pytest.approx(left.tolist(), abs=1e-6)


def test_a_draw_has_its_own_signs_on_every_batch(whole: results.Run) -> None:
    rows = whole.rows(SignedDraw)
    names = [(row.batch, row.draw, row.length) for row in rows]
    assert names == [(b, j, k) for b in range(5) for j in range(2) for k in range(N + 1)]
    for batch, draw in ((0, 0), (3, 1)):
        tape = pathnet.record(small_net(), *small_data().random_batch(4, 0, batch), engine="reference")
        signs = pathnet.paths.signs(N, 1, 0, batch * MOST_DRAWS + draw)
        expected = gradients.squared_norms_by_length(tape._record, signs, "y0")[0]
        own = [row.squared_norm for row in rows if (row.batch, row.draw) == (batch, draw)]
        assert own == pytest.approx(expected.tolist(), rel=1e-9, abs=0)
    drawn = {tuple(pathnet.paths.signs(N, 1, 0, b * MOST_DRAWS + j)[0].tolist()) for b in range(5) for j in range(2)}
    assert len(drawn) == 10


def test_all_methods_share_a_folder_and_nothing_is_lost(whole: results.Run, tmp_path: Path) -> None:
    alone = {plan.method: measured(plan, tmp_path / plan.method) for plan in (EXACT, SIGNED, SAMPLED)}
    assert said(whole.rows(ExactSum)) == said(alone["exact"].rows(ExactSum))
    assert said(whole.rows(SignedDraw)) == said(alone["signed"].rows(SignedDraw))
    np.testing.assert_array_equal(whole.measurements().norm, alone["sampled"].measurements().norm)
    assert all(run.identity == whole.identity for run in alone.values())
    asked = {name: whole.facts[name] for name in ("batches", "exact_batches", "signed_batches", "signed_draws")}
    assert asked == {"batches": 5, "exact_batches": 5, "signed_batches": 5, "signed_draws": 2}
    assert "batches" not in alone["exact"].facts and "exact_batches" not in alone["sampled"].facts
    known = json.loads((whole.folder / "run.json").read_text())["results"]
    assert known == found(whole).as_json() and {"exact", "signed", "cancelling", "cost", "decay"} < set(known)


# Resuming


@pytest.mark.parametrize("every_batch", [True, False], ids=["a part a batch", "one part"])
@pytest.mark.parametrize(("plan", "kind"), KINDS, ids=["exact", "signed"])
def test_an_interrupted_run_goes_on_to_the_same_rows(
    plan: PathGradients, kind: Any, every_batch: bool, whole: results.Run, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(by_length, "PART_SECONDS", 0.0 if every_batch else 1e9)

    def stop(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(plan, tmp_path, stop)
    kept = results.read(tmp_path).rows(kind)
    assert {row.batch for row in kept} == {0, 1, 2} and said(kept) == said(whole.rows(kind))[: len(kept)]
    seen: list[tuple[int, int, str]] = []
    run = measured(plan, tmp_path, lambda *state: seen.append(state))
    assert seen == [(done, 5, "batches, engine reference") for done in (4, 5)]
    assert said(run.rows(kind)) == said(whole.rows(kind))


@pytest.mark.parametrize(("plan", "kind"), KINDS, ids=["exact", "signed"])
def test_a_lost_part_is_measured_again_and_nothing_else(
    plan: PathGradients, kind: Any, whole: results.Run, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(by_length, "PART_SECONDS", 0.0)
    run = measured(plan, tmp_path)
    parts = sorted((tmp_path / "measurements").glob(f"{kind.PART}-*.parquet"))
    assert len(parts) == 5
    parts[2].unlink()
    # An interrupt between a part and the note of it makes a second part of the same rows, whose NaN are the same too.
    run.add_rows([row for row in run.rows(kind) if row.batch == 4])
    seen: list[int] = []
    again = measured(plan, tmp_path, lambda done, *_: seen.append(done))
    assert seen == [5] and said(again.rows(kind)) == said(whole.rows(kind))


def test_more_batches_and_draws_extend_a_run_and_fewer_lose_nothing(whole: results.Run, tmp_path: Path) -> None:
    measured(dataclasses.replace(SIGNED, batches=2, draws=1), tmp_path)
    measured(dataclasses.replace(EXACT, batches=3), tmp_path)
    seen: list[int] = []
    run = measured(SIGNED, tmp_path, lambda done, *_: seen.append(done))
    assert seen == [1, 2, 3, 4, 5] and said(run.rows(SignedDraw)) == said(whole.rows(SignedDraw))
    run = measured(dataclasses.replace(SIGNED, batches=1, draws=1), tmp_path)
    assert said(run.rows(SignedDraw)) == said(whole.rows(SignedDraw))
    assert said(measured(EXACT, tmp_path).rows(ExactSum)) == said(whole.rows(ExactSum))


def test_a_folder_of_another_run_is_refused(whole: results.Run) -> None:
    for plan, _ in KINDS:
        with pytest.raises(ValueError, match="holds another run .seed: expected 1, found 0"):
            measured(dataclasses.replace(plan, seed=1), whole.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "guessed"}, "method: expected .*sampled.*exact.*signed.*, got 'guessed'"),
        ({"draws": 0}, "draws: expected an integer of at least 1, got 0"),
        ({"draws": 7}, "draws: expected 1 but with the method signed, got 7 with sampled"),
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
        ValueError, match="engine: reference gave a norm of nan on batch 0, length 0; expected a finite"
    ):
        measured(plan, tmp_path)
    assert not results.read(tmp_path).rows(ExactSum) and not results.read(tmp_path).rows(SignedDraw)


# What they come to


def test_means_are_over_batches(whole: results.Run) -> None:
    result, rows = found(whole), whole.rows(ExactSum)
    exact, signed = result.exact, result.signed
    assert exact is not None and signed is not None and exact.batches == signed.batches == 5

    def of(name: str, length: int) -> list[float]:
        return [getattr(row, name) for row in rows if row.length == length]

    for k in range(N + 1):
        for name in ("norm", "full_cosine", "share", "left"):
            means = getattr(exact, name)
            assert means.mean[k] == pytest.approx(np.mean(of(name, k)))
            assert np.isnan(means.low[k]) and np.isnan(means.high[k]), "of five batches there is no interval"
        if k < N:
            assert exact.next_cosine.mean[k] == pytest.approx(np.mean(of("next_cosine", k)))
    assert exact.explained.mean == pytest.approx(exact.share.mean.cumsum())
    assert exact.full_norm == pytest.approx(np.mean(of("full_norm", 0)))
    assert exact.product == pytest.approx(exact.norm.mean[1:] / exact.norm.mean[1:].sum())
    first = exact.first_to_explain(0.5)
    assert (exact.explained.mean[first:] >= 0.5).all() and exact.explained.mean[first - 1] < 0.5
    draws = np.array([row.squared_norm for row in whole.rows(SignedDraw)]).reshape(10, N + 1)
    squares = np.array([row.norm for row in rows]).reshape(5, N + 1) ** 2
    expected = judge(draws, np.repeat(squares, 2, 0), np.repeat(np.arange(5), 2))
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(getattr(signed.judgement, field.name), getattr(expected, field.name))
    counts = np.array([comb(N, k) for k in range(N + 1)])
    assert signed.rms == pytest.approx(np.sqrt(draws.mean(0) / counts))
    assert signed.total == pytest.approx(np.sqrt(counts * draws.mean(0)))


def test_what_cancels_is_the_sum_beside_the_norms_on_the_same_batches(whole: results.Run, tmp_path: Path) -> None:
    norms = whole.measurements().norm.reshape(5, N)
    sums = np.array([row.norm for row in whole.rows(ExactSum)]).reshape(5, N + 1)[:, 1:]
    counts = np.array([comb(N, k) for k in range(1, N + 1)])
    result = found(whole)
    assert result.cancelling is not None
    np.testing.assert_allclose(result.cancelling.mean, sums.mean(0) / counts / norms.mean(0))
    assert result.cancelling.mean[-1] == pytest.approx(1, rel=1e-5), "there is one path of length n"
    assert (result.cancelling.mean < 1.5).all() and np.isnan(result.cancelling.low).all()
    measured(SAMPLED, tmp_path)
    fewer = found(measured(dataclasses.replace(EXACT, batches=2), tmp_path))
    assert fewer.cancelling is not None
    np.testing.assert_allclose(fewer.cancelling.mean, sums[:2].mean(0) / counts / norms[:2].mean(0))


def test_the_cost_is_compared_by_relative_deviations_on_the_same_batches(whole: results.Run, tmp_path: Path) -> None:
    norms = whole.measurements().norm.reshape(5, N) ** 2
    draws = np.array([row.squared_norm for row in whole.rows(SignedDraw)]).reshape(10, N + 1)[:, 1:]
    cost = found(whole).cost
    assert cost is not None and cost.batches == 5
    np.testing.assert_allclose(cost.sampled, norms.std(0, ddof=1) / norms.mean(0))
    np.testing.assert_allclose(cost.signed, draws.std(0, ddof=1) / draws.mean(0))
    assert not cost.settled.any(), "five batches are too few to know a tail"
    measured(SIGNED, tmp_path)
    fewer = found(measured(dataclasses.replace(SAMPLED, batches=3), tmp_path)).cost
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
        run = measured(plan, tmp_path / plan.method)
        result = found(run)
        assert [name for name in parts if getattr(result, name) is not None] == [plan.method]
        assert result.cancelling is None and result.cost is None and cancelled(result) is None
        json.dumps(result.as_json(), allow_nan=False)
        assert len(claims(run)) == {"exact": 1, "signed": 0, "sampled": 2}[plan.method]


def test_one_batch_and_one_draw_come_to_something(tmp_path: Path) -> None:
    for plan in (EXACT, SIGNED, SAMPLED):
        run = measured(dataclasses.replace(plan, batches=1, draws=1), tmp_path)
    result = found(run)
    assert result.exact is not None and np.isnan(result.exact.norm.low).all()
    assert result.signed is not None and not result.signed.judgement.trusted.any()
    json.dumps(result.as_json(), allow_nan=False)
    assert not any("nan" in line for line in findings_of(result))


def test_an_empty_run_is_an_error(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathnet.Recorder, "__call__", stop)
        measured(EXACT, tmp_path)
    with pytest.raises(ValueError, match="run: .* holds no measurements yet; start its command again"):
        found(results.read(tmp_path))


@pytest.mark.parametrize("batches", [1, 2])
def test_a_batch_without_a_gradient_has_no_say_in_what_is_explained(tmp_path: Path, batches: int) -> None:
    """The first batch's loss is 0 whatever the weights are."""
    run = measured(dataclasses.replace(EXACT, batches=batches), tmp_path)
    _alone(run, [_without_gradient(row) if row.batch == 0 else row for row in run.rows(ExactSum)])
    if batches == 1:
        with pytest.raises(ValueError, match="run: expected a gradient above zero on some batch, got none on 1"):
            found(run)
        return
    exact, rows = found(run).exact, run.rows(ExactSum)[N + 1 :]
    assert exact is not None and exact.explained.mean[-1] == pytest.approx(1)
    assert exact.share.mean.tolist() == pytest.approx([row.share for row in rows])
    assert exact.left.mean.tolist() == pytest.approx([row.left for row in rows], abs=1e-9)
    assert exact.norm.mean.tolist() == pytest.approx([row.norm / 2 for row in rows])
    assert "explain" in findings_of(found(run))[0]


def _without_gradient(row: ExactSum) -> ExactSum:
    """As `Tape.compare_lengths` has it of a gradient that is zero."""
    nothing = dict.fromkeys(("next_cosine", "full_cosine", "share", "left"), math.nan)
    return dataclasses.replace(row, norm=0.0, full_norm=0.0, **nothing)


def _alone(run: results.Run, rows: Sequence[ExactSum]) -> None:
    """The run with these rows in place of its own."""
    for part in (run.folder / "measurements").glob("exact-*.parquet"):
        part.unlink()
    run.add_rows(rows)


def test_a_batch_with_some_lengths_only_is_an_error(tmp_path: Path) -> None:
    run = measured(dataclasses.replace(EXACT, batches=1), tmp_path)
    run.add_rows([dataclasses.replace(run.rows(ExactSum)[0], batch=7)])
    with pytest.raises(ValueError, match="hold a batch with some lengths only"):
        found(run)


def exact_run(folder: Path, share: Sequence[float]) -> results.Run:
    """Of 10 blocks, whose lengths explain the given shares of the gradient."""
    model = {"hash": "abc", "config": {"model": "residual"}, "blocks": 10}
    identity = {"experiment": path_gradients.NAME, "model": model, "data": {"name": "made up", "hash": "abc"}}
    with results.writing(folder, identity, {}, {"started": ""}) as run:
        rows = [
            ExactSum(0, k, abs(own), 0.5, 0.5, own, abs(1 - sum(share[: k + 1])), 1.0, "cpu")
            for k, own in enumerate(share)
        ]
        run.add_rows(rows)
        return run


@pytest.mark.parametrize(
    ("share", "held"),
    [
        ([0.1, 0.2, 0.3, 0.3, 0.06, 0.04, 0, 0, 0, 0, 0], True),
        ([0.1, 0.2, 0.3, 0.3, 0.04, 0.06, 0, 0, 0, 0, 0], False),
        ([0.1, 0.2, 0.3, 0.3, 0.2, -0.3, 0.2, 0, 0, 0, 0], False),
    ],
)
def test_the_claim_is_that_short_paths_explain_the_gradient(
    share: Sequence[float], held: bool, tmp_path: Path
) -> None:
    (claim,) = claims(exact_run(tmp_path, share))
    assert claim.held == held and claim.paper == "Almost all of the gradient comes from short paths."
    assert "lengths up to 4 of 10 explain" in claim.measured and "at least 95%" in claim.bound


# Findings


def test_findings_say_what_was_found(whole: results.Run) -> None:
    result = found(whole)
    lines = findings_of(result)
    assert result.exact is not None
    most = result.exact.first_to_explain(0.95)
    assert lines[0].startswith(f"exact sums over all 2^9 paths, on 5 batches: lengths up to {most} explain")
    among = cancelled(result)
    assert among is not None and any(
        f"{among.least:.3g} to {among.most:.3g} times the norm of" in line for line in lines
    )
    assert lines[0].endswith("(no interval: 5 batches)")
    few = "10 signed draws on 5 batches, too few for a standard error"
    assert any(line.startswith(f"{few}; not to be trusted at the lengths") for line in lines)
    assert any("the draws are too few" in line for line in lines)
    assert findings_of(Found(9)) == []


def test_of_a_network_with_gates_the_gradient_is_that_with_frozen_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, plan = models.highway(8, 4).eval(), dataclasses.replace(EXACT, batches=1)
    for block in net:  # gates that look at their input, so that something flows through them
        torch.nn.init.normal_(block.gate.weight)
    run = measure(net, small_data(), plan, tmp_path)
    assert measure(net, small_data(), plan, tmp_path).facts["identity"]["model"]["gates"] is True
    result, tape = found(run), pathnet.record(net, *small_data().random_batch(4, 0, 0), engine="reference")
    assert result.exact is not None
    frozen = tape.routed_gradients(torch.ones(1, 3, 2))[0]
    assert result.exact.full_norm == pytest.approx(frozen.norm().item(), rel=1e-6)
    assert abs(tape.gradient().norm() / frozen.norm() - 1) > 0.01
    (claim,), lines, kept = claims(run), findings_of(result), list[Any]()
    monkeypatch.setattr(sums, "saved", lambda figure, stem: kept.append(figure) or [])
    sums.figure_sums(result, result.exact, "title", tmp_path)
    shown = [own.get_text() for own in kept[0].findobj(Text)]
    sentences = [line for line in (*lines, claim.bound, claim.measured, *shown) if "gradient" in line]
    assert len(sentences) == 8 and sentences.pop(2).startswith("what flows through the gates themselves is a part of")
    assert all(line.count("gradient") == line.count("gradient with frozen gates") == 1 for line in sentences)
    assert not any("gates" in line for line in findings_of(dataclasses.replace(result, gates=False)))


def test_alignment_is_told_apart_from_a_heavy_tail() -> None:
    """Two hundred draws of uniform size: no tail, but as many as aligned paths would need only at the ends."""
    draws = np.random.default_rng(0).uniform(0.9, 1.1, (200, 55))
    unknown = Found(54, signed=Signed(200, judge(draws), draws.mean(0)))
    lines = findings_of(unknown)
    assert lines[0] == "200 signed draws on 200 batches; not to be trusted at the lengths 3 to 51"
    assert "for all that is known without exact sums, paths are so aligned" in lines[1] and len(lines) == 2
    counts = np.array([float(comb(54, k)) for k in range(55)])
    aligned = Found(54, signed=Signed(200, judge(draws, counts), draws.mean(0)))
    assert "lengths 3 to 51: the paths are so aligned" in findings_of(aligned)[1]
    apart = Found(54, signed=Signed(200, judge(draws, 0.1 * counts), draws.mean(0)))
    assert findings_of(apart) == ["200 signed draws on 200 batches"]
