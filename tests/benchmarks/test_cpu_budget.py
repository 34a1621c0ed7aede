"""The run on a processor keeps its time limit on machines of any speed, and records its cuts."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_cpu_benchmarks import QUICK

from benchmarks.cpu import field as fields
from benchmarks.cpu import steps
from benchmarks.cpu.budget import Budget, LeftOut
from benchmarks.cpu.cases import FULL, MINUTES, Sizes, with_batch
from benchmarks.cpu.competitors import BUILDERS, Checked, Competitor, Key
from benchmarks.cpu.field import Field, fitting_sizes
from benchmarks.cpu.report import show
from benchmarks.cpu.run import Run, measure
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

SECONDS = 60 * MINUTES
LOOP_S = 0.06
"""Seconds an image of one path of the loop on a machine on which a whole run fits: some 8 s for a batch of 128."""


class Clock:
    """A clock that advances only by `work`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        """Return a work that takes ``seconds`` seconds."""

        def pass_() -> None:
            self.now += seconds

        return pass_


@pytest.fixture
def clock() -> Clock:
    return Clock()


# Rounds


@pytest.mark.parametrize(("seconds", "rounds"), [(18.0, 5), (15.0, 4), (12.0, 3), (11.0, None), (1.0, None)], ids=str)
def test_there_are_as_many_rounds_as_fit_between_the_fewest_and_those_wanted(
    clock: Clock, seconds: float, rounds: int | None
) -> None:
    budget = Budget(seconds, clock, "sweep")
    works = {"a": clock.work(1), "b": clock.work(2)}
    if rounds is None:
        with pytest.raises(LeftOut, match="rounds: the fewest are 3, each of them would take some"):
            budget.timed(works, 5)
        assert clock.now <= 3
        return
    timings = budget.timed(works, 5)
    assert {name: timing.seconds for name, timing in timings.items()} == {"a": [1.0] * rounds, "b": [2.0] * rounds}
    assert clock.now == 3 * (rounds + 1) <= seconds
    because = {"step": "sweep", "what": "rounds", "wanted": 5, "kept": rounds, "because": "one takes some 3 s"}
    assert budget.cuts == ([] if rounds == 5 else [because])


def test_the_first_work_that_is_too_slow_ends_the_comparison(clock: Clock) -> None:
    budget = Budget(100, clock)
    with pytest.raises(LeftOut):
        budget.timed({"slow": clock.work(40), "slower": clock.work(4000)}, 5)
    assert clock.now == 40


def test_a_single_round_needs_no_other_before_it(clock: Clock) -> None:
    assert Budget(5, clock).timed({"long": clock.work(4)}, 1)["long"].seconds == [4.0]
    assert clock.now == 4


def test_the_fewest_rounds_once_begun_may_take_what_is_left_of_the_whole(clock: Clock) -> None:
    durations = iter([1.0, 3.0, 3.0, 3.0, 3.0])

    def slowing() -> None:
        clock.now += next(durations)

    whole = Budget(100, clock)
    assert whole.share(1 / 10).timed({"slowing": slowing}, 5)["slowing"].seconds == [3.0, 3.0, 3.0]
    with pytest.raises(LeftOut, match="1 were taken when the time was over; the fewest are 3"):
        durations = iter([1.0, 7.0])
        Budget(10, clock).timed({"slowing": slowing}, 5)


def test_every_second_round_goes_backwards(clock: Clock) -> None:
    order: list[str] = []
    Budget(clock=clock).timed({name: lambda name=name: order.append(name) for name in "ab"}, 3)  # type: ignore[misc]
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_what_a_step_leaves_goes_to_those_after_it(clock: Clock) -> None:
    whole = Budget(100, clock)
    first = whole.share(1 / 4, "first")
    clock.work(10)()
    assert (first.seconds, first.left) == (25, 15)
    assert whole.share(1 / 3, "second").seconds == 30 and whole.share(1).step == ""


# Sizes


@pytest.mark.parametrize(("slowness", "images"), [(1, 128), (5, 16), (50, 8)])
def test_batches_are_cut_where_a_run_would_not_fit(clock: Clock, slowness: int, images: int) -> None:
    budget = Budget(SECONDS, clock)
    sizes = fitting_sizes(FULL, slowness * LOOP_S, budget)
    assert sizes.setup.batch == images and sizes.compiled == (slowness == 1)
    cuts = {cut["what"]: (cut["wanted"], cut["kept"]) for cut in budget.cuts}
    batches = {"images of a batch, and all other batches in proportion": (128, images)}
    assert cuts == ({} if images == 128 else batches | {"torch.compile in the composition": (True, False)})


def test_all_batches_are_cut_in_proportion() -> None:
    sizes = with_batch(FULL, 16)
    assert (sizes.setup.batch, sizes.fit_batch, sizes.batches) == (16, 2, (2, 4, 8, 16))
    assert [images for _, _, images in sizes.sums] == [4, 4, 16, 16, 4]
    assert with_batch(FULL, 128) == FULL


# Whole runs

COSTS = {
    "checks": 30.0,
    "lengths": 45.0,
    "sweep": 3.0,
    "peak_share": 4.0,
    "fits": 12.0,
    "memory": 5.0,
    "deletions": 8.0,
    "sharing": 20.0,
    "sums": 35.0,
    "training": 6.0,
    "models": 12.0,
}
"""A round of each step's comparisons, in seconds, on a machine on which a whole run nearly fits."""


