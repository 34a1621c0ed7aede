"""Models as strangers write them, none of which knows of pathnet, each with a switch at its branches.

A block passes its branches through ``way``, which leaves them as they are until a test says what a branch shall be:
detached, or nothing. That is the plain loop of the definitions in the model's own code, without any tracing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Switched(nn.Module):
    """A module with residual connections, numbered from 0; ``cut`` tells what happens to (number, branch)."""

    additions = 1

    def __init__(self) -> None:
        super().__init__()
        self.cut: dict[tuple[int, str], str] = {}

    def way(self, x: Tensor, branch: str, number: int = 0) -> Tensor:
        how = self.cut.get((number, branch))
        if how == "detached":
            return x.detach()
        return torch.zeros_like(x) if how == "nothing" else x


class Basic(Switched):
    """torchvision's: the ReLU in place, ``out += identity``, the ReLU behind the addition."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        changes = stride != 1 or inplanes != planes
        self.downsample = (
            nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
            if changes
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out = self.way(out, "residual")
        out += self.way(identity, "skip")
        return self.relu(out)


class Bottleneck(Switched):
    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 2)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes * 2:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * 2, 1, stride, bias=False), nn.BatchNorm2d(planes * 2)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.way(self.bn3(self.conv3(out)), "residual")
        out += self.way(x if self.downsample is None else self.downsample(x), "skip")
        return self.relu(out)


class ResNet(nn.Module):
    """torchvision's, the blocks given."""

    def __init__(self, blocks: Sequence[Switched], stem: int, out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(out, 5)
        self.layer1 = nn.Sequential(*blocks)
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer1(x)), 1))


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OptionA(Switched):
    """A CIFAR block that pads with zero channels, behind the image's own or around them."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, around: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        more = planes - inplanes
        widths = (more // 2, more - more // 2) if around else (0, more)
        self.shortcut = (
            Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *widths), "constant", 0))
            if stride == 2
            else (nn.Identity() if around else nn.Sequential())
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.way(self.bn2(self.conv2(out)), "residual")
        out += self.way(self.shortcut(x), "skip")
        return F.relu(out)


class CifarResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layers = nn.ModuleList(
            [OptionA(4, 4), OptionA(4, 7, 2), OptionA(7, 7, around=True), OptionA(7, 12, 2, around=True)]
        )
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            out = layer(out)
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class Preactivated(Switched):
    """The shared BN and ReLU stand before the projection."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return self.way(out, "residual") + self.way(shortcut, "skip")


class PreactResNet(nn.Module):
    def __init__(self, blocks: Sequence[Switched], width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.layers = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(out)
        self.linear = nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.layers(self.conv1(x))), inplace=True)
        return self.linear(out.mean((2, 3)))


