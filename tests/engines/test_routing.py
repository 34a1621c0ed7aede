"""`pathnet.routed` and `pathnet.routed_gradient` against autograd, detach loops and finite differences."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import processes
from helpers.cases import SMALL, Case, shaken
from helpers.oracles import autograd, detach_loop, in_float64, relative_error
from torch import Tensor, nn

import pathnet
from pathnet import models, paths
from pathnet.models import Block, ResidualNet

EXACT = 1e-12


class PostActivation(Block):
    """A block with a join, and an in-place ReLU in it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.skip_conv = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.bn = nn.BatchNorm2d(channels)

    def skip(self, x: Tensor) -> Tensor:
        return self.skip_conv(x)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def join(self, z: Tensor) -> Tensor:
        return F.relu(z, inplace=True)


class Eager(Block):
    """A block that changes its input in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def residual(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x, inplace=True))


def in_place() -> ResidualNet:
    head = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return ResidualNet(nn.Conv2d(3, 4, 3), [Eager(4) for _ in range(3)], head)


def post_activation() -> ResidualNet:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return ResidualNet(nn.Conv2d(3, 4, 3), [PostActivation(4) for _ in range(3)], head)


NETS: dict[str, Callable[[], ResidualNet]] = {
    "preact": lambda: models.preact_resnet(8, 4, 5),
    "padded": lambda: models.preact_resnet(8, 4, 5, shortcut="pad"),
    "bottleneck": lambda: models.preact_resnet(11, 3, 5, block="bottleneck"),
    "stochastic depth": lambda: models.preact_resnet(8, 4, 5, survival=0.4),
    "highway": lambda: models.highway(8, 4, 5),
    "vgg": lambda: models.vgg(6, 4, 5, stages=2),
    "join": post_activation,
}


def made(kind: str, bn: str = "running") -> ResidualNet:
    torch.manual_seed(0)
    net = shaken(NETS[kind]())
    return in_float64(net, bn) if bn != "training" else net.double().train()


def batch(count: int = 3) -> tuple[Tensor, Tensor]:
    images, labels = Case("", 8, batch=count).images()
    return images.double(), labels


def random(n: int, parts: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, parts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 7))


def gradients(net: nn.Module, output: Tensor, labels: Tensor) -> dict[str, Tensor | None]:
    for parameter in net.parameters():
        parameter.grad = None
    F.cross_entropy(output, labels).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def forward(
    net: ResidualNet, images: Tensor, join: Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
) -> tuple[Tensor, Tensor]:
    """The output, and ``y_0``, where ``join(i, skip, residual, gate)`` makes what enters block i's join."""
    y0 = y = net.stem(images)
    if not y0.requires_grad:
        y0 = y = y0.requires_grad_()
    for i, block in enumerate(net.blocks):
        y = block.join(join(i, block.skip(y), block.residual(y), block.gated(y)))
    return net.head(y), y0


def as_if(value: Tensor, gradient: Tensor) -> Tensor:
    """The value of one, the gradient of the other."""
    return value.detach() + gradient - gradient.detach()


# In both directions the same


@pytest.mark.parametrize("bn", ["running", "batch", "training"])
@pytest.mark.parametrize("kind", NETS)
def test_ones_are_the_network_bit_for_bit(kind: str, bn: str) -> None:
    net, (images, labels) = made(kind, bn), batch()
    other = copy.deepcopy(net)
    expected = gradients(other, whole := other(images), labels)
    for routing, backward in ((torch.ones(net.n, net.parts), None), (None, [[1.0] * net.parts] * net.n)):
        own = copy.deepcopy(net)
        output = pathnet.routed(own, images, routing, backward)
        assert torch.equal(output, whole)
        for name, grad in gradients(own, output, labels).items():
            assert grad is not None and torch.equal(grad, expected[name]), name
        for name, buffer in own.named_buffers():
            assert torch.equal(buffer, other.get_buffer(name)), name
    # Two columns leave the gate out, which has no value.
    torch.testing.assert_close(
        pathnet.routed(copy.deepcopy(net), images, torch.ones(net.n, 2)), whole, rtol=0, atol=0
    )


