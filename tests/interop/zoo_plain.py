"""Models in plain PyTorch as people write them, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Kind, images, layers, modules


def sequences(batch_first: bool = True) -> Any:
    def batch(size: int, length: int, seed: int) -> Tensor:
        x = torch.randn(size, length, 12, generator=torch.Generator().manual_seed(seed))
        return x if batch_first else x.transpose(0, 1).contiguous()

    return batch


def masked_sequences(batch_first: bool = True) -> Any:
    def batch(size: int, length: int, seed: int) -> dict[str, Tensor]:
        padding = torch.zeros(size, length, dtype=torch.bool)
        for sample in range(size):
            padding[sample, length - (sample + seed) % (length // 2) :] = True
        return {"src": sequences(batch_first)(size, length, seed), "src_key_padding_mask": padding}

    return batch


def encoder(id: str, batch: Any, batch_first: bool, norm_first: bool) -> Kind:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=batch_first, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    pairs = (
        (("norm1", "dropout1"), ("norm2", "dropout2"))
        if norm_first
        else (("self_attn", "dropout1"), ("linear1", "dropout2"))
    )
    return Kind(
        id,
        make,
        batch,
        "layers.0",
        layers("layers", 2, *pairs),
        other_lengths=(4, 9),
        batch_dim=0 if batch_first else 1,
    )


class Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x)))


class Modulated(nn.Module):
    """A block of a diffusion transformer: shift, scale and gate of each branch depend on a conditioning vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = Perceptron(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(y, y, y, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiffusionTransformer(nn.Module):
    def __init__(self, width: int = 12, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.embedding = nn.Embedding(7, width)
        self.time = Perceptron(width)
        self.blocks = nn.ModuleList(Modulated(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        condition = self.time(time) + self.embedding(label)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.norm(x))


def conditioned(size: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 16, 16, generator=generator)
    return x, torch.randn(size, 12, generator=generator), torch.randint(0, 7, (size,), generator=generator)


class PaddedShortcut(nn.Module):
    """A block of the usual ResNet for CIFAR-10, whose skip connection pads channels on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad, self.stride = (outputs - inputs) // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        widths = (8, 16, 32)
        for stage, width in enumerate(widths):
            first = PaddedShortcut(widths[max(stage - 1, 0)], width, 1 if stage == 0 else 2)
            rest = [PaddedShortcut(width, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]
        return self.linear(F.avg_pool2d(x, x.size(3)).flatten(1))


def transformer_decoder() -> Kind:
    """Return `nn.Transformer`, whose encoder's output is context of the decoder."""

    def batch(size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        source: Tensor = sequences()(size, 5, seed + 100)
        return source, sequences()(size, length, seed)

    return Kind(
        "nn-transformer",
        lambda: nn.Transformer(12, 2, 2, 2, 16, batch_first=True),
        batch,
        "decoder.layers.0",
        layers(
            "decoder.layers", 2, ("self_attn", "dropout1"), ("multihead_attn", "dropout2"), ("linear1", "dropout3")
        ),
        other_lengths=(4, 9),
        options={"stream": 1},
    )


PLAIN = [
    transformer_decoder(),
    encoder("encoder-masked", masked_sequences(), True, True),
    encoder("encoder-masked-post-norm", masked_sequences(), True, False),
    encoder("encoder-tbc-masked", masked_sequences(False), False, False),
    Kind(
        "dit",
        DiffusionTransformer,
        conditioned,
        "blocks.0",
        layers("blocks", 2, ("norm1", "attn"), ("norm2", "mlp")),
    ),
    Kind(
        "cifar-resnet20",
        CifarResNet,
        images(16),
        "layer1.0",
        modules(*[(f"layer{s}.{b}.conv1", f"layer{s}.{b}.bn2") for s in (1, 2, 3) for b in range(3)]),
    ),
]
