"""Models whose operations need a certain memory layout, on tensors of another layout than the trace's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import relative_error
from helpers.routed_models import squared
from helpers.tolerances import EXACT_WALK, FORWARD
from torch import Tensor, nn

import pathnet

Step = Callable[[Tensor], Tensor]


class Viewing(nn.Module):
    """A model of two blocks, on sequences [B, T, 8] or [T, B, 8].

    Args:
        begin: what is done to its input.
        step: what each block begins with; returns [B, T, 8] or one row for each token.
        exported: whether `torch.fx` cannot trace it.
    """

    def __init__(self, begin: Step, step: Step, exported: bool) -> None:
        super().__init__()
        self.begin, self.step, self.exported = begin, step, exported
        self.layers, self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.exported and x.shape[2] < 2:
            raise ValueError(x.shape)
        y = self.begin(x)
        for layer in self.layers:
            y = y + layer(self.step(torch.tanh(y))).reshape(y.shape)
        return self.out(y)


def complex_turned(x: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (4, 2)).contiguous()) * 1j).flatten(2)


def of_integers(x: Tensor) -> Tensor:
    """Return the numbers, rounded through views of their bits as halves of integers."""
    integers = x.detach().mul(64).int().contiguous().view(torch.int16)
    return x * integers[..., ::2]


def strided(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride()).flip(1)


def written(x: Tensor) -> Tensor:
    x = x * 2
    x.view(x.shape[0] * x.shape[1], 8)[:, ::2].mul_(3)
    return x


STEPS: dict[str, Step] = {
    "view": lambda x: x.contiguous().view(x.shape[0] * x.shape[1], 8),
    "view of a size": lambda x: x.contiguous().view(size=(x.shape[0] * x.shape[1], 8)),
    "view as another": lambda x: x.contiguous().view_as(x.reshape(x.shape[0] * x.shape[1], 8)),
    "complex numbers": complex_turned,
    "another type": of_integers,
    "strides": strided,
}


@pytest.mark.parametrize("name", STEPS)
def test_inputs_of_another_layout_than_the_examples(name: str) -> None:
    """Check where the export omits what has no effect on the example: to make its layout contiguous."""
    torch.manual_seed(0)
    model = Viewing(nn.Identity(), STEPS[name], exported=True).eval()
    net = pathnet.adapt(model, torch.randn(3, 5, 8))
    assert net.n == 2 and net.traced_by == "torch.export"
    x = torch.randn(5, 8, 3).permute(2, 0, 1)
    assert relative_error(net(x).detach(), model(x).detach()) < FORWARD
    target, double = torch.randn(3, 5, 3, dtype=torch.float64), copy.deepcopy(model).double()
    image = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(squared(double(image), target), image)
    tape = pathnet.record(net, x, target, precision="float64", at="image", loss=squared)
    assert relative_error(tape.gradient(), expected) < EXACT_WALK


class Attending(nn.Module):
    """Attention whose result is made contiguous before a view, as in torch's own of 2.11 and 2.12.

    Its kernel, and so the result's layout, depends on whether the mask has a gradient: that of the first block does
    where the inputs have one, as they do not in the trace.
    """

    def forward(self, y: Tensor) -> Tensor:
        batch, length, width = y.shape
        x = y.transpose(0, 1).contiguous().view(length, batch * 2, width // 2).transpose(0, 1)
        x = x.view(batch, 2, length, width // 2)
        x = F.scaled_dot_product_attention(x, x, x, (y @ y.mT)[:, None])
        return (
            x.permute(2, 0, 1, 3).contiguous().view(length * batch, width).view(length, batch, width).transpose(0, 1)
        )


def test_kernels_with_results_of_another_layout_than_in_the_trace() -> None:
    torch.manual_seed(0)
    model = Viewing(nn.Identity(), Attending(), exported=True).eval()
    net = pathnet.adapt(model, torch.randn(3, 5, 8))
    assert net.n == 2 and net.traced_by == "torch.export"
    for x in (torch.randn(2, 5, 8), torch.randn(5, 2, 8).transpose(0, 1)):
        assert relative_error(net(x).detach(), model(x).detach()) < FORWARD


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("step", [lambda x: x.view(x.shape[0] * x.shape[1], 8), written], ids=["read", "written"])
def test_blocks_on_states_of_another_layout_than_in_the_model(step: Step, exported: bool) -> None:
    """Check a model that holds the batch in the second dimension, the blocks' states in the first."""
    torch.manual_seed(0)
    model = Viewing(lambda x: x - x.mean(0), step, exported).eval()
    net = pathnet.adapt(model, torch.randn(5, 3, 8))
    y = torch.randn(5, 4, 8)
    _, context = net.split(y)
    first, _ = net.bound(context)
    expected = y + model.layers[0](step(torch.tanh(y))).reshape(y.shape)
    for state in (y.transpose(0, 1), y.transpose(0, 1).contiguous()):
        assert relative_error(first(state).detach(), expected.transpose(0, 1).detach()) < FORWARD
