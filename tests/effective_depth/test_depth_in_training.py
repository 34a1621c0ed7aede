"""Training that is measured ends as it would have ended unmeasured; resumed training appends to its file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import SMALL, shaken
from helpers.training import Interrupt
from torch import Tensor, nn

from pathnet import EffectiveDepth, data, models, training
from pathnet.effective_depth import Depth, read
from pathnet.models import ResidualNet

ALWAYS = math.inf
"""Share of the time that lets every step be measured."""
RECIPE = training.Recipe(epochs=2, batch_size=32, learning_rate=0.05, warmup_steps=3)


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


def fresh(**settings: Any) -> ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(8, 4, **settings)


def without_seconds(rows: list[Depth]) -> list[Depth]:
    return [dataclasses.replace(row, seconds=0) for row in rows]


class Noisy(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.3), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(x))


def test_a_loop_of_ones_own_goes_on_as_without_it(tmp_path: Path) -> None:
    batch, labels = torch.randn(6, 3, 8, 8), torch.randint(0, 10, (6,))
    ends = []
    for measured in (False, True):
        net = shaken(fresh()).train()
        net.head = Noisy(net.head)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        calls = [0]
        for module in (net.stem, net.blocks[1], net.head.head):  # of which some engine runs each
            module.register_forward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
            if module is not net.stem:
                module.register_full_backward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        callback = EffectiveDepth((batch[:3], labels[:3]), tmp_path / "depth.csv", every=1, share=ALWAYS)
        torch.manual_seed(5)
        np.random.seed(5)
        for step in range(4):
            if measured:
                assert callback(step, net) is not None
                assert read(tmp_path / "depth.csv")[-1].step == step, "a row waits in a buffer"
            optimizer.zero_grad()
            F.cross_entropy(net(batch), labels).backward()
            if measured:  # gradients are left as they are
                before = [parameter.grad.clone() for parameter in net.parameters()]
                EffectiveDepth((batch, labels), tmp_path / f"{step}.csv", net)(0)
                assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), before, strict=True))
            optimizer.step()
        assert net.training and calls == [20]
        ends.append((net.state_dict(), torch.get_rng_state(), np.random.get_state()[1]))
    (plain, rng, numpy_rng), (observed, rng_after, numpy_rng_after) = ends
    assert all(torch.equal(observed[name], tensor) for name, tensor in plain.items())
    assert torch.equal(rng, rng_after) and (numpy_rng == numpy_rng_after).all()


@pytest.mark.parametrize(("survival", "modules"), [(1.0, 0), (1.0, 2), (0.4, 0)])
def test_training_ends_with_the_same_bits(images: data.Data, tmp_path: Path, survival: float, modules: int) -> None:
    recipe = dataclasses.replace(RECIPE, modules=modules)
    plain, measured = fresh(survival=survival), fresh(survival=survival)
    history = training.train(plain, images, recipe)
    callback = EffectiveDepth(
        images.random_batch(8, 0, 0), tmp_path / "depth.csv", every=2, share=ALWAYS, bn="running"
    )
    observed = training.train(measured, images, recipe, callback=callback)
    assert models.fingerprint(plain) == models.fingerprint(measured)
    assert [dataclasses.replace(epoch, seconds=0) for epoch in observed] == [
        dataclasses.replace(epoch, seconds=0) for epoch in history
    ]
    assert [row.step for row in read(tmp_path / "depth.csv")] == [0, 2, 4, 6, 8]


def test_a_wrapped_network_is_measured_as_it_is(tmp_path: Path) -> None:
    net, (batch, labels) = SMALL[0].net(), SMALL[0].images()
    compiled = torch.compile(net, backend="eager")
    rows = [
        EffectiveDepth((batch, labels), tmp_path / f"{i}.csv", first)(0, later)
        for i, (first, later) in enumerate([(net, None), (compiled, None), (None, compiled), (fresh(), net)])
    ]
    assert len(set(without_seconds([row for row in rows if row is not None]))) == 1 and len(rows) == 4


def test_weights_that_are_not_finite_leave_a_row_and_not_an_error(tmp_path: Path) -> None:
    net, (batch, labels) = SMALL[0].net(), SMALL[0].images()
    nn.init.constant_(net.head.linear.weight, math.nan)
    callback = EffectiveDepth((batch, labels), tmp_path / "depth.csv", net, every=1, share=ALWAYS)
    row = callback(0)
    assert row is not None and (row.first, row.last, row.half) == (-1, -1, -1)
    assert math.isnan(row.depth) and math.isnan(row.loss) and math.isnan(read(tmp_path / "depth.csv")[0].depth)
    nn.init.zeros_(net.head.linear.weight)  # no gradient arrives
    row = callback(1)
    assert row is not None and math.isnan(row.depth) and row.loss > 0
    with pytest.raises(ValueError, match="target: expected labels"):
        EffectiveDepth((batch, labels + 5), tmp_path / "other.csv", net)(0)
    infinite = EffectiveDepth((batch, labels), tmp_path / "infinite.csv", net, loss=lambda y, _: y.sum() * math.inf)
    row = infinite(0)
    assert row is not None and math.isnan(row.depth)


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resumed_training_measures_what_is_missing_and_nothing_twice(
    images: data.Data, tmp_path: Path, stop: int
) -> None:
    few = images.random_batch(8, 0, 0)

    def callback(name: str) -> EffectiveDepth:
        return EffectiveDepth(few, tmp_path / name, every=1, share=ALWAYS)

    def interrupt(done: int, steps: int, note: str) -> None:
        if done == stop:
            raise Interrupt

    training.train(fresh(), images, RECIPE, callback=callback("straight.csv"))
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupt):
        training.train(fresh(), images, RECIPE, checkpoint, interrupt, callback("resumed.csv"))
    early = checkpoint.read_bytes()
    assert [row.step for row in read(tmp_path / "resumed.csv")] == list(range(stop + 1))
    training.train(fresh(), images, RECIPE, checkpoint, callback=callback("resumed.csv"))
    straight, resumed = (without_seconds(read(tmp_path / f"{name}.csv")) for name in ("straight", "resumed"))
    assert resumed == straight and [row.step for row in straight] == list(range(9))
    # A checkpoint from before the last rows: its steps are taken again, and not measured again.
    checkpoint.write_bytes(early)
    with pytest.warns(RuntimeWarning, match=rf"resumed.csv goes up to step 8, .* resumes from step {stop}"):
        training.train(fresh(), images, RECIPE, checkpoint, callback=callback("resumed.csv"))
    assert without_seconds(read(tmp_path / "resumed.csv")) == straight
