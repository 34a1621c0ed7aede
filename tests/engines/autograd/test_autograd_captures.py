"""Captures of blocks: which blocks stay plain, and nothing of a capture is left behind."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.any_blocks import SHAPE, Acts, Gated, loop, of_blocks, sequences, squares
from helpers.oracles import relative_error
from helpers.token_nets import WIDTH
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet
from pathnet.engines.autograd import AutogradPrepared, blocks, products
from pathnet.models import Block, ResidualNet


class Does(Block):
    """A residual module of two linear layers, and any function of the input and theirs."""

    def __init__(self, function: Callable[[Tensor, nn.Module, nn.Module], Tensor]) -> None:
        super().__init__()
        self.left, self.right, self.function = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), function

    def residual(self, x: Tensor) -> Tensor:
        return self.function(x, self.left, self.right)


def some_rows(x: Tensor, left: nn.Module, right: nn.Module) -> Tensor:
    rows = x.flatten(0, 1)
    chosen = (rows.sum(-1) > 0).nonzero()[:, 0]
    return torch.zeros_like(rows).index_add(0, chosen, left(rows[chosen]).tanh()).view(x.shape)


def some_values(x: Tensor, left: nn.Module, right: nn.Module) -> Tensor:
    z, mask = left(x), x > 0.3
    return torch.zeros_like(z).index_put((mask,), z[mask].tanh())


PLAIN: dict[str, Callable[[Tensor, Any, Any], Tensor]] = {
    "a list decides": lambda x, left, right: left(x) if x.abs().amax().tolist() < 100 else right(x),
    "NumPy decides": lambda x, left, right: left(x) if x.detach().numpy().max() < 100 else right(x),
    "a list multiplies": lambda x, left, right: left(x) * x.amax().tolist(),
    "some rows": some_rows,
    "some values": some_values,
}
"""Blocks whose operators depend on values."""

CAPTURED: dict[str, Callable[[Tensor, Any, Any], Tensor]] = {
    "expanded": lambda x, left, right: (left(x) * torch.arange(WIDTH)).sum(-1, keepdim=True) * torch.ones(WIDTH),
    "indexed": lambda x, left, right: left(x)[:, torch.tensor([2, 2, 0, 1, 3, 4, 5])] * x,
    "sorted": lambda x, left, right: left(x).gather(1, x.argsort(1)),
}


def programs(recorder: pathnet.Recorder) -> list[bool]:
    """Return for each block whether a program was captured from it."""
    service: Any = recorder._service
    prepared: AutogradPrepared = service.prepared
    return [any(block.programs.values()) for block in prepared.blocks]


def check(tape: pathnet.Tape, net: ResidualNet, inputs: Tensor) -> None:
    codes = pathnet.paths.enumerate_all(net.n)
    for code, gradient in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(gradient, loop(net, inputs, code, lambda y: squares(y, y))) < EXACT_WALK


@pytest.mark.parametrize("kind", [*PLAIN, *CAPTURED])
def test_values_of_a_batch_are_none_of_the_next_batchs(kind: str, form: str) -> None:
    """Two batches come first on which a program that took them for constants agrees with the block."""
    net = of_blocks([Does((PLAIN | CAPTURED)[kind]) for _ in range(2)])
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    for inputs in (sequences(0), sequences(0), sequences(1), 1e3 * sequences(2)):
        check(recorder(inputs, inputs), net, inputs)
    assert all(programs(recorder)) == any(programs(recorder)) == (form == "captured" and kind in CAPTURED)


def test_pullbacks_in_another_memory_layout_are_captured(form: str) -> None:
    torch.manual_seed(0)
    net = ResidualNet(nn.Conv2d(3, 4, 1), [Normalises() for _ in range(2)], nn.Flatten()).double().eval()
    for block in net:
        block.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    for _ in range(2):
        check(recorder(images, images), net, images)
    assert all(programs(recorder)) == (form == "captured")


class Normalises(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.conv(F.silu(self.norm(self.conv(x)))))


def test_batch_normalisations_under_autocast(form: str) -> None:
    torch.manual_seed(0)
    net = ResidualNet(nn.Conv2d(3, 4, 1), [Normalises() for _ in range(2)], nn.Flatten()).eval()
    images, codes = torch.randn(2, 3, 5, 5), pathnet.paths.enumerate_all(2)
    recorder = pathnet.Recorder(net, engine="autograd", precision="network", loss=squares)
    exact = pathnet.record(net, images, images, engine="reference", precision="float64", loss=squares)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            tape = recorder(images, images)
        assert relative_error(tape.path_gradients(codes), exact.path_gradients(codes)) < 2e-2
    assert all(programs(recorder)) == (form == "captured")


class Weighs(Block):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(3))
        self.outward = nn.Linear(8, WIDTH)
        self.mask_type = torch.float32

    def residual(self, x: Tensor) -> Tensor:
        mask = torch.arange(-6.0, 1.0).to(self.mask_type if x.dtype == torch.bfloat16 else x.dtype)
        heads = [linear(x).unflatten(2, (2, 4)).transpose(1, 2) for linear in self.linears]
        mask = mask.expand(x.shape[1], -1)
        return torch.as_tensor(
            self.outward(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2))
        )


def test_float32_masks_of_attention_in_bfloat16(form: str) -> None:
    net, inputs = of_blocks([Weighs(), Weighs()]).bfloat16(), sequences().bfloat16()
    codes = pathnet.paths.enumerate_all(2)
    recorder = pathnet.Recorder(net, engine="autograd", precision="network", loss=squares)
    exact = pathnet.record(
        net.double(), inputs.double(), inputs, engine="reference", precision="float64", loss=squares
    )
    for _ in range(2):
        tape = recorder(inputs, inputs)
        assert relative_error(tape.path_gradients(codes), exact.path_gradients(codes)) < 3e-2
    assert all(programs(recorder)) == (form == "captured")


def test_captures_in_several_threads_leave_modules_as_they_were(form: str) -> None:
    """Tracing replaces methods of all modules; two traces at once would put back each other's."""
    before = nn.Module.__call__, nn.Module.__getattr__
    failures: list[BaseException] = []
    codes = torch.ones(1, 4, dtype=torch.uint8)

    def work(seed: int) -> None:
        try:
            for length in range(2, 5):
                net = of_blocks([Gated() for _ in range(4)], seed)
                inputs = sequences(seed)[:, :length]
                recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
                recorder(inputs, inputs).path_gradients(codes)
                assert all(programs(recorder)) == (form == "captured")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (nn.Module.__call__, nn.Module.__getattr__) == before
        assert not failures
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = before  # type: ignore[method-assign]


