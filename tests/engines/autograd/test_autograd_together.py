"""Several gradients through a block at once: the same results, within the memory, and only where it is faster."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.any_blocks import IMAGE_NETS, TOKEN_NETS, Masked, MaskedNet, Parallel, image_net, of_blocks, sequences
from helpers.any_blocks import squares as loss
from helpers.oracles import relative_error
from helpers.routed_networks import batch
from helpers.token_nets import WIDTH
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet
from pathnet import chunks
from pathnet.engines.autograd import blocks, together, walk
from pathnet.engines.autograd.timing import fastest
from pathnet.models import Block, ResidualNet


@pytest.fixture
def widths(form: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take the smallest width wherever `torch.vmap` serves, in both forms of pull-backs; return what was chosen."""
    chosen: list[int] = []
    measured = blocks.measured_width
    if form == "plain":
        monkeypatch.setattr(blocks, "PATIENCE", -1.0)
        monkeypatch.setattr(blocks.KnownBlock, "is_due", lambda *arguments: False)
    monkeypatch.setattr(blocks, "VISITS", 0)
    monkeypatch.setattr(together, "fastest", lambda candidates, *arguments: len(candidates) > 1)
    monkeypatch.setattr(
        blocks, "measured_width", lambda *arguments: chosen.append(measured(*arguments)) or chosen[-1]
    )
    return chosen


def routings(n: int, parts: int = 2) -> Tensor:
    """Return routings with zeros, and some that share their last blocks."""
    generator = torch.Generator().manual_seed(4)
    routing = torch.randn(11, n, parts, dtype=torch.float64, generator=generator)
    routing[torch.rand(routing.shape, generator=generator) < 0.2] = 0
    # Equal steps after states that differ, since those alone go through at once.
    routing[:, 0] = routing[0, 0] = 1.0
    routing[5:, 1] = routing[5, 1]
    return routing


def compare(net: ResidualNet, inputs: Any, target: Any, bn: Any = "running", parts: int = 2, **options: Any) -> None:
    exact = pathnet.record(net, inputs, target, bn, "reference", "float64", **options)
    recorder = pathnet.Recorder(net, bn, "autograd", "float64", **options)
    routing = routings(net.n, parts)
    expected, expected_sums = exact.routed_gradients(routing), exact.gradient_by_length()
    for _ in range(2):
        tape = recorder(inputs, target)
        assert relative_error(tape.routed_gradients(routing), expected) < EXACT_WALK
        assert relative_error(tape.gradient_by_length(), expected_sums) < EXACT_WALK


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("kind", IMAGE_NETS)
def test_convolutional_networks(kind: str, bn: Any, widths: list[int]) -> None:
    net, (images, labels) = image_net(kind, bn), batch()
    compare(net, images, labels, bn)
    assert 4 in widths


