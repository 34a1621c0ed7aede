"""Routings, sums by length, memory and visits of the autograd engine, against the reference and by count."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.any_blocks import IMAGE_NETS, TOKEN_NETS, Parallel, image_net, of_blocks, sequences, squares
from helpers.oracles import relative_error
from helpers.routed_networks import batch
from helpers.token_nets import WIDTH
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet
from pathnet import chunks, scaling
from pathnet.engines import memory
from pathnet.engines.autograd import blocks, walk
from pathnet.models import Block, ResidualNet


def routings(n: int, parts: int = 2) -> Tensor:
    """Return routings of which several are multiples of each other, and some have zeros."""
    routing = torch.randn(12, n, parts, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    routing[1:3] = routing[:1] * torch.tensor([3.0, -0.1])[:, None, None]
    routing[3, ::2, 0] = 0
    routing[4, :, 1] = 0
    routing[5, n // 2] = 0
    routing[6, -1, 1] = 0
    routing[7:9, 1:] = routing[6, 1:]
    return routing


@pytest.mark.parametrize(("bn", "precision"), [("running", "float64"), ("batch", "float32")])
@pytest.mark.parametrize("kind", IMAGE_NETS)
def test_routings_and_sums_are_those_of_the_reference(kind: str, bn: Any, precision: Any, form: str) -> None:
    net, (images, labels) = image_net(kind, bn), batch()
    recorder = pathnet.Recorder(net, bn, "autograd", precision)
    exact = pathnet.record(net, images, labels, bn, "reference", "float64")
    tolerance = EXACT_WALK if precision == "float64" else 1e-4
    for _ in range(2):
        tape = recorder(images, labels)
        compare(tape, exact, routings(net.n, net.parts), tolerance)


@pytest.mark.parametrize("parts", [2, 3])
def test_residual_modules_in_parallel(parts: int, form: str) -> None:
    net, inputs = of_blocks([Parallel(), Parallel(), Parallel()]), sequences()
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    exact = pathnet.record(net, inputs, inputs, engine="reference", precision="float64", loss=squares)
    for _ in range(2):
        compare(recorder(inputs, inputs), exact, routings(net.n, parts), EXACT_WALK)


def compare(tape: pathnet.Tape, exact: pathnet.Tape, routing: Tensor, tolerance: float) -> None:
    for gradient, expected in zip(tape.routed_gradients(routing), exact.routed_gradients(routing), strict=True):
        assert relative_error(gradient, expected) < tolerance
    sums, expected_sums = tape.gradient_by_length(), exact.gradient_by_length()
    assert relative_error(sums, expected_sums) < tolerance
    record = tape._record
    norms = record.walk.norms(record.start, routing.to(record.start.mantissa.dtype))
    walked = record.walk.routed_backward(record.start, routing.to(record.start.mantissa.dtype))
    torch.testing.assert_close(norms, scaling.norms(*walked), rtol=1e-6, atol=1e-300)
    signs = tape.squared_norms_by_length(2, seed=1)
    torch.testing.assert_close(signs, exact.squared_norms_by_length(2, seed=1), rtol=2e3 * tolerance, atol=0)


@pytest.mark.parametrize("kind", ["language model", "gated", "changes"])
def test_where_memory_is_short_blocks_are_run_again(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = TOKEN_NETS[kind](), sequences()
    whole = pathnet.record(net, inputs, inputs, engine="autograd", precision="float64", loss=squares)
    monkeypatch.setattr("pathnet.engines.autograd.available", lambda device: 0)
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    tape = recorder(inputs, inputs)
    assert all(block.kept is None for block in tape._record.walk.blocks)  # type: ignore[attr-defined]
    assert whole.nbytes >= tape.nbytes + inputs.nbytes
    routing, runs = routings(net.n), []
    expected = whole.routed_gradients(routing)
    run = blocks.KnownBlock.record
    monkeypatch.setattr(blocks.KnownBlock, "record", lambda *arguments: runs.append(arguments) or run(*arguments))
    assert relative_error(tape.routed_gradients(routing), expected) < EXACT_WALK
    # Each block once for all routings.
    assert len(runs) == net.n
    # And again for every three of the states behind it, where no more fit.
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3 * inputs.nbytes)
    walked = tape._record.walk.norms(tape._record.start, routing)
    expected_norms = scaling.norms(*whole._record.walk.routed_backward(whole._record.start, routing))
    torch.testing.assert_close(walked, expected_norms, rtol=1e-9, atol=0)
    assert len(runs) > 2 * net.n
    assert relative_error(tape.gradient_by_length(), whole.gradient_by_length()) < EXACT_WALK


def test_only_what_does_not_fit_is_dropped_and_a_tape_tells_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = TOKEN_NETS["gated"](), sequences()
    tape = pathnet.record(net, inputs, inputs, engine="autograd", precision="float64", loss=squares)
    # Of each block its input, its gate before and after SiLU, and what the gate multiplies; no weights.
    tokens, weights = inputs.numel() * 8, sum(tensor.nbytes for tensor in net.state_dict().values())
    saved = memory.storages(tensor for block in tape._record.walk.blocks for tensor in block.tensors())
    of_weights = memory.storages(tape._record.net.state_dict().values())
    activations = sum(size for storage, size in saved.items() if storage not in of_weights)
    assert activations == net.n * 4 * tokens
    assert tape.nbytes == activations + weights + tokens + sum(
        tensor.nbytes for tensor in (tape.output, *tape._record.start)
    )


class Shift(Block):
    """A module without weights, whose visits are counted."""

    visits = 0

    def residual(self, x: Tensor) -> Tensor:
        return Noted.apply(x)  # type: ignore[no-any-return,no-untyped-call]


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Shift.visits += 1
        return grad * 0.5


def shifts(n: int) -> ResidualNet:
    return ResidualNet(nn.Identity(), [Shift() for _ in range(n)], nn.Linear(WIDTH, 2)).double()


@pytest.mark.parametrize("count", [1, 100])
def test_a_module_is_visited_once_for_each_suffix_that_enters_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PATIENCE", float("inf"))
    n = 24
    codes = torch.randint(0, 2, (count, n), generator=torch.Generator().manual_seed(0))
    tape = pathnet.record(shifts(n), sequences(), sequences(), engine="autograd", precision="float64", loss=squares)
    suffixes = {(i, tuple(code[i:])) for code in codes.tolist() for i in range(n) if code[i]}
    assert count == 1 or len(suffixes) < 0.8 * codes.sum()
    for ask in (tape.path_gradient_norms, tape.path_gradients):
        Shift.visits = 0
        ask(codes)
        assert Shift.visits == len(suffixes)
    multiples = pathnet.paths.routing(codes) * torch.rand(count, n, 1, dtype=torch.float64)
    Shift.visits = 0
    tape.routed_gradients(multiples)
    assert Shift.visits == len(suffixes)


def test_skips_and_gradients_that_are_zero_visit_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PATIENCE", float("inf"))
    monkeypatch.setattr(Shift, "visits", 0)
    net, inputs = shifts(5), sequences()
    tape = pathnet.record(net, inputs, inputs, engine="autograd", precision="float64", loss=squares)
    tape.path_gradient_norms(torch.zeros(1, 5, dtype=torch.uint8))
    assert Shift.visits == 0
    routing = torch.ones(1, 5, 2)
    routing[0, 0] = 0
    assert not tape.routed_gradients(routing).any() and Shift.visits == 0
    nothing = pathnet.record(net, inputs, inputs, engine="autograd", loss=lambda output, _: 0 * output.sum())
    assert not nothing.gradient_by_length().any() and not nothing.gradient().any() and Shift.visits == 0
    tape.gradient_by_length()
    assert Shift.visits == 5 * 6 // 2


@pytest.mark.parametrize(("kept", "width"), [(True, 1), (True, 4), (False, 2)])
def test_few_gradients_are_alive_at_once_however_many_paths(
    kept: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks.KnownBlock, "width", lambda known, pullbacks, grad, count, most: min(width, most))
    if not kept:
        monkeypatch.setattr("pathnet.engines.autograd.available", lambda device: 0)
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * sequences().nbytes)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    through = walk._all_through

    def counted(*arguments: Any) -> Any:
        nonlocal most
        states = through(*arguments)
        alive.update(state.mantissa for state in states)
        assert all(state.mantissa.untyped_storage().nbytes() == state.mantissa.nbytes for state in states)
        most = max(most, len({id(tensor) for tensor in alive}))
        return states

    monkeypatch.setattr(walk, "_all_through", counted)
    tape = pathnet.record(shifts(12), sequences(), sequences(), engine="autograd", loss=squares)
    peaks = []
    for count in (64, 4096):
        most = 0
        gc.collect()
        tape.path_gradient_norms(pathnet.paths.enumerate_all(12)[:count])
        peaks.append(most)
    assert peaks[1] <= width * 14 and peaks[0] > 2


def test_walks_of_several_threads_share_a_tape() -> None:
    net, inputs = TOKEN_NETS["language model"](), sequences()
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    tape, codes = recorder(inputs, inputs), pathnet.paths.enumerate_all(net.n)
    expected = pathnet.record(
        net, inputs, inputs, engine="reference", precision="float64", loss=squares
    ).path_gradient_norms(codes)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: tape.path_gradient_norms(codes), range(40)))
        tapes = list(pool.map(lambda _: recorder(inputs, inputs), range(8)))
    for norms in (*results, *(each.path_gradient_norms(codes) for each in tapes)):
        torch.testing.assert_close(norms, expected, rtol=1e-9, atol=0)
