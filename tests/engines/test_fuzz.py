"""Every public function and constructor, one argument at a time of a wrong kind or range: it returns, or refuses the
argument by its name.

``PATHNET_FUZZ=5000`` runs another, independent round of 5000 calls, seeded by ``PATHNET_FUZZ_SEED``; ``-s`` shows
the counts of its outcomes.
"""

from __future__ import annotations

import inspect
import os
import random
import re
import resource
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.public_calls import calls
from helpers.valid_arguments import (
    folder_of_images,
    measured_run,
    recorded_depths,
    saved_weights,
)
from helpers.wrong_values import CHANGES, TENSORS, VALUES, wrong
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import pathnet
from pathnet import (
    data,
    effective_depth,
    engines,
    lesion,
    models,
    nn,
    paths,
    progress,
    signed,
    study,
    training,
)
from pathnet.experiments import path_gradients
from pathnet.experiments.plans import Plan

# Warnings of PyTorch about the tensors that are wrong on purpose.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begin}:UserWarning")
    for begin in ("The PyTorch API of nested tensors", "Sparse CSR tensor support", "torch.quantize_per_tensor")
]


EXAMPLES = 2000
SECONDS = 20
GIGABYTES = 1.0
SUBMODULES = (data, effective_depth, engines, lesion, models, nn, paths, progress, training, signed)
METHODS = {
    pathnet.Recorder: ("__call__", "routed_outputs", "engine_for"),
    pathnet.Tape: (
        *("path_gradient_norms", "path_gradients", "routed_gradients", "gradient_by_length"),
        "squared_norms_by_length",
    ),
    pathnet.EffectiveDepth: ("__call__",),
    training.Recipe: ("rate",),
    lesion.Ranking: ("order", "agreement"),
    data.InMemory: ("take",),
    data.OnDisk: ("take",),
}


RESULTS = {
    *(pathnet.AdaptedNet, pathnet.LengthSums, pathnet.Tape, effective_depth.Depth, lesion.Errors, lesion.Ranking),
    *(training.Epoch, signed.Judgement, models.FusedForm, models.PostActivationForm, models.Unit, models.Block),
    *(data.Images, engines.Engine, engines.Prepared, engines.Walk, pathnet.ScaledGradient, nn.FusedNet),
}
"""Classes that the library itself constructs, and interfaces: no caller passes values to their constructors."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, where names that count as files do no harm."""
    monkeypatch.chdir(tmp_path_factory.mktemp("fuzz"))
    for each in (saved_weights, recorded_depths, folder_of_images, measured_run):
        each.cache_clear()
        each()


def test_every_public_callable_is_fuzzed_in_all_its_parameters() -> None:
    public = {
        value
        for module in (pathnet, *SUBMODULES)
        for value in (getattr(module, name) for name in module.__all__ if not name.startswith("check_"))
        if callable(value) and not isinstance(value, type(os)) and value not in RESULTS
    }
    public |= {Plan, path_gradients.PathGradients, study.Study}
    covered = {getattr(call.function, "__func__", call.function) for call in calls().values()}
    methods = {getattr(owner, name) for owner, names in METHODS.items() for name in names}
    typing_forms = {value for value in public if getattr(value, "__origin__", None) is not None}
    aliases = {lesion.BatchNormPolicy}
    assert public - covered - typing_forms - aliases == set()
    assert methods - covered == set()
    for name, call in calls().items():
        parameters = inspect.signature(call.function).parameters
        assert set(parameters) == set(call.valid), name


def test_calls_as_they_are_meant_to_be_return() -> None:
    for name, call in calls().items():
        if name == "cifar10":  # its files are large
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.function(**{key: make() for key, make in call.valid.items()})


