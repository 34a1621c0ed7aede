"""The cuda engine on a GPU, against the reference in float64 on the same record, and against its twin."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import Case
from helpers.judging import TOLERANCES, check, check_sums, random_basic_net, random_routings, reference_outputs
from helpers.oracles import in_float64, relative_error
from helpers.tolerances import FORWARD
from torch import Tensor

import pathnet
from pathnet import scaling
from pathnet.engines.cuda import CudaEngine, CudaWalk, Program, ops
from pathnet.engines.engine import Job
from pathnet.engines.self_check import disagreement
from pathnet.scaling import ScaledGradient

SEEDS = (1, 2, 3, 7, 9, 11, 12, 14, 23, 28)
"""Seeds of networks: one to five blocks, widths of 1 to 64, strides, both skips, and sides that no tile divides."""


def recorded(
    net: pathnet.models.ResidualNet, images: Tensor, labels: Tensor, device: torch.device, precision: Any
) -> pathnet.Tape:
    return pathnet.record(net.to(device), images.to(device), labels.to(device), engine="cuda", precision=precision)


def test_auto_takes_the_engine(device: torch.device) -> None:
    case = Case("small", 14, width=16, side=8)
    net, (images, labels) = case.net().to(device), case.images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pathnet.record(net, images.to(device), labels.to(device)).engine == "cuda"


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("seed", SEEDS)
def test_walks_sums_and_forward_passes(seed: int, post: bool, precision: Any, device: torch.device) -> None:
    """Check backward passes, sums and forward passes, and the engine's self-check."""
    net, images, labels = random_basic_net(seed, smallest=1 if precision == "float32" else 6, post=post)
    net, images, labels = net.to(device), images.to(device), labels.to(device)
    y0_shape = torch.as_tensor(net.stem(images)).shape[1:]
    assert disagreement(CudaEngine(), Job(net, "running", precision, y0_shape, images.device), small=False) is None
    recorder, exact = pathnet.Recorder(net, engine="cuda", precision=precision), in_float64(net, "running")
    tape, routing = recorder(images, labels), random_routings(net.n, seed)
    assert relative_error(tape.output, exact(images.double()).detach()) < FORWARD
    check(tape, routing, precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    check_sums(tape, routing[3], precision)
    expected = reference_outputs(exact, images, routing)
    for output, other in zip(recorder.routed_outputs(images, routing), expected, strict=True):
        assert relative_error(output, other) < FORWARD


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(("width", "side", "batch"), [(16, 32, 5), (8, 28, 3), (16, 7, 33), (12, 5, 130)])
def test_networks_of_the_papers_kind(width: int, side: int, batch: int, precision: Any, device: torch.device) -> None:
    case = Case("net", 20, width=width, side=side, batch=batch, shortcut="pad" if width == 8 else "projection")
    net, (images, labels) = case.net(), case.images()
    tape = recorded(net, images, labels, device, precision)
    norms, expected = check(tape, random_routings(tape.n, 0), precision)
    if batch >= 5 and side >= 7:
        norms, expected = scaling.combine(norms[:3]), scaling.combine(expected[:3])
        torch.testing.assert_close(norms, expected, rtol=TOLERANCES[precision][0], atol=0)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_110_layer_network(precision: Any, device: torch.device) -> None:
    case = Case("resnet-110", 110, width=16, side=32, batch=16)
    net, (images, labels) = case.net(), case.images()
    tape = recorded(net, images, labels, device, precision)
    exact = in_float64(net, "running")(images.to(device).double()).detach()
    assert relative_error(tape.output, exact) < FORWARD
    codes = torch.cat([pathnet.paths.sample(54, length, 1) for length in (0, 5, 17, 54)])
    norms, expected = map(scaling.combine, check(tape, pathnet.paths.routing(codes), precision))
    torch.testing.assert_close(norms, expected, rtol=TOLERANCES[precision][0], atol=0)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_twin_tells_what_the_gpu_does(precision: Any, device: torch.device) -> None:
    """Run the same tensors through both: they differ by the order in which tensor cores add, and no more."""
    net, images, labels = random_basic_net(3, smallest=6)
    record = recorded(net, images, labels, device, precision)._record
    assert isinstance(record.walk, CudaWalk)
    routing = random_routings(net.n, 1).float()

    def on_host(program: Program) -> Program:
        return Program(program.host, program.device.cpu())

    network = record.walk.network
    programs = {"backward": on_host(network.backward), "forward": on_host(network.forward)}
    host = replace(network, **programs, affine=network.affine.cpu())
    twin = CudaWalk(host, record.walk.relu_bits.cpu())
    on_gpu = record.walk.norms(record.start, routing.to(device))
    on_cpu = twin.norms(ScaledGradient(*(tensor.cpu() for tensor in record.start)), routing)
    # A different order flips the rounding of a bfloat16 here and there.
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-6 if precision == "float32" else 5e-3, atol=0)
    _, host_walk = host.record(record.y0.cpu())
    different = host_walk.relu_bits ^ twin.relu_bits
    assert np.unpackbits(different.numpy()).mean() < 1e-3


