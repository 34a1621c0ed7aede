"""Models that write into tensors: assignments to slices, and in-place operations on views."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.oracles import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pathnet

Write = Callable[[nn.Module, Tensor], Tensor]


class Writing(nn.Module):
    """A network whose residual modules write into what they return.

    Attributes:
        path: for each block, the branch that a gradient flows through; None for both.
        exported: whether the model checks its input's shape, which only `torch.export` traces.
    """

    def __init__(self, write: Write, exported: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.write, self.exported = write, exported
        self.path: tuple[int | None, ...] = (None,) * 3

    def forward(self, x: Tensor) -> Tensor:
        if self.exported:
            assert x.shape[1] == 5
        return self.after_stem(self.stem(x))

    def after_stem(self, x: Tensor) -> Tensor:
        for branch, chosen in zip(self.branches, self.path, strict=True):
            y = self.write(branch, x)
            x = (x.detach() if chosen == 1 else x) + (y.detach() if chosen == 0 else y)
        return self.head(x)


def slices(branch: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] = branch(x)[:, 1:]
    return y


def sliced_sums(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    y[:, 2:4] += x[:, :2]
    y[..., -1] *= 3
    return y


def mask(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    y[y < 0] = 0
    return y


def columns(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    y[:, 0].add_(1)
    y[:, 2].zero_()
    y[:, 3:5].fill_(0.5)
    return y


def flat_view(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    y.view(-1, 2, 4)[:, 1, 2] = 0
    return y


def twice_through_a_view(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    part = y[:, :4]
    part.mul_(2)
    part.sub_(x[:, 4:])
    return y


def view_of_a_view(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    part = y.unflatten(1, (2, 4)).transpose(1, 2)
    part[:, 1:, 0].mul_(x[:, :3])
    return part.flatten(1) + y


def earlier_views_see_it(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    left, columns = y[:, :4], y.t()
    y.mul_(x)
    y[:, 0] = 1
    return torch.cat([left, columns.t()[:, 4:]], 1) * 2


def index_put(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    y.index_put_((y > 0.1,), torch.tensor(0.25, dtype=torch.float64))
    return y.index_fill_(1, torch.tensor([3]), 2.0)


def new_tensor(branch: nn.Module, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, ::2] = branch(x)[:, ::2]
    y[:, 1::2] = -1
    return y


def in_place_of_a_reshaped(branch: nn.Module, x: Tensor) -> Tensor:
    return torch.relu_(branch(x).view(-1, 2, 4)).flatten(1)


WRITES = [
    *(slices, sliced_sums, mask, columns, flat_view, twice_through_a_view, view_of_a_view, earlier_views_see_it),
    *(index_put, new_tensor, in_place_of_a_reshaped),
]


@pytest.mark.parametrize("exported", [False, True], ids=["fx", "export"])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_paths_through_writes_are_the_models(write: Write, exported: bool) -> None:
    torch.manual_seed(0)
    model = Writing(write, exported).double()
    net = pathnet.adapt(model, torch.randn(4, 5, dtype=torch.float64))
    assert net.n == 3 and net.traced_by == ("torch.export" if exported else "torch.fx")
    x, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    tape = pathnet.record(net, x, target, precision="float64")
    paths = list(itertools.product((0, 1), repeat=3))
    grads = tape.path_gradients(torch.tensor(paths))
    for path, grad in zip(paths, grads, strict=True):
        model.path = path
        y0 = model.stem(x).detach().requires_grad_()
        loss = nn.functional.cross_entropy(model.after_stem(y0), target)
        (expected,) = torch.autograd.grad(loss, y0, materialize_grads=True)
        assert relative_error(grad, expected) < 1e-12
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def out_argument(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    return torch.add(y, 1, out=y)


def chunk(branch: nn.Module, x: Tensor) -> Tensor:
    y = branch(x)
    y.chunk(2, 1)[0].mul_(2)
    return y


def overwritten(branch: nn.Module, x: Tensor) -> Tensor:
    y = torch.tanh(branch(x))
    kept = y.clone()
    y.mul_(2)
    return kept


@pytest.mark.parametrize(
    ("write", "why"),
    [(out_argument, "out=... arguments"), (chunk, "returns multiple views"), (overwritten, "inplace operation")],
)
def test_writes_that_autograd_refuses_are_refused_with_its_reason(write: Write, why: str) -> None:
    with pytest.raises(ValueError, match=f"^model: expected one that autograd differentiates .*{why}"):
        pathnet.adapt(Writing(write), torch.randn(4, 5))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("around", ["branch", "block"])
def test_checkpoints_are_traced_through(use_reentrant: bool, around: str) -> None:
    class Checkpointed(Writing):
        def after_stem(self, x: Tensor) -> Tensor:
            for branch in self.branches:
                if around == "block":
                    x = checkpoint(lambda x, branch=branch: x + branch(x), x, use_reentrant=use_reentrant)
                else:
                    x = x + checkpoint(branch, x, use_reentrant=use_reentrant)
            return self.head(x)

    torch.manual_seed(0)
    model, plain = Checkpointed(slices), Writing(lambda branch, x: branch(x))
    plain.load_state_dict(model.state_dict())
    x, target = torch.randn(4, 5), torch.randint(3, (4,))
    net = pathnet.adapt(model, x)
    assert net.n == 3
    checkpoint_class = torch.utils.checkpoint.CheckpointFunction
    assert issubclass(checkpoint_class, torch.autograd.Function)
    tape, expected = (pathnet.record(each, x, target) for each in (net, pathnet.adapt(plain, x)))
    torch.testing.assert_close(tape.gradient_by_length(), expected.gradient_by_length())
