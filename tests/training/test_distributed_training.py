"""Two processes that train together."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import processes
from helpers.training import Board, FusedCalls, fused_passes, left_out, updated, zeroed
from torch import Tensor, nn

from pathnet import EffectiveDepth, data, models
from pathnet.effective_depth import read
from pathnet.models import ResidualNet
from pathnet.training import Recipe, train
from pathnet.training.sampling import drawn_modules, training_batch

SHARED = Recipe(1, 32, 0.05, weight_decay=1e-2, warmup_steps=2, seed=3)
SHARED_KINDS: dict[str, tuple[float, Recipe]] = {
    "all": (1.0, SHARED),
    "modules": (1.0, dataclasses.replace(SHARED, modules=1)),
    "survival": (0.4, SHARED),
    "zero": (0.4, dataclasses.replace(SHARED, undrawn="zero")),
    "shorter": (
        1.0,
        dataclasses.replace(
            SHARED, epochs=2, batch_size=64, schedule="one-cycle", flips="alternating", label_smoothing=0.2
        ),
    ),
}


def shared_net(survival: float) -> ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(8, 4, survival=survival)


def shared_images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


def one_of_two(rank: int, out: Path) -> None:
    """Train together with another process, and write the results to ``out``."""
    with processes.together(rank, out):
        images = shared_images()
        for kind, (survival, recipe) in SHARED_KINDS.items():
            net = shared_net(survival)
            # Processes begin with the weights of the first.
            if rank == 1:
                nn.init.zeros_(net.head.linear.weight)
            path = out / f"{kind}.safetensors"
            few = images.random_batch(4, 0, 0)
            callback = EffectiveDepth(few, out / f"{kind}.csv", every=1, share=math.inf) if kind == "all" else None
            board = Board()
            with FusedCalls() as calls:
                history = train(net, images, recipe, path, callback=callback, log=board)
            assert (len(board.scalars) > 0) == (rank == 0)
            (out / f"{kind}-{rank}.calls").write_text(str(calls.backward))
            models.save(net, out / f"{kind}-{rank}.safetensors")
            (out / f"{kind}-{rank}.json").write_text(json.dumps([dataclasses.asdict(epoch) for epoch in history]))

        def refusal(net: ResidualNet, recipe: Recipe, path: Path | None = None) -> str:
            try:
                train(net, images, recipe, path)
            except ValueError as error:
                return str(error)
            return ""

        odd = refusal(shared_net(1), dataclasses.replace(SHARED, batch_size=33))
        broken = shared_net(1)
        if rank == 1:
            broken.head.register_forward_hook(lambda module, inputs, output: output * math.nan)
        unseen = out / ("all.safetensors" if rank == 0 else "unseen.safetensors")
        words = [odd, refusal(broken, SHARED), refusal(shared_net(1), SHARED_KINDS["all"][1], unseen)]
        (out / f"words-{rank}.json").write_text(json.dumps(words))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    processes.run(one_of_two, folder)
    return folder


@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_two_processes_train_by_the_mean_of_their_gradients(of_two: Path, kind: str) -> None:
    """Each process takes statistics over its half of the batch; those of the first process are kept."""
    survival, recipe = SHARED_KINDS[kind]
    images, net = shared_images(), shared_net(survival).to(memory_format=torch.channels_last).train()
    velocity: dict[str, Tensor] = {}
    losses, size = [], recipe.batch_size // 2
    for step in range(4):
        batch, labels = training_batch(images, recipe, step)
        drawn = drawn_modules(net, recipe, step) or (True,) * 3
        halves = [copy.deepcopy(net), copy.deepcopy(net)]
        for half, part in zip(halves, (slice(0, size), slice(size, 2 * size)), strict=True):
            half.zero_grad()
            output = zeroed(half, batch[part], drawn)
            loss = F.cross_entropy(output, labels[part], label_smoothing=recipe.label_smoothing)
            loss.backward()
            losses.append(loss.item())
        gradients = {
            name: (p.grad + halves[1].get_parameter(name).grad) / 2
            for name, p in halves[0].named_parameters()
            if p.grad is not None
        }
        untouched = left_out(net, drawn) if recipe.undrawn == "none" else set()
        updated(net, velocity, gradients, untouched, recipe.rate(step, 4), 1e-2)
        for name, buffer in net.named_buffers():
            # `zeroed` updates the statistics of undrawn modules too, training does not.
            if f"{name.rpartition('.')[0]}.weight" not in left_out(net, drawn):
                buffer.copy_(halves[0].get_buffer(name))
    calls = sum(fused_passes(net, drawn_modules(net, recipe, step)) for step in range(4))
    assert [(of_two / f"{kind}-{rank}.calls").read_text() for rank in range(2)] == [str(calls)] * 2
    first, second = (models.load(of_two / f"{kind}-{rank}.safetensors") for rank in range(2))
    assert models.fingerprint(first) == models.fingerprint(second)
    assert models.fingerprint(models.load(of_two / f"{kind}.safetensors")) == models.fingerprint(first)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    histories = [json.loads((of_two / f"{kind}-{rank}.json").read_text()) for rank in range(2)]
    for history in histories:
        means = np.array(losses).reshape(recipe.epochs, -1).mean(1)
        assert [epoch["train_loss"] for epoch in history] == pytest.approx(list(means), rel=1e-5)
        assert [epoch["test_accuracy"] for epoch in history] == [epoch["test_accuracy"] for epoch in histories[0]]


def test_of_two_processes_the_first_measures_the_effective_depth(of_two: Path) -> None:
    assert [row.step for row in read(of_two / "all.csv")] == list(range(5))


def test_two_processes_fail_alike(of_two: Path) -> None:
    """Both stop even if only one has a reason to; otherwise the other would wait for it."""
    for rank in range(2):
        odd, broken, unseen = json.loads((of_two / f"words-{rank}.json").read_text())
        assert odd == "recipe: expected a batch_size that 2 processes can share, got 33"
        assert broken.startswith("recipe: the loss is nan at step 0")
        assert unseen == "checkpoint: expected a file that all processes see, got some at step 0 and some at 4"
