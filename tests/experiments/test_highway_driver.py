"""Measurements of the highway driver, compared with autograd on equation 3 written out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import shaken
from torch import Tensor, nn

from pathnet import models, paths, results
from pathnet.data import Data, synthetic
from pathnet.experiments import highway
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Plan, Value
from pathnet.models import HighwayBlock, ResidualNet

PLAN = Plan(gate_batches=2, gate_batch_size=6, images=8)
PARTS = ("skip", "residual", "gate")


def network(seed: int = 0) -> ResidualNet:
    """Return three blocks, two of which change the shape, with gates that depend on their input."""
    torch.manual_seed(seed)
    net = shaken(models.highway(8, 3)).eval()
    for block in net:
        nn.init.normal_(block.gate.weight, 0, 0.7)
        nn.init.normal_(block.gate.bias, -0.5)
    return net


@pytest.fixture(scope="module")
def data() -> Data:
    return synthetic(images=40, shape=(3, 8, 8))


@pytest.fixture(scope="module")
def run(data: Data, tmp_path_factory: pytest.TempPathFactory) -> results.Run:
    return highway.measure(
        {"highway": [network(), network(1)]}, data, PLAN, tmp_path_factory.mktemp("run") / "highway"
    )


def parts(block: HighwayBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return t, s and f of equation 3."""
    first = F.relu(block.bns[0](x))
    t = torch.sigmoid(block.gate(first))
    f = block.convs[1](F.relu(block.bns[1](block.convs[0](first))))
    return t, x if block.projection is None else block.projection(first), f


def gradient(net: ResidualNet, batch: tuple[Tensor, Tensor], through: dict[int, str], elsewhere: str) -> Tensor:
    """Return the gradient at y_0, in float64, if the gradient of each block flows through some of its parts.

    Args:
        net: the network.
        batch: images and labels.
        through: by block, ``all``, ``skip``, ``residual``, ``gate``, or ``frozen``: both branches but not the gate.
        elsewhere: the same for all other blocks.
    """
    y = y0 = net.stem(batch[0].double()).detach().requires_grad_()
    for i, block in enumerate(net):
        t, s, f = parts(block, y)
        part = through.get(i, elsewhere)
        if part != "all":
            t = t if part == "gate" else t.detach()
            s = s if part in ("skip", "frozen") else s.detach()
            f = f if part in ("residual", "frozen") else f.detach()
        y = t * f + (1 - t) * s
    return torch.autograd.grad(F.cross_entropy(net.head(y), batch[1]), y0)[0]


def values(run: results.Run, seed: int, batch: int, quantity: str) -> list[float]:
    rows = [row for row in run.rows(Value) if (row.seed, row.batch, row.quantity) == (seed, batch, quantity)]
    assert [row.index for row in rows] == list(range(len(rows)))
    return [row.value for row in rows]


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_gates_and_parts_are_those_of_equation_3(run: results.Run, data: Data, seed: int, batch: int) -> None:
    net, drawn = network(seed).double(), data.random_batch(6, 0, batch)
    openness, y = [], net.stem(drawn[0].double())
    with torch.no_grad():
        for block in net:
            t, s, f = parts(block, y)
            openness.append(float(t.mean()))
            y = t * f + (1 - t) * s
    assert values(run, seed, batch, highway.OPENNESS) == pytest.approx(openness, rel=1e-5)
    whole = gradient(net, drawn, {}, "all")
    shares = []
    for block in range(3):
        of_parts = torch.stack([gradient(net, drawn, {block: part}, "all") for part in PARTS])
        torch.testing.assert_close(of_parts.sum(0), whole)
        norms = of_parts.flatten(1).norm(dim=1)
        shares.append((norms / norms.sum()).tolist())
    for part, expected in zip(PARTS, zip(*shares, strict=True), strict=True):
        assert values(run, seed, batch, part) == pytest.approx(expected, rel=1e-3)
    frozen = gradient(net, drawn, {}, "frozen").norm() / whole.norm()
    assert values(run, seed, batch, highway.FROZEN) == pytest.approx([float(frozen)], rel=1e-3)
    norms_along = [
        float(gradient(net, drawn, {i: PARTS[bit] for i, bit in enumerate(path)}, "").norm())
        for path in paths.one_of_each_length(3, 0, batch).tolist()
    ]
    assert values(run, seed, batch, highway.PATH_NORM) == pytest.approx(norms_along, rel=1e-3)
    assert 0 < max(values(run, seed, batch, highway.PARTS_OFF)) < 1e-5


def test_biases_and_deletions_are_the_networks(run: results.Run) -> None:
    summary = highway.summarise(run)
    for seed in (0, 1):
        bias = [float(block.gate.bias.detach().mean()) for block in network(seed)]
        assert summary.bias[seed].tolist() == pytest.approx(bias)
        assert values(run, seed, 1, highway.BIAS) == values(run, seed, 1, highway.HALF_OFF) == []
    assert len(run.rows(ErrorCount)) == 2 * (1 + 3) and summary.deletions.rate.shape == (2, 3)
    assert summary.half_off < 1e-14 and [claim.verdict for claim in highway.claims(run)][:2] == ["held", "held"]


def test_a_gate_that_is_not_at_one_half_is_found(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights_alone(tensor: Tensor) -> Tensor:
        return tensor.detach().zero_() if tensor.ndim > 1 else tensor

    monkeypatch.setattr(nn.init, "zeros_", weights_alone)
    run = highway.measure({"highway": [network()]}, data, dataclasses.replace(PLAN, gate_batches=1), tmp_path)
    assert highway.summarise(run).half_off > 1e-3 and highway.claims(run)[0].verdict == "did not hold"


def test_a_part_that_is_left_out_is_found(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = HighwayBlock.parts

    def without_gate(block: HighwayBlock, x: Tensor, wanted: Any = None) -> tuple[Tensor, ...]:
        skip, residual, *_ = whole(block, x, wanted)
        return skip, residual, 0.0 * residual

    monkeypatch.setattr(HighwayBlock, "parts", without_gate)
    run = highway.measure({"highway": [network()]}, data, dataclasses.replace(PLAN, gate_batches=1), tmp_path)
    assert highway.claims(run)[1].verdict == "did not hold"


def test_an_interrupted_run_goes_on_and_more_batches_extend_it(
    run: results.Run, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    original = highway._openness
    monkeypatch.setattr(highway, "_openness", lambda *arguments: measured.append(1) or original(*arguments))

    def stop(done: int, total: int, note: str) -> None:
        if note == "batches, gates" and done == 3:
            raise KeyboardInterrupt

    nets = {"highway": [network(), network(1)]}
    highway.measure(nets, data, dataclasses.replace(PLAN, gate_batches=1), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        highway.measure(nets, data, PLAN, tmp_path, stop)
    again = highway.measure(nets, data, PLAN, tmp_path)
    assert again.rows(Value) == run.rows(Value) and again.rows(ErrorCount) == run.rows(ErrorCount)
    assert len(measured) == 4 and again.facts["gate_batches"] == 2


def test_batches_are_no_larger_than_the_training_split(data: Data, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, gate_batches=1, gate_batch_size=1000)
    run = highway.measure({"highway": [network()]}, data, plan, tmp_path)
    assert run.identity["batch_size"] == 40 and values(run, 0, 0, highway.FROZEN)
