"""Residual modules that a step does not draw: neither run nor changed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import shaken
from helpers.training import DRAWS, SMALL, Interrupt, fresh, left_out, updated, zeroed
from torch import Tensor

from pathnet import data, models
from pathnet.models import ResidualNet
from pathnet.models.weights import read_tensors
from pathnet.training import Recipe, train
from pathnet.training.sampling import drawn_modules, training_batch


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


@pytest.mark.parametrize("drawn", DRAWS, ids=lambda drawn: "".join("01"[keep] for keep in drawn))
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_gradients_are_those_of_modules_multiplied_by_zero(shortcut: Any, drawn: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(14, 4, shortcut=shortcut)).double().train()
    other = copy.deepcopy(net)
    batch, labels = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (5,))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    output, expected = net(batch, drawn), zeroed(other, batch, drawn)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    F.cross_entropy(output, labels).backward()
    F.cross_entropy(expected, labels).backward()
    unused, theirs = left_out(net, drawn), dict(other.named_parameters())
    assert len(unused) >= 4 * drawn.count(False) - 1
    for name, parameter in net.named_parameters():
        if name in unused:
            assert parameter.grad is None and not theirs[name].grad.any(), name
        else:
            assert parameter.grad is not None and parameter.grad.any(), name
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-12, atol=1e-14)
    for name, buffer in net.named_buffers():
        module = name.rpartition(".")[0]
        if f"{module}.weight" in unused:
            assert torch.equal(buffer, before[name]), name
        else:
            torch.testing.assert_close(buffer, other.get_buffer(name), rtol=1e-13, atol=0)
            assert not torch.equal(buffer, before[name])


@pytest.mark.parametrize("undrawn", ["none", "zero"])
def test_decay_and_momentum_meet_modules_that_are_not_drawn_or_pass_them(images: data.Data, undrawn: Any) -> None:
    recipe = Recipe(1, 16, 0.05, weight_decay=1e-2, warmup_steps=2, augment=False, modules=1, undrawn=undrawn)
    trained, net = fresh(), fresh().to(memory_format=torch.channels_last).train()
    moved: list[set[str]] = []
    weights = {name: p.detach().clone() for name, p in trained.named_parameters()}

    def watch(done: int, steps: int, note: str) -> None:
        now = {name: p.detach().clone() for name, p in trained.named_parameters()}
        moved.append({name for name in now if not torch.equal(now[name], weights[name])})
        weights.update(now)

    train(trained, images, recipe, progress=watch)
    velocity: dict[str, Tensor] = {}
    seen = set()
    for step in range(8):
        drawn = drawn_modules(net, recipe, step)
        assert drawn is not None
        seen.add(drawn)
        batch, labels = training_batch(images, recipe, step)
        net.zero_grad()
        F.cross_entropy(zeroed(net, batch, drawn), labels).backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        untouched = left_out(net, drawn) if undrawn == "none" else set()
        updated(net, velocity, gradients, untouched, recipe.rate(step, 8), 1e-2)
        assert not untouched & moved[step]
        assert {name for name in weights if name.endswith("weight")} <= moved[step] | untouched
    assert len(seen) == 3
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p, net.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_modules_that_are_not_drawn_do_not_run(images: data.Data) -> None:
    recipe = dataclasses.replace(SMALL, epochs=1, batch_size=16, modules=1)
    net, step = fresh(), 0
    ran: list[set[int]] = [set() for _ in range(8)]

    def count(done: int, steps: int, note: str) -> None:
        nonlocal step
        step = done

    def ran_in(block: int) -> Callable[..., None]:
        return lambda *_: ran[step].add(block) if net.training else None

    for i, block in enumerate(net.blocks):
        for module in (*block.convs, block.bns[1]):
            module.register_forward_hook(ran_in(i))
    train(net, images, recipe, progress=count)
    for step_, blocks in enumerate(ran):
        drawn = drawn_modules(net, recipe, step_)
        assert drawn is not None and blocks == {i for i in range(3) if drawn[i]} and len(blocks) == 1
    for i, block in enumerate(net.blocks):
        steps = sum(i in blocks for blocks in ran)
        assert block.bns[1].num_batches_tracked == steps
        assert block.bns[0].num_batches_tracked == (steps if block.projection is None else 8)


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize(
    ("survival", "settings"),
    [(1.0, {"modules": 1}), (1.0, {"modules": 2, "undrawn": "zero"}), (0.3, {}), (0.3, {"undrawn": "zero"})],
    ids=["modules", "modules, zero", "survival", "survival, zero"],
)
def test_training_that_draws_modules_resumes_bit_exactly(
    images: data.Data, tmp_path: Path, stop: int, survival: float, settings: dict[str, Any]
) -> None:
    recipe, path = dataclasses.replace(SMALL, **settings), tmp_path / "checkpoint.safetensors"

    def network(seed: int) -> ResidualNet:
        torch.manual_seed(seed)
        return models.preact_resnet(8, 4, survival=survival)

    straight, resumed = network(0), network(1)
    train(straight, images, recipe)

    def interrupt(done: int, steps: int, note: str) -> None:
        if done == stop:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(network(0), images, recipe, path, interrupt)
    train(resumed, images, recipe, path)
    assert models.fingerprint(resumed) == models.fingerprint(straight)
    assert models.load(path).config == straight.config


def test_a_module_that_was_never_drawn_has_no_momentum(images: data.Data, tmp_path: Path) -> None:
    recipe, path = dataclasses.replace(SMALL, modules=1), tmp_path / "checkpoint.safetensors"

    def interrupt(*_: object) -> None:
        raise Interrupt

    net = fresh()
    with pytest.raises(Interrupt):
        train(net, images, recipe, path, interrupt)
    drawn = drawn_modules(net, recipe, 0)
    assert drawn is not None
    kept = {name.removeprefix("momentum/") for name in read_tensors(path)[0] if name.startswith("momentum/")}
    assert kept == {name for name, _ in net.named_parameters()} - left_out(net, drawn)
