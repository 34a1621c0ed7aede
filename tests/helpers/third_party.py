"""Convolutional models in the style of third parties, without any code of pathnet, with a switch at each branch.

A block passes its branches through `Switched.switch`, which returns them unchanged until a test switches one to
detached or zero. That computes path gradients by definition, in the model's own code, without any tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Switched(nn.Module):
    """A module with residual connections, numbered from 0.

    Attributes:
        additions: number of its residual connections.
        switches: ``detached`` or ``zero`` for (number, branch); other branches are unchanged.
    """

    additions = 1

    def __init__(self) -> None:
        super().__init__()
        self.switches: dict[tuple[int, str], str] = {}

    def switch(self, x: Tensor, branch: str, number: int = 0) -> Tensor:
        """Return a branch as its switch says."""
        state = self.switches.get((number, branch))
        if state == "detached":
            return x.detach()
        return torch.zeros_like(x) if state == "zero" else x


class Basic(Switched):
    """torchvision's block: ReLU in place, ``out += identity``, and a ReLU after the addition."""

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
        out = self.switch(out, "residual")
        out += self.switch(identity, "skip")
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
        out = self.switch(self.bn3(self.conv3(out)), "residual")
        out += self.switch(x if self.downsample is None else self.downsample(x), "skip")
        return self.relu(out)


class ResNet(nn.Module):
    """torchvision's network around any blocks."""

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
    """A CIFAR block that appends zero channels, or adds them on both sides."""

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
        out = self.switch(self.bn2(self.conv2(out)), "residual")
        out += self.switch(self.shortcut(x), "skip")
        return F.relu(out)


class CifarResNet(nn.Module):
    """The network of He et al. on CIFAR around blocks with option A, four of different kinds by default."""

    def __init__(self, layers: Sequence[OptionA] = ()) -> None:
        super().__init__()
        layers = layers or [
            OptionA(4, 4),
            OptionA(4, 7, 2),
            OptionA(7, 7, around=True),
            OptionA(7, 12, 2, around=True),
        ]
        width = layers[0].conv1.in_channels
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.ModuleList(layers)
        self.linear = nn.Linear(layers[-1].conv2.out_channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            out = layer(out)
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def cifar_resnet20(width: int) -> CifarResNet:
    """Return ResNet-20: three blocks a stage, zero channels on both sides where a stage widens."""
    stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
    return CifarResNet(
        [
            OptionA(inplanes if first else planes, planes, stride if first else 1, around=True)
            for inplanes, planes, stride in stages
            for first in (True, False, False)
        ]
    )


class Preactivated(Switched):
    """A pre-activation block whose projection shares BN and ReLU with the residual module."""

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
        return self.switch(out, "residual") + self.switch(shortcut, "skip")


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


class InPlace(Switched):
    """A block whose in-place ReLU also changes the skip: ``relu(x) + f(relu(x))``."""

    def __init__(self, planes: int, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(planes, planes, 3, 1, 1)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == "module":
            out = self.relu(x)
        elif self.variant == "function":
            out = F.relu(x, True)
        else:
            # One tensor under two names, changed through both.
            out = x.add_(0.5)
            out -= 0.1
            x.relu_()
        out = self.switch(self.conv2(F.elu(self.conv1(out))), "residual")
        return out.add_(self.switch(x, "skip"))


class Scaled(Switched):
    """``torch.add`` with a factor, squeeze and excitation, and concatenation inside the residual module."""

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
        return torch.add(self.switch(x, "skip"), self.switch(y, "residual"), alpha=0.5)


class Parallel(Switched):
    """A block with two residual modules in parallel, added to the input one after the other."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(planes, planes, 3, 1, 1)
        self.b = nn.Conv2d(planes, planes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.switch(x, "skip") + self.switch(self.a(F.gelu(x)), "residual")
        y += self.switch(self.b(torch.sin(x)), "residual")
        return y


class NormAct(nn.BatchNorm2d):
    """A subclass that calls ``F.batch_norm`` itself and adds an activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(x)


class Functional(Switched):
    def __init__(self, planes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = NormAct(planes), NormAct(planes)
        self.conv1, self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1), nn.Conv2d(planes, planes, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.switch(x, "skip") + self.switch(self.conv2(self.norm2(self.conv1(self.norm1(x)))), "residual")


class ShapeDependent(Switched):
    """A block with control flow on shapes, which torch.fx cannot trace."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(planes, planes, 3, 1, 1), nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        if x.shape[2] != x.shape[3]:
            x = x + 1
        out = self.switch(self.bn(self.conv(x)), "residual")
        out += self.switch(x, "skip")
        return torch.relu_(out)


class TwoOutputs(nn.Module):
    """A model that returns logits and the last block's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first, self.second = Parallel(4), Scaled(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.second(self.first(self.conv(x)))
        return {"features": features, "prediction": self.fc(features.mean((2, 3)))}


def shaken(model: nn.Module) -> nn.Module:
    """Return a model with random statistics, and with weights so large that no branch is negligible."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data *= 2
    return model
