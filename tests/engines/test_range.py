"""Modules that shrink a gradient beyond float32's range at once, or let it grow beyond it; losses that do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import Case, faint, measured_net, post_activation_net
from helpers.judging import TOLERANCES, check, check_sums, random_routings
from helpers.oracles import detach_loop, in_float64
from torch import Tensor, nn

import pathnet
from pathnet import native, scaling
from pathnet.engines import magnitudes
from pathnet.engines.tables import UnitColumn, tables
from pathnet.models import ResidualNet

GROWTH = {"running": 20, "batch": 0}
"""Exponents of growth by BN mode. None in ``batch``: values that grow on top of a bias would leave nothing of the
normalised ones in float32."""

needs_cpu = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def faint_net(kind: str, seed: int, bn: str) -> tuple[ResidualNet, Tensor, Tensor]:
    net, images, labels = measured_net(seed, small=True) if kind == "pre" else post_activation_net(seed, bn)
    return faint(net, seed, GROWTH[bn]), images, labels


@needs_cpu
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("seed", range(6))
def test_the_cpu_engine_keeps_what_a_module_shrinks(seed: int, kind: str, bn: Any, precision: Any) -> None:
    net, images, labels = faint_net(kind, seed, bn)
    tape = pathnet.record(net, images, labels, bn=bn, engine="cpu", precision=precision)
    check(tape, random_routings(net.n, seed), precision)
    check_sums(tape, torch.ones(net.n, 2), precision)


@needs_cpu
def test_without_dividing_the_same_gradients_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show that the test above can fail."""
    monkeypatch.setattr(magnitudes, "ORDINARY", 10_000)
    net, images, labels = faint_net("pre", 0, "running")
    tape = pathnet.record(net, images, labels, engine="cpu")
    assert (tape.path_gradient_norms(torch.ones(1, net.n, dtype=torch.uint8)) == 0).all()


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize(
    ("case", "seed"), [(Case("basic", 8), 0), (Case("bottleneck", 11, block="bottleneck", width=6), 1)]
)
@pytest.mark.parametrize("engine", ["reference", "autograd"])
def test_engines_for_any_network_keep_what_a_module_shrinks(case: Case, seed: int, bn: Any, engine: str) -> None:
    net = faint(case.net(), seed)
    images, labels = case.images()
    routing = random_routings(net.n, 0)
    exact = pathnet.record(net, images, labels, bn=bn, engine="reference", precision="float64")
    walked = pathnet.record(net, images, labels, bn=bn, engine=engine)
    expected = exact.routed_gradients(routing).flatten(2).norm(dim=2)
    assert (expected[expected > 0].log10() < -40).any()
    actual = walked.routed_gradients(routing).flatten(2).norm(dim=2)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)
    sums = walked.gradient_by_length().flatten(2).norm(dim=2)
    torch.testing.assert_close(sums, exact.gradient_by_length().flatten(2).norm(dim=2), rtol=1e-3, atol=0)


def test_float64_itself_equals_the_detach_loop_there() -> None:
    net = faint(Case("basic", 8).net(), 0)
    images, labels = Case("basic", 8).images()
    tape = pathnet.record(net, images, labels, engine="reference", precision="float64")
    for b in pathnet.paths.enumerate_all(net.n):
        expected = detach_loop(in_float64(net, "running"), images.double(), labels, b.tolist())
        torch.testing.assert_close(tape.path_gradients(b[None])[0], expected, rtol=1e-10, atol=0)


@needs_cpu
@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("factor", [1e-10, 2e-20])
def test_relu_bits_of_the_faintest_activations_are_those_of_float64(factor: float, bn: Any) -> None:
    """Activations of 1e-40 are denormal in float32, and still of one sign or the other."""
    net, denormal = Case("basic", 14).net(), 0
    with torch.no_grad():
        for block in net.blocks:
            for norm in block.bns:
                norm.weight *= factor
                norm.bias.zero_()
                norm.running_mean.zero_()
    images, labels = Case("basic", 14).images()
    tape, exact = pathnet.record(net, images, labels, bn=bn, engine="cpu"), in_float64(net, bn)
    y = exact.stem(images.double())
    for block, bits in zip(exact.blocks, tape._record.walk.bits(), strict=True):  # type: ignore[attr-defined]
        x = y
        for norm, conv, recorded in zip(block.bns, block.convs, bits, strict=True):
            z = norm(x)
            sure = (z.abs() > 1e-3 * z.abs().mean()) & (z.abs() > 1e-42)
            assert torch.equal(recorded[sure], (z > 0)[sure])
            denormal += int((z[sure].abs() < torch.finfo(torch.float32).tiny).sum())
            x = conv(z.relu())
        y = block(y)
    assert bn == "batch" or factor > 1e-15 or denormal > 100


