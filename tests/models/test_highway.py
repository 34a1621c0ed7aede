"""Highway networks: a block's Jacobian has three parts, skip, residual module and gate; and deletion."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import shaken
from helpers.oracles import in_float64, relative_error
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet
from pathnet import lesion, models
from pathnet.models import HighwayBlock, ResidualNet

SKIP, RESIDUAL, GATE = range(3)
MODES = ["running", "batch"]
SHORTCUTS = ["projection", "pad"]


def network(depth: int = 8, shortcut: str = "projection") -> ResidualNet:
    """Return a network of three blocks, or six at depth 14, whose gates depend on their input, around one half."""
    torch.manual_seed(0)
    net = shaken(models.highway(depth, 4, num_classes=5, shortcut=shortcut)).eval()  # type: ignore[arg-type]
    for block in net:
        nn.init.normal_(block.gate.weight, 0, 0.5)
        nn.init.normal_(block.gate.bias)
    return net


def batch(side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, side, side, generator=generator), torch.randint(0, 5, (3,), generator=generator)


def parts(block: HighwayBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return t, s and f of equation 3 of the paper."""
    first_bn, second_bn = block.bns
    first = F.relu(first_bn(x))
    t = 1 / (1 + torch.exp(-F.conv2d(first, block.gate.weight, block.gate.bias, block.stride)))
    f = F.conv2d(first, block.convs[0].weight, None, block.stride, 1)
    f = F.conv2d(F.relu(second_bn(f)), block.convs[1].weight, None, 1, 1)
    if block.projection is not None:
        return t, F.conv2d(first, block.projection.weight, None, block.stride), f
    if block.pad:
        return t, F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, f.shape[1] - x.shape[1])), f
    return t, x, f


def gradients(net: ResidualNet, bn: str, routes: list[tuple[int, ...] | None], side: int = 8) -> Tensor:
    """Return the gradient at y_0 along each route, float64 [R, *y0.shape].

    A route names one part per block; the other parts are detached. None stands for the ordinary gradient.
    """
    net = in_float64(net, bn)
    images, labels = batch(side)
    grads: list[Tensor] = []
    for route in routes:
        y = y0 = net.stem(images.double())
        for i, block in enumerate(net.blocks):
            t, s, f = parts(block, y)
            if route is None:
                y = t * f + (1 - t) * s
            elif route[i] == SKIP:
                y = (1 - t.detach()) * s + (t * f).detach()
            elif route[i] == RESIDUAL:
                y = t.detach() * f + ((1 - t) * s).detach()
            else:
                y = t * (f - s).detach() + s.detach()
        grads += torch.autograd.grad(F.cross_entropy(net.head(y), labels), y0)
    return torch.stack(grads)


def tape(net: ResidualNet, bn: str, side: int = 8) -> pathnet.Tape:
    return pathnet.record(net, *batch(side), bn, "reference", "float64")  # type: ignore[arg-type]


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("bn", MODES)
def test_every_route_through_the_three_parts_and_their_sum(bn: str, shortcut: str) -> None:
    net, side = network(shortcut=shortcut), 7
    routes: list[tuple[int, ...] | None] = list(itertools.product(range(3), repeat=3))
    expected = gradients(net, bn, [*routes, None], side)
    routing = F.one_hot(torch.tensor(routes), 3).double()
    recorded = tape(net, bn, side)
    grads = recorded.routed_gradients(routing)
    for grad, truth, route in zip(grads, expected, routes, strict=False):
        assert relative_error(grad, truth) < EXACT_WALK, route
    ordinary = expected[-1]
    assert relative_error(grads.sum(0), ordinary) < EXACT_WALK
    assert relative_error(recorded.gradient(), ordinary) < EXACT_WALK
    assert relative_error(recorded.routed_gradients(torch.ones(1, 3, 3))[0], ordinary) < EXACT_WALK
    # Two coefficients per block leave out the gates, whose part is not small.
    frozen = recorded.routed_gradients(torch.ones(1, 3, 2))[0]
    without_gates = [grad for grad, route in zip(grads, routes, strict=True) if GATE not in (route or ())]
    assert relative_error(frozen, torch.stack(without_gates).sum(0)) < EXACT_WALK
    assert relative_error(frozen, ordinary) > 0.05


