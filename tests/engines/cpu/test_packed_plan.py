"""Packed plans: the ops refuse incomplete ones, and those for other kinds of pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.op_cases import PACKED, WALKS, arguments, pack, two_blocks
from helpers.walk_cases import INSTRUCTION_SETS, plan
from torch import Tensor

from pathnet import native
from pathnet.engines.cpu import ops

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def test_an_unknown_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    call = plan(3, wide=False).backward_arguments("running")
    monkeypatch.setenv("PATHNET_ISA", "mmx")
    with pytest.raises(RuntimeError, match="PATHNET_ISA: this processor has .*base, got mmx"):
        ops.cpu_backward_running(*call)
    with pytest.raises(RuntimeError, match="PATHNET_ISA: this processor has .*base, got mmx"):
        plan(3, wide=False).pack(True, "running")


@pytest.mark.skipif(len(INSTRUCTION_SETS) < 2, reason="this processor has one instruction set")
@pytest.mark.parametrize("name", WALKS)
def test_weights_packed_for_another_instruction_set_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for packed_for, other in zip(INSTRUCTION_SETS, [*INSTRUCTION_SETS[1:], INSTRUCTION_SETS[0]], strict=True):
        monkeypatch.setenv("PATHNET_ISA", packed_for)
        call = arguments(name, two_blocks())
        monkeypatch.setenv("PATHNET_ISA", other)
        message = f"plan: expected a plan for the instruction set {other}, got one for {packed_for}"
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, name)(**call)


@pytest.mark.parametrize("name", WALKS)
def test_weights_packed_for_another_walk_are_refused(name: str) -> None:
    right = arguments(name, two_blocks())
    for packing in PACKED:
        if packing == WALKS[name]:
            continue
        message = r"plan: expected a plan for the pass (back|for)ward_\w+, got one for \w+"
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, name)(**{**right, "plan": pack(two_blocks(), packing)})


@pytest.mark.parametrize("name", WALKS)
def test_packed_weights_of_another_size_are_refused(isa: str, name: str) -> None:
    right = arguments(name, two_blocks())
    packed = right["plan"]
    longer = torch.cat([packed, packed.new_zeros(64)])
    for wrong in (packed[:-1], packed[:64], longer):
        with pytest.raises(RuntimeError, match=rf"plan: expected {len(packed)} bytes, got {len(wrong)}"):
            getattr(ops, name)(**{**right, "plan": wrong.clone()})
    for wrong, message in (
        (packed[:63].clone(), "plan: expected what cpu_pack made, got 63 bytes"),
        (packed[:0].clone(), "plan: expected what cpu_pack made, got 0 bytes"),
        (packed[None], r"plan: expected shape \[\*\]"),
        (packed.view(torch.int8), "plan: expected Byte, got Char"),
        (torch.zeros_like(packed), "plan: expected what cpu_pack made, got other bytes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, name)(**{**right, "plan": wrong})


@pytest.mark.parametrize("name", WALKS)
def test_packed_weights_that_begin_between_two_floats_are_refused(name: str) -> None:
    right, call = arguments(name, two_blocks()), getattr(ops, name)
    memory = torch.cat([right["plan"].new_zeros(4), right["plan"]])
    expected = call(**right)
    assert all(map(torch.equal, expected, call(**{**right, "plan": memory[4:]})))
    for offset in (1, 2, 3):
        wrong = torch.cat([memory[4 - offset : 4], right["plan"]])[offset:]
        with pytest.raises(RuntimeError, match=f"plan: expected data aligned to 4 bytes, got it {offset} bytes off"):
            call(**{**right, "plan": wrong})


@pytest.mark.parametrize("name", WALKS)
def test_every_byte_before_the_weights_and_behind_them_is_checked(name: str) -> None:
    right, call = arguments(name, two_blocks()), getattr(ops, name)
    packed = right["plan"]
    tables = 64 + 2 * 10 * 8 + 5 * 12 * 8
    for byte in [*range(tables), *range(len(packed) - 8, len(packed))]:
        wrong = packed.clone()
        wrong[byte] ^= 1 << byte % 8
        with pytest.raises(RuntimeError, match="plan: expected "):
            call(**{**right, "plan": wrong})


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_changed_factors_of_a_walk_forward_are_refused(bn: str) -> None:
    network = two_blocks()
    right = network.forward_arguments(bn)
    begin = 64 + 2 * 10 * 8 + 5 * 12 * 8
    addends = network.biases if bn == "running" else network.epsilons
    floats = len(network.scales) + len(network.shifts) + len(addends)
    for number in range(floats):
        wrong = right[2].clone()
        wrong[begin + 4 * number + 3] ^= 128
        with pytest.raises(RuntimeError, match="plan: expected what cpu_pack made, got tables that changed since"):
            ops_of(bn)(*right[:2], wrong, False)


def ops_of(bn: str) -> Any:
    return ops.cpu_forward_running if bn == "running" else ops.cpu_forward_batch


@pytest.mark.parametrize("name", WALKS)
def test_the_weights_of_another_network_of_equal_size_are_refused(name: str) -> None:
    network, packing = two_blocks(), WALKS[name]
    first, second = (pack(replace(network, weights=weights), packing) for weights in variants(network.weights))
    assert len(first) == len(second)
    spliced = torch.cat([first[: len(first) // 2], second[len(first) // 2 :]])
    with pytest.raises(RuntimeError, match="plan: expected what cpu_pack made, got the weights of another plan"):
        getattr(ops, name)(**{**arguments(name, network), "plan": spliced})


def variants(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights, and a copy with the signs of two changed."""
    changed = weights.clone()
    changed[[0, 8]] *= -1
    return weights, changed