def timing(name: str, clock: Clock, slowness: float) -> Callable[[Field], Any]:
    def step(field: Field) -> Any:
        share = field.sizes.setup.batch / FULL.setup.batch
        works = {str(i): clock.work(slowness * share * COSTS[name] / 4) for i in range(4)}
        if name == "checks":
            return {"seconds": [work() for work in works.values()]}
        timings = field.budget.timed(works, 5)
        return {"timings": {key: timing.facts() for key, timing in timings.items()}}

    return step


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Iterator[Callable[[float], None]]:
    """Return a function that sets the slowness of the machine, with steps faked."""

    def set_slowness(slowness: float) -> None:
        for name in steps.STEPS:
            monkeypatch.setitem(steps.STEPS, name, timing(name, clock, slowness))
        monkeypatch.setattr(fields, "seconds_an_image", lambda *_: slowness * LOOP_S)

    net = fields.network
    monkeypatch.setattr(fields, "network", lambda setup: net(QUICK.setup))
    monkeypatch.setattr(fields, "batch", lambda setup, **_: (None, None))
    monkeypatch.setattr("benchmarks.cpu.run.figures", lambda findings: [])
    monkeypatch.setattr("benchmarks.cpu.run.lines_by_length", lambda findings: {})
    yield set_slowness


@pytest.mark.parametrize("slowness", [0.2, 1, 5, 50])
def test_a_run_keeps_its_time_on_a_machine_of_any_speed(
    machine: Callable[[float], None], clock: Clock, tmp_path: Path, slowness: float
) -> None:
    machine(slowness)
    run = measure(FULL, tmp_path, budget=Budget(SECONDS, clock))
    results = run.results
    assert clock.now <= SECONDS and results["budget"] == {"minutes": 15.0, "taken_s": round(clock.now, 1)}
    assert results["found"].keys() | results["left_out"].keys() == steps.STEPS.keys() and not results["failed"]
    cut = {cut["step"] for cut in results["cuts"]}
    fewer = {
        name for name, step in results["found"].items() if name != "checks" and step["timings"]["0"]["rounds"] < 5
    }
    assert fewer <= cut and all(rounds_of(results, name) >= 3 for name in results["found"])
    assert not results["left_out"] or slowness == 50
    assert (cut == set() and fewer == set()) == (slowness == 0.2)
    show({**results, "found": {}}, Console(width=200, file=(file := io.StringIO())))
    text = file.getvalue()
    assert ("cut to keep within 15 minutes" in text) == (slowness > 0.2)
    for entry in results["cuts"]:
        assert f"{entry['what']}: {entry['kept']} instead of {entry['wanted']}, since {entry['because']}" in text
    for name, reason in results["left_out"].items():
        assert f"left out: {name}: {reason}" in text


def rounds_of(results: dict[str, Any], name: str) -> int:
    return 5 if name == "checks" else int(results["found"][name]["timings"]["0"]["rounds"])


def test_where_the_time_is_over_every_further_step_is_left_out(
    machine: Callable[[float], None], clock: Clock, tmp_path: Path
) -> None:
    machine(2000)
    run = measure(FULL, tmp_path, budget=Budget(SECONDS, clock))
    assert list(run.results["found"]) == ["checks"] and run.wrong is None
    assert list(run.results["left_out"]) == list(steps.STEPS)[1:]


def test_goals_are_not_judged_at_other_batches(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = {"figure": "speed", "sense": "at least", "goal": 2.0, "walks": 3.0, "counted": None, "met": True}
    monkeypatch.setattr("benchmarks.cpu.run.figures", lambda findings: [figure])
    for sizes, met in ((QUICK.setup.batch, True), (1, None)):
        run = Run(QUICK, tmp_path, budget=Budget(SECONDS, clock))
        run.field.sizes = with_batch(QUICK, sizes)
        run._save()
        assert run.results["figures"] == [{**figure, "met": met}]


# Who takes part


def test_whoever_would_take_too_long_is_not_built(clock: Clock) -> None:
    loop, slow = Key("loop", "running", "float32"), Key("composition", "running", "float32")
    builders = {key: BUILDERS[key] for key in (loop, slow)}
    field = Field(QUICK, builders, Budget(100, clock))
    field.checked = {loop: Checked(0, 0, True, 1.0), slow: Checked(0, 0, True, 50.0)}
    timed: list[int] = []

    def norm(key: Key, competitor: Competitor, length: int) -> float:
        timed.append(length)
        clock.now += 1
        field.seconds[key, length] = 1.0
        return 1.0

    field._norm = norm  # type: ignore[method-assign]
    assert list(field.competitors) == [loop] and timed == list(QUICK.setup.lengths)
    assert field.left_out == {str(slow): "to build and check it would take some 750 s, and 97 s are left for it"}
    assert [cut["what"] for cut in field.budget.cuts] == [f"competitor {slow}"] and field.refused == {}


def test_fewer_lengths_stand_for_all_where_a_round_of_them_takes_too_long(clock: Clock) -> None:
    sizes: Sizes = replace(QUICK, setup=replace(QUICK.setup, lengths=(1, 2, 3, 4, 6)))
    key = Key("loop", "running", "float32")
    for seconds, kept in ((25.0, [1, 2, 3, 4, 6]), (17.0, [1, 3, 6]), (13.0, [1, 6]), (1.0, [1, 6])):
        field = Field(sizes, {key: BUILDERS[key]}, Budget(seconds, clock, "lengths"))
        field.competitors = {key: Competitor(None, lambda paths: paths, lambda paths: paths)}
        field.seconds = {(key, length): 1.0 for length in sizes.setup.lengths}
        assert steps._kept_lengths(field) == kept
        assert [cut["kept"] for cut in field.budget.cuts] == ([] if len(kept) == 5 else [kept])
