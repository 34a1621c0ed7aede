"""Behaviour in training: modules that keep it are the model's own, and the loss of any is refused by name."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathnet


class DropPath(nn.Module):
    """Stochastic depth by sample, as in timm."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)


class Attention(nn.Module):
    """Attention with functional dropout, whose weights and mode belong to one module."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.qkv, self.out, self.p = nn.Linear(8, 24), nn.Linear(8, 8), p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = F.dropout(torch.softmax(q @ k.transpose(1, 2), -1), self.p, self.training)
        return self.out(weights @ v)


class Layer(nn.Module):
    def __init__(self, attention: float, path: float, skipped: float) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attention(attention)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        self.drop_path, self.skipped = DropPath(path), skipped

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.skipped and random.random() < self.skipped:
            return x
        x = x + self.drop_path(self.attention(self.norm(x)))
        return x + self.drop_path(self.mlp(x))


class Transformer(nn.Module):
    """A transformer on vectors.

    Args:
        exported: whether the model checks its input's shape, which only `torch.export` traces.
    """

    def __init__(
        self, attention: float = 0.0, path: float = 0.0, skipped: float = 0.0, exported: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.exported = nn.Linear(5, 8), nn.Linear(8, 3), exported
        self.layers = nn.ModuleList(Layer(attention, path, skipped) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.exported:
            assert x.shape[1] > 1
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def inputs() -> Tensor:
    return torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))


def seeded(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    random.seed(3)
    return module(x)


def assert_trains_as(net: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Check outputs, in both modes, and gradients in training."""
    model.eval()
    evaluated = model(x)
    torch.testing.assert_close(net.eval()(x), evaluated)
    net.train()
    assert all(module.training for module in model.modules())
    expected = seeded(model, x)
    torch.testing.assert_close(seeded(net, x), expected)
    assert (expected - evaluated).abs().max() > 1e-3
    weights = list(model.parameters())
    grads = [torch.autograd.grad(seeded(each, x).square().sum(), weights) for each in (net, model)]
    torch.testing.assert_close(*grads)
    net.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("attention", "path"), [(0.0, 0.4), (0.4, 0.0), (0.4, 0.4)])
def test_modules_called_whole_train_as_the_model_does(attention: float, path: float) -> None:
    model = Transformer(attention, path)
    net = pathnet.adapt(model, inputs())
    assert net.n == 4 and not net.viewed.branches
    assert_trains_as(net, model, inputs())