@pytest.mark.parametrize("bn", ["running", "batch", "training"])
@pytest.mark.parametrize("kind", NETS)
def test_random_coefficients_give_autograds_gradients(kind: str, bn: str) -> None:
    net, (images, labels) = made(kind, bn), batch()
    routing, other = random(net.n), copy.deepcopy(net)
    output = pathnet.routed(net, images, routing)
    expected, _ = forward(other, images, lambda i, s, f, _: routing[i, 0] * s + routing[i, 1] * f)
    torch.testing.assert_close(output, expected, rtol=EXACT, atol=EXACT)
    own, theirs = gradients(net, output, labels), gradients(other, expected, labels)
    for name, grad in own.items():
        if kind == "highway" and ".gate." in name:
            assert grad is None
        else:
            torch.testing.assert_close(grad, theirs[name], rtol=1e-10, atol=1e-13)
    for name, buffer in net.named_buffers():
        if bn == "running":
            assert torch.equal(buffer, other.get_buffer(name)), name
        elif name.endswith("num_batches_tracked"):
            assert buffer == 1, name


@pytest.mark.parametrize("kind", ["preact", "highway", "join"])
def test_first_and_second_derivatives_of_inputs_and_coefficients(kind: str) -> None:
    net, (images, _) = made(kind), batch(1)
    net.requires_grad_(False)
    routing = random(net.n)

    def output(x: Tensor, coefficients: Tensor) -> Tensor:
        return pathnet.routed(net, x, coefficients)

    given = images[:, :, :4, :4].clone().requires_grad_(), routing.requires_grad_()
    assert torch.autograd.gradcheck(output, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, given, fast_mode=True)


# Apart


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("bn", ["running", "batch"])
def test_coefficients_apart_against_values_and_gradients_written_out(kind: str, bn: str) -> None:
    net, (images, labels) = made(kind, bn), batch()
    there, back = random(net.n), random(net.n, net.parts, 1)
    other, x = copy.deepcopy(net), images.requires_grad_()

    def join(i: int, skip: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
        gradient = back[i, 0] * skip + back[i, 1] * residual
        if gate is not None:
            gradient = gradient + back[i, 2] * gate
        return as_if(there[i, 0] * skip + there[i, 1] * residual, gradient)

    expected, _ = forward(other, x, join)
    theirs = gradients(other, expected, labels)
    of_input, x.grad = x.grad, None
    output = pathnet.routed(net, x, there, back)
    torch.testing.assert_close(output, expected, rtol=EXACT, atol=EXACT)
    for name, grad in gradients(net, output, labels).items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, of_input, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("case", [*SMALL[:3], SMALL[4]], ids=lambda case: case.id)
def test_every_path_against_the_detach_loop_and_the_tape(case: Case, bn: Any) -> None:
    net, (images, labels) = case.net(), case.images()
    exact = in_float64(net, bn)
    every = paths.enumerate_all(net.n)
    for at in ("y0", "image", "stem_weight") if net.n < 6 else ("y0",):
        tape = pathnet.record(net, images, labels, bn, "reference", "float64", at=at)  # type: ignore[arg-type]
        taped = tape.path_gradients(every)
        total = 0.0
        for path, of_tape in zip(every, taped, strict=True):
            x = images.double().requires_grad_()
            kept: list[Tensor] = []
            handle = exact.stem.register_forward_hook(lambda module, given, output, kept=kept: kept.append(output))
            output = pathnet.routed(exact, x, None, paths.routing(path[None])[0])
            handle.remove()
            place = {"y0": kept[0], "image": x, "stem_weight": exact.stem_weight()}[at]
            (own,) = torch.autograd.grad(F.cross_entropy(output, labels), place)
            assert relative_error(own, detach_loop(net, images, labels, path, bn, at)) < 1e-11
            assert relative_error(own, of_tape) < 1e-9
            total = total + own
        assert relative_error(total, autograd(net, images, labels, bn, at)) < 1e-10  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["preact", "padded", "join", "highway"])
