"""Copies between host and device, with tensors on PyTorch's meta device in place of a GPU's, and no kernel run.

Tensors on that device have no values, so reading one fails, and every copy from the host is seen.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import stub_cuda
from helpers.cases import Case, faint, post_activation_net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pathnet
from pathnet.engines import fallback
from pathnet.engines import triton as triton_engine
from pathnet.engines.transfers import to_device
from pathnet.engines.triton import TritonPrepared, TritonWalk
from pathnet.engines.triton.graphs import Graphs
from pathnet.engines.triton.network import PackedConvolution, TritonNetwork
from pathnet.engines.triton.packing import block_network, network_of
from pathnet.engines.triton.state import Saved, allocate_on
from pathnet.models import ResidualNet
from pathnet.scaling import ScaledGradient

pytest.importorskip("triton")

META, CPU = torch.device("meta"), torch.device("cpu")
BATCH = 3


class Copies(TorchDispatchMode):
    """Counts copies from the host, and fails for one that waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        sources = [
            tensor for tensor in args if isinstance(tensor, Tensor) and tensor.device == CPU and tensor.ndim > 0
        ]
        if sources and isinstance(result, Tensor) and result.device == META:
            self.count += 1
            copies_behind = func is torch.ops.aten.copy_.default and args[2:] == (True,)
            asynchronous = kwargs.get("non_blocking", False) or copies_behind
            assert asynchronous, f"{func} waits"
        return result


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> stub_cuda.Cuda:
    from pathnet.engines.triton import arrivals, dgrad, endings, folding, forward, numbers, statistics, sums, wgrad

    make_tensor = torch.tensor

    def tensor(*values: Any, device: Any = None, **options: Any) -> Tensor:
        assert device is None or torch.device(device) == CPU, "torch.tensor on a device copies from pageable memory"
        return make_tensor(*values, **options)

    cuda = stub_cuda.install(monkeypatch)
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(triton_engine, "on_device", lambda device: nullcontext())
    for module in (arrivals, dgrad, endings, folding, forward, numbers, statistics, sums, wgrad):
        monkeypatch.setattr(module, "launch", lambda *positional, **arguments: None)
    return cuda


def on_meta(network: TritonNetwork) -> TritonNetwork:
    def moved(conv: PackedConvolution) -> PackedConvolution:
        shift = None if conv.shift is None else conv.shift.to(META)
        return replace(conv, weight=conv.weight.to(META), transposed=conv.transposed.to(META), shift=shift)

    blocks = [
        replace(
            block,
            convolutions=[moved(conv) for conv in block.convolutions],
            projection=None if block.projection is None else moved(block.projection),
        )
        for block in network.blocks
    ]
    exponents = None if network.scale_exponents is None else network.scale_exponents.to(META)
    tensors = {name: getattr(network, name).to(META) for name in ("affine", "statistics", "epsilon")}
    return replace(network, blocks=blocks, scale_exponents=exponents, **tensors)


def prepared_net(kind: str, bn: Any) -> tuple[TritonPrepared, int]:
    from pathnet.engines.triton.recording import plan_recording

    net: ResidualNet = post_activation_net(7, bn)[0] if kind == "post" else Case("copies", 14, width=4, side=8).net()
    if kind == "faint":
        net = faint(net, 0)
    network = on_meta(network_of(net, bn, "float32", (net.stem_weight().shape[0], 8, 8)))
    assert (network.magnitudes is not None) == (kind == "faint")
    return TritonPrepared(network, plan_recording(network)), net.n


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("kind", ["pre", "faint", "post"])
def test_a_batch_is_one_copy_and_waits_for_nothing(
    kind: str, bn: Any, graphs: bool, monkeypatch: pytest.MonkeyPatch, nothing_is_run: stub_cuda.Cuda
) -> None:
    if not graphs:
        monkeypatch.setattr("pathnet.engines.triton.graphs._captures", lambda device: False)
    prepared, n = prepared_net(kind, bn)
    network = prepared.network
    inputs, outputs = network.blocks[0].input, network.blocks[-1].output
    y0 = torch.empty(BATCH, inputs.channels, inputs.height, inputs.width, device=META)
    grad = torch.empty(BATCH, outputs.channels, outputs.height, outputs.width, device=META)
    start = ScaledGradient(grad, torch.empty(BATCH if bn == "running" else 1, dtype=torch.int32, device=META))
    routing = pathnet.paths.routing(torch.ones(3, n, dtype=torch.uint8), torch.float32)
    routing[1, 0] = 0.5
    for _ in range(3):
        with Copies() as copies:
            _, walk = prepared.record(y0)
        # The plan, and where each BN's x_hat begins.
        assert copies.count == 2
        for backward in (walk.norms, walk.routed_backward):
            with Copies() as copies:
                backward(start, routing)
            assert copies.count == 1
        with Copies() as copies:
            walk.sums_by_length(start, routing[1])
        assert copies.count == 1
        with Copies() as copies:
            prepared.routed_forward(y0, routing)
        assert copies.count == 1
    assert bool(nothing_is_run.of("replay")) == graphs


