"""The cuda engine's ops on the host: grouping, slices, malformed arguments, launches and copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.judging import TOLERANCES, random_basic_net
from helpers.twin import (
    GPUS,
    SMALL,
    arguments,
    forward_arguments,
    sample,
    scheduled,
    small_tape,
)
from torch import Tensor

import pathnet
from pathnet import native
from pathnet.engines import cuda
from pathnet.engines.cuda import CudaWalk, ops
from pathnet.engines.tables import tables
from pathnet.scaling import ScaledGradient

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_results_do_not_depend_on_order_grouping_or_neighbours(precision: Any) -> None:
    inputs = arguments(precision)
    whole = ops.cuda_backward_running(**inputs)
    backwards = ops.cuda_backward_running(**{**inputs, "schedule": inputs["schedule"].flip(1)})
    assert all(map(torch.equal, whole, backwards))
    for path in range(3):
        one = {**inputs, "routing": inputs["routing"][path : path + 1], "schedule": scheduled(*torch.zeros(2, 1))}
        assert all(torch.equal(a[path], b[0]) for a, b in zip(whole, ops.cuda_backward_running(**one), strict=True))
    alone = {**inputs, **sample(inputs, slice(1, 2))}
    assert all(torch.equal(a[:, 1:2], b) for a, b in zip(whole, ops.cuda_backward_running(**alone), strict=True))
    norms_alone = ops.cuda_backward_running(**{**inputs, "gradients": False})
    assert torch.equal(norms_alone[0], whole[0]) and norms_alone[1].shape[0] == norms_alone[2].shape[0] == 0


def test_scaled_coefficients_zero_gradients_and_others_that_are_not_finite() -> None:
    inputs = arguments(routing=torch.randn(2, 6, 2))
    norms, grad, exponent = ops.cuda_backward_running(**inputs)
    scaled = {**inputs, "grad": inputs["grad"] * 2.0**-100, "exponent": inputs["exponent"] - 400}
    other = ops.cuda_backward_running(**scaled)
    torch.testing.assert_close(other[0] * 2.0**500, norms, rtol=1e-5, atol=0)
    largest = grad.abs().flatten(2).amax(2)
    assert ((largest >= 0.25) & (largest < 1)).all()
    zeros = ops.cuda_backward_running(**{**inputs, "grad": torch.zeros_like(inputs["grad"])})
    assert not zeros[0].any() and not zeros[1].any()
    spoiled = inputs["grad"].clone()
    spoiled[0, 1, 0, 0, 0] = torch.nan
    broken = ops.cuda_backward_running(**{**inputs, "grad": spoiled})
    assert broken[0][:, 1].isnan().all() and torch.equal(broken[0][:, [0, 2]], norms[:, [0, 2]])


def test_no_paths_and_no_samples() -> None:
    inputs = arguments(routing=torch.empty(0, 6, 2))
    assert ops.cuda_backward_running(**inputs)[0].shape == (0, 3)
    none = {**arguments(), **sample(inputs, slice(0))}
    assert ops.cuda_backward_running(**none)[0].shape == (3, 0)
    forward = forward_arguments(record=False)
    assert ops.cuda_forward_running(**{**forward, "y0": forward["y0"][:0]})[0].shape[:2] == (2, 0)


def test_opcheck() -> None:
    net = SMALL.net()
    network = tables(net, "running", (16, 6, 6))
    plan = (network.blocks, network.units, network.weights, network.scales, True, 1, GPUS["227 KB"])
    torch.library.opcheck(torch.ops.pathnet.cuda_pack.default, plan)
    for inputs in (arguments(), arguments("bfloat16", gradients=False)):
        torch.library.opcheck(torch.ops.pathnet.cuda_backward_running.default, tuple(inputs.values()))
    for record in (True, False):
        op = torch.ops.pathnet.cuda_forward_running.default
        torch.library.opcheck(op, tuple(forward_arguments(record).values()))
    inputs = arguments()
    torch.library.opcheck(torch.ops.pathnet.cuda_unpack_bits.default, (inputs["relu_bits"], inputs["program"], 1, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": lambda g: g.double()}, "grad: expected Float, got Double"),
        (
            {"grad": lambda g: g[:, :, :5].contiguous()},
            r"grad: expected shape \[\*, \*, 64, 2, 2\], got \[1, 3, 5, 2",
        ),
        ({"exponent": lambda e: e[:, :2].contiguous()}, r"exponent: expected shape \[1, 3\], got \[1, 2\]"),
        (
            {"schedule": lambda s: s[:, :2].contiguous()},
            r"schedule: expected shape \[2, 3\], got \[2, 2\]",
        ),
        ({"schedule": lambda s: s.long()}, "schedule: expected Int, got Long"),
        ({"routing": lambda r: r[:, :2].contiguous()}, r"routing: expected shape \[\*, 6, 2\]"),
        ({"schedule": lambda s: s[:1]}, r"schedule: expected shape \[2, 3\]"),
        ({"program": lambda p: p + 1}, "program: expected what cuda_pack made"),
        ({"program": lambda p: p[:-1]}, "program: expected what cuda_pack made"),
        ({"program": lambda p: torch.cat([p[:-1], p[-1:] ^ 1])}, "program: expected what cuda_pack made"),
        ({"packed": lambda p: p[:-1]}, "packed: expected shape"),
        ({"packed": lambda p: p + 1}, "packed: expected a copy of program"),
        ({"packed": lambda p: p[:-16]}, "packed: expected shape"),
        ({"relu_bits": lambda b: b[:, :-1].contiguous()}, "relu_bits: expected shape"),
        (
            {"relu_bits": lambda b: b.t().contiguous().t()},
            "relu_bits: expected contiguous rows a multiple of 4 bytes",
        ),
        ({"relu_bits": lambda b: F.pad(b, (0, 2))[:, :-2]}, "relu_bits: expected contiguous rows a multiple of 4"),
    ],
)
def test_malformed_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    inputs = arguments()
    with pytest.raises(RuntimeError, match=message):
        ops.cuda_backward_running(**{**inputs, **{name: change(inputs[name]) for name, change in changes.items()}})


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """Return the same values as a slice that begins ``offset`` elements into its memory."""
    memory = tensor.new_zeros(tensor.numel() + offset)
    memory[offset:] = tensor.flatten()
    return memory[offset:].view(tensor.shape)


@pytest.mark.parametrize(("name", "bytes_read"), [("packed", 16), ("relu_bits", 4)])
def test_slices_begin_where_the_kernels_can_read_them(name: str, bytes_read: int) -> None:
    inputs = arguments("bfloat16")
    whole = ops.cuda_backward_running(**inputs)
    sliced = {**inputs, name: shifted(inputs[name], bytes_read)}
    assert all(map(torch.equal, whole, ops.cuda_backward_running(**sliced)))
    for offset in (1, 2, bytes_read // 2):
        message = f"{name}: expected data aligned to {bytes_read} bytes, got it {offset} bytes off"
        with pytest.raises(RuntimeError, match=message):
            ops.cuda_backward_running(**{**inputs, name: shifted(inputs[name], offset)})


def test_bits_may_be_columns_of_longer_rows() -> None:
    inputs = arguments("bfloat16")
    longer = F.pad(inputs["relu_bits"], (64, 4), value=255)
    columns = {**inputs, "relu_bits": longer[:, 64:-4]}
    whole = ops.cuda_backward_running(**inputs)
    assert all(map(torch.equal, whole, ops.cuda_backward_running(**columns)))


@pytest.mark.parametrize("precision", TOLERANCES)
def test_each_path_starts_from_its_gradient(precision: Any) -> None:
    inputs = arguments(precision)
    grad, exponent = torch.randn(4, *inputs["grad"].shape[1:]), torch.randint(-9, 9, (4, 3), dtype=torch.int32)
    starts = torch.tensor([2, 0, 2])
    schedule = scheduled(torch.arange(3), starts)
    inputs["routing"][2] = torch.tensor([1.0, 0.0])
    several = ops.cuda_backward_running(**{**inputs, "grad": grad, "exponent": exponent, "schedule": schedule})
    for path, start in enumerate(starts.tolist()):
        alone = {**inputs, "grad": grad[start : start + 1], "exponent": exponent[start : start + 1]}
        expected = ops.cuda_backward_running(**alone)
        assert all(torch.equal(a[path], b[path]) for a, b in zip(several, expected, strict=True))


def test_a_start_that_is_none_is_not_walked() -> None:
    inputs = arguments(gradients=False)
    for wrong in (-1, 1, 1 << 30):
        starts = torch.full_like(inputs["schedule"][1], wrong)
        ops.cuda_backward_running(**{**inputs, "schedule": scheduled(inputs["schedule"][0], starts)})


@pytest.mark.parametrize("seed", [0, 3])
def test_sums_by_length_launch_once_a_block_and_copy_no_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, images, labels = random_basic_net(seed, smallest=6, post=seed == 3)
    tape = pathnet.record(net, images, labels, engine="twin")
    record, launched, launch = tape._record, [], ops.cuda_backward_running
    assert isinstance(record.walk, CudaWalk)
    memory = record.walk.relu_bits.untyped_storage().data_ptr()

    def watched(*inputs: Any) -> Any:
        launched.append((len(inputs[2]), inputs[6].untyped_storage().data_ptr() == memory))
        return launch(*inputs)

    monkeypatch.setattr(ops, "cuda_backward_running", watched)
    record.walk.sums_by_length(record.start, torch.ones(net.n, 2))
    assert launched == [(2 * k, True) for k in range(1, net.n + 1)]


@pytest.mark.parametrize("sums", [False, True], ids=["paths", "sums"])
def test_what_a_walk_needs_of_the_host_is_sent_in_two_copies(sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a device without values: the order is computed on the host, and nothing waits."""
    recorded: Any = small_tape()._record.walk
    sent: list[tuple[str, list[int]]] = []
    network, device = recorded.network, torch.device("meta")
    assert len(network.steps) == 6

    def noted(values: Tensor, to: torch.device) -> Tensor:
        assert to == device
        sent.append((values.device.type, list(values.shape)))
        return values.to(to)

    def launched(*inputs: Any) -> tuple[Tensor, ...]:
        assert {tensor.device.type for tensor in inputs[:4]} == {"meta"}
        return inputs[0], inputs[0], inputs[1]

    monkeypatch.setattr(cuda, "to_device", noted)
    monkeypatch.setattr(ops, "cuda_backward_running", launched)
    grad, exponent = torch.empty(12, 3, 64, 2, 2, device=device), torch.empty(12, 3, device=device).int()
    walk = CudaWalk(network, recorded.relu_bits.to(device))
    if sums:
        walk._through_block(5, ScaledGradient(grad, exponent), [(1.0, 0.0)] * 6 + [(0.0, 1.0)] * 6)
    else:
        walk.routed_backward(ScaledGradient(grad[0], exponent[0]), torch.ones(12, 6, 2))
    assert sent == [("cpu", [2, 12]), ("cpu", [12, 1 if sums else 6, 2])]


