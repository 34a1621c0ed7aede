"""`adapt` on models that keep what they compute, hold others or share weights across blocks, and refusals told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.oracles import relative_error
from helpers.strangers import Basic
from torch import Tensor, nn

import pathnet


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def module(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y

    def forward(self, x: Tensor) -> Any:
        return x + self.module(x)


class Keeping(Perceptron):
    """Keeps what it computed, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[operator]
        self.kept = self.module(x)
        return x + self.kept


def test_what_a_model_keeps_is_as_it_was() -> None:
    model = Keeping()
    x, calls = torch.randn(3, 4), model.calls
    model(x)
    kept = model.kept
    net = pathnet.adapt(model, x)
    assert model.kept is kept and model.calls is calls and float(calls) == 1  # type: ignore[arg-type]
    torch.testing.assert_close(net(x), model(x), rtol=0, atol=0)
    assert model.kept is not kept and float(calls) == 2  # type: ignore[arg-type]


class HardCoded(Perceptron):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(3, 4))


class Random(Perceptron):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x + torch.randn_like(x))


class Refusing(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("too long")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (HardCoded, {}, "model: takes no batch of another size than 3"),
        (Random, {}, "model: expected the same output each time"),
        (Refusing, {}, r"example: the model rejects the shape \[3, 4\] in torch.float32 \(too long\)"),
        (Refusing, {"example": None}, r"example: none could be guessed, .*\[2, 4\]: too long"),
        (Perceptron, {"example": torch.full((3, 4), torch.nan)}, "example: expected one for which .* is finite"),
        (Perceptron, {"example": (torch.zeros(3, 4),)}, "example: expected a tensor, got a tuple"),
        (Perceptron, {"output": 0}, "output: expected None for a model that returns one tensor, got 0"),
        (Perceptron, {"blocks": []}, r"blocks: expected a list of submodules or their names, got \[\]"),
        (Perceptron, {"blocks": "first"}, "blocks: expected a list of submodules or their names, got 'first'"),
        (Perceptron, {"blocks": ["first"]}, "blocks: no addition in them is a residual connection"),
        (
            lambda: nn.DataParallel(Perceptron()),
            {},
            "model: expected the module inside the wrapper or .*got DataParallel",
        ),
    ],
)
def test_what_cannot_be_served_is_told(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pathnet.adapt(make(), **{"example": torch.randn(3, 4), **arguments})


def test_named_blocks_are_told_apart_from_those_with_longer_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), *(Basic(4, 4) for _ in range(9)))
    assert [block.name for block in pathnet.adapt(model, torch.randn(2, 3, 5, 5), blocks=["10"])] == ["10"]
    with pytest.raises(ValueError, match="blocks: no addition in '1' is a residual connection"):
        pathnet.adapt(model, torch.randn(2, 3, 5, 5), blocks=["1", "10"])


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = Basic(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.block(x).mean((2, 3)))
        return y


