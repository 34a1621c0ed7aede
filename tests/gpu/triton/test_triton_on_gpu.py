"""The triton engine and fused blocks on a GPU, against the reference in float64 on the same record."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.cases import Case, shaken
from helpers.gpu_cases import CASES, DEEP, FUSED, WIDTH_16, GpuCase, jobs
from helpers.judging import TOLERANCES, check, check_sums, random_routings, reference_outputs
from helpers.oracles import autograd, detach_loop, in_float64, relative_error
from helpers.tolerances import FLOAT32_SAMPLE_NORM, FORWARD
from torch import Tensor

import pathnet
from pathnet import scaling
from pathnet.engines.engine import Job
from pathnet.engines.self_check import disagreement
from pathnet.engines.triton import TritonEngine
from pathnet.models import ResidualNet
from pathnet.nn import FusedNet, fuse, fused_residual
from pathnet.recording import snapshot

MODES = ["running", "batch"]

each_job = pytest.mark.parametrize(
    ("case", "bn", "precision"), [pytest.param(*job, id=f"{job[0].id}-{job[1]}-{job[2]}") for job in jobs()]
)


def recorded(
    net: ResidualNet, images: Tensor, labels: Tensor, device: torch.device, bn: Any, precision: Any = "float32"
) -> pathnet.Tape:
    on_device = net.to(device), images.to(device), labels.to(device)
    return pathnet.record(*on_device, bn=bn, engine="triton", precision=precision)


@each_job
def test_walks_forward_passes_and_sums(case: GpuCase, bn: Any, precision: Any, device: torch.device) -> None:
    """The engine also passes its self-check, and another record leaves the first unchanged."""
    net, (images, labels) = case.net().to(device), (tensor.to(device) for tensor in case.images())
    y0_shape = torch.as_tensor(net.stem(images)).shape[1:]
    frozen = snapshot(net, bn, torch.float32)
    assert disagreement(TritonEngine(), Job(frozen, bn, precision, y0_shape, images.device)) is None
    recorder, exact = pathnet.Recorder(net, bn, "triton", precision), in_float64(net, bn)
    tape, routing = recorder(images, labels), random_routings(net.n, 1)
    recorder(images.flip(0) * 2, labels)
    assert relative_error(tape.output, exact(images.double()).detach()) < FORWARD
    check(tape, routing, precision)
    check_sums(tape, torch.ones(net.n, 2), precision)
    check_sums(tape, routing[3], precision)
    expected = reference_outputs(exact, images, routing)
    for output, expected_output in zip(recorder.routed_outputs(images, routing), expected, strict=True):
        assert relative_error(output, expected_output) < FORWARD


@pytest.mark.parametrize(("bn", "precision"), [("running", "float32"), ("batch", "bfloat16")])
def test_what_is_replayed_equals_what_is_launched(bn: Any, precision: Any, device: torch.device) -> None:
    """Records, backward and forward passes are equal to the bit, with other routings than the captured ones, for a
    larger and a smaller batch in turn, and on another stream."""
    case = Case("replayed", 14, width=16, side=28, batch=8)
    net, (images, labels) = case.net().to(device), (tensor.to(device) for tensor in case.images())

    def all_results(recorder: pathnet.Recorder, count: int, seed: int) -> list[Tensor]:
        tape, routing = recorder(images[:count], labels[:count]), random_routings(net.n, seed)
        norms = tape._record.walk.norms(tape._record.start, routing)
        gradients = tape._record.walk.routed_backward(tape._record.start, routing)
        return [tape.output, norms, *gradients, *recorder.routed_outputs(images[:count], routing)]

    recorder = pathnet.Recorder(net, bn, "triton", precision)
    for round_ in range(4):
        for count in (8, 5):
            stream = torch.cuda.Stream(device) if round_ == 3 else torch.cuda.current_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                replayed = all_results(recorder, count, round_)
                launched = all_results(pathnet.Recorder(net, bn, "triton", precision), count, round_)
            torch.cuda.synchronize(device)
            assert all(torch.equal(*pair) for pair in zip(replayed, launched, strict=True))


def test_memory_of_graphs_is_that_of_the_largest(device: torch.device) -> None:
    case = Case("memory", 14, width=16, side=28, batch=32)
    net, (images, labels) = case.net().to(device), (tensor.to(device) for tensor in case.images())
    recorder, codes = pathnet.Recorder(net, "batch", "triton"), pathnet.paths.one_of_each_length(net.n)

    def held(count: int) -> int:
        for _ in range(3):
            recorder(images[:count], labels[:count]).path_gradient_norms(codes)
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)

    largest = held(32)
    assert max(held(count) for count in (8, 20, 31)) < 1.1 * largest


@pytest.mark.parametrize("open_stem", [False, True])
@pytest.mark.parametrize(
    ("case", "bn"),
    [pytest.param(case, bn, id=f"{case.id}-{bn}") for case in CASES if "post" in case.id for bn, _ in case.jobs],
)
def test_every_path_of_post_activation_networks(
    case: GpuCase, bn: Any, open_stem: bool, device: torch.device
) -> None:
    net, (images, labels) = case.net(), case.images()
    if open_stem:
        net.stem = net.stem[:1]  # type: ignore[index]
    net, images, labels = net.to(device), images.to(device), labels.to(device)
    precision = dict(case.jobs)[bn]
    tape, every = recorded(net, images, labels, device, bn, precision), pathnet.paths.enumerate_all(net.n)
    tolerance = FLOAT32_SAMPLE_NORM if precision == "float32" else TOLERANCES[precision][2]
    gradients = tape.path_gradients(every)
    for path, gradient in zip(every, gradients, strict=True):
        assert relative_error(gradient, detach_loop(net, images, labels, path, bn)) < tolerance
    assert relative_error(gradients.sum(0), autograd(net, images, labels, bn)) < tolerance


def test_the_original_110_layer_network(device: torch.device) -> None:
    """Activations follow the additions. 54 ReLUs let few values of short paths pass, and rounding errs more in
    them than in the mean of many."""
    torch.manual_seed(0)
    net = shaken(pathnet.models.resnet(110)).eval()
    tape = recorded(net, *DEEP.images(), device, "running")
    codes = torch.cat([pathnet.paths.sample(54, length, 1) for length in (17, 27, 54)])
    norms, expected = map(scaling.combine, check(tape, pathnet.paths.routing(codes), "float32", gradients=False))
    torch.testing.assert_close(norms, expected, rtol=TOLERANCES["float32"][0], atol=0)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
def test_the_110_layer_network(bn: Any, precision: Any, device: torch.device) -> None:
    tape = recorded(DEEP.net(), *DEEP.images(), device, bn, precision)
    codes = torch.cat([pathnet.paths.sample(54, length, 1) for length in (0, 5, 17, 54)])
    norms, expected = map(scaling.combine, check(tape, pathnet.paths.routing(codes), precision, gradients=False))
    torch.testing.assert_close(norms, expected, rtol=TOLERANCES[precision][0], atol=0)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", MODES)
def test_results_are_bit_equal_for_any_grouping_and_stream(bn: Any, precision: Any, device: torch.device) -> None:
    case = Case("net", 20, width=16, side=28, batch=7)
    tape = recorded(case.net(), *case.images(), device, bn, precision)
    b = pathnet.paths.sample(tape.n, 4, 40)
    together = tape.path_gradient_norms(b, per_sample=True)
    assert torch.equal(together, torch.cat([tape.path_gradient_norms(part, per_sample=True) for part in b.split(7)]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = tape.path_gradient_norms(b, per_sample=True)
    torch.cuda.synchronize()
    assert torch.equal(together, elsewhere)
    assert tape.path_gradient_norms(b[:0]).shape == (0,)


@pytest.mark.parametrize("bn", MODES)
def test_tapes_of_one_recorder_are_independent(bn: Any, device: torch.device) -> None:
    """Records replay one graph, which writes to the same place each time."""
    case = Case("net", 14, width=16, side=28, batch=6)
    net, (images, labels) = case.net().to(device), (tensor.to(device) for tensor in case.images())
    recorder, b = pathnet.Recorder(net, bn=bn, engine="triton"), pathnet.paths.enumerate_all(6)
    first = recorder(images, labels)
    before = first.path_gradient_norms(b)
    second = recorder(images.flip(0) * 2, labels.flip(0))
    assert torch.equal(first.path_gradient_norms(b), before)
    assert not torch.equal(second.path_gradient_norms(b), before)
    assert torch.equal(recorder(images, labels).path_gradient_norms(b), before)


def one_step(net: ResidualNet, images: Tensor, labels: Tensor, fused: bool) -> tuple[Tensor, list[Tensor]]:
    model = fuse(net) if fused else net
    assert not isinstance(model, FusedNet) or set(model.engines) == {"triton"}
    output = model(images)
    loss = torch.nn.functional.cross_entropy(output, labels)
    return output, list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize(
    ("case", "training"),
    [
        pytest.param(case, training, id=f"{case.id}-{'training' if training else 'evaluation'}")
        for case, training in FUSED
    ],
)
def test_fused_blocks_against_autograd(case: Case, training: bool, device: torch.device) -> None:
    net, (images, labels) = case.net().to(device).train(training), (tensor.to(device) for tensor in case.images())
    exact = copy.deepcopy(net).double()
    output, grads = one_step(net, images, labels, fused=True)
    expected, expected_grads = one_step(exact, images.double(), labels, fused=False)
    assert relative_error(output, expected) < FORWARD
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) < 1e-3
    for buffer, expected_buffer in zip(net.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), expected_buffer.double(), rtol=1e-4, atol=1e-5)


def test_a_compiled_fused_block(device: torch.device) -> None:
    block = WIDTH_16.net().blocks[1].to(device).train()
    x = torch.randn(4, 16, 32, 32, device=device)
    expected = fused_residual(copy.deepcopy(block), x)  # type: ignore[arg-type]
    compiled = torch.compile(lambda x: fused_residual(block, x), fullgraph=True)  # type: ignore[arg-type]
    torch.testing.assert_close(compiled(x), expected)


def test_a_skipped_module_launches_nothing(device: torch.device) -> None:
    block = Case("net", 8, width=16, side=8).net().blocks[0].to(device).train()
    x = torch.randn(4, 16, 8, 8, device=device, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = fused_residual(block, x, 1.0, 0.0)  # type: ignore[arg-type]
        torch.cuda.synchronize()
    assert y is x
    assert not [event for event in profile.events() if "kernel" in event.name]
