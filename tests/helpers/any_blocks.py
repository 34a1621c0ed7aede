"""Networks with blocks of every kind for engines that take any, and the plain loop over their paths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathnet
from helpers.routed_networks import NETS, in_place, random_net_of
from helpers.token_nets import WIDTH, language_model
from pathnet.models import Block, ResidualNet
from pathnet.models.context import Context

SHAPE = (3, 7, WIDTH)


class Attends(Block):
    """Causal or full attention by PyTorch's fused operator, with or without a mask of its own."""

    def __init__(self, causal: bool, masked: bool = False) -> None:
        super().__init__()
        self.norm, self.inward, self.outward = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * 8), nn.Linear(8, WIDTH)
        self.causal, self.masked = causal, masked

    def residual(self, x: Tensor) -> Tensor:
        heads = [t.unflatten(2, (2, 4)).transpose(1, 2) for t in self.inward(self.norm(x)).chunk(3, -1)]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(1) if self.masked else None
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=self.causal)
        return torch.as_tensor(self.outward(attended.transpose(1, 2).flatten(2)))


class Acts(Block):
    """A perceptron with any activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inward, self.outward, self.activation = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH), activation

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.outward(self.activation(self.inward(x))))


class Gated(Block):
    """A product of two functions of the input, as in SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=i > 0) for i in range(3))

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down(F.silu(self.gate(x)) * self.up(x)))


class Changes(Block):
    """A block whose skip connection has weights, and which changes values in place, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.across, self.inward, self.outward = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def skip(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.across(x))

    def residual(self, x: Tensor) -> Tensor:
        z = self.inward(x).mul_(2).add_(1).relu_()
        return self.outward(z).tanh_()

    def join(self, z: Tensor) -> Tensor:
        return F.leaky_relu_(z, 0.1)


class Parallel(Block):
    """Two residual modules side by side."""

    residual_modules = 2

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def parts(self, x: Tensor, wanted: Collection[int] | None = None) -> tuple[Tensor | None, ...]:
        return x, self.left(x).tanh(), F.gelu(self.right(x))

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.left(x).tanh() + F.gelu(self.right(x)))


class Masked(Block):
    """A block that multiplies by a mask and adds a number, both of the batch's context."""

    def __init__(self, mask: Tensor | None = None, shift: float = 0.0) -> None:
        super().__init__()
        self.linear, self.mask, self.shift = nn.Linear(WIDTH, WIDTH), mask, shift

    def bound(self, context: Context) -> Block:
        block = copy.copy(self)
        block.mask, block.shift = context.values["mask"], context.values["shift"]
        return block

    def residual(self, x: Tensor) -> Tensor:
        assert self.mask is not None
        return torch.as_tensor((self.linear(x) + self.shift).tanh() * self.mask[..., None].log1p())


class MaskedNet(ResidualNet):
    """A network of inputs [B, T, WIDTH] and a mask [B, T] in one dictionary."""

    def split(self, inputs: Any) -> tuple[Tensor, Context]:
        values = {"mask": inputs["mask"], "shift": float(inputs["x"].shape[1])}
        return inputs["x"], Context(values, {"mask": 0})

    def tensors(self, inputs: Any) -> dict[str, Tensor]:
        return dict(inputs)

    def bound(self, context: Context) -> ResidualNet:
        return ResidualNet(self.stem, [block.bound(context) for block in self], self.head)


class Chooses(Block):
    """A block whose operators depend on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(x) if x.sum() > 0 else self.linear(x).tanh())


class Counts(Block):
    """A block that takes a number of its input for a constant, past what a trace can see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def residual(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(x) * float(x.detach().clone().numpy().sum()))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "leaky": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
    "log sigmoid": F.logsigmoid,
    "softmax": lambda x: x.softmax(-1),
    "square": lambda x: x.relu().square(),
    "power": lambda x: x.abs() ** 1.5,
}


def of_blocks(blocks: Sequence[Block], seed: int = 0) -> ResidualNet:
    """Return a network of such blocks in float64, whose inputs are [B, T, WIDTH]."""
    torch.manual_seed(seed)
    net = ResidualNet(nn.Linear(WIDTH, WIDTH), blocks, nn.Linear(WIDTH, 5)).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return net


TOKEN_NETS: dict[str, Callable[[], ResidualNet]] = {
    "language model": lambda: of_blocks(list(language_model(4))),
    "attention": lambda: of_blocks([Attends(True), Attends(False), Attends(False, masked=True)]),
    "gated": lambda: of_blocks([Gated(), Gated(), Gated()]),
    "changes": lambda: of_blocks([Changes(), Changes(), Changes()]),
    "chooses": lambda: of_blocks([Chooses(), Gated(), Chooses()]),
    "activations": lambda: of_blocks([Acts(activation) for activation in ACTIVATIONS.values()]),
}


def some_paths(net: ResidualNet) -> Tensor:
    """Return all paths of at most four blocks; of more, those through one module, through all but one and all."""
    if net.n <= 4:
        return pathnet.paths.enumerate_all(net.n)
    one = torch.eye(net.n, dtype=torch.uint8)
    return torch.cat([one, 1 - one, torch.ones(1, net.n, dtype=torch.uint8)])


IMAGE_NETS = [*NETS, "in place"]


def image_net(kind: str, bn: str) -> ResidualNet:
    """Return a network of convolutions in float64, in the mode of the batch normalisation."""
    if kind != "in place":
        return random_net_of(kind, bn)
    torch.manual_seed(0)
    return in_place().double().eval()


def sequences(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output.double() - 1).square().mean()


def loop(net: ResidualNet, inputs: Tensor, path: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a path's gradient at ``y_0`` by an ordinary forward pass with the branches off the path detached."""
    y0 = y = net.stem(inputs).detach().requires_grad_()
    for block, on in zip(net, path.tolist(), strict=True):
        # Copies, since a branch may change its input.
        skip, residual = block.branches(y.clone())
        y = block.join(skip.detach() + residual if on else skip + residual.detach())
    return torch.autograd.grad(loss(net.head(y)), y0, materialize_grads=True)[0]