class Hung(BaseException):
    """An exception that the library does not catch."""


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hung(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(name: str, argument: str, value_name: str) -> str | None:
    """Return one of `FINE`, or the failure; None where the argument has no such wrong value."""
    call = calls()[name]
    arguments = {key: make() for key, make in call.valid.items()}
    try:
        value = arguments[argument] = wrong(value_name, arguments[argument])
    except (KeyError, RuntimeError, TypeError, IndexError):
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings(), _in_time():
            warnings.simplefilter("ignore")
            result = call.function(**arguments)
    except (ValueError, TypeError) as error:
        names = (argument, *call.parts.get(argument, ()))
        if any(re.match(rf"{re.escape(each)}\b", str(error)) for each in names):
            return "refused"
        if callable(value) and argument in FUNCTIONS:
            return "the caller's own error"
        return f"{type(error).__name__} that does not begin with {argument}: {str(error)[:200]}"
    except OSError as error:
        if isinstance(value, str | Path) and argument in FILES:
            return "no such file"
        return f"{type(error).__name__}: {str(error)[:200]}"
    except (Exception, Hung) as error:
        if callable(value) and argument in FUNCTIONS:
            return "the caller's own error"
        return f"{type(error).__name__}: {str(error)[:200]}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    if grown > GIGABYTES:
        return f"took {grown:.1f} GB"
    if "norm" in name and isinstance(result, Tensor) and not torch.isfinite(result).all():
        return "gave norms that are not finite"
    return "returned"


FUNCTIONS = ("loss", "progress", "callback", "reporter", "model", "stem", "head")
"""Arguments that the library calls, and that may raise errors of their own."""


FILES = ("path", "folder", "checkpoint", "out", "file")
FINE = ("returned", "refused", "no such file", "the caller's own error")


@cache
def _wrong_values(name: str, argument: str) -> st.SearchStrategy[str]:
    """Return a strategy for names of wrong values, with each kind that applies to the argument equally often."""
    valid = calls()[name].valid[argument]()
    tensors = [each for each in VALUES if each in TENSORS]
    kinds = [[each for each in VALUES if each not in TENSORS], tensors]
    if isinstance(valid, Tensor):
        kinds.append(list(CHANGES))
    if isinstance(valid, list | tuple) and valid:
        last = [*VALUES, *(CHANGES if isinstance(valid[-1], Tensor) else ())]
        kinds.append([f"inside:{each}" for each in last])
    return st.one_of(*map(st.sampled_from, kinds))


def _cases() -> st.SearchStrategy[tuple[str, str, str]]:
    arguments = [(name, key) for name, call in calls().items() for key in call.valid]
    return st.sampled_from(arguments).flatmap(
        lambda case: st.tuples(st.just(case[0]), st.just(case[1]), _wrong_values(*case))
    )


def _round(examples: int, number: int | None = None) -> tuple[Counter[str], dict[str, str]]:
    """Run ``examples`` calls; return the counts of outcomes, and the failures. Without a number it repeats itself."""
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}

    @settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_cases())
    def one(case: tuple[str, str, str]) -> None:
        end = outcome(*case)
        if end is not None:
            counts[end if end in FINE else end.split(":")[0]] += 1
            if end not in FINE:
                failures[" | ".join(case)] = end

    (one if number is None else seed(number)(one))()
    return counts, failures


def _listed(failures: Mapping[str, str]) -> str:
    return "\n".join(f"{case}: {end}" for case, end in sorted(failures.items()))


def test_wrong_arguments_are_refused_by_their_names() -> None:
    counts, failures = _round(EXAMPLES)
    assert not failures, _listed(failures)
    assert counts.total() > 0.8 * EXAMPLES and counts["refused"] > counts["returned"] > 0


@pytest.mark.skipif("PATHNET_FUZZ" not in os.environ, reason="needs PATHNET_FUZZ, a number of calls")
def test_another_round_of_wrong_arguments_is_refused() -> None:
    number = int(os.environ.get("PATHNET_FUZZ_SEED", random.randrange(2**32)))
    counts, failures = _round(int(os.environ["PATHNET_FUZZ"]), number)
    print(f"seed {number}")
    for end, count in counts.most_common():
        print(f"{count:8} {end}")
    assert not failures, f"seed {number}\n{_listed(failures)}"