@pytest.mark.parametrize("bn", MODES)
def test_every_path_through_frozen_gates(bn: str) -> None:
    net = network(14)
    paths = torch.tensor(list(itertools.product(range(2), repeat=6)), dtype=torch.uint8)
    expected = gradients(net, bn, [tuple(path) for path in paths.tolist()])
    recorded = tape(net, bn)
    grads = recorded.path_gradients(paths)
    for grad, truth in zip(grads, expected, strict=True):
        assert relative_error(grad, truth) < EXACT_WALK
    norms = recorded.path_gradient_norms(paths)
    torch.testing.assert_close(norms, expected.flatten(1).norm(dim=1), rtol=EXACT_WALK, atol=0)
    # The remainder of the ordinary gradient passes at least one gate.
    (ordinary,) = gradients(net, bn, [None])
    routings = torch.zeros(6, 6, 3, dtype=torch.float64)
    for i, routing in enumerate(routings):
        # The first gate on the route is that of block i: both branches before it, all parts after it.
        routing[:i], routing[i, GATE], routing[i + 1 :] = torch.tensor([1.0, 1.0, 0.0]), 1, 1
    through_gates = recorded.routed_gradients(routings)
    assert relative_error(grads.sum(0) + through_gates.sum(0), ordinary) < EXACT_WALK


@pytest.mark.parametrize("bn", MODES)
def test_a_branch_computed_alone_equals_the_one_computed_with_the_other(bn: str) -> None:
    net = in_float64(network(14), bn)
    x = net.stem(batch()[0].double()).detach().requires_grad_()
    for block in net.blocks:
        t, s, f = parts(block, x)
        expected = ((1 - t.detach()) * s, t.detach() * f)
        alone = (block.skip(x), block.residual(x))
        for by_itself, together, truth in zip(alone, block.branches(x), expected, strict=True):
            grad = torch.randn_like(truth)
            (jacobian,) = torch.autograd.grad(truth, x, grad, retain_graph=True)
            for branch in (by_itself, together):
                assert relative_error(branch.detach(), truth.detach()) < EXACT_WALK
                assert (
                    relative_error(torch.autograd.grad(branch, x, grad, retain_graph=True)[0], jacobian) < EXACT_WALK
                )
        x = block(x).detach().requires_grad_()


