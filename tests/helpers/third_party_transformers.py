"""Transformers in the style of third parties, with a switch at each branch (`third_party.Switched`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from helpers.third_party import Switched


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


class Transformer(Switched):
    """A pre-norm layer: attention, with or without rotary embedding, and an MLP with a polynomial GELU."""

    additions = 2

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(torch.rand(dim))
        self.drop = nn.Dropout(0.5)

    def attention(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if rotary is not None:
            q, k = rotated(q, *rotary), rotated(k, *rotary)
        scores = q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads)
        if mask is not None:
            scores = scores + mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.switch(x, "skip", 0) + self.switch(
            self.gamma * self.attention(self.norm1(x), rotary, mask), "residual", 0
        )
        return self.switch(x, "skip", 1) + self.switch(
            self.drop(self.fc2(gelu(self.fc1(self.norm2(x))))), "residual", 1
        )


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList([Transformer(8, 2), Transformer(8, 2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class LanguageModel(nn.Module):
    """A language model with learned and rotary positions, a causal mask per sample, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(9, 8)
        self.layers = nn.ModuleList([Transformer(8, 2), Transformer(8, 2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("frequency", torch.tensor([1.0, 0.1]), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        places = torch.arange(length, device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        angles = torch.outer(places.to(self.frequency.dtype), self.frequency)
        angles = torch.cat((angles, angles), -1)
        mask = torch.full((batch, 1, length, length), -1e9, dtype=x.dtype).triu(1)
        for layer in self.layers:
            x = layer(x, (angles.cos(), angles.sin()), mask)
        return self.head(self.norm(x))
