"""A small language model as a `ResidualNet`: learned positions, causal attention, GELU, a head tied to the stem."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.models import Block, ResidualNet

VOCABULARY, POSITIONS, WIDTH = 11, 9, 6


class Embedded(nn.Module):
    """Token and position embedding, int64 [B, T] to [B, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.tokens(tokens) + self.places.weight[: tokens.shape[1]])


class Attention(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inward, self.outward = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9), nn.Linear(3, WIDTH)

    def residual(self, x: Tensor) -> Tensor:
        query, key, value = self.inward(self.norm(x)).chunk(3, -1)
        scores = query @ key.mT
        unseen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return torch.as_tensor(self.outward(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ value))


class Perceptron(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inward, self.outward = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.outward(F.gelu(self.inward(self.norm(x)))))


def language_model(blocks: int, seed: int = 0) -> ResidualNet:
    """Return a network of alternating attention and MLP blocks, with logits [B, T, VOCABULARY]."""
    torch.manual_seed(seed)
    stem, linear = Embedded(), nn.Linear(WIDTH, VOCABULARY, bias=False)
    linear.weight = stem.tokens.weight
    kinds = [Attention() if i % 2 == 0 else Perceptron() for i in range(blocks)]
    return ResidualNet(stem, kinds, nn.Sequential(nn.LayerNorm(WIDTH), linear)).eval()


def sentences(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return tokens and the following ones, int64 [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (batch, length + 1), generator=generator)
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()
