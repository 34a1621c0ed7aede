"""Lesioned networks over the same weights: blocks deleted or reordered, residual modules scaled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.checks import MOST_INTEGER, check_integer, check_integers, check_number, described
from pathnet.data import Batches, Data
from pathnet.data.batches import labelled, sent
from pathnet.data.passes import Passes, of_element
from pathnet.full_precision import full_precision
from pathnet.models.context import Context
from pathnet.models.hooks import copy_without_hooks
from pathnet.models.residual_net import Block, ResidualNet, check_inputs, check_net

__all__ = [
    "BATCH",
    "Lesion",
    "RECALIBRATION_BATCHES",
    "Scaled",
    "block_shapes",
    "check_lesions",
    "check_training_split",
    "delete",
    "lesioned_as",
    "recalibrated",
    "reorder",
]

BATCH = 128
"""Images that lesioned networks run on together."""
RECALIBRATION_BATCHES = 8
"""Default number of training batches that recalibrated running statistics are the means over."""
MOST_BATCHES = 10_000


@dataclass(frozen=True)
class Lesion:
    """A change to a trained network; blocks are numbered from 0. The defaults leave the network intact.

    Attributes:
        deleted: the deleted blocks, by their numbers in the new order.
        order: the blocks in the order in which they run; empty for the order of training.
        scale: factor on the residual modules that are kept (k / n after training with k of n modules).
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

    def split(self, inputs: Any) -> tuple[Tensor, Context]:
        return self._intact[0].split(inputs)

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
    manager it lesions ``net`` itself until the context ends::

        with lesion.delete(net, [3]):
            accuracy = training.evaluate(net, data)

    Raises:
        ValueError: a number is not that of one of the network's blocks, or occurs twice.
    """
    check_net(net)
    deleted = check_integers("blocks", blocks, 0, MOST_INTEGER)
    _check_deleted("blocks", net, deleted)
    return Lesioned(net, [Deleted(block) if i in deleted else block for i, block in enumerate(net)])


def reorder(net: ResidualNet, order: Iterable[int]) -> Lesioned:
    """Return the network with its blocks (from 0) in another order (section 4.3).

    The returned network shares the weights of ``net`` and works as a context manager, see `delete`.

    Raises:
        ValueError: ``order`` does not contain every block exactly once.
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


@full_precision()
@torch.no_grad()
def recalibrated(
    net: ResidualNet, data: Data | Batches | Iterable[Any], batches: int = RECALIBRATION_BATCHES, seed: int = 0
) -> ResidualNet:
    """Return a copy in evaluation mode whose running statistics are means over a few training batches.

    Args:
        data: a data set; `pathnet.data.Batches` with training batches; or an iterable of training batches as `errors`
            takes test batches.
        batches: number of random batches of 128 training images, without augmentation, that the copy runs on; of a
            caller's own batches, the first of them, or all if there are fewer.
        seed: seed of the random batches of a data set.

    Raises:
        ValueError: the network's running statistics are frozen, or an argument is out of range.
    """
    check_net(net)
    batches, seed = check_integer("batches", batches, 1, MOST_BATCHES), check_integer("seed", seed, 0)
    if net.frozen_statistics:
        raise ValueError(f"net: expected running statistics that can change, got fixed {net.frozen_statistics[0]}")
    recalibrating = copy_without_hooks(net).eval()
    norms = [module for module in recalibrating.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    device = next(net.parameters()).device
    for number, inputs in enumerate(_training_inputs(data, batches, seed)):
        with of_element(number, named=not isinstance(data, Data)):
            recalibrating(sent(inputs, device))
    return recalibrating.eval()


def _training_inputs(data: Data | Batches | Iterable[Any], batches: int, seed: int) -> Iterator[Any]:
    if isinstance(data, Data):
        for batch in range(batches):
            yield data.random_batch(data.batch_size(BATCH), seed, batch)[0]
        return
    check_training_split(data, needed=isinstance(data, Batches))
    source = data.train if isinstance(data, Batches) else labelled("data", data)
    yield from (inputs for inputs, _ in islice(source or (), batches))


def check_training_split(data: object, needed: bool = True) -> None:
    """Raise ValueError if ``data`` has no training batches.

    Args:
        needed: whether an iterable of test batches alone is refused too.
    """
    if needed and not isinstance(data, Data) and (not isinstance(data, Batches) or data.train is None):
        raise ValueError(
            "data: expected a data set, or pathnet.data.Batches with training batches (train=), to recalibrate batch "
            f"normalisation, got {described(data)}"
        )


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
