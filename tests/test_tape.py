"""Promises of a tape besides the mathematics: range, exactness, snapshots, choice of engine, clear errors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import SMALL, Case
from helpers.oracles import autograd, relative_error
from torch import Tensor, nn

import pathnet
from pathnet import native, scaling
from pathnet.models import Block, ResidualNet, fingerprint
from pathnet.recording import cross_entropy

CASE = SMALL[1]

needs_native = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)
ENGINES = ["reference", pytest.param("cpu", marks=needs_native)]


def identity_net(n: int, residual: Callable[[], nn.Module]) -> ResidualNet:
    class Plain(Block):
        def __init__(self) -> None:
            super().__init__()
            self.f = residual()

        def residual(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.f(x))

    return ResidualNet(nn.Identity(), [Plain() for _ in range(n)], nn.Flatten())


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).sum()


class TimesTenToTheMinusTen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e-10


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_norm_of_1e_minus_200_keeps_its_relative_precision(precision: Any) -> None:
    net = identity_net(30, TimesTenToTheMinusTen)
    images, target = torch.randn(2, 1, 3, 3), torch.randn(2, 9)
    tape = pathnet.record(net, images, target, loss=squares, engine="reference", precision=precision)
    codes = pathnet.paths.sample(30, 20, count=3)
    factor = float(torch.tensor(1e-10)) if precision == "float32" else 1e-10
    expected = target.double().norm() * factor**20
    assert 1e-201 < expected < 1e-198
    tolerance = 1e-5 if precision == "float32" else 1e-12
    torch.testing.assert_close(tape.path_gradient_norms(codes), expected.expand(3), rtol=tolerance, atol=0)
    torch.testing.assert_close(
        tape.path_gradient_norms(codes, per_sample=True),
        (target.double().norm(dim=1) * factor**20).expand(3, 2),
        rtol=tolerance,
        atol=0,
    )
    mantissa, exponent = tape.path_gradients(codes, scaled=True)
    assert mantissa.abs().max() < 1 <= 2 * mantissa.abs().max()
    torch.testing.assert_close(torch.ldexp(mantissa.double(), exponent), tape.path_gradients(codes), rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_long_paths_of_a_deep_network_underflow_nowhere(engine: str) -> None:
    case = Case("deep", 110, width=2, side=8, batch=2)
    net, (images, labels) = case.net(), case.images()
    for block in net.blocks:
        block.convs[-1].weight.data.mul_(2.0**-13)
    codes = pathnet.paths.sample(54, 51, count=2)
    truth = pathnet.record(net, images, labels, precision="float64").path_gradient_norms(codes)
    assert 0 < truth.max() < 1e-150
    norms = pathnet.record(net, images, labels, engine=engine).path_gradient_norms(codes)
    torch.testing.assert_close(norms, truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_all_skip_path_through_identities_returns_the_incoming_gradient_bit_for_bit(engine: str) -> None:
    class Trunk(Block):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def residual(self, x: Tensor) -> Tensor:
            return self.block.residual(x)

        def form(self) -> Any:
            return self.block.form()

    whole, (images, labels) = CASE.net(), CASE.images()
    net = ResidualNet(whole.stem, [Trunk(whole.blocks[i]) for i in (0, 1)], whole.head)
    net.head.bn, net.head.linear = nn.BatchNorm2d(4).eval(), nn.Linear(4, 5)
    tape = pathnet.record(net, images, labels, engine=engine)
    y2 = net.blocks[1](net.blocks[0](net.stem(images))).detach().requires_grad_()
    (incoming,) = torch.autograd.grad(cross_entropy(net.head(y2), labels), y2)
    walked = tape.path_gradients(torch.zeros(1, 2, dtype=torch.uint8))[0]
    recorded = scaling.value(tape._record.start.mantissa[None], tape._record.start.exponent[None])[0]
    assert recorded.abs().max() > 0 and torch.equal(walked, recorded)
    # The engine's forward pass led to it.
    assert relative_error(recorded, incoming.double()) < 1e-6


def test_a_post_activation_join_is_passed_by_both_branches() -> None:
    class PostActivation(Block):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def residual(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.conv(x))

        def join(self, z: Tensor) -> Tensor:
            return F.relu(z)

    torch.manual_seed(0)
    net = ResidualNet(nn.Identity(), [PostActivation() for _ in range(4)], nn.Flatten())
    images, target = torch.randn(3, 2, 5, 5), torch.randn(3, 50)
    tape = pathnet.record(net, images, target, loss=squares, precision="float64")
    for code in pathnet.paths.enumerate_all(4):
        y0 = images.double().requires_grad_()
        y = y0
        double = pathnet.models.residual_net.ResidualNet(net.stem, list(net.blocks), net.head).double()
        for bit, block in zip(code, double.blocks, strict=True):
            s, f = y, block.conv(y)
            y = F.relu(s.detach() + f if bit else s + f.detach())
        (expected,) = torch.autograd.grad(squares(y.flatten(1), target), y0)
        assert relative_error(tape.path_gradients(code[None])[0], expected) < 1e-10


@pytest.mark.parametrize("after_the_addition", [False, True])
def test_in_place_relus(after_the_addition: bool) -> None:
    """At the start of a residual module, a head and a stem; or after the addition, as in torchvision's networks."""

    class InPlace(Block):
        def __init__(self) -> None:
            super().__init__()
            first = nn.Identity() if after_the_addition else nn.ReLU(inplace=True)
            self.f = nn.Sequential(first, nn.Conv2d(4, 4, 3, padding=1))

        def residual(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.f(x))

        def join(self, z: Tensor) -> Tensor:
            return z.relu_() if after_the_addition else z

    torch.manual_seed(0)
    stem = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3))
    first = nn.Identity() if after_the_addition else nn.ReLU(inplace=True)
    head = nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net, (images, labels) = ResidualNet(stem, [InPlace() for _ in range(3)], head), CASE.images()
    tape = pathnet.record(net, images, labels, precision="float64", at="image")
    leaf = images.double().requires_grad_()
    loss = F.cross_entropy(copy.deepcopy(net).double()(leaf.clone()), labels)
    assert relative_error(tape.gradient(), torch.autograd.grad(loss, leaf)[0]) < 1e-10
    assert relative_error(tape.path_gradients(pathnet.paths.enumerate_all(3)).sum(0), tape.gradient()) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_mode_changes_nothing(engine: str, mode: Callable[[], Any]) -> None:
    net, (images, labels) = CASE.net(), CASE.images()
    codes = pathnet.paths.enumerate_all(6)[::7]
    for at in ("y0", "image", "stem_weight"):
        expected = pathnet.record(net, images, labels, engine=engine, at=at).path_gradient_norms(codes)  # type: ignore[arg-type]
        with mode():
            made_here = images.clone(), labels.clone()
            tape = pathnet.record(net, *made_here, engine=engine, at=at)  # type: ignore[arg-type]
            assert torch.equal(tape.path_gradient_norms(codes), expected)


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_the_network_is_left_as_it_was_and_later_changes_do_not_reach_the_tape(bn: Any) -> None:
    net, (images, labels) = CASE.net(), CASE.images()
    net.train()
    before = fingerprint(net)
    tape = pathnet.record(net, images, labels, bn=bn, engine="reference", at="image")
    codes = pathnet.paths.enumerate_all(6)[::7]
    norms = tape.path_gradient_norms(codes)
    assert fingerprint(net) == before and net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    images.neg_()
    for parameter in net.parameters():
        parameter.data.zero_()
    assert torch.equal(tape.path_gradient_norms(codes), norms)