def test_weight_gradients_along_a_path_are_the_detach_loops(kind: str) -> None:
    for path in itertools.product((0, 1), repeat=3):
        net, (images, labels) = made(kind, "training"), batch()
        other = copy.deepcopy(net)

        def join(i: int, skip: Tensor, residual: Tensor, _: Any, path: Sequence[int] = path) -> Tensor:
            return skip.detach() + residual if path[i] else skip + residual.detach()

        expected, _ = forward(other, images, join)
        theirs = gradients(other, expected, labels)
        output = pathnet.routed(net, images, None, paths.routing(torch.tensor([path]))[0])
        torch.testing.assert_close(output, expected, rtol=EXACT, atol=EXACT)
        for name, grad in gradients(net, output, labels).items():
            assert (grad is None) == (theirs[name] is None), name
            if grad is not None:
                torch.testing.assert_close(grad, theirs[name], rtol=1e-10, atol=1e-13)


def test_ones_in_two_columns_leave_out_what_flows_through_gates() -> None:
    net, (images, labels) = made("highway"), batch()
    other = copy.deepcopy(net)
    expected = gradients(other, forward(other, images, lambda i, s, f, _: s + f)[0], labels)
    for name, grad in gradients(net, pathnet.routed(net, images, torch.ones(3, 2)), labels).items():
        assert (grad is None) == (".gate." in name)
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-13)


def test_the_parts_of_a_gated_block_share_one_pass_of_its_statistics() -> None:
    net, (images, _) = made("highway", "training"), batch()
    other = copy.deepcopy(net)
    pathnet.routed(net, images, None, random(3, 3))
    other(images)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


# Left out


@pytest.mark.parametrize("kind", ["preact", "padded", "bottleneck"])
def test_a_module_left_out_is_not_computed_and_its_weights_get_none(kind: str) -> None:
    net, (images, labels) = made(kind, "training"), batch()
    other, ran = copy.deepcopy(net), set[int]()
    for i, block in enumerate(net.blocks):
        block.convs[-1].register_forward_hook(lambda *_, i=i: ran.add(i))  # type: ignore[misc]
    drawn = [True, False, True]
    routing = [[1.0, float(own)] for own in drawn]
    output = pathnet.routed(net, images, routing)
    assert ran == {0, 2}
    expected = gradients(other, other(images, drawn), labels)
    for name, grad in gradients(net, output, labels).items():
        assert (grad is None) == (expected[name] is None), name
        assert grad is None or torch.equal(grad, expected[name])
    assert sum(grad is None for grad in expected.values()) >= 3
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


def test_a_skip_left_out_is_not_computed_either() -> None:
    net, (images, labels) = made("join"), batch()
    net.blocks[1].skip_conv.register_forward_hook(lambda *_: pytest.fail("computed"))
    output = pathnet.routed(net, images, [[1, 1], [0, 2], [1, 1]])
    assert gradients(net, output, labels)["blocks.1.skip_conv.weight"] is None


def test_all_of_a_block_left_out_leaves_zeros() -> None:
    net, (images, labels) = made("join"), batch()
    output = pathnet.routed(net, images, [[1, 1], [0, 0], [1, 1]])
    expected, _ = forward(net, images, lambda i, s, f, _: (i != 1) * (s + f))
    torch.testing.assert_close(output, expected, rtol=EXACT, atol=EXACT)
    assert gradients(net, output, labels)["blocks.0.conv.weight"] is None


