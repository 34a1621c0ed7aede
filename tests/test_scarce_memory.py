"""Routings are cut into chunks that an engine takes, and into smaller ones where a GPU's memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.cases import SMALL
from torch import Tensor, nn

import pathnet
from pathnet import engines
from pathnet.engines.engine import Job
from pathnet.engines.reference import ReferenceEngine, ReferencePrepared, ReferenceWalk
from pathnet.scaling import ScaledGradient

CASE = SMALL[1]
CODES = pathnet.paths.enumerate_all(6)[::5]


class Scarce(ReferenceEngine):
    """An engine that has room for ``room`` routings at a time."""

    name = "scarce"
    walk: type[ScarceWalk]

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, list[int]()

    def take(self, routing: Tensor) -> None:
        self.tried.append(len(routing))
        if len(routing) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def prepare(self, job: Job) -> ReferencePrepared:
        return ScarcePrepared(super().prepare(job).blocks, self)


@dataclass(frozen=True)
class ScarcePrepared(ReferencePrepared):
    engine: Scarce

    def record(self, y0: Tensor) -> tuple[Tensor, ReferenceWalk]:
        y, walk = super().record(y0)
        return y, self.engine.walk(walk.blocks, walk.tensors, walk.output_bytes, self.engine)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        self.engine.take(routing)
        return super().routed_forward(y0, routing)


@dataclass(frozen=True)
class ScarceWalk(ReferenceWalk):
    engine: Scarce

    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        self.engine.take(routing)
        return super().routed_backward(start, routing)


class ScarceNormsWalk(ScarceWalk):
    """A walk with norms of its own, whose allocations the engine does not see."""

    def norms(self, start: ScaledGradient, routing: Tensor) -> Tensor:
        self.engine.take(routing)
        return ReferenceWalk(self.blocks, self.tensors, self.output_bytes).norms(start, routing)


Scarce.walk = ScarceWalk


class ScarceNorms(Scarce):
    walk = ScarceNormsWalk


QUESTIONS: list[Callable[[pathnet.Recorder, pathnet.Tape], Tensor]] = [
    lambda _, tape: tape.path_gradients(CODES),
    lambda _, tape: tape.path_gradient_norms(CODES),
    lambda _, tape: tape.path_gradient_norms(CODES, per_sample=True),
    lambda recorder, _: recorder.routed_outputs(CASE.images()[0], pathnet.paths.routing(CODES)),
]


@pytest.mark.parametrize("kind", [Scarce, ScarceNorms])
@pytest.mark.parametrize("ask", QUESTIONS)
def test_where_memory_runs_out_the_work_is_split(
    ask: Callable[[pathnet.Recorder, pathnet.Tape], Tensor], kind: type[Scarce], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, engine = [], kind(100)
    monkeypatch.setattr(engines, "ENGINES", (engine,))
    recorder = pathnet.Recorder(CASE.net(), "batch")
    tape = recorder(*CASE.images())
    for room, expected in ((100, [13]), (3, [13, 6, 3, 3, 3, 3, 1]), (1, [13, 6, 3] + 13 * [1])):
        engine.room, engine.tried = room, []
        results.append(ask(recorder, tape))
        assert engine.tried == expected
    assert all(torch.equal(result, results[0]) for result in results)
    engine.room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        ask(recorder, tape)


@pytest.mark.parametrize("ask", QUESTIONS)
def test_an_engine_gets_no_more_routings_at_once_than_it_takes(
    ask: Callable[[pathnet.Recorder, pathnet.Tape], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScarceNorms(100)
    monkeypatch.setattr(engines, "ENGINES", (engine,))
    recorder = pathnet.Recorder(CASE.net(), "batch")
    tape = recorder(*CASE.images())
    whole = ask(recorder, tape)
    assert engine.tried == [13]
    monkeypatch.setattr(ScarceNormsWalk, "max_routings", lambda walk: 5)
    monkeypatch.setattr(ScarcePrepared, "max_routings", lambda prepared, y0: 5)
    engine.tried = []
    assert torch.equal(ask(recorder, tape), whole)
    assert engine.tried == [5, 5, 3]


def test_a_stem_without_room_is_no_wrong_shape() -> None:
    class Full(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    net = CASE.net()
    net.stem = Full()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pathnet.record(net, *CASE.images())
