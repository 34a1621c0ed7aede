"""The timed models, their batches, and their residual modules as someone who knows the model lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.adapted.language import Gpt
from benchmarks.adapted.vision import ConvNeXt, Vit

__all__ = ["FULL", "NAMES", "ON_GPU", "SMALL", "Case", "Module", "Sizes", "Structure", "structure"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Module:
    """One residual module, ``x + residual(x)``; ``before`` is applied first where a stage begins."""

    residual: Function
    before: Function | None = None


@dataclass(frozen=True)
class Structure:
    """A model as stem, residual modules from input to output, and head: written by hand, without pathnet."""

    stem: Function
    modules: Sequence[Module]
    head: Function


@dataclass(frozen=True)
class Case:
    """One model and its batch.

    Attributes:
        build: returns the model; its weights follow from torch's generator.
        inputs: returns a batch, from a generator.
        classes: number of classes, or size of the vocabulary.
        sequence: whether each position has a label.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    classes: int
    sequence: bool = False

    def model(self, device: str = "cpu") -> nn.Module:
        """Return the model in evaluation mode, the same at each call; no parameter takes gradients."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval().requires_grad_(False).to(device)

    def batch(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return inputs and labels, the same at each call."""
        generator = torch.Generator().manual_seed(0)
        inputs = self.inputs(generator)
        shape = inputs.shape if self.sequence else inputs.shape[:1]
        return inputs.to(device), torch.randint(0, self.classes, shape, generator=generator).to(device)


def structure(model: nn.Module) -> Structure:
    """Return the model's parts.

    Raises:
        ValueError: the model is none of the timed ones.
    """
    modules: list[Module] = []
    if isinstance(model, Gpt | Vit):
        for layer in model.layers:
            modules.append(Module(lambda x, layer=layer: layer.attention(layer.norm1(x))))  # type: ignore[misc]
            modules.append(Module(lambda x, layer=layer: layer.mlp(layer.norm2(x))))  # type: ignore[misc]
        return Structure(model.embed, modules, model.logits)
    if isinstance(model, ConvNeXt):
        for stage, blocks in enumerate(model.stages):
            for number, block in enumerate(blocks):  # type: ignore[arg-type, var-annotated]
                begins = stage > 0 and number == 0
                modules.append(Module(block.residual, model.between[stage - 1] if begins else None))
        return Structure(model.embed, modules, model.logits)
    raise ValueError(f"model: expected one of the timed models, got {type(model).__name__}")


def _tokens(vocabulary: int, batch: int, length: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, vocabulary, (batch, length), generator=generator)


def _images(batch: int, side: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(batch, 3, side, side, generator=generator)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measurements.

    Attributes:
        paths: a small and a large number of paths in one call; the competitors run the small one.
        single: number of paths that are measured one a call.
        loops: number of paths of the loop, each of which takes as long as any other.
        rounds: number of rounds of all timings but that of the large number of paths, which runs once.
        adaptations: number of times that a model is adapted.
        alone: names of the models whose memory is measured in a process of their own, on a processor.
    """

    cases: tuple[Case, ...]
    paths: tuple[int, int]
    single: int
    loops: int
    rounds: int
    adaptations: int
    alone: tuple[str, ...]


NAMES = ("GPT", "ViT-Tiny", "ConvNeXt-Tiny")


def _cases(sentences: int, views: int, pictures: int, suffix: str = "") -> tuple[Case, ...]:
    gpt, vit, convnext = (f"{name}{suffix}" for name in NAMES)
    depths, widths = (3, 3, 9, 3), (96, 192, 384, 768)
    return (
        Case(gpt, lambda: Gpt(1024, 64, 256, 12, 8), _tokens(1024, sentences, 64), 1024, sequence=True),
        Case(vit, lambda: Vit(224, 16, 192, 12, 3, 1000), _images(views, 224), 1000),
        Case(convnext, lambda: ConvNeXt(depths, widths, 1000), _images(pictures, 224), 1000),
    )


FULL = Sizes(_cases(4, 2, 1), paths=(100, 1000), single=20, loops=5, rounds=3, adaptations=2, alone=NAMES)
"""A GPT of 12 layers on 4 x 64 of 1024 tokens. Images have the size that the networks are for; the batches are the
smallest that fill a core, 394 and 3136 to 49 positions, so that 1,000 paths fit into a run."""

ON_GPU = replace(FULL, cases=(*FULL.cases, *_cases(64, 32, 16, ", 16 x")), adaptations=1)
"""Also with batches 16 times as large: the others leave a GPU idle between launches."""

SMALL = Sizes(
    (
        Case(NAMES[0], lambda: Gpt(17, 5, 8, 2, 2), _tokens(17, 2, 5), 17, sequence=True),
        Case(NAMES[1], lambda: Vit(8, 4, 12, 2, 3, 5), _images(2, 8), 5),
        Case(NAMES[2], lambda: ConvNeXt((1, 2), (4, 6), 5), _images(1, 16), 5),
    ),
    paths=(6, 20),
    single=4,
    loops=2,
    rounds=2,
    adaptations=1,
    alone=NAMES[:1],
)