@pytest.mark.parametrize("engine", ENGINES)
def test_results_do_not_depend_on_how_paths_are_grouped(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (images, labels) = CASE.net(), CASE.images()
    tape = pathnet.record(net, images, labels, engine=engine)
    codes = pathnet.paths.enumerate_all(6)
    whole = tape.path_gradients(codes)
    monkeypatch.setattr("pathnet.chunks.CHUNK_BYTES", 40_000)
    assert torch.equal(tape.path_gradients(codes), whole)
    assert torch.equal(tape.path_gradients(codes.flip(0)).flip(0), whole)
    assert tape.path_gradients(codes[:0]).shape == (0, *whole.shape[1:])
    assert tape.path_gradient_norms(codes[:0]).shape == (0,)


def test_any_differentiable_loss() -> None:
    net, (images, _) = CASE.net(), CASE.images()
    target = torch.randn(3, 5)
    tape = pathnet.record(net, images, target, precision="float64", loss=lambda o, t: F.mse_loss(o, t.double()))
    double = CASE.net().double()
    y0 = double.stem(images.double()).detach().requires_grad_()
    y = y0
    for block in double.blocks:
        y = block(y)
    loss = F.mse_loss(double.head(y), target.double())
    assert relative_error(tape.gradient(), torch.autograd.grad(loss, y0)[0]) < 1e-10
    assert tape.loss == pytest.approx(loss.item()) and tape.output.shape == (3, 5)


def test_a_confident_samples_gradient_is_not_rounded_away() -> None:
    net, (images, labels) = CASE.net(), CASE.images()
    net.head.linear.weight.data.zero_()
    net.head.linear.bias.data = 30.0 * F.one_hot(labels[0], 5).float()
    net.head.linear.weight.data[labels[0]] = 0.01
    labels = labels[:1].expand(3)
    truth = autograd(net, images, labels)
    assert 0 < truth.abs().max() < 1e-13
    assert relative_error(pathnet.record(net, images, labels, engine="reference").gradient(), truth) < 1e-2


def test_auto_takes_the_fastest_engine_that_serves_and_says_when_it_is_another() -> None:
    net, (images, labels) = CASE.net(), CASE.images()
    if native.LOADED:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pathnet.record(net, images, labels).engine == "cpu"
            assert pathnet.record(net, images, labels, precision="float64").engine == "autograd"
    net.blocks[1].convs[0].dilation = net.blocks[1].convs[0].padding = (2, 2)
    with pytest.warns(RuntimeWarning, match=r"'autograd' was chosen; .* \(cpu: "):
        assert pathnet.record(net, images, labels).engine == "autograd"
    with pytest.raises(ValueError, match="engine: expected one that serves this job, got 'cpu'"):
        pathnet.record(net, images, labels, engine="cpu")
    with pytest.raises(ValueError, match='reference: no precision="bfloat16"'):
        pathnet.record(net, images, labels, precision="bfloat16")
    assert list(pathnet.engines.available()) == ["cuda", "triton", "cpu", "autograd", "reference"]
    assert pathnet.engines.available()["reference"] is None


def test_a_tape_tells_its_size() -> None:
    net, (images, labels) = CASE.net(), CASE.images()
    tape = pathnet.record(net, images, labels, engine="reference")
    floats = 4 * (images.numel() + 3 * 64 * (3 * 4 + 2 * 2 + 1))
    assert floats < tape.nbytes < floats + 100_000


IMAGES, LABELS = CASE.images()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": nn.Linear(2, 2)}, "net: expected a pathnet ResidualNet, got a Linear"),
        ({"images": IMAGES[0]}, r"images: expected shape \[B, C, H, W\] with B >= 1, got \[3, 8, 8\]"),
        ({"images": IMAGES[:0]}, "images: expected shape"),
        ({"images": IMAGES[:, :1]}, r"images: the network refuses the shape \[3, 1, 8, 8\]"),
        (
            {"images": IMAGES.to(torch.uint8)},
            "images: expected a float32, float64, bfloat16 or float16 tensor .* got torch.uint8",
        ),
        ({"images": IMAGES.numpy()}, "images: expected .* got a ndarray"),
        ({"images": IMAGES.to("meta")}, r"images: expected device cpu \(the network's\), got meta"),
        ({"images": IMAGES * torch.nan}, "images: expected finite values"),
        ({"target": LABELS.float()}, "target: expected an int64 tensor .*, got torch.float32; loss= takes"),
        ({"target": LABELS.int()}, "target: expected an int64 tensor .*, got torch.int32; target.long"),
        ({"target": LABELS[:2]}, r"target: expected shape \[3\]"),
        ({"target": LABELS + 5}, "target: expected labels 0 to 4"),
        ({"bn": "eval"}, "bn: expected 'running' or 'batch', got 'eval'"),
        ({"at": "y1"}, r"at: expected 'y0', 'image', 'stem_weight', the number of a block \(0 to 5\) or .* got 'y1'"),
        ({"precision": "float16"}, "precision: expected"),
        ({"engine": "gpu"}, "engine: expected auto, cuda, triton, cpu, autograd, reference, got 'gpu'"),
        (
            {"loss": lambda output, target: output.sum().to(torch.complex64)},
            "loss: expected one real number per batch, got a tensor torch.complex64",
        ),
        (
            {"loss": lambda output, target: output},
            r"loss: expected one real number per batch, got a tensor torch.float32 \[3, 5\]",
        ),
    ],
)
def test_bad_arguments_of_record_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"net": CASE.net(), "images": IMAGES, "target": LABELS, **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        pathnet.record(**arguments)


