"""Additions and subtractions that are residual connections, and those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.model_cases import adapted_by_name
from helpers.oracles import relative_error
from helpers.third_party import Basic, shaken
from torch import Tensor, nn

import pathnet


def test_additions_inside_a_branch_are_no_residual_connections() -> None:
    kinds = [block.kind() for block in adapted_by_name("language model")]
    assert kinds == ["attention", "perceptron"] * 2
    assert all(block.skip_branch is None for block in adapted_by_name("language model"))
    assert [block.skip_kind() for block in adapted_by_name("scaled")] == ["identity"] * 5
    assert not any(block.nested for name in ("scaled", "language model", "basic") for block in adapted_by_name(name))

    class Polynomial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)
            x = x * torch.sigmoid(x + 0.1 * x**3)
            return self.fc((x + 1).mean((2, 3)))

    with pytest.raises(ValueError, match="no residual connection was found"):
        pathnet.adapt(Polynomial())


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)])
        self.fc = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.conv(x)]
        for layer in self.layers:
            features.append(layer(F.relu(torch.cat(features, 1))))
        return self.fc(torch.cat(features, 1).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.low, self.up = nn.Conv2d(3, 4, 3, padding=1), Basic(4, 4), nn.Conv2d(8, 4, 1)
        self.deep = nn.Sequential(nn.Conv2d(4, 4, 2, 2), Basic(4, 4), nn.ConvTranspose2d(4, 4, 2, 2))
        self.out = Basic(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        high = self.low(self.down(x))
        return self.out(self.up(torch.cat([high, self.deep(high)], 1)))


def test_concatenations_around_blocks_are_rejected_by_name() -> None:
    with pytest.raises(ValueError, match=r"at cat \(node 'cat_1'\) its paths are joined by concatenation"):
        pathnet.adapt(Dense())
    with pytest.raises(ValueError, match=r"'deep.1'.*concatenation at cat"):
        pathnet.adapt(UNet())
    # Named blocks are accepted if they are residual connections, and rejected by name if not.
    net = pathnet.adapt(UNet(), blocks=["low", "out"])
    assert [block.name for block in net] == ["low", "out"]
    with pytest.raises(ValueError, match=r"blocks: no addition in 'deep.1' is a residual connection"):
        pathnet.adapt(UNet(), blocks=["low", "deep.1"])


class LongSkip(nn.Module):
    """Blocks inside one long residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body, self.out = (
            nn.Conv2d(3, 4, 3),
            nn.Sequential(Basic(4, 4), Basic(4, 4)),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.out(x + 0.2 * self.body(x))


class Gathering(nn.Module):
    """The input of every block is concatenated later on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(3, 4, 3), nn.ModuleList([Basic(4, 4), Basic(4, 4)])
        self.last, self.fc = Basic(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        gathered = [self.conv(x)]
        for block in self.blocks:
            gathered.append(block(gathered[-1].clone()))
        return self.fc(self.last(torch.cat(gathered, 1)).mean((2, 3)))


def test_nested_blocks_are_reported_and_concatenated_ones_rejected() -> None:
    net = pathnet.adapt(LongSkip(), torch.randn(2, 3, 9, 9))
    assert net.n == 1 and "convolutions with 2 residual connections inside" in str(net)
    with pytest.raises(ValueError, match=r"2 additions from .* in module 'blocks.0'\).*concatenation at cat"):
        pathnet.adapt(Gathering(), torch.randn(2, 3, 9, 9))


def test_operations_between_blocks_belong_to_both_branches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Basic(4, 4), nn.Conv2d(4, 6, 2, 2), nn.BatchNorm2d(6), Basic(6, 6))
    model.extend([nn.AvgPool2d(2), Basic(6, 6), nn.Flatten(), nn.Linear(24, 5)])
    net = pathnet.adapt(shaken(model).eval(), torch.randn(2, 3, 11, 11))
    assert [block.skip_kind() for block in net] == [
        *("identity", "identity after 1 shared layer", "identity after a shared part"),
    ]
    x = torch.randn(2, 3, 11, 11)
    with torch.no_grad():
        expected = model[8](model[7](model[6](model[5](F.relu(model[3](model[2](model[1](model[0](x)))))))))
        torch.testing.assert_close(pathnet.lesion.delete(net, [1])(x), expected)


class Leaking(nn.Module):
    """An addition after a block, one of whose branches has another user as well."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.block, self.leaks = Basic(4, 4), leaks
        self.first, self.second, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        source = self.first(self.block(x))
        branch = self.second(source)
        return self.fc(torch.cat([source + branch, branch if self.leaks else source], 1).mean((2, 3)))


def test_an_addition_whose_branch_has_another_user_is_not_called_bypassed() -> None:
    torch.manual_seed(0)
    assert [block.name for block in pathnet.adapt(Leaking(True), torch.randn(2, 4, 5, 5))] == ["block"]
    with pytest.raises(ValueError, match="model: add .* is not a residual connection, since other paths bypass it"):
        pathnet.adapt(Leaking(False), torch.randn(2, 4, 5, 5))


class HeavySkip(nn.Module):
    """A projection with more weights but fewer layers than the residual module."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(4, 4, 3, padding=1)
        self.module = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1))

    def forward(self, x: Tensor) -> Any:
        return self.module(x) + self.projection(x)


def test_the_skip_is_the_branch_with_fewer_layers_whatever_their_size() -> None:
    torch.manual_seed(0)
    model, x = HeavySkip(), torch.randn(2, 4, 5, 5)
    lesioned = pathnet.lesion.delete(pathnet.adapt(model, x), [0])
    torch.testing.assert_close(lesioned(x), model.projection(x), rtol=0, atol=0)


class Joined(nn.Module):
    """Three blocks whose branches a given function joins."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.join = join

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for layer in self.layers:
            x = self.join(x, layer(x))
        return self.last(x)


SUBTRACTIONS: dict[str, tuple[Callable[[Any, Any], Any], float, float]] = {
    "x - f(x)": (lambda x, f: x - f, 1, -1),
    "f(x) - x": (lambda x, f: f - x, -1, 1),
    "torch.sub": (lambda x, f: torch.sub(x, f, alpha=0.5), 1, -0.5),
    "torch.rsub": (lambda x, f: torch.rsub(f, x, alpha=2), 1, -2),
    "in place": (lambda x, f: x.clone().sub_(f), 1, -1),
    "of a sum": (lambda x, f: x - (f - 3 * f.sin()), 1, -1),
}


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("kind", SUBTRACTIONS)
def test_a_subtraction_is_the_addition_of_a_branch_with_its_sign_flipped(kind: str, exported: bool) -> None:
    join, a, c = SUBTRACTIONS[kind]
    model = Joined(join).double()
    x, labels = torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 2])
    if exported:
        model.forward = with_shape_check(model)  # type: ignore[method-assign]
    net = pathnet.adapt(model, x)
    assert net.n == 3 and net.traced_by == ("torch.export" if exported else "torch.fx")
    tape, codes = pathnet.record(net, x, labels, precision="float64"), pathnet.paths.enumerate_all(3)
    for code, grad in zip(codes, tape.path_gradients(codes), strict=True):
        y = y0 = model.first(x).detach().requires_grad_()
        for takes_residual, layer in zip(code, model.layers, strict=True):
            f = layer(y)
            f = c * (f - 3 * f.sin() if kind == "of a sum" else f)
            y = a * y.detach() + f if takes_residual else a * y + f.detach()
        (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model.last(y), labels), y0)
        assert relative_error(grad, expected) < 1e-12
    deleted = model.last(a**3 * model.first(x))
    torch.testing.assert_close(pathnet.lesion.delete(net, [0, 1, 2])(x), deleted, rtol=0, atol=1e-14)


def with_shape_check(model: nn.Module) -> Callable[[Tensor], Any]:
    """Return the model's forward after a check of the shape, which `torch.fx` cannot trace."""
    forward = model.forward

    def checked(x: Tensor) -> Any:
        if x.shape[1] != 4:
            raise ValueError(x.shape)
        return forward(x)

    return checked


@pytest.mark.parametrize(
    ("join", "message"),
    [
        (lambda x, f: torch.lerp(x, f, 0.5), r"joined at lerp \(node 'lerp'\), where a sum or difference of"),
        (
            torch.maximum,
            r"joined at maximum \(node 'maximum'\), where .* expected; blocks= takes each block's branches",
        ),
        (lambda x, f: 1 - x * f, r"joined at mul \(node 'mul'\)"),
    ],
)
def test_other_operations_that_join_are_named(join: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"model: no residual connection was found; its paths are {message}"):
        pathnet.adapt(Joined(join), torch.randn(2, 4))
