"""Models of several inputs that follow one path by definition, in their own code, without any tracing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, VOCABULARY = 8, 2, 13


class Routed(nn.Module):
    """A model whose residual stream passes `begin` once and `join` at each addition.

    Attributes:
        path: a bit for each residual module; None for the model itself.
        deleted: the blocks whose residual modules are left out.
        y0: the input of the first block of the last run along a path.
    """

    path: Sequence[int] | None = None
    deleted: tuple[int, ...] = ()
    y0: Tensor

    def begin(self, y: Tensor) -> Tensor:
        if self.path is None:
            return y
        self.y0 = y.detach().requires_grad_()
        return self.y0

    def join(self, i: int, skip: Tensor, residual: Tensor) -> Tensor:
        if i in self.deleted:
            return skip
        if self.path is None:
            return skip + residual
        return skip.detach() + residual if self.path[i] else skip + residual.detach()


def along(model: Routed, loss: Callable[[Any], Tensor], path: Sequence[int]) -> Tensor:
    """Return the gradient of ``loss(model)`` at ``y_0`` along a path, in float64."""
    model = copy.deepcopy(model).double().eval()
    model.path = list(path)
    value = loss(model)
    return torch.autograd.grad(value, model.y0)[0]


def padded(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return tokens and a mask of sentences of different lengths, padded on the right."""
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    lengths = torch.randint(2, length + 1, (batch, 1), generator=generator)
    return ids, (torch.arange(length) < lengths).long()


def sentences(batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids, mask = padded(batch, length, generator)
    return {"ids": ids, "mask": mask}


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, Mapping):
        return {name: cast(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(cast(value, dtype) for value in inputs)
    return inputs.to(dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).sum() + output.square().sum()


class Attention(nn.Module):
    """Attention with an additive mask, and keys and values of another sequence where that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(
        self,
        y: Tensor,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        y = self.norm(y)
        source = y if memory is None else memory
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, x in ((self.q, y), (self.k, source), (self.v, source))
        )
        if rotary is not None:
            q, k = turned(q, *rotary), turned(k, *rotary)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores + mask
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inward, self.outward = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, y: Tensor) -> Tensor:
        return self.outward(F.gelu(self.inward(self.norm(y))))


def layers(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleList([Attention(), Perceptron()]) for _ in range(count))


class Padded(Routed):
    """A causal language model with padding, rotary factors and slopes that follow the mask (alibi).

    Args:
        last: whether the output is that of each sentence's last token, selected by value.
    """

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last, self.tokens, self.layers, self.out = (
            last,
            nn.Embedding(VOCABULARY, WIDTH),
            layers(),
            nn.Linear(8, 5),
        )
        self.slopes = nn.Parameter(torch.rand(HEADS))
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = mask.cumsum(1) - 1
        angles = positions[:, None, :, None] * self.frequencies
        rotary = angles.cos(), angles.sin()
        length = ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        unseen = future[None, None] | (mask == 0)[:, None, None]
        bias = self.slopes[:, None, None] * positions[:, None, None, :].to(self.slopes.dtype)
        bias = bias.masked_fill(unseen, -1e4)
        y = self.begin(self.tokens(ids))
        for i, (attention, perceptron) in enumerate(self.layers):
            y = self.join(2 * i, y, attention(y, bias, rotary))
            y = self.join(2 * i + 1, y, perceptron(y))
        if self.last:
            y = y[torch.arange(ids.shape[0], device=ids.device), mask.sum(1) - 1]
        return self.out(y)


class Conditioned(Routed):
    """A diffusion transformer: shifts, scales and gates of each block come from a time and a class."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.classes = nn.Conv2d(3, WIDTH, 2, 2), nn.Embedding(4, WIDTH)
        self.times = nn.Sequential(nn.Linear(2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.layers = layers()
        self.modulations = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(2))
        self.last, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, scale: float = 1.0) -> Tensor:
        condition = self.times(torch.stack([time.sin(), time.cos()], -1))
        if label is not None:
            condition = condition + self.classes(label) * scale
        y = self.begin(self.patches(x).flatten(2).mT)
        for i, ((attention, perceptron), modulation) in enumerate(zip(self.layers, self.modulations, strict=True)):
            shift, gate, second_shift, second_gate = modulation(F.silu(condition))[:, None].chunk(4, -1)
            y = self.join(2 * i, y, gate * attention(y + shift))
            y = self.join(2 * i + 1, y, second_gate * perceptron(y + second_shift))
        return self.out(y * self.last(condition)[:, None])


class Judged(Routed):
    """A model of one dictionary that returns another one, with its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Padded()

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.inner.path, self.inner.deleted = self.path, self.deleted
        logits = self.inner(batch["ids"], batch["mask"])
        if self.path is not None:
            self.y0 = self.inner.y0
        return {"loss": F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), "logits": logits}


class TimeFirst(Routed):
    """A transformer over [T, B, C], with a mask [B, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 5)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(2))
        self.perceptrons = nn.ModuleList(Perceptron() for _ in range(2))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.begin(self.first(x))
        for i, (attention, perceptron) in enumerate(zip(self.attentions, self.perceptrons, strict=True)):
            attended, _ = attention(y, y, y, key_padding_mask=padding, need_weights=False)
            y = self.join(2 * i, y, attended)
            y = self.join(2 * i + 1, y, perceptron(y))
        return self.out(y)


class Encoder(nn.Module):
    def __init__(self, model: Translating) -> None:
        super().__init__()
        self.tokens, self.layers = nn.Embedding(VOCABULARY, WIDTH), layers()
        self.followed = (model,)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        (model,) = self.followed
        follows = model.stream == "encoder"
        y = self.tokens(ids)
        y = model.begin(y) if follows else y
        for i, (attention, perceptron) in enumerate(self.layers):
            joined = model.join if follows else lambda _, skip, residual: skip + residual
            y = joined(2 * i, y, attention(y, mask))
            y = joined(2 * i + 1, y, perceptron(y))
        return y


class Decoder(nn.Module):
    def __init__(self, model: Translating) -> None:
        super().__init__()
        self.tokens, self.layers, self.cross = nn.Embedding(VOCABULARY, WIDTH), layers(), nn.ModuleList()
        for _ in range(2):
            self.cross.append(Attention())
        self.followed = (model,)

    def forward(self, ids: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        (model,) = self.followed
        follows = model.stream == "decoder"
        joined = model.join if follows else lambda _, skip, residual: skip + residual
        y = self.tokens(ids)
        y = model.begin(y) if follows else y
        for i, ((attention, perceptron), cross) in enumerate(zip(self.layers, self.cross, strict=True)):
            y = joined(3 * i, y, attention(y))
            y = joined(3 * i + 1, y, cross(y, mask, memory=memory))
            y = joined(3 * i + 2, y, perceptron(y))
        return y


class Translating(Routed):
    """An encoder-decoder, of which one stream is followed."""

    stream = "decoder"

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream
        self.encoder, self.decoder, self.out = Encoder(self), Decoder(self), nn.Linear(WIDTH, VOCABULARY)

    def __deepcopy__(self, memo: dict[int, Any]) -> Translating:
        copied = Translating(self.stream)
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, source: Tensor, seen: Tensor, target: Tensor) -> Tensor:
        mask = torch.where(seen, 0.0, -1e4)[:, None, None].to(self.out.weight.dtype)
        return self.out(self.decoder(target, self.encoder(source, mask), mask))
