"""Figures from arrays that somebody measured: the same pixels as from the run, and refusals that name the array."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pytest
import torch
from helpers.runs import IMAGES, gradient_run, one_of_each
from matplotlib.figure import Figure
from numpy.typing import NDArray

import pathnet
from pathnet import figures, results
from pathnet.effective_depth import Depth, read
from pathnet.effective_depth.rows import HEADER
from pathnet.experiments import highway, lesion_single, remaining_paths
from pathnet.experiments.by_length import ExactSum, SignedDraw
from pathnet.experiments.comparison import compare
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Value
from pathnet.figures import sources
from pathnet.results import Run


def pixels(figure: Figure) -> NDArray[np.uint8]:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba()).copy()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("study")
    by_name = {run.experiment: run for run in one_of_each(folder)}
    net = pathnet.models.preact_resnet(depth=8, width=4, num_classes=2, in_channels=1)
    data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
    for method, draws in (("sampled", 1), ("exact", 1), ("signed", 3)):
        plan = pathnet.experiments.PathGradients(batches=12, batch_size=8, method=method, draws=draws)
        by_name["all methods"] = pathnet.measure(net, data, plan, folder / "all methods")
    return by_name


def columns(rows: list[Any], *names: str) -> dict[str, NDArray[Any]]:
    return {name: np.array([getattr(row, name) for row in rows]) for name in names}


def sampled(run: Run) -> dict[str, Any]:
    measured = run.measurements()
    shuffled = np.random.default_rng(0).permutation(len(measured))
    return {
        "length": torch.tensor(measured.length[shuffled]),
        "norm": torch.tensor(measured.norm[shuffled], requires_grad=True),
        "batch": measured.batch[shuffled].tolist(),
    }


def plain(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(torch.as_tensor(values).detach()) for name, values in arrays.items()}


def every_method(run: Run) -> dict[str, Any]:
    names = ("batch", "length", "norm", "full_norm", "next_cosine", "full_cosine", "share", "left")
    exact = columns(run.rows(ExactSum), *names)
    signed = columns(run.rows(SignedDraw), "batch", "draw", "length", "squared_norm")
    return {**sampled(run), "exact": polars.DataFrame(exact), "signed": signed}


def rates(run: Run, kind: str) -> dict[str, Any]:
    rows = [row for row in run.rows(ErrorCount) if row.network == kind]
    seeds = sorted({row.seed for row in rows})
    deleted = [[row.wrong for row in rows if row.seed == seed and row.size] for seed in seeds]
    intact = [row.rate for row in rows if not row.size]
    downsampling = run.fact("networks", kind, 0, "downsampling")
    arrays = {"wrong": deleted, "images": IMAGES, "intact": intact, "downsampling": downsampling, "chance": 0.9}
    return {**arrays, "first": 1} if kind == "vgg" else arrays


def singles(run: Run) -> dict[str, Any]:
    return {kind: rates(run, kind) for kind in run.fact("networks")}


def stochastic(run: Run) -> dict[str, Any]:
    survival = run.fact("networks", "stochastic depth", 0, "survival")
    return {"deletions": singles(run), "survival": torch.tensor(survival, dtype=torch.float64)}


def lesioned(run: Run) -> dict[str, Any]:
    rows = [row for row in run.rows(ErrorCount) if row.size]
    intact = next(row.rate for row in run.rows(ErrorCount) if not row.size)
    arrays = columns(rows, "size", "rate", "seed")
    return {**arrays, "intact": intact, "chance": 0.9, "blocks": run.fact("networks", "residual", 0, "blocks")}


def reordered(run: Run) -> dict[str, Any]:
    rows = [row for row in run.rows(ErrorCount) if row.size]
    return {**lesioned(run), "order": [row.order for row in rows]}


def remaining(run: Run) -> dict[str, Any]:
    values = {(row.quantity, row.index): row.value for row in run.rows(Value)}
    names = [f"left of 2000 with {number} deleted" for number in (1, 10, 20)]
    drawn = np.array([[values[name, length] for length in range(55)] for name in names]) / 2000
    return {"blocks": 54, "deleted": (1, 10, 20), "drawn": torch.tensor(drawn)}


def effective(run: Run) -> dict[str, Any]:
    rows = run.rows(ErrorCount)
    full = [row.rate for row in rows if row.network == "residual"]
    tests = {
        "as it is": [
            row.rate for row in rows if row.network == "effective" and row.bn == "running" and row.scale == 1
        ],
        "scaled by k/n": [row.rate for row in rows if row.scale == 0.5],
        "recalibrated": [row.rate for row in rows if row.bn == "recalibrated"],
    }
    return {"modules": 2, "blocks": 4, "full": full, "effective": tests}


def gated(run: Run) -> dict[str, Any]:
    def table(quantity: str) -> list[list[float]]:
        rows = [row for row in run.rows(Value) if row.quantity == quantity]
        keys = sorted({(row.seed, row.batch) for row in rows})
        return [[row.value for row in rows if (row.seed, row.batch) == key] for key in keys]

    names = {"openness": highway.OPENNESS, "bias": highway.BIAS, "path_norms": highway.PATH_NORM}
    arrays = {name: table(quantity) for name, quantity in (names | {p: p for p in highway.PARTS}).items()}
    return {**arrays, "deletions": singles(run)}


FIGURES: list[tuple[str, Callable[..., Any], Callable[[Run], Any]]] = [
    ("all methods", figures.figure_6, every_method),
    ("all methods", figures.figure_sums, every_method),
    ("path-gradients", figures.figure_6, lambda run: pandas.DataFrame(plain(sampled(run)))),
    ("lesion-single", figures.figure_3, singles),
    ("lesion-many", figures.figure_5a, lambda run: polars.DataFrame(lesioned(run))),
    ("lesion-reorder", figures.figure_5b, reordered),
    ("remaining-paths", figures.figure_7, remaining),
    ("lesion-stochastic-depth", figures.figure_8, stochastic),
    ("effective-training", figures.figure_effective, effective),
    ("highway", figures.figure_highway, gated),
]


@pytest.mark.parametrize(("name", "draw", "arrays"), FIGURES, ids=lambda value: getattr(value, "__name__", None))
def test_the_arrays_of_a_run_are_drawn_as_the_run_is(
    runs: dict[str, Run], name: str, draw: Callable[..., Any], arrays: Callable[[Run], Any]
) -> None:
    by_run, by_folder, by_arrays = (draw(form, "t") for form in (runs[name], runs[name].folder, arrays(runs[name])))
    expected = pixels(by_run)
    assert (pixels(by_arrays) == expected).all() and (expected < 200).any()
    assert by_folder.get_suptitle() == by_run.get_suptitle()


def test_a_heading_is_that_of_the_run_unless_the_caller_has_another(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["lesion-single"]
    assert figures.figure_3(run).get_suptitle().startswith("made up; residual, depth 14")
    assert figures.figure_3(run, "mine").get_suptitle() == "mine"
    assert figures.figure_3(lesion_single.summarise(run)).get_suptitle() == "single blocks deleted"
    files = figures.figure_3(run, path_stem=tmp_path / "figure")
    assert files == [tmp_path / "figure.png", tmp_path / "figure.svg"] and all(file.stat().st_size for file in files)


def test_several_measurements_of_a_length_on_a_batch_all_count() -> None:
    rng = np.random.default_rng(1)
    norm, length = rng.lognormal(size=720), np.tile(np.repeat([1, 2, 3], [3, 5, 4]), 60)
    batch = np.repeat(np.arange(20), 36)

    summary = sources.comparison_of({"length": length, "norm": norm, "batch": batch}).sampled
    assert summary is not None and (summary.measurements, summary.batches) == (720, 20)
    for k in (1, 2, 3):
        of_length = norm[length == k]
        assert summary.count[k - 1] == len(of_length)
        assert summary.mean[k - 1] == pytest.approx(of_length.mean())
        assert summary.std[k - 1] == pytest.approx(of_length.std(ddof=1))
        assert summary.quantile_95[k - 1] == pytest.approx(np.quantile(of_length, 0.95))
    # Batches are resampled whole: norms that are equal within a batch are no further evidence.
    level = rng.lognormal(size=20)
    once = sources.comparison_of({"length": [1] * 20, "norm": level, "batch": np.arange(20)}).sampled
    often = sources.comparison_of(
        {"length": [1] * 100, "norm": np.repeat(level, 5), "batch": np.repeat(np.arange(20), 5)}
    )
    assert once is not None and often.sampled is not None
    assert [often.sampled.low[0], often.sampled.high[0]] == pytest.approx([once.low[0], once.high[0]])


def test_repeated_measurements_are_compared_with_exact_sums(runs: dict[str, Run]) -> None:
    arrays = every_method(runs["all methods"])
    twice = {
        name: np.concatenate([torch.as_tensor(arrays[name]).detach().numpy()] * 2)
        for name in ("length", "norm", "batch")
    }

    once, doubled = (sources.comparison_of({**arrays, **changed}) for changed in ({}, twice))
    assert once.cancelling is not None and doubled.cancelling is not None
    np.testing.assert_allclose(doubled.cancelling.mean, once.cancelling.mean, rtol=1e-12)
    assert doubled.cost is not None and doubled.cost.batches == 12


def test_length_sums_of_a_tape_are_exact_sums() -> None:
    torch.manual_seed(0)
    net = pathnet.models.preact_resnet(depth=8, width=4, num_classes=2, in_channels=1)
    data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
    sums = [pathnet.record(net, *data.random_batch(8, 0, batch)).compare_lengths() for batch in range(3)]
    figure = figures.figure_sums(sums)
    assert figure.get_suptitle() == "exact sums on 3 batches"
    explained = {line.get_label(): line.get_ydata() for line in figure.axes[2].get_lines()}
    expected = torch.stack([each.explained for each in sums]).mean(0)
    np.testing.assert_allclose(explained["share explained"], expected, rtol=1e-12)
    assert figures.figure_sums(sums[0]).get_suptitle() == "exact sums on 1 batch"


def test_depths_are_drawn_from_their_file_their_rows_and_their_columns(tmp_path: Path) -> None:
    rows = [Depth(0, 3.6, 1, 6, 4, 0.79, 0.03), Depth(100, 2.9, 1, 5, -1, 0.21, 0.03)]
    file = tmp_path / "depth.csv"
    file.write_text(
        "".join(f"{','.join(map(str, row))}\n" for row in [HEADER, *(vars(row).values() for row in rows)])
    )
    assert read(file) == rows
    arrays = {name: torch.tensor([getattr(row, name) for row in rows]) for name in HEADER}
    drawn = [pixels(figures.figure_depth(form)) for form in (rows, file, arrays)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] == drawn[2]).all()


@pytest.mark.filterwarnings("error")
def test_what_is_optional_is_left_out() -> None:
    labels = {line.get_label() for line in figures.figure_3({"mine": torch.tensor([0.1, 0.3])}).axes[0].get_lines()}
    assert labels == {"mine"}
    many = figures.figure_5a({"size": [1, 2], "rate": [0.1, 0.2], "blocks": 3})
    assert not {"chance", "no lesion", "no block deleted"} & {
        line.get_label() for axes in many.axes for line in axes.get_lines()
    }
    swaps = {"tau": [0.9, 0.5], "rate": [0.1, 0.2]}
    assert figures.figure_5b(swaps).get_suptitle() == "2 draws"
    assert figures.figure_5b({**swaps, "size": [1, 4]}, "t").get_suptitle() == "t: 1 draw per size, 1 to 4 swaps"
    lines = figures.figure_7({"blocks": 5, "deleted": 2}).axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["2 deleted (equation 8)"]
    np.testing.assert_allclose(lines[0].get_ydata(), [1, 3 / 5, 3 / 10, 1 / 10, 0, 0])


@pytest.mark.parametrize("frame", [pandas.DataFrame, polars.DataFrame])
def test_columns_of_a_frame_are_kinds_and_a_column_may_hold_a_single_value(frame: Callable[[Any], Any]) -> None:
    kinds = {"plain": [0.1, 0.3], "stochastic depth": [0.1, 0.2]}
    pairs = [
        (figures.figure_3, kinds, frame(kinds)),
        (figures.figure_8, {"deletions": kinds, "survival": [0.9, 0.5]}, None),
        (figures.figure_effective, {"modules": 1, "blocks": 2, "full": [0.1, 0.2], "effective": kinds}, None),
    ]
    for draw, by_name, table in pairs:
        inner = {name: frame(value) if value is kinds else value for name, value in by_name.items()}
        assert (pixels(draw(inner if table is None else table)) == pixels(draw(by_name))).all()
    single = {"rate": [0.1, 0.3], "intact": [0.05] * 2, "images": [100] * 2, "chance": [0.9] * 2}
    first = {name: value if name == "rate" else value[0] for name, value in single.items()}
    assert (pixels(figures.figure_3({"mine": frame(single)})) == pixels(figures.figure_3({"mine": first}))).all()
    sizes = {"size": [1, 2], "rate": [0.1, 0.2], "blocks": [3, 3]}
    assert (pixels(figures.figure_5a(frame(sizes))) == pixels(figures.figure_5a({**sizes, "blocks": 3}))).all()


def test_a_run_of_another_experiment_is_refused(tmp_path: Path) -> None:
    run = gradient_run(tmp_path / "run", np.ones((2, 3)))
    with pytest.raises(
        ValueError, match=r"^results: expected a run of remaining-paths, got one of path-gradients \(.*\)$"
    ):
        figures.figure_7(run)
    assert compare(results.read(run.folder)).n == 3 and remaining_paths.NAME == "remaining-paths"
