"""Signals in the middle of a native call: each is answered within a second, and costs nothing but time."""

from __future__ import annotations

import pytest
from helpers.interrupted import result_of

from pathnet import native

ANSWERED_S = 3.0
"""Maximum delay in seconds: a tenth of a second on idle cores. Walks are sized to take four times as long."""

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_an_interrupt_ends_every_walk_at_once_and_leaves_the_recorder_as_it_was(bn: str) -> None:
    result = result_of("interrupt", bn)
    assert set(result["delays"]) >= {"norms", "sums", "outputs"}
    assert max(result["delays"].values()) < ANSWERED_S, result
    assert result["same"]


def test_a_handler_that_returns_changes_no_bit_and_walks_itself() -> None:
    result = result_of("returning")
    assert min(result["calls"]) >= 2, result
    assert result["same"]
    assert result["denormals"], "a handler computes as Python does, not as a walk"


def test_what_a_handler_raises_is_what_the_call_raises() -> None:
    result = result_of("raising")
    assert set(result["delays"]) == {"SIGALRM", "SIGTERM"}
    assert max(result["delays"].values()) < ANSWERED_S, result


def test_a_walk_in_another_thread_goes_on_while_the_main_thread_is_interrupted() -> None:
    result = result_of("elsewhere")
    assert result["alive"] and result["delay"] < ANSWERED_S, result
    assert result["same"]


def test_an_op_called_by_itself_ends_in_an_error_that_no_later_call_repeats() -> None:
    assert result_of("bare") == {"message": "interrupted by a signal", "next": "RuntimeError"}
