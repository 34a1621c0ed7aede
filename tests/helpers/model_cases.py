"""Third-party models with batches for them, and their path gradients by definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathnet
from helpers.third_party import (
    Basic,
    Bottleneck,
    CifarResNet,
    Functional,
    InPlace,
    Parallel,
    Preactivated,
    PreactResNet,
    ResNet,
    Scaled,
    ShapeDependent,
    Switched,
    TwoOutputs,
    shaken,
)
from helpers.third_party_transformers import LanguageModel, VisionTransformer


@dataclass(frozen=True)
class ModelCase:
    """A third-party model and its batches; ``name`` identifies it in test reports.

    Attributes:
        make: constructor of the model, with random weights.
        shape: shape of the input.
        tokens: size of the vocabulary of integer inputs; 0 for floating-point inputs.
        output: name of the output to adapt; None for models with one output.
        batch_norm: whether the model has batch normalisation over channels.
        classes: number of classes of the target.
        at: place of the compared gradients; ``image`` if the stem's last operations are part of the first block.
    """

    name: str
    make: Any
    shape: tuple[int, ...] = (3, 3, 9, 9)
    tokens: int = 0
    output: str | None = None
    batch_norm: bool = False
    classes: int = 5
    at: str = "y0"

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return shaken(self.make()).double().eval()

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed + 100)
        if self.tokens:
            x = torch.randint(0, self.tokens, self.shape, generator=generator)
            return x, torch.randint(0, self.classes, self.shape, generator=generator)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, self.classes, self.shape[:1], generator=generator)


MODEL_CASES = [
    ModelCase(
        "basic", lambda: ResNet([Basic(4, 4), Basic(4, 6, 2), Basic(6, 6), Basic(6, 6)], 4, 6), batch_norm=True
    ),
    ModelCase("bottleneck", lambda: ResNet([Bottleneck(4, 3), Bottleneck(6, 3), Bottleneck(6, 4, 2)], 4, 8)),
    ModelCase("zero padding", CifarResNet, (2, 3, 10, 10), batch_norm=True),
    ModelCase(
        "pre-activation",
        lambda: PreactResNet([Preactivated(4, 6), Preactivated(6, 6), Preactivated(6, 7, 2)], 4, 7),
        batch_norm=True,
    ),
    ModelCase(
        "in place",
        lambda: PreactResNet([InPlace(4, variant) for variant in ("module", "function", "method", "module")], 4, 4),
        at="image",
    ),
    ModelCase("scaled", lambda: PreactResNet([Scaled(4), Parallel(4), Scaled(4), Parallel(4), Scaled(4)], 4, 4)),
    ModelCase("functions", lambda: PreactResNet([Functional(4), Functional(4)], 4, 4), batch_norm=True),
    ModelCase(
        "control flow", lambda: ResNet([ShapeDependent(4), Basic(4, 4), ShapeDependent(4)], 4, 4), batch_norm=True
    ),
    ModelCase("vision transformer", VisionTransformer, (3, 3, 8, 8)),
    ModelCase("language model", LanguageModel, (3, 6), tokens=11, classes=11),
    ModelCase("two outputs", TwoOutputs, output="prediction"),
]


BY_NAME = {case.name: case for case in MODEL_CASES}


def adapted_by_name(name: str) -> pathnet.AdaptedNet:
    """Return a new model of a case, adapted."""
    case = BY_NAME[name]
    return pathnet.adapt(case.model(), case.batch()[0], output=case.output)


def sites(model: nn.Module) -> list[tuple[Switched, int]]:
    """Return the residual connections of a model, in order: the module, and the number of the addition in it."""
    blocks = [module for module in model.modules() if isinstance(module, Switched)]
    return [(block, number) for block in blocks for number in range(block.additions)]


def path_gradient(case: ModelCase, model: nn.Module, path: Sequence[int]) -> Tensor:
    """Return the gradient of the mean cross-entropy along a path, by definition, in the model's own code.

    It is the gradient at the input of the first block, or of the network, as the case says.
    """
    connections = sites(model)
    leaf: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not leaf:
            leaf.append(args[0].detach().requires_grad_())
            # The block may change its input in place.
            return (leaf[0].clone(), *args[1:])
        return args

    handle = connections[0][0].register_forward_pre_hook(enter)
    try:
        for (block, number), takes_residual in zip(connections, path, strict=True):
            block.switches = {**block.switches, (number, "skip" if takes_residual else "residual"): "detached"}
        x, target = case.batch()
        if case.at == "image":
            leaf.append(x.requires_grad_())
        loss = F.cross_entropy(outcome(case, model, x).flatten(0, -2), target.flatten())
        (gradient,) = torch.autograd.grad(loss, leaf[0])
    finally:
        handle.remove()
        for block, _ in connections:
            block.switches = {}
    return gradient


def outcome(case: ModelCase, model: nn.Module, x: Tensor) -> Tensor:
    """Return the model's output for which the case is."""
    result = model(x.clone())
    return result if case.output is None else result[case.output]


@torch.no_grad()
def without(case: ModelCase, model: nn.Module, deleted: Sequence[int], x: Tensor) -> Tensor:
    """Return the model's output while some residual modules return zero."""
    connections = sites(model)
    for i in deleted:
        block, number = connections[i]
        block.switches = {**block.switches, (number, "residual"): "zero"}
    try:
        return outcome(case, model, x)
    finally:
        for block, _ in connections:
            block.switches = {}
