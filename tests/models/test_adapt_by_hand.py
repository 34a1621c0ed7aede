"""`adapt` with ``blocks=``: submodules that contain the blocks, and branches by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import relative_error
from helpers.third_party import Basic
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet
from pathnet.models import PostActivationForm


class ValueDependent(nn.Module):
    """Untraceable control flow on values: in the model, in its blocks or in their branches."""

    def __init__(self, inside: str) -> None:
        super().__init__()
        self.inside = inside
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.blocks = nn.ModuleList([Branch(4, inside), Branch(4, "")])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for block in self.blocks:
            if self.inside != "model" or x.sum() > -1e9:
                x = block(x)
        return self.fc(x.mean((2, 3)))


class Branch(nn.Module):
    def __init__(self, planes: int, inside: str) -> None:
        super().__init__()
        self.module, self.inside = Deciding(planes, inside), inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return F.relu(x + y) if self.inside != "block" or y.sum() > -1e9 else x


class Deciding(nn.Module):
    def __init__(self, planes: int, inside: str) -> None:
        super().__init__()
        self.conv, self.inside = nn.Conv2d(planes, planes, 3, padding=1), inside

    def forward(self, x: Tensor) -> Tensor:
        if self.inside == "branch in place":
            x.relu_()
        return self.conv(x) if not self.inside.startswith("branch") or x.sum() > -1e9 else x


def parts_by_hand(model: ValueDependent) -> dict[str, Any]:
    """Return the parts of a model by name, as modules, and as functions."""
    first = F.relu if model.inside == "branch in place" else None
    blocks = [(first, "blocks.0.module", torch.relu), (lambda y: y, model.blocks[1].module, nn.ReLU())]
    return {"blocks": blocks, "stem": "conv", "head": lambda y: model.fc(y.mean((2, 3)))}


@pytest.mark.parametrize("inside", ["model", "block", "branch", "branch in place"])
def test_control_flow_on_values(inside: str) -> None:
    torch.manual_seed(0)
    model = ValueDependent(inside).double()
    x, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    nets = [pathnet.adapt(model, x, **parts_by_hand(model))]
    assert nets[0].traced_by == "hand" and nets[0].n == 2
    if inside == "branch":
        nets.append(pathnet.adapt(model, x))
        assert nets[1].traced_by == "torch.fx around blocks.0.module"
    else:
        advice = "model: cannot be traced; blocks= takes the names of blocks, to trace one by one, or their branches"
        reason = r"\(torch.fx: .*control flow; torch.export: fails .*data-dependent expression"
        with pytest.raises(ValueError, match=f"^{advice}.* {reason}") as failure:
            pathnet.adapt(model, x)
        assert len(str(failure.value)) < 420
    if inside != "branch in place":
        nets.append(pathnet.adapt(model, x, blocks=["blocks.0", "blocks.1"]))
    first, second = (block.module.conv for block in model.blocks)
    codes = pathnet.paths.enumerate_all(2)
    for net in nets:
        tape = pathnet.record(net, x, labels, precision="float64", at="image")
        image = x.clone().requires_grad_()
        for code, grad in zip(codes, tape.path_gradients(codes), strict=True):
            y = model.conv(image)
            if inside == "branch in place":
                y = F.relu(y)
            for takes_residual, conv in zip(code, (first, second), strict=True):
                y = F.relu(y.detach() + conv(y) if takes_residual else y + conv(y).detach())
            loss = F.cross_entropy(model.fc(y.mean((2, 3))), labels)
            assert relative_error(grad, torch.autograd.grad(loss, image)[0]) < EXACT_WALK
        with torch.no_grad():
            y = model.conv(x)
            y = F.relu(y)
            deleted = model.fc(F.relu(y + second(y)).mean((2, 3)))
            torch.testing.assert_close(pathnet.lesion.delete(net, [0])(x.clone()), deleted)


class Around(nn.Module):
    """A model that torch.fx traces around its blocks, of which one needs torch.export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second, self.fc = (
            nn.Conv2d(3, 4, 3),
            Asserting(4, 4),
            Basic(4, 4),
            nn.Linear(4, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class Asserting(Basic):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError(x.shape)
        return super().forward(x)


def test_named_blocks_are_traced_one_by_one() -> None:
    torch.manual_seed(0)
    model = Around()
    x = torch.randn(2, 3, 9, 9)
    for blocks in (["first", "second"], [model.first, model.second], [model.first, "second"]):
        net = pathnet.adapt(model, x, blocks=blocks)
        assert net.traced_by == "torch.fx" and [block.name for block in net] == ["first", "second"]
        assert all(isinstance(block.form(), PostActivationForm) for block in net)
    assert set(net.parameters()) == set(model.parameters())


def test_a_named_block_is_not_confused_with_one_whose_name_is_longer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), *(Basic(4, 4) for _ in range(9)))
    assert [block.name for block in pathnet.adapt(model, torch.randn(2, 3, 5, 5), blocks=["10"])] == ["10"]
    with pytest.raises(ValueError, match="blocks: no addition in '1' is a residual connection"):
        pathnet.adapt(model, torch.randn(2, 3, 5, 5), blocks=["1", "10"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": ["conv", "nothing"]}, "blocks: the model has no submodule 'nothing'"),
        ({"blocks": [nn.Conv2d(1, 1, 1)]}, "blocks: expected submodules of the model, their names, or pairs"),
        ({"blocks": [3]}, "blocks: expected submodules of the model"),
        (
            {"blocks": [(None, "blocks.0.module", torch.relu)]},
            "stem: expected a part of the model since blocks are pairs of branches, got None",
        ),
        ({"blocks": None}, "stem: expected None unless blocks are pairs of branches"),
        ({"blocks": [("blocks.0.module",)]}, "blocks: expected pairs"),
        ({"blocks": [("blocks.0.module", None)]}, "blocks: expected a residual module in block 0"),
        ({"blocks": [(None, "fc")]}, "the residual module of block 0: rejects the output of the part before it"),
        ({"blocks": [(None, 3)]}, "the residual module of block 0: expected a submodule, its name or a function"),
        ({"blocks": [(None, "blocks.0.module")]}, "model: the adapted network's output is not the model's"),
        ({"blocks": [(None, lambda y: y if y.sum() > 0 else -y)]}, "expected a function that torch.fx can trace"),
    ],
)
def test_wrong_blocks_are_named(change: dict[str, Any], message: str) -> None:
    model = ValueDependent("")
    arguments = {**parts_by_hand(model), **change}
    if message.startswith("stem: expected a part of the model since blocks are pairs of branches, got None"):
        arguments |= {"stem": None}
    elif isinstance(change["blocks"], list) and not isinstance(change["blocks"][0], tuple):
        arguments = change
    with pytest.raises(ValueError, match=message):
        pathnet.adapt(model, torch.randn(2, 3, 8, 8), **arguments)


def test_gradients_are_compared_with_the_models() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"gradient of (the input|0.weight) is not the model's"):
        pathnet.adapt(
            model,
            torch.randn(2, 3, 4, 4),
            stem="0",
            blocks=[(lambda y: 0 * y, "1")],
            head=lambda y: y.detach() * 2 - y,
        )
