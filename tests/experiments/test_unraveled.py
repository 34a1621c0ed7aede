"""Equations 4 to 6: the nested expression and the sum over all paths equal the network, and wrong forms do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.cases import SMALL, Case, random_net, shaken
from helpers.oracles import relative_error
from torch import Tensor

from pathnet import models
from pathnet.data import synthetic
from pathnet.experiments import unraveled
from pathnet.experiments.run import Plan, Value
from pathnet.models import Block, ResidualNet

EXACT = 1e-10
DATA = synthetic(images=32, shape=(3, 8, 8))
Form = Callable[[Sequence[Block], Tensor], Tensor]


def output(blocks: Sequence[Block], y: Tensor) -> Tensor:
    for block in blocks:
        y = block(y)
    return y


def start(net: ResidualNet, images: Tensor) -> tuple[list[Block], Tensor]:
    """Return the blocks and the input of the first, in float64."""
    net = net.double().requires_grad_(False)
    return list(net), net.stem(images.double())


def without_biases(blocks: Sequence[Block], y0: Tensor) -> Tensor:
    """Return the sum over only the 2^n paths from the input."""
    points = [y0]
    for block in blocks:
        points.append(block(points[-1]))
    total = torch.zeros_like(points[-1])
    for path in product((0, 1), repeat=len(blocks)):
        value = y0
        for through_module, block, x in zip(path, blocks, points, strict=False):
            value = torch.func.jvp(block.residual if through_module else block.skip, (x,), (value,))[1]
        total += value
    return total


def swapped(form: Form) -> Form:
    """Exchange the first two blocks, if there are two."""
    return lambda blocks, y0: form([*blocks[1::-1], *blocks[2:]], y0)


@pytest.mark.parametrize("case", [case for case in SMALL if case.depth <= 14], ids=lambda case: case.id)
def test_both_forms_are_the_network_with_projections_and_pads(case: Case) -> None:
    blocks, y0 = start(case.net(), case.images()[0])
    for n in range(1, len(blocks) + 1):
        expected = output(blocks[:n], y0)
        assert relative_error(unraveled.nested(blocks[:n], y0), expected) < EXACT
        assert relative_error(unraveled.paths_sum(blocks[:n], y0), expected) < EXACT


@pytest.mark.parametrize("seed", range(12))
def test_both_forms_are_the_network_for_random_blocks(seed: int) -> None:
    net, images, _ = random_net(seed)
    blocks, y0 = start(net, images)
    expected = output(blocks, y0)
    assert relative_error(unraveled.nested(blocks, y0), expected) < EXACT
    assert relative_error(unraveled.paths_sum(blocks, y0), expected) < EXACT


@pytest.mark.parametrize(
    "net",
    [
        lambda: models.highway(8, 3),
        lambda: models.vgg(7, 3, stages=3),
        lambda: models.preact_resnet(8, 3, survival=0.5),
    ],
    ids=["highway", "vgg", "stochastic depth"],
)
def test_both_forms_are_networks_of_other_kinds(net: Callable[[], ResidualNet]) -> None:
    torch.manual_seed(0)
    blocks, y0 = start(shaken(net()).eval(), torch.randn(2, 3, 8, 8))
    expected = output(blocks, y0)
    assert relative_error(unraveled.nested(blocks, y0), expected) < EXACT
    assert relative_error(unraveled.paths_sum(blocks, y0), expected) < EXACT


def test_the_nested_expression_goes_through_a_join() -> None:
    class Joined(models.PreactBlock):
        def join(self, z: Tensor) -> Tensor:
            return torch.relu(z)

    torch.manual_seed(0)
    blocks = [Joined(3, (3, 3), (3, 3), 1, "projection").double().eval().requires_grad_(False) for _ in range(3)]
    y0 = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert relative_error(unraveled.nested(blocks, y0), output(blocks, y0)) < EXACT


def test_the_forms_tell_another_order_and_missing_biases() -> None:
    case = SMALL[1]
    blocks, y0 = start(case.net(), case.images()[0])
    expected = output(blocks, y0)
    for form in (unraveled.nested, unraveled.paths_sum):
        assert relative_error(swapped(form)(blocks, y0), expected) > 1e-3
    assert relative_error(without_biases(blocks, y0), expected) > 1e-3


def test_a_module_on_every_branch_is_evaluated_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, y0 = start(SMALL[0].net(), SMALL[0].images()[0])
    calls = [0, 0, 0]
    for i, block in enumerate(blocks):

        def counted(x: Tensor, i: int = i, residual: Callable[[Tensor], Tensor] = block.residual) -> Tensor:
            calls[i] += 1
            return residual(x)

        monkeypatch.setattr(block, "residual", counted)
    unraveled.nested(blocks, y0)
    assert calls == [4, 2, 1]


def test_the_driver_measures_both_for_one_to_six_blocks(tmp_path: Path) -> None:
    run = unraveled.measure({}, DATA, Plan(), tmp_path)
    rows = run.rows(Value)
    assert sorted((row.quantity, row.index) for row in rows) == sorted(
        (form, n) for form in (unraveled.NESTED, unraveled.PATHS) for n in range(1, 7)
    )
    assert all(0 <= row.value < 1e-12 for row in rows)
    assert [claim.verdict for claim in unraveled.claims(run)] == ["held", "held"]
    assert unraveled.measure({}, DATA, Plan(), tmp_path).rows(Value) == rows
    with pytest.raises(ValueError, match=r"holds another run \(plan_seed: expected 1, found 0"):
        unraveled.measure({}, DATA, Plan(plan_seed=1), tmp_path)


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    [
        ("nested", swapped(output), [False, True]),
        ("paths_sum", swapped(unraveled.paths_sum), [True, False]),
        ("paths_sum", without_biases, [True, False]),
    ],
    ids=["nested in another order", "paths in another order", "no paths from biases"],
)
def test_the_drivers_claims_fail_for_forms_that_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: Form, expected: list[bool]
) -> None:
    monkeypatch.setattr(unraveled, name, form)
    run = unraveled.measure({}, DATA, Plan(), tmp_path)
    assert [claim.verdict == "held" for claim in unraveled.claims(run)] == expected