def test_a_coefficient_of_zero_that_is_learned_keeps_its_branch() -> None:
    net, (images, labels) = made("preact"), batch()
    routing = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    F.cross_entropy(pathnet.routed(net, images, routing), labels).backward()
    step = 1e-6
    for i, j in itertools.product(range(3), range(2)):
        both = []
        for sign in (1, -1):
            moved = routing.detach().clone()
            moved[i, j] += sign * step
            both.append(F.cross_entropy(pathnet.routed(net, images, moved), labels).item())
        assert routing.grad[i, j] == pytest.approx((both[0] - both[1]) / (2 * step), rel=1e-6, abs=1e-9)


def test_learned_coefficients_with_others_in_the_backward_pass() -> None:
    """Their gradients are <g, branch>, of the gradient that arrives as it is routed."""
    net, (images, labels) = made("preact"), batch()
    routing, back = random(3).requires_grad_(), random(3, seed=1)
    copied = routing.detach().clone().requires_grad_()

    def join(i: int, skip: Tensor, residual: Tensor, _: Any) -> Tensor:
        value = copied[i, 0] * skip.detach() + copied[i, 1] * residual.detach()
        gradient = back[i, 0] * skip + back[i, 1] * residual
        return value + gradient - gradient.detach()

    F.cross_entropy(forward(net, images, join)[0], labels).backward()
    for backward in (back, back.tolist()):
        routing.grad = None
        F.cross_entropy(pathnet.routed(net, images, routing, backward), labels).backward()
        torch.testing.assert_close(routing.grad, copied.grad, rtol=1e-10, atol=1e-13)


# Penalties on gradients


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("kind", [*NETS, "in place"])
def test_a_routed_gradient_is_the_tapes(kind: str, bn: Any) -> None:
    torch.manual_seed(0)
    net, (images, labels) = shaken({**NETS, "in place": in_place}[kind]()), batch()
    tape = pathnet.record(net, images, labels, bn, "reference", "float64")
    backward = random(net.n, net.parts)
    own = pathnet.routed_gradient(in_float64(net, bn), images, labels, backward)
    assert relative_error(own.detach(), tape.routed_gradients(backward[None])[0]) < 1e-10
    output, y0 = forward(in_float64(net, bn), images, lambda i, s, f, _: s + f)
    ones = torch.ones(net.n, net.parts)
    full = pathnet.routed_gradient(in_float64(net, bn), images, labels, ones, lambda out, _: out.square().sum())
    if kind not in ("highway", "in place"):
        assert relative_error(full.detach(), torch.autograd.grad(output.square().sum(), y0)[0]) < 1e-10


@pytest.mark.parametrize("kind", ["preact", "highway", "join"])
@pytest.mark.parametrize("path", [(1, 0, 1), (0, 1, 0)])
def test_a_penalty_on_a_paths_gradient_has_its_whole_derivative(kind: str, path: tuple[int, ...]) -> None:
    """Against finite differences along a random direction in the space of all weights."""
    net, (images, labels) = made(kind), batch(2)
    backward = paths.routing(torch.tensor([path]))[0]
    for name, parameter in net.named_parameters():
        if name.endswith(".gate.weight"):  # constant gates, as paths have them
            nn.init.zeros_(parameter)

    def penalty() -> Tensor:
        return pathnet.routed_gradient(net, images, labels, backward).square().sum()

    penalty().backward()
    torch.manual_seed(1)
    slope, directions = 0.0, []
    moved = [parameter for name, parameter in net.named_parameters() if ".gate" not in name]
    for parameter in moved:
        directions.append(torch.randn_like(parameter))
        slope += 0.0 if parameter.grad is None else float((parameter.grad * directions[-1]).sum())
    values = []
    for step in (1e-7, -2e-7):
        with torch.no_grad():
            for parameter, direction in zip(moved, directions, strict=True):
                parameter.add_(direction, alpha=step)
        values.append(penalty().item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-4)