class Overwriting(Switched):
    """A ReLU in place changes what the skip hands on: the block is ``relu(x) + f(relu(x))``."""

    def __init__(self, planes: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(planes, planes, 3, 1, 1)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "module":
            out = self.relu(x)
        elif self.how == "function":
            out = F.relu(x, True)
        else:
            # One tensor under two names, changed under both of them.
            out = x.add_(0.5)
            out -= 0.1
            x.relu_()
        out = self.way(self.conv2(F.elu(self.conv1(out))), "residual")
        return out.add_(self.way(x, "skip"))


class Scaled(Switched):
    """``torch.add`` with a factor; squeeze and excitation; a sum of three; concatenation inside the module."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(planes, 3, 1)
        self.b = nn.Sequential(nn.Conv2d(planes, 2, 1), nn.Conv2d(2, 4, 3, padding=1), nn.Tanh())
        self.out = nn.Conv2d(7, planes, 1)
        self.squeeze, self.excite = nn.Conv2d(planes, 2, 1), nn.Conv2d(2, planes, 1)
        self.scale = nn.Parameter(torch.rand(planes, 1, 1))
        self.drop = nn.Dropout2d(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(torch.cat([self.a(x), self.b(x)], 1))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.drop(y * self.scale)
        return torch.add(self.way(x, "skip"), self.way(y, "residual"), alpha=0.5)


class Parallel(Switched):
    """Two modules side by side, added to the input one after the other."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(planes, planes, 3, 1, 1)
        self.b = nn.Conv2d(planes, planes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.way(x, "skip") + self.way(self.a(F.gelu(x)), "residual")
        y += self.way(self.b(torch.sin(x)), "residual")
        return y


class NormAct(nn.BatchNorm2d):
    """A subclass with an activation of its own, which calls the function itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(x)


class Functional(Switched):
    def __init__(self, planes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = NormAct(planes), NormAct(planes)
        self.conv1, self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1), nn.Conv2d(planes, planes, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x, "skip") + self.way(self.conv2(self.norm2(self.conv1(self.norm1(x)))), "residual")


class Asking(Switched):
    """Control flow on shapes, which fx does not trace."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(planes, planes, 3, 1, 1), nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        if x.shape[2] != x.shape[3]:
            x = x + 1
        out = self.way(self.bn(self.conv(x)), "residual")
        out += self.way(x, "skip")
        return torch.relu_(out)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


class Transformer(Switched):
    """Pre-norm: attention, rotary or not, and an MLP with the GELU written out; a factor for each."""

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
        x = self.way(x, "skip", 0) + self.way(self.gamma * self.attention(self.norm1(x), rotary, mask), "residual", 0)
        return self.way(x, "skip", 1) + self.way(self.drop(self.fc2(gelu(self.fc1(self.norm2(x))))), "residual", 1)


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
    """Learned and rotary positions, a causal mask for every sample, tied weights."""

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


class TwoOutputs(nn.Module):
    """Logits, and what the last block gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first, self.second = Parallel(4), Scaled(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.second(self.first(self.conv(x)))
        return {"features": features, "prediction": self.fc(features.mean((2, 3)))}


def shaken(model: nn.Module) -> nn.Module:
    """Random statistics and weights, large enough that no branch is next to nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data *= 2
    return model


@dataclass(frozen=True)
class Stranger:
    """A model, a batch for it, and what its output is compared with.

    Attributes:
        make: the model, its weights random.
        shape: of the input; integers below ``tokens`` where that is given.
        output: which output is meant.
        batch_norm: it has batch normalisation over channels.
        at: where gradients are compared; ``image`` where the first block's module begins with what is the stem's.
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


STRANGERS = [
    Stranger("basic", lambda: ResNet([Basic(4, 4), Basic(4, 6, 2), Basic(6, 6), Basic(6, 6)], 4, 6), batch_norm=True),
    Stranger("bottleneck", lambda: ResNet([Bottleneck(4, 3), Bottleneck(6, 3), Bottleneck(6, 4, 2)], 4, 8)),
    Stranger("zero padding", CifarResNet, (2, 3, 10, 10), batch_norm=True),
    Stranger(
        "pre-activation",
        lambda: PreactResNet([Preactivated(4, 6), Preactivated(6, 6), Preactivated(6, 7, 2)], 4, 7),
        batch_norm=True,
    ),
    Stranger(
        "in place",
        lambda: PreactResNet([Overwriting(4, how) for how in ("module", "function", "method", "module")], 4, 4),
        at="image",
    ),
    Stranger("scaled", lambda: PreactResNet([Scaled(4), Parallel(4), Scaled(4), Parallel(4), Scaled(4)], 4, 4)),
    Stranger("functions", lambda: PreactResNet([Functional(4), Functional(4)], 4, 4), batch_norm=True),
    Stranger("control flow", lambda: ResNet([Asking(4), Basic(4, 4), Asking(4)], 4, 4), batch_norm=True),
    Stranger("vision transformer", VisionTransformer, (3, 3, 8, 8)),
    Stranger("language model", LanguageModel, (3, 6), tokens=11, classes=11),
    Stranger("two outputs", TwoOutputs, output="prediction"),
]


def sites(model: nn.Module) -> list[tuple[Switched, int]]:
    """The residual connections of a stranger, in order: the module, and the number of the addition in it."""
    blocks = [module for module in model.modules() if isinstance(module, Switched)]
    return [(block, number) for block in blocks for number in range(block.additions)]


def path_gradient(stranger: Stranger, model: nn.Module, path: Sequence[int]) -> Tensor:
    """Of the mean cross-entropy, at the input of the first block or of the network, by the plain loop in the
    stranger's own code."""
    found = sites(model)
    leaf: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not leaf:
            leaf.append(args[0].detach().requires_grad_())
            # A copy, since a block may change its input in place.
            return (leaf[0].clone(), *args[1:])
        return args

    handle = found[0][0].register_forward_pre_hook(enter)
    try:
        for (block, number), way in zip(found, path, strict=True):
            block.cut = {**block.cut, (number, "skip" if way else "residual"): "detached"}
        x, target = stranger.batch()
        if stranger.at == "image":
            leaf.append(x.requires_grad_())
        loss = F.cross_entropy(outcome(stranger, model, x).flatten(0, -2), target.flatten())
        (gradient,) = torch.autograd.grad(loss, leaf[0])
    finally:
        handle.remove()
        for block, _ in found:
            block.cut = {}
    return gradient


def outcome(stranger: Stranger, model: nn.Module, x: Tensor) -> Tensor:
    given = model(x.clone())
    return given if stranger.output is None else given[stranger.output]


@torch.no_grad()
def without(stranger: Stranger, model: nn.Module, deleted: Sequence[int], x: Tensor) -> Tensor:
    """The stranger's output when residual modules give nothing."""
    found = sites(model)
    for i in deleted:
        block, number = found[i]
        block.cut = {**block.cut, (number, "residual"): "nothing"}
    try:
        return outcome(stranger, model, x)
    finally:
        for block, _ in found:
            block.cut = {}