def test_sums_by_length_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer gradients at a time, each part planned when it comes."""
    prepared, n = prepared_net("pre", "batch")
    network = prepared.network
    saved = Saved.room(network, BATCH, allocate_on(META))
    walk = TritonWalk(network, saved, BATCH, Graphs())
    outputs = network.blocks[-1].output
    grad = torch.empty(BATCH, outputs.channels, outputs.height, outputs.width, device=META)
    monkeypatch.setattr(fallback, "_room", lambda device: 1)
    with Copies() as copies:
        start = ScaledGradient(grad, torch.empty(1, dtype=torch.int32, device=META))
        sums, exponents = walk.sums_by_length(start, torch.ones(n, 2))
    assert len(sums) == n + 1 and exponents.shape == (n + 1, 1)
    assert copies.count == 1 + sum(range(2, n + 2))


def test_sums_by_length_take_half_of_what_is_free_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused memory that PyTorch holds counts as free; on a CPU the chunks are the usual ones."""
    for name, size in (("memory_reserved", 3 << 30), ("memory_allocated", 1 << 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    assert fallback._room(torch.device("cuda")) == 6 << 30
    assert fallback._room(CPU) is None


def test_what_goes_to_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def to(values: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        calls.append((device, non_blocking))
        return values

    def pin_memory(values: Tensor) -> Tensor:
        calls.append("pinned")
        return values

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    gpu, there = torch.device("cuda", 1), torch.empty(3, device=META)
    to_device(torch.zeros(3), gpu)
    assert calls == ["pinned", (gpu, True)]
    assert to_device(there, META) is there and len(calls) == 2


def test_a_blocks_training_leaves_nothing_of_a_device_behind() -> None:
    """Training copies nothing to the device: plans are cached, and a kernel writes their numbers in every step."""
    from pathnet.engines.triton import training

    x = torch.empty(BATCH, 4, 6, 6, device=META)
    weights = [torch.empty(shape, device=META) for shape in ((6, 4, 3, 3), (6, 6, 3, 3), (6, 4, 1, 1))]
    norms = [torch.empty(channels, device=META) for channels in (4, 4, 6, 6)]
    network = block_network(x.shape[1:], x.dtype, weights, norms, [2, 1, 2], [1e-5, 1e-5])
    with Copies() as copies:
        result = training.block_forward(network, x, 1.0, 0.5)
        saved = training.saved_for(network, BATCH, result.bits, result.normalized, result.scales)
        training.block_backward(network, saved, result.output, 1.0, 0.5)
    assert copies.count == 0
    for cached in (training._forward_plan, training._backward_plan):
        plan, words = cached(training._Key(network), 1.0, 0.5)
        assert cached.cache_info().hits > 0
        assert all(isinstance(word, int) for word in words)
        convolutions = [conv for block in plan.schedule.blocks for conv in (*block.convolutions, block.projection)]
        assert all(tensor.device == CPU for conv in convolutions if conv for tensor in (conv.weight, conv.transposed))
    caches = [name for name, value in vars(training).items() if hasattr(value, "cache_info")]
    assert caches == ["_forward_plan", "_backward_plan"]


def test_numbers_are_written_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from pathnet.engines.triton import launch, numbers

    monkeypatch.setattr(numbers, "launch", importlib.import_module(launch.__name__).launch)
    rng = np.random.default_rng(0)
    for count in (1, 15, 16, 17, 40):
        values = rng.integers(-(2**31), 2**31, count)
        values[:2] = (1, -(2**31))[: len(values[:2])]
        room = torch.full((count + 3,), 7, dtype=torch.int32)
        numbers.write_numbers(values.tolist(), room)
        assert room.tolist() == [*values.tolist(), 7, 7, 7]
