"""Transformers whose attention and perceptron are parallel, against forward hooks on the original models."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import relative_error
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-interop has it)")

import pathnet  # noqa: E402

VOCABULARY = 19
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Parallel:
    """A transformer of two layers; ``attention`` and ``perceptron`` are their submodules' names."""

    id: str
    make: Callable[[], nn.Module]
    layers: str
    attention: str
    perceptron: str = "mlp"
    tolerance: float = 1e-10

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval().double()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("bias"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, 0, 0.3)
        return model


def gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(**SIZES, hidden_size=12, intermediate_size=14, max_position_embeddings=8)
    return transformers.GPTNeoXForCausalLM(config)  # type: ignore[no-any-return]


def gpt_j() -> nn.Module:
    sizes = {"n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=VOCABULARY, **sizes, **ends))  # type: ignore[no-any-return]


def falcon(**settings: Any) -> nn.Module:
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES, hidden_size=12, **settings))  # type: ignore[no-any-return]


def phi() -> nn.Module:
    config = transformers.PhiConfig(**SIZES, hidden_size=16, intermediate_size=14, max_position_embeddings=8)
    return transformers.PhiForCausalLM(config)  # type: ignore[no-any-return]


MODELS = [
    Parallel("gpt-neox", gpt_neox, "gpt_neox.layers", "attention"),
    # GPT-J computes its attention weights, and the others their rotary factors, in float32.
    Parallel("gpt-j", gpt_j, "transformer.h", "attn", tolerance=1e-6),
    Parallel("falcon-7b", falcon, "transformer.h", "self_attention"),
    Parallel("falcon-40b", lambda: falcon(new_decoder_architecture=True), "transformer.h", "self_attention"),
    Parallel("phi", phi, "model.layers", "self_attn"),
]


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


def first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def truth(case: Parallel, model: nn.Module, path: Sequence[int]) -> Tensor:
    """Return the gradient at the first layer's input along a path: 0 = skip, 1 = attention, 2 = perceptron."""
    inputs: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        x = x if inputs else x.detach().requires_grad_()
        inputs.append(x)
        x = x.view_as(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def without_skip(module: nn.Module, args: Any, output: Any) -> Any:
        x = inputs[-1]
        return first(output, lambda y: y + (x.detach() - x))

    with ExitStack() as hooks:
        for i, entry in enumerate(path):
            layer = model.get_submodule(f"{case.layers}.{i}")
            hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
            if entry:
                hooks.enter_context(layer.register_forward_hook(without_skip))
            for number, name in enumerate((case.attention, case.perceptron), 1):
                if entry != number:
                    module = layer.get_submodule(name)
                    hooks.enter_context(
                        module.register_forward_hook(lambda _, __, output: first(output, Tensor.detach))
                    )
        tokens, target = batch(1)
        output = model(tokens, use_cache=False).logits
    loss = F.cross_entropy(output.flatten(0, -2), target.flatten())
    return torch.autograd.grad(loss, inputs[0])[0]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_every_path_through_separate_modules(case: Parallel) -> None:
    model = case.model()
    net = pathnet.adapt(copy.deepcopy(model), batch()[0], parallel="separate")
    assert [block.kind() for block in net] == ["attention and perceptron in parallel"] * 2
    assert (net.n, net.residual_modules, net.parts) == (2, (2, 2), 3)
    tape = pathnet.record(net, *batch(1), precision="float64")
    codes = pathnet.paths.enumerate_all(2, net.residual_modules)
    grads = tape.path_gradients(codes)
    assert len(codes) == 9 and {tuple(code) for code in codes.tolist()} == set(itertools.product(range(3), repeat=2))
    for code, grad in zip(codes.tolist(), grads, strict=True):
        assert relative_error(grad, truth(case, model, code)) < case.tolerance, code
    assert relative_error(grads.sum(0), tape.gradient()) < case.tolerance
    # As one module: the path through it is the sum of both.
    together = pathnet.record(pathnet.adapt(model, batch()[0]), *batch(1), precision="float64")
    (through,) = together.path_gradients(torch.tensor([[1, 0]]))
    assert relative_error(through, grads[codes.tolist().index([1, 0])] + grads[codes.tolist().index([2, 0])]) < 1e-10