@pytest.mark.parametrize("seed", range(4))
def test_dividing_is_by_powers_of_two_and_leaves_ordinary_networks_alone(seed: int) -> None:
    for kind in ("pre", "post"):
        net, images, _ = measured_net(seed) if kind == "pre" else post_activation_net(seed)
        whole = tables(net, "running", net.stem(images).shape[1:])
        assert magnitudes.divided(whole).tables is whole
        whole = tables(faint(net, seed), "running", net.stem(images).shape[1:])
        back = magnitudes.divided(whole)
        units = whole.units.tolist()
        for unit, weight, scale in zip(units, back.weights.tolist(), back.scales.tolist(), strict=True):
            channels, begin = unit[UnitColumn.CHANNELS], unit[UnitColumn.WEIGHTS]
            part = slice(begin, begin + channels * unit[UnitColumn.OUT_CHANNELS] * unit[UnitColumn.KERNEL] ** 2)
            assert torch.equal(back.tables.weights[part].double() * 2.0**weight, whole.weights[part].double())
            if unit[UnitColumn.SCALES] >= 0:
                part = slice(unit[UnitColumn.SCALES], unit[UnitColumn.SCALES] + channels)
                assert torch.equal(back.tables.scales[part].double() * 2.0**scale, whole.scales[part].double())


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "large": lambda output, target: F.cross_entropy(output.double(), target) * 1e300,
        "tiny": lambda output, target: F.cross_entropy(output.double(), target) * 1e-300,
        "uneven": lambda output, target: (
            F.cross_entropy(output.double(), target, reduction="none")
            * torch.tensor([1e200, 1, 1e-200], dtype=torch.float64)
        ).sum(),
    }