def test_second_derivatives_with_coefficients_apart_take_what_is_kept_back_for_a_constant() -> None:
    net, (images, labels) = made("preact"), batch(2)
    path = (1, 0, 1)
    other = copy.deepcopy(net)
    _, y0 = forward(net, images, lambda i, s, f, _: s + f)
    held: list[tuple[Tensor, Tensor]] = []
    y = y0
    for block in net.blocks:
        held.append((block.skip(y).detach(), block.residual(y).detach()))
        y = block(y)

    def join(i: int, skip: Tensor, residual: Tensor, _: Any) -> Tensor:
        return held[i][0] + residual if path[i] else skip + held[i][1]

    output, start = forward(other, images, join)
    (expected,) = torch.autograd.grad(F.cross_entropy(output, labels), start, create_graph=True)
    expected.square().sum().backward()
    kept: list[Tensor] = []
    net.stem.register_forward_hook(lambda module, given, output: kept.append(output))
    output = pathnet.routed(net, images, None, paths.routing(torch.tensor([path]))[0])
    (grad,) = torch.autograd.grad(F.cross_entropy(output, labels), kept[0], create_graph=True)
    grad.square().sum().backward()
    for name, parameter in net.named_parameters():
        theirs = other.get_parameter(name).grad
        if theirs is not None:
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-9, atol=1e-12)


# Compiled, in bfloat16, shared out


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["preact", "highway", "join"])
def test_one_program_serves_all_routings(compiling: None, kind: str, backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    net, (images, labels) = made(kind, "training"), batch()
    plain = copy.deepcopy(net)
    programs = CompileCounterWithBackend(backend)
    compiled = torch.compile(net, backend=programs, fullgraph=True)
    path = paths.routing(torch.tensor([[1, 0, 1]]))[0]
    for there in (random(3), random(3, seed=2), path, torch.ones(3, 2, dtype=torch.float64)):
        for back in (random(3, net.parts, 3), torch.ones(3, net.parts, dtype=torch.float64)):
            output, expected = (pathnet.routed(own, images, there, back) for own in (compiled, plain))
            torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
            own, theirs = gradients(net, output, labels), gradients(plain, expected, labels)
            for name, grad in own.items():
                other = theirs[name]
                if other is None:
                    assert grad is None or not grad.any(), name
                else:
                    torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-11)
    assert programs.frame_count == 1


def test_a_compiled_function_that_routes_breaks_no_graph(compiling: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    net, (images, labels) = made("preact"), batch()
    programs = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=programs, fullgraph=True)
    def loss(x: Tensor, routing: Tensor, backward: Tensor) -> Tensor:
        return F.cross_entropy(pathnet.routed(net, x, routing, backward), labels)

    for seed in range(3):
        routing, back = random(3, seed=seed).requires_grad_(), random(3, seed=seed + 9)
        loss(images, routing, back).backward()
        own, routing.grad = routing.grad, None
        F.cross_entropy(pathnet.routed(net, images, routing, back), labels).backward()
        torch.testing.assert_close(own, routing.grad, rtol=1e-9, atol=1e-12)
    assert programs.frame_count == 1


def test_under_autocast_coefficients_do_not_change_the_types() -> None:
    net, (images, labels) = made("preact").float(), batch()
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
        net, (images, labels) = made("preact"), batch(4)
        both = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        part = slice(2 * rank, 2 * rank + 2)
        found = []
        for routing in ROUTED:
            grads = gradients(
                net, pathnet.routed(both, images[part], routing, [[1, c] for _, c in routing]), labels[part]
            )
            found.append({name: None if grad is None else grad.clone() for name, grad in grads.items()})
        torch.save(found, folder / f"{rank}.pt")


def test_two_processes_share_out_a_routed_batch(tmp_path: Path) -> None:
    processes.run(one_of_two, tmp_path)
    net, (images, labels) = made("preact"), batch(4)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for routing, *shared in zip(ROUTED, *found, strict=True):
        expected = gradients(net, pathnet.routed(net, images, routing, [[1, c] for _, c in routing]), labels)
        for name, grad in expected.items():
            for own in shared:
                assert (own[name] is None) == (grad is None), name
                if grad is not None:
                    torch.testing.assert_close(own[name], grad, rtol=1e-10, atol=1e-13)
        assert any(grad is None for grad in expected.values())