def test_a_network_that_diverged_or_has_no_convolution_is_told() -> None:
    net = CASE.net()
    net.head.linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="net: its loss on these images is nan"):
        pathnet.record(net, IMAGES, LABELS)
    plain = identity_net(2, nn.Identity)
    with pytest.raises(ValueError, match='at="stem_weight": this network\'s stem has no convolution'):
        pathnet.record(plain, IMAGES, torch.zeros(3, 192), loss=squares, at="stem_weight", engine="reference")


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.uint8), r"b: expected shape \[P, 6\] for 6 blocks, got \[2, 5\]"),
        (torch.zeros(6, dtype=torch.uint8), r"b: expected shape \[P, 6\]"),
        (torch.full((2, 6), 2, dtype=torch.uint8), "b: expected zeros and ones, got values 2 to 2"),
        (torch.zeros(2, 6), "b: expected an integer tensor, got torch.float32"),
        ([[0] * 6], "b: expected an integer tensor, got a list"),
        (torch.tensor(1), r"b: expected shape \[P, 6\] for 6 blocks, got \[\]"),
        (torch.full((1, 6), -1), "b: expected zeros and ones, got values -1 to -1"),
        (torch.full((1, 6), 2, dtype=torch.uint64), "b: expected zeros and ones, got values 2 to 2"),
        (torch.zeros(1, 6, dtype=torch.complex64), "b: expected an integer tensor, got torch.complex64"),
        (torch.zeros(1, 6, dtype=torch.int64).to_sparse(), "b: expected an integer tensor that is dense"),
        (torch.zeros(1, 6, dtype=torch.int64, device="meta"), "b: expected an integer tensor that is dense"),
    ],
)
def test_bad_paths_are_named(b: Any, message: str) -> None:
    tape = pathnet.record(CASE.net(), IMAGES, LABELS, engine="reference")
    for call in (tape.path_gradient_norms, tape.path_gradients):
        with pytest.raises(ValueError, match=f"^{message}"):
            call(b)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (torch.ones(2, 6), r"routing: expected shape \[P, 6, 2\] for 6 blocks, got \[2, 6\]"),
        (
            torch.ones(2, 6, 2, dtype=torch.int64),
            "routing: expected a floating-point tensor, got torch.int64",
        ),
        (torch.ones(2, 6, 2) / 0, "routing: expected coefficients that are finite in float32"),
        (
            torch.full((2, 6, 2), 1e39, dtype=torch.float64),
            "routing: expected coefficients that are finite in float32",
        ),
    ],
)
def test_bad_routings_are_named(routing: Tensor, message: str) -> None:
    tape = pathnet.record(CASE.net(), IMAGES, LABELS, engine="reference")
    with pytest.raises(ValueError, match=f"^{message}"):
        tape.routed_gradients(routing)