@pytest.mark.parametrize("engine", ["reference", "autograd", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("name", ["large", "tiny", "uneven"])
def test_a_loss_in_float64_may_leave_float32s_range(name: str, bn: Any, engine: str) -> None:
    case, loss = Case("basic", 8), losses()[name]
    net, (images, labels) = case.net(), case.images()
    b = torch.tensor([[0, 1, 0], [1, 1, 1]])
    exact = pathnet.record(net, images, labels, bn=bn, engine="reference", precision="float64", loss=loss)
    tape = pathnet.record(net, images, labels, bn=bn, engine=engine, loss=loss)
    expected, actual = exact.path_gradients(b, scaled=True), tape.path_gradients(b, scaled=True)
    norms, truth = (grads[0].double().flatten(2).norm(dim=2) for grads in (actual, expected))
    assert (truth > 0).all()
    powers = (actual[1] - expected[1]).flatten(1).double()
    torch.testing.assert_close((norms * 2**powers), truth, rtol=2e-2 if bn == "batch" else 1e-3, atol=0)


def test_a_faint_loss_in_float16_keeps_its_gradient() -> None:
    """1e-8 is zero in float16, and 1e-8 times 2^15 is not."""
    case, b = Case("basic", 8), torch.ones(1, 3, dtype=torch.uint8)
    net, (images, labels) = case.net(), case.images()
    norms = [
        pathnet.record(
            net,
            images,
            labels,
            engine="reference",
            loss=lambda output, target, dtype=dtype: F.cross_entropy(output, target).to(dtype) * 1e-8,
        ).path_gradient_norms(b)
        for dtype in (torch.float16, torch.float32)
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_a_loss_whose_gradient_is_nan_is_refused(bn: Any) -> None:
    net, (images, labels) = Case("basic", 8).net(), Case("basic", 8).images()

    with pytest.raises(ValueError, match=r"^loss: expected a finite gradient .* got NaN or infinity$"):
        pathnet.record(net, images, labels, bn=bn, engine="reference", loss=root_of_zero)


def root_of_zero(output: Tensor, target: Tensor) -> Tensor:
    return (output * 0).square().sum().sqrt()


def constant(output: Tensor, target: Tensor) -> Tensor:
    return torch.tensor(1.0)


LOSSES = {
    root_of_zero: "expected a finite gradient at the network's output, got NaN or infinity",
    constant: "expected a differentiable function of the output, got one that is constant",
}
USES: dict[str, Callable[[ResidualNet, Tensor, Tensor, Any], object]] = {
    "record": lambda net, images, labels, loss: pathnet.record(net, images, labels, engine="reference", loss=loss),
    "routed_gradient": lambda net, images, labels, loss: pathnet.routed_gradient(
        net, images, labels, torch.ones(net.n, 2), loss
    ),
    "rank": lambda net, images, labels, loss: pathnet.lesion.rank(net, [(images, labels)], loss),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_without_a_gradient_is_refused_wherever_it_is_used(use: str, loss: Any) -> None:
    net, (images, labels) = Case("basic", 8).net(), Case("basic", 8).images()
    with pytest.raises(ValueError, match=f"^loss: {LOSSES[loss]}$"):
        USES[use](net, images, labels, loss)


def test_a_sample_that_fits_all_but_perfectly_keeps_its_gradient() -> None:
    """Check a loss in float64: in float32 the gradient of its cross-entropy, 1e-60, would be 0."""
    net, (images, labels) = Case("basic", 8).net(), Case("basic", 8).images()
    with torch.no_grad():
        net.head.linear.weight[labels[0]] += 60 * torch.sign(net.head[:4](walked(net, images))[0])
    exact = pathnet.record(net, images, labels, engine="reference", precision="float64")
    tape = pathnet.record(net, images, labels, engine="reference")
    b = torch.ones(1, net.n, dtype=torch.uint8)
    expected = exact.path_gradient_norms(b, per_sample=True)[0, 0]
    assert 0 < expected < 1e-45
    torch.testing.assert_close(tape.path_gradient_norms(b, per_sample=True)[0, 0], expected, rtol=0.2, atol=0)


def walked(net: ResidualNet, images: Tensor) -> Tensor:
    y = net.stem(images)
    for block in net.blocks:
        y = block(y)
    return y


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def test_lifted_coefficients_stay_in_range() -> None:
    """Both branches of a block count in sums by length, though one be 2^160 times the other."""
    shares = magnitudes.Magnitudes(torch.tensor([[0, -150], [0, 10], [0, 0]]))
    routing, exponents = shares.of_sums(torch.ones(3, 2))
    assert routing.dtype == torch.float32 and (routing > 1e-38).all() and (routing < 1e20).all()
    powers = torch.log2(routing.double()) + torch.tensor([[-60.0], [10.0], [0.0]])
    assert torch.equal(powers, shares.branches.double()) and exponents.tolist() == [[-50]]
    codes = pathnet.paths.routing(torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.float32)
    routing, exponents = shares.of_routing(codes)
    assert torch.equal(routing, codes) and exponents.tolist() == [-140, 0]
    assert torch.equal(scaling.times_power_of_two(torch.ones(2), exponents)[1:], torch.ones(1))


@needs_cpu
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", ["running", "batch"])
def test_dividing_changes_no_bit_of_an_ordinary_network(
    bn: Any, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images, labels = measured_net(5, small=True)
    b = pathnet.paths.enumerate_all(net.n)[:32]
    plain = pathnet.record(net, images, labels, bn=bn, engine="cpu", precision=precision)
    monkeypatch.setattr(magnitudes, "ORDINARY", -1)
    back = pathnet.record(net, images, labels, bn=bn, engine="cpu", precision=precision)
    assert back._record.walk.magnitudes is not None  # type: ignore[attr-defined]
    assert torch.equal(plain.path_gradient_norms(b, per_sample=True), back.path_gradient_norms(b, per_sample=True))
    assert torch.equal(plain.path_gradients(b), back.path_gradients(b))


@pytest.mark.parametrize("engine", ["reference", "autograd", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.Conv2d])
def test_a_module_may_shrink_a_gradient_by_1e_60_at_once(kind: type[nn.Module], engine: str) -> None:
    """Check the recorder's promise; the ReLU bits are those of the network with the larger factors."""
    net, (images, labels) = Case("basic", 8).net(), Case("basic", 8).images()
    plain = pathnet.record(net, images, labels, engine="reference", precision="float64")
    for block in net.blocks:
        for module in block.modules():
            if isinstance(module, kind) and module is not block.projection:
                module.weight.data *= 2.0**-100  # type: ignore[operator]
            if isinstance(module, nn.BatchNorm2d):
                # So that the next ReLU's bits do not depend on the smaller factors.
                nn.init.ones_(module.bias) if kind is nn.Conv2d else module.bias.data.mul_(2.0**-100)
    tape = pathnet.record(net, images, labels, engine=engine)
    exact = pathnet.record(net, images, labels, engine="reference", precision="float64")
    b = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.uint8)
    expected = exact.path_gradient_norms(b)
    torch.testing.assert_close(tape.path_gradient_norms(b), expected, rtol=1e-4, atol=0)
    ratio = expected[:3] / plain.path_gradient_norms(b[:3])
    assert ((ratio > 0) & (ratio < 1e-55)).any()


@pytest.mark.parametrize("engine", ["reference", "autograd", pytest.param("cpu", marks=needs_cpu)])
def test_coefficients_at_the_ends_of_float32_leave_gradients_in_range(engine: str) -> None:
    net, (images, labels) = Case("basic", 14).net(), Case("basic", 14).images()
    routing = torch.ones(4, net.n, 2)
    routing[0] *= 3e38
    routing[1] *= 1e-37
    routing[2, ::2] *= 3e38
    routing[3, 1] = torch.tensor([1e-37, 3e38])
    exact = pathnet.record(net, images, labels, engine="reference", precision="float64")
    tape = pathnet.record(net, images, labels, engine=engine)
    torch.testing.assert_close(
        tape.routed_gradients(routing).flatten(1).norm(dim=1),
        exact.routed_gradients(routing).flatten(1).norm(dim=1),
        rtol=1e-4,
        atol=0,
    )