@pytest.mark.parametrize("bn", MODES)
def test_coefficients_multiply_the_parts(bn: str) -> None:
    net, generator = network(), torch.Generator().manual_seed(2)
    routings = torch.randn(4, 3, 3, dtype=torch.float64, generator=generator)
    routes = list(itertools.product(range(3), repeat=3))
    by_route = gradients(net, bn, list(routes))
    for routing, grad in zip(routings, tape(net, bn).routed_gradients(routings), strict=True):
        weights = torch.stack([routing[torch.arange(3), torch.tensor(route)].prod() for route in routes])
        assert relative_error(grad, torch.einsum("r,r...->...", weights, by_route)) < EXACT_WALK


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("bn", MODES)
def test_a_gate_at_one_half_is_a_residual_network_with_halved_branches(bn: str, shortcut: str) -> None:
    """Check this also for paths, each with a factor of 1/2 per block; nothing flows through the gates."""
    net = network(14, shortcut)
    for block in net:
        nn.init.zeros_(block.gate.weight)
        nn.init.zeros_(block.gate.bias)
    plain = models.preact_resnet(14, 4, num_classes=5, shortcut=shortcut)  # type: ignore[arg-type]
    plain.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if ".gate." not in name})
    residual_net = in_float64(plain, bn)
    images, labels = batch()

    def halved(path: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        """Return the output, and the gradient along a path with the branch's factor left out, or the ordinary one."""
        y = y0 = residual_net.stem(images.double())
        for i, block in enumerate(residual_net.blocks):
            skip, residual = block.skip(y), block.residual(y)
            y = (skip + residual) / 2
            if path is not None:
                branch = residual if path[i] else skip
                y = branch + (y - branch).detach()
        output = residual_net.head(y)
        return output.detach(), torch.autograd.grad(F.cross_entropy(output, labels), y0)[0]

    recorded = tape(net, bn)
    output, ordinary = halved(None)
    assert relative_error(recorded.output, output) < EXACT_WALK
    assert relative_error(recorded.gradient(), ordinary) < EXACT_WALK
    paths = list(itertools.product(range(2), repeat=6))
    grads = recorded.path_gradients(torch.tensor(paths))
    for grad, path in zip(grads, paths, strict=True):
        assert relative_error(grad, halved(path)[1] * 2.0**-6) < EXACT_WALK
    assert relative_error(grads.sum(0), ordinary) < EXACT_WALK


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_deleted_block_passes_its_input_on_whatever_its_gate(shortcut: str) -> None:
    net = network(14, shortcut)
    images, _ = batch()
    with torch.no_grad():
        for deleted in range(6):
            y = net.stem(images)
            for i, block in enumerate(net.blocks):
                t, s, f = parts(block, y)
                if i == deleted:
                    torch.testing.assert_close(block.lesioned(y), s)
                    assert (s is y) == (i not in (2, 4))
                y = s if i == deleted else t * f + (1 - t) * s
            torch.testing.assert_close(lesion.delete(net, [deleted])(images), net.head(y))
            drawn = [i != deleted for i in range(6)]
            torch.testing.assert_close(net(images, drawn), net.head(y))


def test_training_leaves_out_the_gates_of_blocks_that_are_not_drawn() -> None:
    net = network(14).train()
    images, labels = batch()
    drawn = [True, False, True, False, True, False]
    F.cross_entropy(net(images, drawn), labels).backward()
    for block, is_drawn in zip(net, drawn, strict=True):
        assert (block.gate.weight.grad is not None) == is_drawn == (block.convs[0].weight.grad is not None)


def test_initial_gates_depend_on_their_bias_alone() -> None:
    net = models.highway(14, 4, gate_bias=-3.0)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        openness = net.blocks[0].openness(x)
        torch.testing.assert_close(openness, torch.full((2, 4, 8, 8), 1 / (1 + torch.e**3)))
        assert network().blocks[1].openness(x).shape == (2, 8, 4, 4)
        torch.testing.assert_close(network().blocks[1].openness(x), parts(network().blocks[1], x)[0])


def test_the_autograd_engine_runs_gates_with_a_warning_why_other_engines_cannot() -> None:
    net, (images, labels) = network(), batch()
    with pytest.warns(RuntimeWarning, match="'autograd' was chosen; .*block 0: its gate multiplies"):
        assert pathnet.record(net, images, labels).engine == "autograd"


def test_routings_of_the_wrong_shape_are_named() -> None:
    recorded = tape(network(), "running")
    with pytest.raises(ValueError, match=r"routing: expected shape \[P, 3, 2\] or \[P, 3, 3\] for 3 blocks, got"):
        recorded.routed_gradients(torch.ones(1, 3, 4))
    plain = models.preact_resnet(8, 4, num_classes=5).eval()
    with pytest.raises(ValueError, match=r"routing: expected shape \[P, 3, 2\] for 3 blocks, got \[1, 3, 3\]"):
        tape(plain, "running").routed_gradients(torch.ones(1, 3, 3))
    with pytest.raises(ValueError, match=r"routing: expected shape \[P, 3, 2\]"):
        pathnet.Recorder(network(), "running", "reference").routed_outputs(batch()[0], torch.ones(1, 3, 3))


def test_routed_outputs_use_the_actual_gates() -> None:
    net, (images, _) = network(), batch()
    routings = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(3))
    # A branch with coefficient 0 is not computed.
    routings[2, :, 0], routings[3, :, 1] = 0, 0
    outputs = pathnet.Recorder(net, "running", "reference", "float64").routed_outputs(images, routings)
    net = in_float64(net, "running")
    with torch.no_grad():
        for routing, output in zip(routings.double(), outputs, strict=True):
            y = net.stem(images.double())
            for block, (a, c) in zip(net.blocks, routing, strict=True):
                t, s, f = parts(block, y)
                y = a * (1 - t) * s + c * t * f
            assert relative_error(output, net.head(y)) < EXACT_WALK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 9}, r"depth: basic blocks need a depth of 6n \+ 2"),
        ({"shortcut": "none"}, "shortcut: expected 'projection' or 'pad' or 'pad_around', got 'none'"),
        ({"width": 0}, "width: expected an integer from 1 to 65536, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.highway(**arguments)  # type: ignore[arg-type]
