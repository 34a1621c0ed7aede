"""Processes that share the work of a run, here as threads with a store of their own."""

from __future__ import annotations

import time
from typing import Any

import pytest
from helpers.threads import together
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pathnet import workers
from pathnet.workers import ALONE, Workers, gone


def test_every_unit_goes_to_one_process_and_a_fast_one_takes_more() -> None:
    def work(group: Workers) -> list[int]:
        units = []
        for unit in group.share_out(60):
            units.append(unit)
            time.sleep(0.001 if group.rank == 1 else 0.01)
        return units

    units = together(3, work)
    assert sorted(unit for of_process in units for unit in of_process) == list(range(60))
    assert len(units[1]) > len(units[0]) + len(units[2])


def test_done_counts_the_units_of_all_processes_that_are_done() -> None:
    def work(group: Workers) -> int:
        for _ in group.share_out(9):
            time.sleep(0.001)
        group.gather(None)
        group.agree(lambda: None)
        before = group.done
        group.agree(lambda: None)
        assert group.rank > 0 or list(group.share_out(2)) is not None
        return before

    assert together(2, work) == [9, 9]
    units = ALONE.share_out(2)
    assert (next(units), ALONE.done, next(units), ALONE.done, list(units), ALONE.done) == (0, 0, 1, 1, [], 2)


def test_all_agree_on_what_the_first_decides() -> None:
    decided = []

    def work(group: Workers) -> Any:
        return group.agree(lambda: decided.append(group.rank) or {"units": list(range(10)), "pair": (1, None)})

    assert together(3, work) == [{"units": list(range(10)), "pair": [1, None]}] * 3 and decided == [0]


def test_a_decision_larger_than_a_value_of_the_store_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LONGEST_VALUE", 100)
    expected = [unit * 7919 % 1009 for unit in range(2000)]
    assert together(2, lambda group: group.agree(lambda: expected)) == [expected, expected]


@pytest.mark.parametrize("error", [ValueError("run: expected room"), OSError(28, "disk full")])
def test_a_refusal_of_the_first_is_raised_in_all(error: Exception) -> None:
    def refuse() -> None:
        raise error

    outcomes = together(3, lambda group: group.agree(refuse))
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(type(error), str(error))] * 3
    assert {getattr(outcome, "errno", None) for outcome in outcomes} == {getattr(error, "errno", None)}


def test_the_first_gathers_what_all_say_by_rank() -> None:
    assert together(3, lambda group: group.gather({"rank": group.rank})) == [[{"rank": r} for r in range(3)], [], []]


def test_the_first_does_not_wait_for_a_process_that_is_gone() -> None:
    def work(group: Workers) -> Any:
        if group.rank == 1:
            group.store.set(gone(1), "")  # type: ignore[union-attr]
            return "gone"
        with (
            pytest.warns(RuntimeWarning, match="process 1 of 3 is gone; what was measured is kept")
            if (group.leads)
            else pytest.MonkeyPatch.context()
        ):
            return group.gather(group.rank)

    assert together(3, work) == [[0, 2], "gone", []]


def test_what_a_process_said_before_it_was_gone_counts() -> None:
    def work(group: Workers) -> Any:
        said = group.gather(group.rank)
        group.store.set(gone(group.rank), "")  # type: ignore[union-attr]
        return said

    assert together(2, work) == [[0, 1], []]


def test_nobody_waits_for_a_first_process_that_is_gone() -> None:
    def work(group: Workers) -> Any:
        if group.leads:
            group.store.set(gone(0), "")  # type: ignore[union-attr]
            return "gone"
        return group.agree(lambda: 1)

    first, second = together(2, work)
    assert first == "gone" and isinstance(second, OSError)
    assert str(second).startswith("workers: the first process is gone; what was measured is kept")


def test_a_store_that_has_ended_is_one_line() -> None:
    class Ended(HashStore):  # type: ignore[misc]
        def add(self, key: str, number: int) -> int:
            raise RuntimeError("recvVector failed\nException raised from recvBytes")

    with pytest.raises(OSError, match="^workers: torchrun has ended; what was measured is kept"):
        next(Workers(0, 2, 0, 2, Ended()).share_out(3))


def test_one_of_all_does_what_is_done_once() -> None:
    assert sorted(together(4, lambda group: group.first_to("greet"))) == [False, False, False, True]


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    workers._torchrun.cache_clear()
    assert workers.torchrun() is ALONE and repr(ALONE) == "<Process 0 of 1>"


def test_a_restarted_group_reads_nothing_of_the_one_before() -> None:
    first = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": "2"}
    changed = [{**first, name: "7"} for name in first]
    assert len({workers.prefix(environment) for environment in [first, *changed]}) == 4
