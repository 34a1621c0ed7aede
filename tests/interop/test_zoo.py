"""Models of many kinds against the originals, along single paths, which `zoo_hooks.truth` runs with hooks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers.oracles import relative_error
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="torchvision is not installed (make test-interop has it)")
pytest.importorskip("timm", reason="timm is not installed (make test-interop has it)")
pytest.importorskip("transformers", reason="transformers is not installed (make test-interop has it)")

from zoo import Kind  # noqa: E402
from zoo_hooks import deleted, path_routes, run, target_of, truth  # noqa: E402
from zoo_language import CAUSAL, CLASSIFIERS, DECODERS, ENCODERS, PARALLEL  # noqa: E402
from zoo_plain import PLAIN  # noqa: E402
from zoo_torchvision import TORCHVISION  # noqa: E402
from zoo_vision import HUGGING_FACE, TIMM  # noqa: E402

import pathnet  # noqa: E402
from pathnet.models import ResidualNet  # noqa: E402

KINDS = [*CAUSAL, *PARALLEL, *CLASSIFIERS, *ENCODERS, *DECODERS, *HUGGING_FACE, *TIMM, *TORCHVISION, *PLAIN]
BY_ID = {kind.id: kind for kind in KINDS}


def some_paths(n: int) -> list[tuple[int, ...]]:
    """Return all paths if there are few; else the shortest, the longest, and some of other lengths."""
    if n <= 4:
        return list(itertools.product((0, 1), repeat=n))
    every_other = tuple(i % 2 for i in range(n))
    return [(0,) * n, (1,) * n, every_other, (1, *[0] * (n - 1)), (*[1] * (n - 1), 0)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_outputs_single_paths_and_deletions_are_the_models(kind: Kind) -> None:
    model = kind.model()
    weights = [weight.clone() for weight in model.state_dict().values()]
    net = pathnet.adapt(model, kind.example(), **(kind.options or {}))
    assert net.n == kind.n
    check_paths(kind, model, net)
    check_deletions(kind, model, net)
    for length in kind.other_lengths:
        check_another_length(kind, model, net, length)
    for weight, before in zip(model.state_dict().values(), weights, strict=True):
        assert torch.equal(weight, before)


def check_paths(kind: Kind, model: nn.Module, net: ResidualNet) -> None:
    """Check outputs, single paths, and sums by length of another batch than the example, of another size."""
    batch = kind.batch(3, kind.length, 1)
    with torch.no_grad():
        output = run(kind, model, batch)
        torch.testing.assert_close(net(batch), output, rtol=1e-5, atol=1e-6)
    target = target_of(output, 1)
    ordinary = truth(kind, model, batch, target)
    paths = some_paths(kind.n)
    expected = torch.stack([truth(kind, model, batch, target, path_routes(kind, path)) for path in paths])
    codes = torch.tensor(paths, dtype=torch.uint8)
    for engine in ("auto", "reference"):
        tape = recorded(kind, net, batch, target, engine)
        assert relative_error(tape.output, output.double()) < 1e-5
        assert relative_error(tape.gradient(), ordinary) < kind.tolerance
        for gradient, true in zip(tape.path_gradients(codes), expected, strict=True):
            assert relative_error(gradient, true) < kind.tolerance
        sums = tape.gradient_by_length()
        assert relative_error(sums.sum(0), ordinary) < kind.tolerance
        assert relative_error(sums[0], expected[0]) < kind.tolerance
        if len(paths) == 2**kind.n:
            for length, total in enumerate(sums):
                assert relative_error(total, expected[codes.sum(1) == length].sum(0)) < kind.tolerance


def check_deletions(kind: Kind, model: nn.Module, net: ResidualNet) -> None:
    batch = kind.batch(2, kind.length, 2)
    for blocks in ([0], [kind.n - 1], [0, kind.n // 2]):
        expected = deleted(kind, model, batch, blocks)
        with torch.no_grad():
            assert relative_error(net(batch), expected.double()) > 1e-4
            torch.testing.assert_close(pathnet.lesion.delete(net, blocks)(batch), expected, rtol=1e-4, atol=1e-5)


def check_another_length(kind: Kind, model: nn.Module, net: ResidualNet, length: int) -> None:
    batch = kind.batch(3, length, length)
    with torch.no_grad():
        output = run(kind, model, batch)
        torch.testing.assert_close(net(batch), output, rtol=1e-5, atol=1e-6)
    target = target_of(output, length)
    path = tuple(int(i % 3 != 1) for i in range(kind.n))
    expected = truth(kind, model, batch, target, path_routes(kind, path))
    tape = recorded(kind, net, batch, target)
    assert relative_error(tape.path_gradients(torch.tensor([path], dtype=torch.uint8))[0], expected) < kind.tolerance


def recorded(kind: Kind, net: ResidualNet, batch: Any, target: Tensor, engine: str = "auto") -> pathnet.Tape:
    return pathnet.record(net, batch, target, precision="float64", engine=engine, at=kind.at)


@pytest.mark.parametrize("kind", PARALLEL[1:3], ids=lambda kind: kind.id)
def test_attention_and_perceptron_in_parallel_have_a_coefficient_each(kind: Kind) -> None:
    model, batch = kind.model(), kind.batch(3, kind.length, 1)
    net = pathnet.adapt(model, kind.example(), parallel="separate")
    target = target_of(run(kind, model, batch), 1)
    tape = recorded(kind, net, batch, target)
    codes = pathnet.paths.enumerate_all(net.n, modules=net.residual_modules)
    assert len(codes) == 3**net.n
    expected = []
    for code in codes.tolist():
        routes = [(entry == 0, entry == 1, entry == 2) for entry in code]
        expected.append(truth(kind, model, batch, target, routes))
    for gradient, true in zip(tape.path_gradients(codes), expected, strict=True):
        assert relative_error(gradient, true) < kind.tolerance
    assert relative_error(torch.stack(expected).sum(0), tape.gradient()) < kind.tolerance


def test_gradients_at_the_input_of_a_later_layer_of_gpt2() -> None:
    kind = BY_ID["gpt2-padded"]
    rest = dataclasses.replace(kind, entry="transformer.h.1", additions=kind.additions[2:])
    model, batch = kind.model(), kind.batch(3, kind.length, 1)
    net = pathnet.adapt(model, kind.example())
    target = target_of(run(kind, model, batch), 1)
    for engine in ("auto", "reference"):
        tape = pathnet.record(net, batch, target, precision="float64", at=2, engine=engine)
        codes = pathnet.paths.enumerate_all(rest.n)
        for code, gradient in zip(codes.tolist(), tape.path_gradients(codes), strict=True):
            assert (
                relative_error(gradient, truth(rest, model, batch, target, path_routes(rest, code))) < kind.tolerance
            )