class Wrapping(nn.Module):
    """Holds another as ``model``, and takes `torch.export` to be traced."""

    def __init__(self, several: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.model, self.several = nn.Conv2d(3, 4, 1), Stage(), several

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        for _ in range(y.shape[1] - 3):
            y = self.model(y)
        return {"prediction": y, "shifted": y + 1} if self.several else SimpleNamespace(logits=y)


@pytest.mark.parametrize("output", [None, "prediction"])
def test_exported_models_keep_their_names_and_statistics(output: str | None) -> None:
    model = Wrapping(output is not None).eval()
    x = torch.randn(3, 3, 5, 5)
    net = pathnet.adapt(model, x, output=output)
    assert net.traced_by == "torch.export" and net.frozen_statistics == ()
    assert [block.name for block in net] == ["model.block"]
    assert [block.name for block in pathnet.adapt(model, x, blocks=["model.block"], output=output)] == ["model.block"]
    own = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert own in set(net.modules())


class Biased(nn.Module):
    """All blocks take a bias that the first one computes, of weights and of the shape (relative positions)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.positions(torch.arange(x.shape[1])) * 2
        for layer in self.layers:
            x = x + torch.tanh(layer(x) + bias)
        return x


def test_weights_outside_of_the_branches_get_their_gradient_in_each() -> None:
    model = Biased().double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    net = pathnet.adapt(model, x)
    assert net.n == 3
    other = torch.randn(2, 5, 4, dtype=torch.float64)
    weight = model.positions.weight
    (given,) = torch.autograd.grad(net(other).square().sum(), weight)
    (expected,) = torch.autograd.grad(model(other).square().sum(), weight)
    assert relative_error(given, expected) < 1e-14
    with torch.no_grad():
        weight.mul_(3)
    torch.testing.assert_close(net(other), model(other), rtol=0, atol=1e-14)
    y = other
    bias = model.positions(torch.arange(5)) * 2
    for i in (0, 2):
        y = y + torch.tanh(model.layers[i](y) + bias)
    torch.testing.assert_close(pathnet.lesion.delete(net, [1])(other), y, rtol=0, atol=1e-14)


class Named(nn.Module):
    """Two linear layers behind a normalisation whose weights are named after another part."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.post_attention_scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x * self.post_attention_scale)
        return x + torch.addmm(self.fc.bias, x, self.fc.weight)


def test_kinds_are_of_what_is_called() -> None:
    net = pathnet.adapt(Named(), torch.randn(3, 4))
    assert [block.kind() for block in net] == ["linear layers"] * 2  # type: ignore[operator]


def test_copies_of_a_model_that_keeps_what_it_computes() -> None:
    model = Keeping()
    pathnet.adapt(model, torch.randn(3, 4))
    copy.deepcopy(model)


class Leaking(nn.Module):
    """Behind its block an addition one of whose branches goes on elsewhere too."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.block, self.leaks = Basic(4, 4), leaks
        self.first, self.second, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        source = self.first(self.block(x))
        branch = self.second(source)
        return self.fc(torch.cat([source + branch, branch if self.leaks else source], 1).mean((2, 3)))


def test_an_addition_whose_branch_goes_on_elsewhere_is_no_block_with_something_led_around_it() -> None:
    torch.manual_seed(0)
    assert [block.name for block in pathnet.adapt(Leaking(True), torch.randn(2, 4, 5, 5))] == ["block"]
    with pytest.raises(ValueError, match="model: 1 additions from add .* are no residual connections"):
        pathnet.adapt(Leaking(False), torch.randn(2, 4, 5, 5))


class HeavySkip(nn.Module):
    """A projection of more weights than the residual module, which has more layers."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(4, 4, 3, padding=1)
        self.module = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1))

    def forward(self, x: Tensor) -> Any:
        return self.module(x) + self.projection(x)


def test_the_skip_is_the_branch_of_fewer_layers_whatever_their_size() -> None:
    torch.manual_seed(0)
    model, x = HeavySkip(), torch.randn(2, 4, 5, 5)
    without = pathnet.lesion.delete(pathnet.adapt(model, x), [0])
    torch.testing.assert_close(without(x), model.projection(x), rtol=0, atol=0)


class Joined(nn.Module):
    """Three blocks of a kind."""

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
def test_a_subtraction_is_an_addition_of_a_branch_with_its_sign_changed(kind: str, exported: bool) -> None:
    join, a, c = SUBTRACTIONS[kind]
    model = Joined(join).double()
    x, labels = torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 2])
    if exported:
        model.forward = asking_for_its_shape(model)  # type: ignore[method-assign]
    net = pathnet.adapt(model, x)
    assert net.n == 3 and net.traced_by == ("torch.export" if exported else "torch.fx")
    tape, codes = pathnet.record(net, x, labels, precision="float64"), pathnet.paths.enumerate_all(3)
    for code, own in zip(codes, tape.path_gradients(codes), strict=True):
        y = y0 = model.first(x).detach().requires_grad_()
        for taken, layer in zip(code, model.layers, strict=True):
            f = layer(y)
            f = c * (f - 3 * f.sin() if kind == "of a sum" else f)
            y = a * y.detach() + f if taken else a * y + f.detach()
        (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model.last(y), labels), y0)
        assert relative_error(own, expected) < 1e-12
    deleted = model.last(a**3 * model.first(x))
    torch.testing.assert_close(pathnet.lesion.delete(net, [0, 1, 2])(x), deleted, rtol=0, atol=1e-14)


def asking_for_its_shape(model: nn.Module) -> Callable[[Tensor], Any]:
    """What a model does, behind a question that `torch.fx` has no answer to."""
    forward = model.forward

    def asking(x: Tensor) -> Any:
        if x.shape[1] != 4:
            raise ValueError(x.shape)
        return forward(x)

    return asking


