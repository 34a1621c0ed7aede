"""Few reads of a GPU's values: each would wait for all work launched before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.cases import SMALL
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pathnet
from pathnet import engines, native
from pathnet.engines.engine import Job
from pathnet.engines.reference import ReferenceEngine, ReferencePrepared, ReferenceWalk
from pathnet.recording import ValueCheck, cross_entropy
from pathnet.scaling import ScaledGradient
from pathnet.walks import Record

CASE = SMALL[1]
CODES = pathnet.paths.enumerate_all(6)[::5]
needs_native = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


class Looks(TorchFunctionMode):
    """Counts the calls that bring the values of tensors to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu", "nonzero", "__array__"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Counts single values that are read: ``item``, ``bool``, ``float`` and the like; and shapes that are values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def looks(call: Callable[[], Any]) -> dict[str, int]:
    with Looks() as values, Scalars() as scalars:
        call()
    return dict(values.seen + scalars.seen)


def test_the_count_sees_them() -> None:
    x = torch.ones(2)
    assert looks(lambda: x.sum().item()) == looks(lambda: bool(x.sum())) == {"_local_scalar_dense": 1}
    assert looks(lambda: float(x.sum()) if (x > 0).all() else 0) == {"_local_scalar_dense": 2}
    assert looks(lambda: x.tolist()) == {"tolist": 1}
    assert looks(lambda: x.argmax() + 1) == {}


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("at", ["y0", "image", "stem_weight"])
@pytest.mark.parametrize("loss", [cross_entropy, lambda output, target: output.square().mean()])
def test_a_recording_looks_once(bn: Any, at: Any, loss: Any) -> None:
    recorder, (images, labels) = pathnet.Recorder(CASE.net(), bn, "reference", at=at, loss=loss), CASE.images()
    recorder(images, labels)
    assert looks(lambda: recorder(images, labels)) == {"tolist": 1}


@needs_native
def test_a_recording_by_the_cpu_engine_looks_once() -> None:
    recorder, (images, labels) = pathnet.Recorder(CASE.net(), engine="cpu"), CASE.images()
    recorder(images, labels)
    assert looks(lambda: recorder(images, labels)) == {"tolist": 1}


class Unsettled:
    """A tape whose values are not checked yet, as on a GPU; ``events`` lists walks and checks in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, settle: Callable[[Record], Record]) -> None:
        whole = pathnet.record(CASE.net(), *CASE.images(), engine="reference")
        self.events: list[str] = []
        walk, sums = ReferenceWalk.routed_backward, ReferenceWalk.sums_by_length

        def noting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*arguments: Any) -> Any:
                self.events.append(name)
                return work(*arguments)

            return noted

        monkeypatch.setattr(ReferenceWalk, "routed_backward", noting("walk", walk))
        monkeypatch.setattr(ReferenceWalk, "sums_by_length", noting("walk", sums))
        looking = noting("look", lambda: settle(whole._record))
        self.whole, self.tape = whole, pathnet.Tape(whole._record, whole._place, looking)


ASKING: list[Callable[[pathnet.Tape], Any]] = [
    lambda tape: tape.path_gradient_norms(CODES),
    lambda tape: tape.path_gradients(CODES),
    lambda tape: tape.gradient(),
    lambda tape: tape.gradient_by_length(),
    lambda tape: tape.squared_norms_by_length(1),
]


@pytest.mark.parametrize("ask", ASKING)
def test_walks_are_asked_for_before_the_values_are_looked_at(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unsettled = Unsettled(monkeypatch, lambda record: record)
    assert unsettled.tape.n == 6 and unsettled.tape.nbytes > 0 and not unsettled.events
    result = ask(unsettled.tape)
    assert unsettled.events.index("look") >= 1 and unsettled.events.count("look") == 1
    assert torch.equal(result, ask(unsettled.whole))
    assert unsettled.tape.loss == unsettled.whole.loss and unsettled.events.count("look") == 1


def doubled(start: ScaledGradient) -> ScaledGradient:
    return start._replace(mantissa=start.mantissa * 2)


@pytest.mark.parametrize("ask", ASKING)
def test_a_gradient_that_is_taken_anew_is_walked_anew(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unsettled = Unsettled(monkeypatch, lambda record: replace(record, start=doubled(record.start)))
    first, second = ask(unsettled.tape), ask(unsettled.tape)
    assert torch.equal(first, second) and not torch.equal(first, ask(unsettled.whole))


@pytest.mark.parametrize("ask", [*ASKING, lambda tape: tape.loss, lambda tape: tape.output])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_wrong_with_the_values_is_told_instead_of_a_result(
    fails: bool, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expect this every time, and instead of an error that the values led to."""

    def refuse(record: Record) -> Record:
        raise ValueError("images: expected finite values, got NaN or infinity")

    unsettled = Unsettled(monkeypatch, refuse)
    if fails:
        for name in ("routed_backward", "sums_by_length"):
            monkeypatch.setattr(ReferenceWalk, name, lambda *_: torch.zeros(1)[5])
    for _ in range(2):
        with pytest.raises(ValueError, match="images: expected finite values"):
            ask(unsettled.tape)


class Elsewhere(ReferenceEngine):
    """An engine for a device without values, ``meta``: a read of a value, or a mix with another device, fails."""

    name = "elsewhere"

    def prepare(self, job: Job) -> ReferencePrepared:
        return ElsewherePrepared(super().prepare(job).blocks)


class ElsewhereWalk(ReferenceWalk):
    def routed_backward(self, start: ScaledGradient, routing: Tensor) -> ScaledGradient:
        grad, exponent = start
        assert routing.device.type == "cpu" and routing.dtype == grad.dtype
        routing = routing.to(grad.device)
        grads = grad.new_ones(len(routing), *self.tensors[0].shape) * routing.sum((1, 2))[:, None, None, None, None]
        return ScaledGradient(grads, exponent.expand(len(routing), *exponent.shape))


class ElsewherePrepared(ReferencePrepared):
    def record(self, y0: Tensor) -> tuple[Tensor, ReferenceWalk]:
        y, walk = super().record(y0)
        return y, ElsewhereWalk(walk.blocks, walk.tensors, walk.output_bytes)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        y = y0
        for block in self.blocks:
            y = block(y)
        return y * routing.to(y0.device).sum((1, 2))[:, None, None, None, None]


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("at", ["y0", "image", "stem_weight"])
def test_walks_of_codes_in_the_hosts_memory_never_look(at: Any, bn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", (Elsewhere(),))
    net, (images, labels) = CASE.net().to("meta"), (tensor.to("meta") for tensor in CASE.images())
    recorder = pathnet.Recorder(net, bn, at=at)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta"):
        recorder(images, labels)
    monkeypatch.setattr(ValueCheck, "result", lambda _: (1.0, 1.0))
    tape = recorder(images, labels)
    for per_sample in (False, True):
        norms = tape.path_gradient_norms(CODES, per_sample)
        assert norms.device.type == "meta" and norms.dtype == torch.float64
        assert norms.shape == ((13, 3) if per_sample else (13,))
    assert tape.path_gradients(CODES).device.type == "meta"
    assert [tensor.device.type for tensor in tape.path_gradients(CODES, scaled=True)] == ["meta", "meta"]
    assert tape.gradient().device.type == "meta"
