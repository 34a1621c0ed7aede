"""A `Recorder` that another process gets, and what recorders, tapes and sums say of themselves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.cases import Case

import pathnet
from pathnet import native

CASE = Case("six", 14)
CODES = pathnet.paths.one_of_each_length(6)
ENGINES = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)),
]


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("at", ["y0", "stem_weight"])
@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_pickled_recorder_records_the_same_numbers(engine: str, bn: Any, at: Any, used: bool) -> None:
    recorder, batch = pathnet.Recorder(CASE.net(), bn, engine, at=at), CASE.images()
    if used:
        recorder(*batch)
    pickled = pickle.loads(pickle.dumps(recorder))
    expected, tape = recorder(*batch), pickled(*batch)
    assert tape.engine == engine and tape.loss == expected.loss
    assert torch.equal(tape.path_gradient_norms(CODES), expected.path_gradient_norms(CODES))
    routing = pathnet.paths.routing(CODES)
    assert torch.equal(pickled.routed_outputs(batch[0], routing), recorder.routed_outputs(batch[0], routing))


def test_recorders_and_tapes_say_what_they_are_of() -> None:
    recorder = pathnet.Recorder(CASE.net(), "batch", "reference", at="image")
    assert repr(recorder) == ("Recorder(6 blocks, bn='batch', engine='reference', precision='float32', at='image')")
    tape = recorder(*CASE.images())
    described = repr(tape)
    assert described.startswith("Tape(6 blocks, batch of 3, engine='reference', at='image', ")
    assert described.endswith(f"{tape.nbytes / 1e6:.1f} MB)")


def test_sums_by_length_say_which_length_explains_most() -> None:
    sums = pathnet.record(CASE.net(), *CASE.images(), engine="reference").compare_lengths()
    most = int(sums.share.argmax())
    assert repr(sums) == (
        f"LengthSums(lengths 0 to 6, full_norm={sums.full_norm:.3g}, "
        f"length {most} explains most ({float(sums.share[most]):.0%}))"
    )


def test_a_copied_recorder_is_the_recorder_whose_lock_its_network_needs() -> None:
    recorder = pathnet.Recorder(CASE.net())
    assert copy.copy(recorder) is recorder
    assert copy.deepcopy(recorder)._net is not recorder._net