def test_slices_of_float32_begin_anywhere() -> None:
    inputs, forward = arguments(), forward_arguments(record=False)
    whole, outputs = ops.cuda_backward_running(**inputs), ops.cuda_forward_running(**forward)
    for name in ("grad", "exponent", "routing", "schedule"):
        sliced = {**inputs, name: shifted(inputs[name], 1)}
        assert all(map(torch.equal, whole, ops.cuda_backward_running(**sliced)))
    for name in ("y0", "routing", "order", "affine"):
        sliced = {**forward, name: shifted(forward[name], 1)}
        assert all(map(torch.equal, outputs, ops.cuda_forward_running(**sliced)))
    with pytest.raises(RuntimeError, match="packed: expected data aligned to 16 bytes, got it 8 bytes off"):
        ops.cuda_forward_running(**{**forward, "packed": shifted(forward["packed"], 8)})


def test_a_program_serves_its_own_direction_only() -> None:
    inputs, forward = arguments(), forward_arguments(record=False)
    with pytest.raises(RuntimeError, match="program: expected one for the backward pass, got the other"):
        ops.cuda_backward_running(**{**inputs, "program": forward["program"]})
    with pytest.raises(RuntimeError, match="program: expected one for the forward pass, got the other"):
        ops.cuda_forward_running(**{**forward, "program": inputs["program"]})
    with pytest.raises(RuntimeError, match="routing: expected one to record, got 2"):
        ops.cuda_forward_running(**{**forward, "record": True})