@pytest.mark.parametrize(
    ("join", "message"),
    [
        (lambda x, f: torch.lerp(x, f, 0.5), r"joined at lerp \(node 'lerp'\), where the sum or difference of"),
        (
            torch.maximum,
            r"joined at maximum \(node 'maximum'\), where .* expected; blocks= takes each block's branches",
        ),
        (lambda x, f: 1 - x * f, r"joined at mul \(node 'mul'\)"),
    ],
)
def test_what_joins_branches_otherwise_is_named(join: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"model: no residual connection was found; its paths are {message}"):
        pathnet.adapt(Joined(join), torch.randn(2, 4))


class Sentences(nn.Module):
    """Reads the values of its tokens besides embedding them: each sentence's own slopes for attention (as BLOOM), the
    experts that a router picks (Mixtral), or where a sentence ends, which is classified (GPT-2)."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads, self.tokens = reads, nn.Embedding(9, 6)
        self.layers, self.last = nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Any:
        x, seen = self.tokens(ids), (ids != 0).to(torch.float32)
        for layer in self.layers:
            y = layer(x)
            if self.reads == "slopes":
                y = y * seen.cumsum(1)[:, :, None]
            if self.reads == "experts":
                y = y * torch.index_select(layer.weight, 0, (ids[:, 0] + 6) % 6)[:, None]
            x = x + torch.tanh(y)
        if self.reads == "ends":
            x = x.gather(1, (seen.sum(1).long() - 1)[:, None, None].expand(-1, 1, 6))[:, 0]
        return self.last(x)


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        (
            "slopes",
            r"the residual module of 'addition \(1\)' needs getitem .*, which is computed from the input's values",
        ),
        ("experts", r"the residual module of 'addition \(1\)' needs .*, which is computed from the input's values"),
        ("ends", "the head needs .*, which is computed from the input's values"),
    ],
)
def test_parts_that_read_the_input_itself_are_named(reads: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"model: {message} outside of it; .*; blocks= takes branches, .*, by hand"):
        pathnet.adapt(Sentences(reads), torch.randint(1, 9, (3, 5)))


class Dropping(Perceptron):
    def __init__(self, p: float, exported: bool) -> None:
        super().__init__()
        self.drop, self.exported = nn.Dropout(p), exported

    def forward(self, x: Tensor) -> Any:
        if self.exported and x.shape[1] != 4:
            raise ValueError(x.shape)
        return x + self.drop(self.module(x))


def test_networks_whose_dropout_was_left_out_do_not_train_without_it() -> None:
    x = torch.randn(3, 4)
    live = pathnet.adapt(Dropping(0.5, False), x).train()
    assert live.dropouts == () and not torch.equal(live(x), live(x))
    model = Dropping(0.5, True).train()
    net = pathnet.adapt(model, x)
    assert net.traced_by == "torch.export" and "without dropout, in evaluation alone: drop" in str(net)
    assert torch.equal(net.eval()(x), model.eval()(x))
    for own in (net, copy.deepcopy(net), nn.Sequential(net)):
        with pytest.raises(
            ValueError, match=r"net: tracing omitted .* expected p = 0, got 'drop' \(p = 0.5\); set it, or"
        ):
            own.train()
    inside = nn.Sequential(nn.Linear(4, 4), model, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"got '1.drop' \(p = 0.5\)"):
        pathnet.adapt(inside, x, blocks=["1"]).train()
    model.drop.p = 0.0
    assert net.train().training


def test_half_precision_is_served_where_it_can_be_traced_and_named_where_not() -> None:
    x, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for dtype in (torch.float16, torch.bfloat16):
        net = pathnet.adapt(Dropping(0.0, False).to(dtype), x.to(dtype))
        assert pathnet.record(net, x, labels, engine="reference").gradient().dtype == torch.float64
        with pytest.raises(ValueError, match=f"got {dtype} in first.weight; model.float\\(\\) makes them float32"):
            pathnet.adapt(Dropping(0.0, True).to(dtype), x.to(dtype))
        with pytest.raises(ValueError, match=r"example: the model rejects the shape \[3, 4\] in torch.float32 \("):
            pathnet.adapt(Dropping(0.0, False).to(dtype), x)