# Refusals


@pytest.mark.parametrize("label", [-1, 99])
def test_a_gradient_of_labels_that_no_class_has_is_refused(label: int) -> None:
    net, (images, labels) = made("preact"), batch()
    with pytest.raises(ValueError, match=r"target: expected labels 0 to \d+, got"):
        pathnet.routed_gradient(net, images, torch.full_like(labels, label), torch.ones(3, 2))


def test_a_gradient_of_a_loss_that_is_not_finite_is_refused() -> None:
    net, (images, labels) = made("preact"), batch()
    with pytest.raises(ValueError, match="net: its loss on these inputs is nan"):
        pathnet.routed_gradient(
            net, images, labels, torch.ones(3, 2), lambda out, _: (out.sum() - out.sum()).sqrt() / 0
        )
    with pytest.raises(ValueError, match="x: expected finite values, got NaN or infinity"):
        pathnet.routed_gradient(net, images * torch.nan, labels, torch.ones(3, 2))
    with pytest.raises(ValueError, match="loss: expected one real number a batch"):
        pathnet.routed_gradient(net, images, labels, torch.ones(3, 2), lambda out, _: out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(3, 4), r"expected shape \[3, 2\] for 3 blocks, got \[3, 4\]"),
        (torch.ones(2, 2), r"expected shape \[3, 2\] for 3 blocks, got \[2, 2\]"),
        (torch.ones(1, 3, 2), r"expected shape \[3, 2\] for 3 blocks, got \[1, 3, 2\]"),
        (torch.ones(3, 3), r"expected shape \[3, 2\] for 3 blocks, got \[3, 3\]"),
        (torch.ones(3, 2, dtype=torch.int64), r"expected a floating-point tensor, got torch\.int64"),
        (torch.full((3, 2), torch.nan), "expected coefficients that are finite in float32"),
        ([[1, 1], [1, 1], [1, 1e300]], "expected coefficients that are finite in float32"),
        ("ones", "expected a tensor or nested numbers, got 'ones'"),
        ([[1, 1], [1]], r"expected a tensor or nested numbers, got a list"),
    ],
)
def test_bad_coefficients_are_named(given: Any, message: str) -> None:
    net, (images, _) = made("preact"), batch()
    with pytest.raises(ValueError, match=f"routing: {message}"):
        pathnet.routed(net, images, given)
    with pytest.raises(ValueError, match=f"backward: {message}"):
        pathnet.routed(net, images, None, given)
    with pytest.raises(ValueError, match=f"backward: {message}"):
        pathnet.routed_gradient(net, images, torch.zeros(3, dtype=torch.int64), given)
    with pytest.raises(ValueError, match=f"routing: {message}"):
        net(images, routing=given)


def test_other_bad_arguments_are_named() -> None:
    net, (images, labels) = made("highway"), batch()
    with pytest.raises(ValueError, match=r"routing: expected shape \[3, 2\] or \[3, 3\] for 3 blocks"):
        pathnet.routed(net, images, torch.ones(3, 1))
    with pytest.raises(ValueError, match="drawn: expected None with a routing"):
        net(images, [True] * 3, torch.ones(3, 2))
    with pytest.raises(ValueError, match="net: expected a pathnet ResidualNet, or one wrapped, got a Sequential"):
        pathnet.routed(nn.Sequential(net), images, torch.ones(3, 2))
    with pytest.raises(ValueError, match="net: expected a pathnet ResidualNet, got a Sequential"):
        pathnet.routed_gradient(nn.Sequential(net), images, labels, torch.ones(3, 2))  # type: ignore[arg-type]