def test_programs_do_not_pile_up_with_batch_sizes(form: str) -> None:
    net = of_blocks([Gated(), Gated()])
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    tapes = []
    for size in range(1, 9):
        inputs = torch.randn(size, *SHAPE[1:], dtype=torch.float64)
        tapes.append((recorder(inputs, inputs), inputs))
        check(tapes[-1][0], net, inputs)
    service: Any = recorder._service
    assert all(len(block.programs) <= blocks.MOST_LAYOUTS for block in service.prepared.blocks)
    for tape, inputs in tapes:
        check(tape, net, inputs)


def test_another_batch_size_is_captured_when_it_has_been_walked_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = of_blocks([Gated(), Gated()]), sequences()
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    recorder(inputs, inputs).gradient()
    service: Any = recorder._service
    for block in service.prepared.blocks:
        block.spent = {signature: 2 * blocks.PATIENCE for signature in block.spent}
    recorder(inputs[:2], inputs[:2]).gradient()
    assert not any(programs(recorder))
    monkeypatch.setattr(blocks, "_is_faster", lambda *arguments: True)
    recorder(inputs, inputs).gradient()
    assert all(programs(recorder))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tape: pickle.loads(pickle.dumps(tape))])
def test_copies_of_tapes(copied: Callable[[pathnet.Tape], pathnet.Tape], form: str) -> None:
    net, inputs = of_blocks([Gated(), Acts(torch.tanh), Gated()]), sequences()
    recorder = pathnet.Recorder(net, engine="autograd", precision="float64", loss=squares)
    for _ in range(2):
        tape = recorder(inputs, inputs)
        check(copied(tape), net, inputs)
        check(tape, net, inputs)
        check(copied(tape), net, inputs)


def test_slices_of_weights_are_multiplied_from_dense_copies() -> None:
    """OneDNN takes seconds for a product with a weight whose rows are apart in memory."""
    x, whole = torch.randn(5, 6), torch.randn(12, 14)
    candidates = products.products(x, whole[:6, :7], None)
    assert all(stored.is_mkldnn for candidate in candidates for stored in candidate.held)
    expected = x @ whole[:6, :7]
    assert all(relative_error(candidate(x), expected) < 1e-5 for candidate in candidates)
    dense = [products.products(x, weight, None) for weight in (whole[:6, :7].clone(), whole.t()[:7, :6].clone().t())]
    assert len(dense[0]) == len(dense[1]) >= len(candidates)
