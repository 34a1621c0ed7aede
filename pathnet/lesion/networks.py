"""Lesioned networks over the same weights: blocks deleted or reordered, residual modules scaled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.checks import MOST_INTEGER, check_integers, check_number
from pathnet.data.batches import sent
from pathnet.data.passes import Passes
from pathnet.models.context import Context
from pathnet.models.residual_net import Block, ResidualNet, check_inputs, check_net

__all__ = [
    "BATCH",
    "Lesion",
    "Scaled",
    "block_shapes",
    "check_lesions",
    "delete",
    "lesioned_as",
    "reorder",
]

BATCH = 128
"""Images that lesioned networks run on together."""


@dataclass(frozen=True)
class Lesion:
    """A change to a trained network; blocks are numbered from 0. The defaults leave the network intact.

    Attributes:
        deleted: the deleted blocks, by their numbers in the new order.
        order: the blocks in the order in which they run; empty for the order of training.
        scale: factor on the residual modules that are kept (k / n after training with k of n modules).

    Raises:
        ValueError: a block's number is negative or no integer, or ``scale`` is not above 0.

    Example:
        >>> from pathnet import lesion
        >>> lesion.Lesion(deleted=(3, 5))
        Lesion(deleted=(3, 5), order=(), scale=1.0)
    """

    deleted: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("deleted", "order"):
            object.__setattr__(self, name, check_integers(name, getattr(self, name), 0, MOST_INTEGER))
        object.__setattr__(self, "scale", check_number("scale", self.scale, above=0))


class Deleted(Block):
    """A deleted block, which passes its input through its skip connection alone."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, self.residual_modules = block, block.residual_modules

    def skip(self, x: Tensor) -> Tensor:
        return self.block.lesioned(x)

    def residual(self, x: Tensor) -> Tensor:
        return 0.0 * self.skip(x)

    def parts(self, x: Tensor, wanted: Collection[int] | None = None) -> tuple[Tensor | None, ...]:
        skip = self.skip(x)
        return (skip, *[0.0 * skip] * self.residual_modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x)

    def bound(self, context: Context) -> Deleted:
        block = self.block.bound(context)
        return self if block is self.block else Deleted(block)


class Scaled(Block):
    """A block whose residual module is multiplied by a constant factor."""

    def __init__(self, block: Block, scale: float) -> None:
        super().__init__()
        self.block, self.scale, self.residual_modules = block, scale, block.residual_modules

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip, residual = self.block.branches(x)
        return skip, self.scale * residual

    def parts(self, x: Tensor, wanted: Collection[int] | None = None) -> tuple[Tensor | None, ...]:
        skip, *modules = self.block.parts(x, wanted)[: 1 + self.residual_modules]
        return (skip, *(None if module is None else self.scale * module for module in modules))

    def join(self, z: Tensor) -> Tensor:
        return self.block.join(z)

    def lesioned(self, x: Tensor) -> Tensor:
        return self.block.lesioned(x)

    def bound(self, context: Context) -> Block:
        block = self.block.bound(context)
        return self if block is self.block else Scaled(block, self.scale)


class Lesioned(ResidualNet):
    """A lesioned view of the network ``intact``, with the same weights.

    As a context manager it lesions ``intact`` itself and restores it on exit.
    """

    def __init__(self, intact: ResidualNet, blocks: Sequence[Block]) -> None:
        super().__init__(intact.stem, blocks, intact.head)
        self.training = intact.training
        self.frozen_statistics, self.reader = intact.frozen_statistics, intact.reader
        self.batch_first_output = intact.batch_first_output
        self.decides_by_batch = intact.decides_by_batch
        # The tuple keeps torch from registering the network as a submodule, which would count its weights twice.
        self._intact = (intact,)
        self._intact_blocks: nn.ModuleList | None = None

    def tensors(self, inputs: Any, name: str = "images") -> dict[str, Tensor]:
        return self._intact[0].tensors(inputs, name)

    def split(self, inputs: Any, name: str = "images") -> tuple[Tensor, Context]:
        return self._intact[0].split(inputs, name)

    def bound(self, context: Context) -> ResidualNet:
        intact = self._intact[0].bound(context)
        return self if intact is self._intact[0] else Lesioned(intact, [block.bound(context) for block in self])

    def __enter__(self) -> ResidualNet:
        (intact,) = self._intact
        self._intact_blocks, intact.blocks = intact.blocks, self.blocks
        return intact

    def __exit__(self, *_: object) -> None:
        (intact,) = self._intact
        assert self._intact_blocks is not None
        intact.blocks = self._intact_blocks


