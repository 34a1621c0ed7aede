"""Networks that lack what their model does in training: each way to train them is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathnet


class Block(nn.Module):
    """A residual block with functional dropout.

    Args:
        exported: whether the block checks its input's shape, which only `torch.export` traces.
    """

    def __init__(self, p: float, exported: bool = False) -> None:
        super().__init__()
        self.linear, self.dropout, self.p, self.exported = nn.Linear(5, 5), nn.Dropout(0.0), p, exported

    def forward(self, x: Tensor) -> Tensor:
        if self.exported:
            assert x.shape[1] > 1
        return x + self.dropout(F.dropout(torch.tanh(self.linear(x)), self.p, self.training))


class Scheduled(nn.Sequential):
    """A model whose `train` sets more than modes.

    Args:
        live: whether what it sets acts through a module that the network calls.
    """

    def __init__(self, live: bool) -> None:
        super().__init__(Block(0.0), Block(0.0), nn.Linear(5, 3))
        self.live, self.scale = live, {"factor": 1.0}

    def train(self, mode: bool = True) -> Any:
        if self.live:
            self[0].dropout.p = 0.5 if mode else 0.0  # type: ignore[union-attr]
        else:
            self.scale["factor"] = 2.0 if mode else 1.0
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.scale["factor"]


def seeded(module: nn.Module, x: Tensor) -> Any:
    torch.manual_seed(3)
    return module(x)


def test_what_a_train_of_the_model_s_class_sets_is_live_or_refused() -> None:
    model, x = Scheduled(live=True), torch.randn(4, 5)
    net = pathnet.adapt(model, x)
    torch.testing.assert_close(seeded(net.train(), x), seeded(model, x))
    assert (net(x) - net.eval()(x)).abs().max() > 1e-3
    model = Scheduled(live=False).eval()
    net = pathnet.adapt(model, x)
    with pytest.raises(ValueError, match="the training branch of the model itself; training"):
        net.train()
    assert model.scale == {"factor": 1.0} and torch.equal(net.eval()(x), model.eval()(x))


@pytest.mark.parametrize("exported", [False, True])
def test_a_network_that_cannot_train_refuses_to_run_while_its_model_trains(exported: bool) -> None:
    model, x = nn.Sequential(Block(0.3, exported), Block(0.0), nn.Linear(5, 3)), torch.randn(4, 5)
    if exported:
        model[0].p, model[0].dropout.p = 0.0, 0.3  # type: ignore[union-attr,assignment]
    net = pathnet.adapt(model, x)
    assert model.training and not net.training
    for run in (net,) if exported else (net, copy.deepcopy(net)):
        with pytest.raises(ValueError, match=r"net: .* training would run .*: call net.eval\(\)"):
            run(x)
    with pytest.raises(ValueError, match=r"call net.eval\(\)"):
        pathnet.routed(net, x, torch.ones(net.n, 2))
    labels = torch.zeros(4, dtype=torch.int64)
    pathnet.record(net, x, labels, engine="autograd").gradient()
    assert 0 <= pathnet.training.evaluate(net, [(x, labels)]) <= 1
    torch.testing.assert_close(net.eval()(x), model.eval()(x))