@pytest.mark.parametrize("kind", TOKEN_NETS)
def test_networks_of_sequences(kind: str, form: str, widths: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(TOKEN_NETS[kind](), sequences(), sequences(), loss=loss)
    # PyTorch has no rule of vmap for fused attention and one of the activations; captured, they are products.
    assert set(widths) == ({"attention": {1}, "activations": {1, 4}}.get(kind, {4}) if form == "plain" else {4})


class Groups(Block):
    """Attention with fewer heads of keys than of queries, which stays PyTorch's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.rest, self.outward = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def residual(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(2, (2, 4)).transpose(1, 2)
        key, value = (t[:, None] for t in self.rest(x).chunk(2, -1))
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return torch.as_tensor(self.outward(attended.transpose(1, 2).flatten(2)))


def test_nothing_is_written_where_an_operator_lacks_a_rule(
    form: str, widths: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Operators of a captured block warn past Python."""
    compare(of_blocks([Groups(), Groups()]), sequences(), sequences(), loss=loss)
    assert set(widths) == {1}
    assert capfd.readouterr().err == ""
    assert torch._C._functorch._is_vmap_fallback_enabled()


def test_residual_modules_in_parallel(widths: list[int]) -> None:
    net = of_blocks([Parallel(), Parallel(), Parallel()])
    for parts in (2, 3):
        compare(net, sequences(), sequences(), parts=parts, loss=loss)
    assert set(widths) == {4}


def test_a_context(widths: list[int]) -> None:
    net = of_blocks([Masked(), Masked(), Masked()])
    net = MaskedNet(net.stem, list(net), net.head)  # type: ignore[arg-type]
    inputs = {"x": sequences(), "mask": sequences(9)[..., 0].abs()}
    compare(net, inputs, sequences(), loss=loss)
    assert set(widths) == {4}


class Faint(Block):
    """A module that scales each sample by another power of two, down to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def residual(self, x: Tensor) -> Tensor:
        powers = torch.tensor([0.0, 2.0**-80, 2.0**-300], dtype=x.dtype)
        return self.linear(x) * powers[:, None, None] * powers[:, None, None]


def test_each_gradient_keeps_its_exponents(widths: list[int]) -> None:
    net, inputs = of_blocks([Faint() for _ in range(4)]), sequences()
    codes = pathnet.paths.enumerate_all(net.n)
    exact = pathnet.record(net, inputs, inputs, engine="reference", precision="float64", loss=loss)
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=loss)
    for _ in range(2):
        walked = recorder(inputs, inputs).path_gradients(codes, scaled=True)
        expected = exact.path_gradients(codes, scaled=True)
        assert torch.equal(walked.exponent, expected.exponent)
        torch.testing.assert_close(walked.mantissa, expected.mantissa, rtol=1e-10, atol=1e-12)
    assert set(widths) == {4}


class Stubborn(torch.autograd.Function):
    """A function whose backward pass fails for several gradients at once, with any error, or is another one."""

    fault = ""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(grad):
            if Stubborn.fault == "raises":
                raise KeyError("of whatever kind")
            if Stubborn.fault == "warns":
                warnings.warn("no batching rule", stacklevel=1)
            return grad * (0.75 if Stubborn.fault == "differs" else 0.5)
        return grad * 0.5


class Refuses(Block):
    def residual(self, x: Tensor) -> Tensor:
        return Stubborn.apply(x)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize("form", ["plain"], indirect=True)
@pytest.mark.parametrize("fault", ["", "raises", "warns", "differs"])
def test_one_after_the_other_where_vmap_fails(fault: str, widths: list[int], monkeypatch: Any) -> None:
    monkeypatch.setattr(Stubborn, "fault", fault)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(of_blocks([Refuses() for _ in range(3)]), sequences(), sequences(), loss=loss)
    assert set(widths) == {1 if fault else 4}


def test_products_by_onednn_go_one_after_the_other_without_a_word(
    form: str, widths: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Vmap has no rule for them. Of that it warns on stderr, past Python, where Python does not call the operator."""
    net, inputs = TOKEN_NETS["gated"]().float(), sequences().float()
    recorder = pathnet.Recorder(net, engine="autograd", loss=loss)
    for _ in range(2):
        recorder(inputs, inputs).path_gradients(pathnet.paths.enumerate_all(net.n))
    assert capfd.readouterr().err == ""
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    assert set(widths) == {1 if form == "captured" and onednn else 4}
    assert torch._C._functorch._is_vmap_fallback_enabled()


def test_no_more_at_once_than_memory_has_room_for(widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, passed = sequences(), list[int]()
    through = walk.pulled_together

    def counted(pullbacks: Any, step: Any, states: Any, width: int) -> Any:
        passed.append(width)
        return through(pullbacks, step, states, width)

    monkeypatch.setattr(walk, "pulled_together", counted)
    monkeypatch.setattr(together, "WIDTHS", (2, 4))
    for room, most in ((7, 4), (3, 2), (1, 1)):
        passed.clear()
        monkeypatch.setattr(chunks, "CHUNK_BYTES", room * inputs.nbytes)
        monkeypatch.setattr(together, "fastest", lambda candidates, *arguments: len(candidates) - 1)
        compare(TOKEN_NETS["gated"](), inputs, inputs, loss=loss)
        assert max(passed) == most
    # A choice that was measured with more room.
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 7 * inputs.nbytes)
    net = TOKEN_NETS["gated"]()
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=loss)
    for _ in range(2):
        tape = recorder(inputs, inputs)
        tape.gradient_by_length()
    passed.clear()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3 * inputs.nbytes)
    tape.gradient_by_length()
    assert max(passed) == 3


def test_the_choice_is_measured_once_for_equal_blocks_and_on_no_short_call(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(blocks, "PATIENCE", 0.0)
    monkeypatch.setattr(blocks, "_is_faster", lambda *arguments: True)
    monkeypatch.setattr(blocks, "measured_width", lambda *arguments: measured.append(1) or 1)
    net, inputs = TOKEN_NETS["gated"](), sequences()
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=loss)
    tape, codes = recorder(inputs, inputs), pathnet.paths.enumerate_all(net.n)
    tape.path_gradient_norms(codes)
    assert not measured
    for _ in range(blocks.VISITS):
        tape.path_gradient_norms(codes[-1:])
    assert len(measured) == 1


def test_work_counts_in_what_is_fastest() -> None:
    candidates = [lambda: sum(range(200_000)), lambda: sum(range(400_000))]
    assert fastest(candidates, torch.device("cpu")) == 0
    assert fastest(candidates, torch.device("cpu"), (1, 8)) == 1
