"""Places of gradients: a block's input, the image or a parameter, and the blocks that paths there run through."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from pathnet.checks import check_integer, described
from pathnet.models.context import Context
from pathnet.models.residual_net import ResidualNet

__all__ = ["Front", "Place", "Tail", "locate", "routed_parts", "tail"]


@dataclass(frozen=True)
class Place:
    """A place of gradients in a network of n blocks.

    Attributes:
        at: the place as the caller names it.
        start: number of the first block that the engine walks through; n where it walks through none.
        block: number of the block that holds the parameter, before block ``start``; None for other places.
        parameter: name of the parameter in the network; empty for other places.
        leaf: the parameter itself, in the copy of the network that is recorded; see `within`.
    """

    at: str | int
    start: int = 0
    block: int | None = None
    parameter: str = ""
    leaf: Tensor | None = field(default=None, repr=False, compare=False)

    def within(self, net: ResidualNet) -> Place:
        """Return the place with the parameter of a copy of the network, whose blocks may be bound to a context."""
        return replace(self, leaf=net.get_parameter(self.parameter).requires_grad_()) if self.parameter else self


class Tail(ResidualNet):
    """The part of a network from block ``start`` on, whose stem also runs the blocks before.

    It is the only network that may be without blocks, if ``start`` is n.
    """

    def __init__(self, whole: ResidualNet, start: int) -> None:
        nn.Module.__init__(self)
        self.stem = Front(whole, start)
        self.blocks = nn.ModuleList(list(whole)[start:])
        self.head = whole.head
        self.config = None
        self.frozen_statistics = whole.frozen_statistics

    def split(self, inputs: Any, name: str = "images") -> tuple[Tensor, Context]:
        return self.whole.split(inputs, name)

    def bound(self, context: Context) -> ResidualNet:
        whole = self.whole.bound(context)
        return self if whole is self.whole else Tail(whole, self._front.start)

    @property
    def whole(self) -> ResidualNet:
        """The whole network."""
        return self._front.whole

    @property
    def _front(self) -> Front:
        assert isinstance(self.stem, Front)
        return self.stem


class Front(nn.Module):
    """The stem of a network, then its blocks before block ``start``."""

    def __init__(self, whole: ResidualNet, start: int) -> None:
        super().__init__()
        self.whole, self.start = whole, start

    def forward(self, x: Tensor) -> Tensor:
        return self.input_of(self.start, x)

    def input_of(self, number: int, x: Tensor) -> Tensor:
        """Return the input of a block, by its number, for an input of the network."""
        x = self.whole.stem(x)
        for block in list(self.whole)[:number]:
            x = block(x)
        return x


def tail(net: ResidualNet, place: Place) -> ResidualNet:
    """Return the part of a network that paths to a place run through; the network itself if that is all of it."""
    return net if place.start == 0 else Tail(net, place.start)


def routed_parts(behind: ResidualNet, place: Place) -> int:
    """Return the number of parts of a block's Jacobian along paths to a place, see `ResidualNet.parts`.

    Args:
        behind: the part of the network that `tail` returns.
    """
    return behind.parts if place.block is None or not isinstance(behind, Tail) else behind.whole.parts


def locate(net: ResidualNet, at: object) -> Place:
    """Return the place that a caller names.

    Args:
        at: ``y0``, ``image``, ``stem_weight``, the number of a block, or the name of a parameter.

    Raises:
        ValueError: the network has no such place, or no gradient along a path is defined there.
    """
    if isinstance(at, str):
        if at in ("y0", "image"):
            return Place(at)
        return _of_stem_weight(net) if at == "stem_weight" else _of_parameter(net, at)
    try:
        number = check_integer("at", at, 0, net.n - 1)
    except ValueError:
        raise _unknown(net, at) from None
    return Place(number, number)


def _unknown(net: ResidualNet, at: object) -> ValueError:
    return ValueError(
        f"at: expected 'y0', 'image', 'stem_weight', the number of a block (0 to {net.n - 1}) or the name of a "
        f"parameter, got {described(at)}"
    )


def _of_stem_weight(net: ResidualNet) -> Place:
    weight = net.stem_weight()
    for name, parameter in net.named_parameters():
        if parameter is weight:
            return Place("stem_weight", parameter=name)
    raise ValueError('at="stem_weight": the weight of the stem\'s convolution is computed from other parameters')


def _of_parameter(net: ResidualNet, at: str) -> Place:
    parameters = dict(net.named_parameters(remove_duplicate=False))
    name = net.parameter_names.get(at, at)
    if name not in parameters:
        raise _unknown(net, at)
    parameter = parameters[name]
    if parameters.get(at, parameter) is not parameter:
        raise ValueError(f"at: expected the name of one parameter, got {at!r}, in the model that of {name!r}")
    if not parameter.is_floating_point():
        raise ValueError(f"at: expected a floating-point parameter, got {at!r}, {parameter.dtype}")

    def within(part: nn.Module) -> bool:
        return any(each is parameter for each in part.parameters())

    blocks = [i for i, block in enumerate(net) if within(block)]
    where = [*(["the stem"] if within(net.stem) else []), *(f"block {i}" for i in blocks)]
    if len(where) > 1:
        raise ValueError(f"at: expected a parameter of the stem or of one block, got {at!r} of {' and '.join(where)}")
    if not where:
        only = "the head" if within(net.head) else "the context of the blocks"
        raise ValueError(
            f"at: expected a parameter that paths lead to, of the stem or of a block, got {at!r} of {only}"
        )
    return Place(at, blocks[0] + 1, blocks[0], name) if blocks else Place(at, parameter=name)
