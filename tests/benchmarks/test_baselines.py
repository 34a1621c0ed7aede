"""The baselines, the float64 backward pass and the network of the benchmarks against oracles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cases import SMALL, Case
from helpers.oracles import detach_loop as true_gradient
from helpers.oracles import relative_error

import pathnet
from benchmarks import truth
from benchmarks.baselines import BatchedGradients, detach_loop, norms
from benchmarks.cases import FULL, REHEARSAL, module_flops, network, path_flops
from benchmarks.composed import Composed
from benchmarks.timing import interleaved
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

CHAINS = [case for case in SMALL if case.block == "basic"]


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.id)
def test_baselines_against_the_detach_loop_in_float64(case: Case) -> None:
    net, (images, labels) = case.net(), case.images()
    codes = pathnet.paths.enumerate_all(net.n)[:: 1 if net.n < 4 else 7]
    expected = torch.stack([true_gradient(net, images, labels, code) for code in codes])
    batched = BatchedGradients(net, images, labels)
    batched.forward()
    composed = Composed(net, images, labels, torch.float32)
    along = composed.module_graphs(lambda work: work)
    walks = {
        "loop": torch.stack([detach_loop(net, images, labels, code) for code in codes.tolist()]),
        "batched": batched.gradients(codes),
        "composed": composed.gradients(composed.rows(codes), len(codes)).permute(0, 1, 4, 2, 3),
        "one by one": torch.cat([composed.gradients(composed.rows(code[None]), 1) for code in codes]).permute(
            0, 1, 4, 2, 3
        ),
        "by modules": torch.cat([along(code).clone() for code in codes.tolist()]).permute(0, 1, 4, 2, 3),
    }
    for name, measured in walks.items():
        for grad, expected_grad in zip(measured, expected, strict=True):
            assert relative_error(grad, expected_grad) < 1e-4, name
    torch.testing.assert_close(norms(expected.float()), expected.flatten(1).norm(dim=1).float())


def test_the_float64_walk_is_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared on an instruction set that computes in float32: the two bfloat16 terms of AMX have 17 bits."""
    monkeypatch.setenv("PATHNET_ISA", "base")
    case = CHAINS[1]
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="cpu")
    codes = pathnet.paths.enumerate_all(net.n)[::5]
    for code, measured in zip(codes, truth.gradients(tape, pathnet.paths.routing(codes)), strict=True):
        assert relative_error(measured, true_gradient(net, images, labels, code)) < 1e-5
    routing = torch.randn(3, net.n, 2, generator=torch.Generator().manual_seed(0))
    assert truth.errors(tape, routing).gradient < 1e-5
    wrong = routing.clone()
    wrong[:, 2, 1] += 0.1
    assert relative_error(tape.routed_gradients(wrong), truth.gradients(tape, routing)) > 1e-3


def test_a_module_is_9_44_mflop_at_cifar_sizes() -> None:
    net = pathnet.models.preact_resnet(110)
    residual, skip = zip(*module_flops(net, 32), strict=True)
    assert residual[1] == residual[20] == residual[-1] == 2 * 2 * 9 * 16 * 16 * 32 * 32
    assert [i for i, cost in enumerate(skip) if cost] == [18, 36]
    assert skip[18] == 2 * 16 * 32 * 16 * 16
    codes = torch.tensor([[1] * 54, [0] * 54])
    assert path_flops(net, 32, codes) == sum(residual) + sum(skip)


def test_the_network_of_the_benchmarks_has_gradients_along_every_path() -> None:
    setup = replace(FULL, device="cpu", engine="cpu", batch=2, side=8)
    net, generator = network(setup), torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    tape = pathnet.record(net, images, torch.tensor([0, 1]), engine="cpu")
    sizes = tape.path_gradient_norms(pathnet.paths.one_of_each_length(net.n), per_sample=True)
    assert (sizes > 0).all() and tape.loss < 100


def test_timings_are_interleaved() -> None:
    calls: list[str] = []
    work = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = interleaved(replace(REHEARSAL, rounds=3), work)  # type: ignore[arg-type]
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert timings["a"].facts()["rounds"] == 3 and timings["a"].median > 0