@pytest.mark.parametrize("precision", TOLERANCES)
def test_results_are_bit_equal_for_any_grouping(precision: Any, device: torch.device) -> None:
    case = Case("net", 20, width=16, side=16, batch=7)
    tape = recorded(case.net(), *case.images(), device, precision)
    b = pathnet.paths.sample(tape.n, 4, 40)
    whole = tape.path_gradient_norms(b, per_sample=True)
    assert torch.equal(whole, tape.path_gradient_norms(b, per_sample=True))
    parts = [tape.path_gradient_norms(part, per_sample=True) for part in b.split(7)]
    assert torch.equal(whole, torch.cat(parts))
    gradients = tape.path_gradients(b[:5])
    torch.testing.assert_close(gradients.flatten(2).norm(dim=2), whole[:5], rtol=1e-6, atol=0)


def test_work_on_another_stream(device: torch.device) -> None:
    case = Case("net", 20, width=16, side=16, batch=7)
    tape = recorded(case.net(), *case.images(), device, "bfloat16")
    b = pathnet.paths.sample(tape.n, 4, 200)
    expected = tape.path_gradient_norms(b)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(tape.path_gradient_norms(b))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_what_is_wrong_with_a_batch_is_told_when_the_tape_is_asked(device: torch.device) -> None:
    """Recording must not raise, since it would wait for the GPU; a measurement must, instead of a result."""
    case = Case("small", 14, width=16, side=8)
    net, (images, labels) = case.net().to(device), (tensor.to(device) for tensor in case.images())
    recorder, codes = pathnet.Recorder(net, engine="cuda"), pathnet.paths.sample(6, 3, 4)
    whole = recorder(images, labels)
    assert torch.equal(whole.path_gradient_norms(codes), recorder(images, labels).path_gradient_norms(codes))
    assert whole.loss == recorder(images, labels).loss
    asking: list[Callable[[pathnet.Tape], object]] = [
        lambda tape: tape.loss,
        lambda tape: tape.path_gradient_norms(codes),
        lambda tape: tape.gradient_by_length(),
    ]
    for ask in asking:
        spoiled, strange = recorder(images / 0, labels), recorder(images, labels + 100)
        for _ in range(2):
            with pytest.raises(ValueError, match="images: expected finite values, got NaN or infinity"):
                ask(spoiled)
            with pytest.raises(ValueError, match="target: expected labels 0 to"):
                ask(strange)


def test_no_paths_one_path_and_more_than_the_processors(device: torch.device) -> None:
    case = Case("net", 14, width=16, side=8, batch=1)
    tape = recorded(case.net(), *case.images(), device, "bfloat16")
    assert tape.path_gradient_norms(torch.zeros(0, 6, dtype=torch.uint8)).shape == (0,)
    many = tape.path_gradient_norms(pathnet.paths.sample(6, 3, 5000))
    one = tape.path_gradient_norms(pathnet.paths.sample(6, 3, 5000)[4321:4322])
    assert torch.equal(many[4321:4322], one)


def test_tensors_on_several_devices_are_refused(device: torch.device) -> None:
    case = Case("net", 14, width=16, side=8)
    record = recorded(case.net(), *case.images(), device, "float32")._record
    assert isinstance(record.walk, CudaWalk)
    program, routing = record.walk.network.backward, torch.randn(1, 6, 2)
    schedule = torch.zeros(2, 1, dtype=torch.int32, device=device)
    gradients = record.start.mantissa[None], record.start.exponent[None]
    network = program.host, program.device, record.walk.relu_bits
    with pytest.raises(RuntimeError, match="expected all tensors but program on one device"):
        ops.cuda_backward_running(*gradients, routing, schedule, *network, True)


def test_opcheck(device: torch.device) -> None:
    case = Case("net", 14, width=16, side=8)
    record = recorded(case.net(), *case.images(), device, "bfloat16")._record
    assert isinstance(record.walk, CudaWalk)
    network, schedule = record.walk.network, torch.zeros(2, 1, dtype=torch.int32, device=device)
    routing = torch.randn(1, 6, 2, device=device)
    back, forward = network.backward, network.forward
    torch.library.opcheck(
        torch.ops.pathnet.cuda_backward_running.default,
        (record.start.mantissa[None], record.start.exponent[None], routing, schedule, back.host, back.device)
        + (record.walk.relu_bits, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.pathnet.cuda_forward_running.default,
        (record.y0, routing, schedule[0], forward.host, forward.device, network.affine, True),
        test_utils=("test_schema", "test_faketensor"),
    )