def delete(net: ResidualNet, blocks: Iterable[int]) -> Lesioned:
    """Return the network without the blocks of the given numbers (from 0), each replaced by its skip connection.

    This is the lesion of sections 4.1 and 4.2. The returned network shares the weights of ``net``. As a context
    manager it lesions ``net`` itself until the context ends.

    Args:
        net: the network.
        blocks: numbers of the blocks to delete.

    Raises:
        ValueError: a number is not that of one of the network's blocks, or occurs twice.

    Example:
        >>> import torch
        >>> from pathnet import lesion, models
        >>> net = models.preact_resnet(depth=14, width=8, in_channels=1).eval()
        >>> images = torch.randn(4, 1, 8, 8)
        >>> lesioned = lesion.delete(net, [3])
        >>> torch.equal(lesioned(images), net(images))
        False
        >>> with lesion.delete(net, [3]):
        ...     torch.equal(lesioned(images), net(images))
        True
    """
    check_net(net)
    deleted = check_integers("blocks", blocks, 0, MOST_INTEGER)
    _check_deleted("blocks", net, deleted)
    return Lesioned(net, [Deleted(block) if i in deleted else block for i, block in enumerate(net)])


def reorder(net: ResidualNet, order: Iterable[int]) -> Lesioned:
    """Return the network with its blocks (from 0) in another order (section 4.3).

    The returned network shares the weights of ``net`` and works as a context manager, see `delete`. Only blocks of
    equal shapes can change places; others fail when images reach them.

    Args:
        net: the network.
        order: the n blocks in the order in which they run.

    Raises:
        ValueError: ``order`` does not contain every block exactly once.

    Example:
        >>> import torch
        >>> from pathnet import lesion, models
        >>> net = models.preact_resnet(depth=14, width=8, in_channels=1).eval()
        >>> swapped = lesion.reorder(net, [1, 0, 2, 3, 4, 5])
        >>> swapped.blocks[0] is net.blocks[1], swapped(torch.randn(4, 1, 8, 8)).shape
        (True, torch.Size([4, 10]))
    """
    check_net(net)
    blocks, order = list(net), check_integers("order", order, 0, MOST_INTEGER)
    _check_order(net, order)
    return Lesioned(net, [blocks[i] for i in order])


def block_shapes(net: ResidualNet, images: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the shapes [C, H, W] that enter and leave every block.

    A block that changes the shape is a downsampling block; only blocks of equal shapes can change places.

    Args:
        images: [B, C, H, W], of which only the first image runs; or the tuple or mapping that the network takes.

    Raises:
        ValueError: ``net`` is not a `ResidualNet`, or ``images`` is not a nonempty batch of its inputs.
    """
    check_net(net)
    if not isinstance(images, tuple | list | Mapping):
        x = check_inputs("images", images, net)
        if x.ndim == 0 or len(x) == 0:
            raise ValueError(f"images: expected a batch of at least one, got shape {list(x.shape)}")
    entering_and_leaving = []
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            x, context = net.split(images)
            # The context is that of all samples.
            bound = net.bound(context)
            y = bound.stem((x if context.values else x[:1]).clone())
            for block in bound:
                entering, y = tuple(y.shape[1:]), block(y.clone())
                entering_and_leaving.append((entering, tuple(y.shape[1:])))
    finally:
        net.train(training)
    return entering_and_leaving


def lesioned_as(net: ResidualNet, lesion: Lesion) -> ResidualNet:
    """Return the network with a lesion applied: its order, its scale, then its deletions."""
    ordered = reorder(net, lesion.order) if lesion.order else net
    if lesion.scale != 1:
        ordered = Lesioned(ordered, [Scaled(block, lesion.scale) for block in ordered])
    return delete(ordered, lesion.deleted)


def check_lesions(net: ResidualNet, lesions: Sequence[Lesion], passes: Passes) -> None:
    """Raise ValueError unless every lesion fits the network.

    Args:
        passes: passes over the batches; one begins if a lesion has an order.
    """
    for lesion in lesions:
        _check_deleted("deleted", net, lesion.deleted)
        if lesion.order:
            _check_order(net, lesion.order)
    orders = {lesion.order for lesion in lesions if lesion.order}
    if not orders:
        return
    with passes.element(0):
        inputs, _ = next(iter(passes))
        entering_and_leaving = block_shapes(net, sent(inputs, next(net.parameters()).device))
    for order in orders:
        shape = entering_and_leaving[0][0]
        for place, block in enumerate(order):
            entering, leaving = entering_and_leaving[block]
            if entering != shape:
                raise ValueError(f"order: block {block} takes {list(entering)}, got {list(shape)} in place {place}")
            shape = leaving


def _check_deleted(name: str, net: ResidualNet, deleted: Sequence[int]) -> None:
    if len(set(deleted)) < len(deleted) or not all(0 <= i < net.n for i in deleted):
        raise ValueError(f"{name}: expected different numbers from 0 to {net.n - 1}, got {list(deleted)}")


def _check_order(net: ResidualNet, order: Sequence[int]) -> None:
    if sorted(order) != list(range(net.n)):
        raise ValueError(f"order: expected every number from 0 to {net.n - 1} once, got {list(order)}")
