"""Routed outputs in compiled programs, under autocast and on two processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import processes
from helpers.oracles import relative_error
from helpers.routed_networks import batch, gradients, random, random_net_of
from torch import Tensor, nn

import pathnet
from pathnet import paths


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["preact", "highway", "join"])
def test_one_program_serves_all_routings(compiling: None, kind: str, backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    net, (images, labels) = random_net_of(kind, "training"), batch()
    plain = copy.deepcopy(net)
    programs = CompileCounterWithBackend(backend)
    compiled = torch.compile(net, backend=programs, fullgraph=True)
    path = paths.routing(torch.tensor([[1, 0, 1]]))[0]
    for there in (random(3), random(3, seed=2), path, torch.ones(3, 2, dtype=torch.float64)):
        for back in (random(3, net.parts, 3), torch.ones(3, net.parts, dtype=torch.float64)):
            output, expected = (pathnet.routed(each, images, there, back) for each in (compiled, plain))
            torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
            measured, theirs = gradients(net, output, labels), gradients(plain, expected, labels)
            for name, grad in measured.items():
                other = theirs[name]
                if other is None:
                    assert grad is None or not grad.any(), name
                else:
                    torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-11)
    assert programs.frame_count == 1


def test_a_compiled_function_that_routes_breaks_no_graph(compiling: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    net, (images, labels) = random_net_of("preact"), batch()
    programs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=programs, fullgraph=True)
    def loss(x: Tensor, routing: Tensor, backward: Tensor) -> Tensor:
        return F.cross_entropy(pathnet.routed(net, x, routing, backward), labels)

    for seed in range(3):
        routing, back = random(3, seed=seed).requires_grad_(), random(3, seed=seed + 9)
        loss(images, routing, back).backward()
        measured, routing.grad = routing.grad, None
        F.cross_entropy(pathnet.routed(net, images, routing, back), labels).backward()
        torch.testing.assert_close(measured, routing.grad, rtol=1e-9, atol=1e-12)
    assert programs.frame_count == 1


def test_under_autocast_coefficients_do_not_change_the_types() -> None:
    net, (images, labels) = random_net_of("preact").float(), batch()
    images = images.float()
    there, back = random(3), random(3, seed=1)
    exact = pathnet.routed(copy.deepcopy(net).double(), images.double(), there, back)
    for routing in (there, there.clone().requires_grad_()):
        with torch.autocast("cpu", torch.bfloat16):
            output = pathnet.routed(net, images, routing, back)
            assert torch.equal(pathnet.routed(net, images, torch.ones(3, 2)), net(images))
        assert output.dtype == torch.bfloat16
        assert relative_error(output.detach(), exact.detach()) < 0.05
        for grad in gradients(net, output.float(), labels).values():
            assert grad is not None and grad.dtype == torch.float32 and torch.isfinite(grad).all()
        if routing.requires_grad:
            assert routing.grad is not None and routing.grad.dtype == torch.float64


ROUTED = [((1.0, 1.0), (1.0, 0.0), (1.0, 0.5)), ((1.0, 0.0), (0.5, 2.0), (1.0, 0.0))]


def one_of_two(rank: int, folder: Path) -> None:
    with processes.together(rank, folder):
        net, (images, labels) = random_net_of("preact"), batch(4)
        both = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        part = slice(2 * rank, 2 * rank + 2)
        results = []
        for routing in ROUTED:
            grads = gradients(
                net, pathnet.routed(both, images[part], routing, [[1, c] for _, c in routing]), labels[part]
            )
            results.append({name: None if grad is None else grad.clone() for name, grad in grads.items()})
        torch.save(results, folder / f"{rank}.pt")


def test_two_processes_share_out_a_routed_batch(tmp_path: Path) -> None:
    processes.run(one_of_two, tmp_path)
    net, (images, labels) = random_net_of("preact"), batch(4)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for routing, *shared in zip(ROUTED, *results, strict=True):
        expected = gradients(net, pathnet.routed(net, images, routing, [[1, c] for _, c in routing]), labels)
        for name, grad in expected.items():
            for grads in shared:
                assert (grads[name] is None) == (grad is None), name
                if grad is not None:
                    torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-13)
        assert any(grad is None for grad in expected.values())
