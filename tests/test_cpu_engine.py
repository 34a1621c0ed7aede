"""The cpu engine's walk against the reference's, in float64 on the same record; its forward pass apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import SMALL, Case, random_net
from oracles import detach_loop, relative_error
from tolerances import FLOAT32_BATCH_NORM, FLOAT32_SAMPLE_NORM
from torch import Tensor

import pathnet
from pathnet import native, scaling
from pathnet.engines.cpu import Plan
from pathnet.engines.reference import ReferenceEngine, freeze

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def truth(tape: pathnet.Tape, routing: Tensor) -> Tensor:
    """float64 [P, B, ...]: the reference's walk on the tape's own ReLU bits and incoming gradient."""
    record, engine = tape._record, ReferenceEngine()
    assert isinstance(record.blocks, Plan)
    frozen = freeze(record.net, record.blocks.bits())
    y0 = record.y0.double()
    _, blocks = engine.record(engine.prepare(frozen, y0.shape[1:], "float64"), y0)
    walked = engine.routed_backward(blocks, record.grad.double(), record.exponent, routing.double())
    return scaling.value(*walked)


def check(tape: pathnet.Tape, routing: Tensor) -> None:
    expected, walked = truth(tape, routing), tape.routed_gradients(routing)
    for own, other in zip(walked, expected, strict=True):
        assert relative_error(own, other) < FLOAT32_SAMPLE_NORM
        torch.testing.assert_close(own.norm(), other.norm(), rtol=FLOAT32_BATCH_NORM, atol=0)
        samples = own.flatten(1).norm(dim=1)
        torch.testing.assert_close(samples, other.flatten(1).norm(dim=1), rtol=FLOAT32_SAMPLE_NORM, atol=0)


@pytest.mark.parametrize("seed", range(70))
@pytest.mark.parametrize("kind", ["paths", "ends", "routings"])
def test_walks_of_random_networks(seed: int, kind: str) -> None:
    net, images, labels = random_net(seed)
    tape = pathnet.record(net, images, labels, engine="cpu")
    rng = np.random.default_rng(seed)
    if kind == "paths":
        codes = torch.from_numpy(rng.integers(0, 2, (3, net.n), dtype=np.uint8))
        routing = pathnet.paths.routing(codes, torch.float32)
    elif kind == "ends":
        ends = torch.tensor([0, 1], dtype=torch.uint8)[:, None].expand(2, net.n)
        routing = pathnet.paths.routing(ends, torch.float32)
    else:
        routing = torch.from_numpy(rng.normal(size=(2, net.n, 2)).astype(np.float32))
    check(tape, routing)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_every_path_against_the_detach_loop(case: Case) -> None:
    """Judged on the float64 network's own bits: so few ReLUs that rounding flips none of them here."""
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="cpu")
    codes = pathnet.paths.enumerate_all(tape.n)
    for code, walked in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(walked, detach_loop(net, images, labels, code)) < FLOAT32_SAMPLE_NORM


def test_the_recording_forward_is_float32_accurate() -> None:
    case = Case("deep", 110, width=4, side=16, batch=2)
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="cpu")
    exact = net.double()(images.double())
    assert relative_error(tape.output, exact.detach()) < 1e-4


def test_the_110_layer_network() -> None:
    case = Case("resnet-110", 110, width=16, side=32, batch=2)
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="cpu")
    codes = torch.cat([pathnet.paths.sample(54, length, 1) for length in (0, 5, 17, 54)])
    check(tape, pathnet.paths.routing(codes, torch.float32))


@pytest.mark.parametrize("at", ["image", "stem_weight"])
def test_other_places(at: str) -> None:
    case = SMALL[1]
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, engine="cpu", at=at)  # type: ignore[arg-type]
    for code in pathnet.paths.enumerate_all(6)[::9]:
        expected = detach_loop(net, images, labels, code, at=at)
        assert relative_error(tape.path_gradients(code[None])[0], expected) < FLOAT32_SAMPLE_NORM
        norms = tape.path_gradient_norms(code[None])
        torch.testing.assert_close(norms[0], expected.norm(), rtol=FLOAT32_SAMPLE_NORM, atol=0)


def test_what_the_engine_lacks_is_named() -> None:
    net, (images, labels) = SMALL[0].net(), SMALL[0].images()
    net.blocks[1].convs[0].dilation = (2, 2)
    with pytest.raises(ValueError, match="cpu: block 2 has a convolution that is grouped, dilated or not square"):
        pathnet.record(net, images, labels, engine="cpu")
    with pytest.raises(ValueError, match='cpu: no precision="float64"'):
        pathnet.record(net, images, labels, engine="cpu", precision="float64")