def test_functional_dropout_of_a_block_is_refused_and_without_effect_allowed() -> None:
    class Block(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.linear, self.p = nn.Linear(5, 5), p

        def forward(self, x: Tensor) -> Tensor:
            return x + F.dropout(torch.tanh(self.linear(x)), self.p, self.training)

    x = torch.randn(4, 5)
    for p in (0.0, 0.1):
        model = nn.Sequential(Block(p), Block(0.0))
        net = pathnet.adapt(model, x)
        assert net.n == 2
        if p == 0:
            assert net.train().training and model[0].training
            continue
        with pytest.raises(ValueError, match=r"net: expected evaluation mode, .* training branch of '0'; training"):
            net.train()
        assert "for evaluation only, without the training branch of 0" in str(net)
        assert torch.equal(net.eval()(x), model.eval()(x))


@pytest.mark.parametrize("exported", [False, True])
def test_skipped_layers_are_refused_however_seldom_they_are_skipped(exported: bool) -> None:
    model = Transformer(skipped=1e-9, exported=exported)
    state = random.getstate(), torch.get_rng_state()
    net = pathnet.adapt(model, inputs())
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert net.viewed.branches == ("layers.0", "layers.1")
    with pytest.raises(ValueError, match="'layers.0', 'layers.1'; training"):
        net.train()


def test_modules_inlined_by_export_are_refused_where_they_act() -> None:
    model = Transformer(path=0.3, exported=True)
    net = pathnet.adapt(model, inputs())
    assert net.traced_by == "torch.export"
    with pytest.raises(ValueError, match=r"'layers.0.drop_path', 'layers.1.drop_path'; training"):
        net.train()
    assert not any(module.training for module in [*net.eval().modules(), *model.modules()])
    model = Transformer(exported=True)
    net = pathnet.adapt(model, inputs()).train()
    assert all(module.training for module in model.modules())
    assert torch.equal(net(inputs()), model(inputs()))


@pytest.mark.parametrize("exported", [False, True])
def test_a_module_that_only_training_calls_is_not_lost(exported: bool) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.noise = nn.Linear(5, 5), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            if exported:
                assert x.shape[1] > 1
            if self.training:
                x = self.noise(x)
            return x + torch.tanh(self.linear(x))

    class Harmless(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.dropout(torch.tanh(self.linear(x)), 0.0, self.training)

    net = pathnet.adapt(nn.Sequential(Noisy(), Harmless(), nn.Linear(5, 2)), torch.randn(4, 5))
    with pytest.raises(
        ValueError, match="training branch of '0'; training|omitted the model's dropout, .* '0.noise'"
    ):
        net.train()


def test_attention_of_torch_keeps_its_dropout() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, 0.2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    net = pathnet.adapt(model, torch.randn(3, 4, 8))
    assert net.n == 2 and net.traced_by == "torch.fx"
    assert_trains_as(net, model, torch.randn(5, 4, 8))


def test_exported_attention_and_batch_statistics_are_refused_or_live() -> None:
    class Model(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, p, batch_first=True)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 4
            return x + self.attention(*[self.norm(x)] * 3, need_weights=False)[0]

    torch.manual_seed(0)
    x = torch.randn(6, 4, 8)
    with pytest.raises(ValueError, match="training branch of 'attention'; training"):
        pathnet.adapt(Model(0.2), x).train()
    model = Model(0.0)
    assert_trains_as(pathnet.adapt(model, x), model, x)


class Frozen(nn.Module):
    """A network whose first normalisation keeps its statistics in training."""

    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.exported = exported
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.stem[1].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.exported:
            assert x.shape[1] == 3
        x = self.stem(x)
        return x + self.branch(x)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("how", ["itself", "copied", "pickled"])
def test_modes_that_the_model_overrides_are_kept(exported: bool, how: str) -> None:
    torch.manual_seed(0)
    model, x = Frozen(exported), torch.randn(4, 3, 6, 6)
    net = pathnet.adapt(model, x)
    if how != "itself":
        net = copy.deepcopy(net) if how == "copied" else pickle.loads(pickle.dumps(net))
        viewed = net.viewed.model
        assert viewed is not None and viewed is not model
        assert {id(weight) for weight in viewed.parameters()} == {id(weight) for weight in net.parameters()}
        model = copy.deepcopy(model)
    expected = model.train()(x)
    torch.testing.assert_close(net.train()(x), expected)
    assert (model.eval()(x) - expected).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), model(x))


def test_copies_and_pickles_stand_alone() -> None:
    model, x = Transformer(attention=0.2, path=0.3), inputs()
    net = pathnet.adapt(model, x).eval()
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert copied.viewed.model is None
        copied.train()
        assert not any(module.training for module in [*model.eval().modules(), *net.modules()])
        model.train()
        torch.testing.assert_close(seeded(copied, x), seeded(model, x))
    refusing = pickle.loads(pickle.dumps(pathnet.adapt(Transformer(skipped=0.5), x)))
    with pytest.raises(ValueError, match=r"'layers.0', 'layers.1'; training"):
        refusing.train()


class Overriding(Transformer):
    def train(self, mode: bool = True) -> Any:
        return super().train(mode)


def test_a_copy_holds_no_weight_twice() -> None:
    net = copy.deepcopy(pathnet.adapt(Overriding(), inputs()))
    viewed = net.viewed.model
    assert viewed is not None
    assert {id(weight) for weight in viewed.parameters()} == {id(weight) for weight in net.parameters()}
    sizes = [len(pickle.dumps(pathnet.adapt(model, inputs()))) for model in (Overriding(), Transformer())]
    weights = sum(weight.numel() * weight.element_size() for weight in net.parameters())
    assert sizes[0] - sizes[1] < sizes[1] - weights


def test_stochastic_depth_in_evaluation_leaves_fused_forms() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv, self.drop_path = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), DropPath(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(self.conv(torch.relu(self.bn(x))))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.Flatten(), nn.Linear(8 * 36, 3))
    net = pathnet.adapt(model, torch.randn(4, 3, 8, 8))
    assert all(block.form() is not None for block in net.eval())
    assert all(block.form() is None for block in net.train())
    assert_trains_as(net, model, torch.randn(5, 3, 8, 8))


def test_parts_by_hand_stay_live() -> None:
    model, x = Transformer(attention=0.3, path=0.3), inputs()
    blocks = []
    for i in range(2):
        layer: Any = model.layers[i]
        blocks.append((None, lambda x, layer=layer: layer.drop_path(layer.attention(layer.norm(x)))))
        blocks.append((None, lambda x, layer=layer: layer.drop_path(layer.mlp(x))))
    net = pathnet.adapt(model, x, blocks=blocks, stem="stem", head=lambda x: model.head(x.mean(1)))
    assert net.traced_by == "hand"
    assert_trains_as(net, model, x)
