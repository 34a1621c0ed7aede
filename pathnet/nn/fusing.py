"""Networks whose blocks run by fused kernels, as views of networks whose blocks run their modules."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.checks import one_of
from pathnet.models.residual_net import Block, ResidualNet, check_net
from pathnet.nn.parts import GLOBAL_HOOKS, FusedParts, fused_parts, never_fused
from pathnet.nn.residual import DTYPES, fused_skip, run_fused, transformed, unfit, unfit_size
from pathnet.nn.serving import FusedEngine, serving

__all__ = ["FusedNet", "fuse"]

DICTIONARIES = (
    *("_modules", "_parameters", "_buffers"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)
"""Attributes of a module that change inside."""


class FusedNet(ResidualNet):
    """A view of a network whose blocks run by fused kernels; `fuse` returns it.

    It is of the network's class too, and shares its mode, stem, head, and all that its blocks consist of.

    Example:
        >>> from pathnet import models, nn
        >>> fused = nn.fuse(models.highway(depth=8, width=8), engine="cpu")
        >>> fused.engines
        ('none', 'none', 'none')
        >>> fused.unfused[2]
        'its gate multiplies skip connection and residual module'
    """

    __slots__ = ("_engine", "_intact")
    _engine: FusedEngine
    _intact: ResidualNet

    @property
    def engines(self) -> tuple[str, ...]:
        """Engine of each block on its present device, ``cpu`` or ``triton``; ``none`` where its modules run."""
        return tuple(self._engine_or_reason(block)[0] for block in self)

    @property
    def unfused(self) -> dict[int, str]:
        """Reason why a block runs its modules now, by the number of the block."""
        reasons = [self._engine_or_reason(block)[1] for block in self]
        return {number: reason for number, reason in enumerate(reasons) if reason}

    @property
    def training(self) -> bool:
        """Mode of the network."""
        return self._intact.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._intact.training = mode

    def _engine_or_reason(self, block: Block) -> tuple[str, str]:
        if isinstance(block, FusedBlock):
            return block.engine_or_reason()
        if self._engine == "none":
            return "none", serving("none", "cpu")[1]
        return "none", never_fused(block) or "it was compiled before it could be fused"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _net_view, (self._intact, self._engine), _shared(self)


class FusedBlock(Block):
    """A view of a block that runs by fused kernels where an engine serves, and by the block's modules elsewhere.

    Its attributes are the block's, in one dictionary: modules, mode, hooks. Only compiled code is its own.
    """

    __slots__ = ("_compiled_call_impl", "_engine", "_intact", "_parts", "_unchanged")
    _engine: FusedEngine
    _intact: Block
    _parts: FusedParts | str
    _unchanged: Callable[[], bool]

    def forward(self, x: Tensor) -> Tensor:
        parts = self._parts_now()
        if isinstance(parts, str) or unfit(parts, x) is not None:
            return super().forward(x)
        kernels, _ = serving(self._engine, x.device.type)
        if kernels is None or unfit_size(parts, x, kernels) is not None:
            return super().forward(x)
        return run_fused(kernels, parts, x, 1.0, 1.0)

    def lesioned(self, x: Tensor) -> Tensor:
        parts = self._parts_now()
        if isinstance(parts, str) or unfit(parts, x) is not None or type(self._intact).lesioned is not Block.lesioned:
            return super().lesioned(x)
        kernels, _ = serving(self._engine, x.device.type)
        skip = fused_skip(kernels, parts, x)
        return super().lesioned(x) if skip is None else run_fused("cpu", skip, x, 0.0, 1.0)

    def engine_or_reason(self) -> tuple[str, str]:
        """Return the engine that runs the block now, and ""; or ``none``, and the reason."""
        parts = self._parts_now()
        if isinstance(parts, str):
            return "none", parts
        weight = parts.convs[0].weight
        if weight.dtype not in DTYPES:
            return "none", f"its parameters are {weight.dtype}"
        kernels, reason = serving(self._engine, weight.device.type)
        return kernels or "none", reason

    def _parts_now(self) -> FusedParts | str:
        if torch.compiler.is_compiling():
            # The program has guards in place of the comparison.
            return fused_parts(self)
        transformation = transformed()
        if transformation is not None:
            return transformation
        if not self._unchanged():
            self._parts, self._unchanged = fused_parts(self), comparison(self)
        return self._parts

    def plain(self) -> Block:
        return self._intact

    def extra_repr(self) -> str:
        return f"engine={self.engine_or_reason()[0]}"

    def __copy__(self) -> Block:
        return _block_view(copy.copy(self._intact), self._engine)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _block_view, (self._intact, self._engine)


def fuse(net: ResidualNet, engine: FusedEngine = "auto") -> FusedNet:
    """Return a view of a network whose blocks run by fused kernels wherever an engine serves them.

    It computes what the network computes, within rounding, as `fused_residual` runs one block, and is differentiable
    once. Train and evaluate it in place of the network: both have the same parameters, buffers, mode, hooks and
    state-dict keys, so an optimizer or a checkpoint of one is that of the other. Copies, pickles and `pathnet.models`
    treat it as a network of its own.

    A block runs its modules, as in ``net``, where no engine serves it, which `FusedNet.unfused` tells: a block
    without a pre-activation form, with modules whose hooks or classes compute more, with BNs of which some train, or
    on another device; one that stochastic depth scales, in evaluation; and for inputs in other types than float32 and
    bfloat16. So do all blocks in `torch.func`, forward-mode differentiation, `pathnet.record`, `pathnet.routed` and
    `pathnet.adapt`. Each call of a block compares the attributes of its modules with those of the call before, so
    changes of them are seen; a program of `torch.compile` sees those that its guards see, thus no hooks that come
    later. A stem, a head or a list of blocks that is replaced in ``net`` is not seen: fuse again.

    Args:
        net: the network. What `fuse` returned is fused anew.
        engine: ``auto``, the native code on a CPU and Triton's kernels on a GPU; ``cpu`` or ``triton``, where blocks
            on other devices run their modules; or ``none`` for the modules everywhere.

    Raises:
        ValueError: ``net`` is not a `ResidualNet`, or the engine is not one of these.

    Example:
        >>> import torch
        >>> from pathnet import models, nn
        >>> _ = torch.manual_seed(0)
        >>> net = models.preact_resnet(depth=14, width=8)
        >>> fused = nn.fuse(net)
        >>> fused.engines
        ('cpu', 'cpu', 'cpu', 'cpu', 'cpu', 'cpu')
        >>> images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
        >>> torch.nn.functional.cross_entropy(fused(images), labels).backward()
        >>> net.blocks[0].convs[0].weight.grad.shape  # the parameters are the network's
        torch.Size([8, 8, 3, 3])
        >>> torch.allclose(fused.eval()(images), net(images), atol=1e-4)
        True
    """
    check_net(net)
    one_of("engine", engine, FusedEngine)
    net = net._intact if isinstance(net, FusedNet) else net
    fused = _net_view(net, engine)
    fused.__dict__.update(_shared(net))
    fused._modules = {**net._modules, "blocks": nn.ModuleList(_fused(block, engine) for block in net)}
    return fused


def _fused(block: Block, engine: FusedEngine) -> Block:
    block = block.plain()
    if engine == "none" or block._compiled_call_impl is not None or never_fused(block) is not None:
        return block
    return _block_view(block, engine)


def _shared(net: ResidualNet) -> dict[str, Any]:
    """Return the attributes of a network without its mode, which views read from it, and compiled code."""
    return {name: value for name, value in net.__dict__.items() if name not in ("training", "_compiled_call_impl")}


def _net_view(net: ResidualNet, engine: FusedEngine) -> FusedNet:
    fused: FusedNet = _view_of(FusedNet, net)
    object.__setattr__(fused, "_engine", engine)
    return fused


def _block_view(block: Block, engine: FusedEngine) -> FusedBlock:
    fused: FusedBlock = _view_of(FusedBlock, block)
    fused.__dict__ = block.__dict__
    fused._engine, fused._compiled_call_impl = engine, None
    fused._parts, fused._unchanged = "", lambda: False
    return fused


def _view_of(view: type, module: nn.Module) -> Any:
    kind: Any = type(module)
    fused: Any = object.__new__(_view_class(view, kind))
    # Not by the module's own method, which would count the original among the submodules.
    object.__setattr__(fused, "_intact", module)
    return fused


@functools.cache
def _view_class(view: Any, kind: Any) -> Any:
    """Return the class of views of a class's modules, which has that class's methods."""
    return type(f"Fused{kind.__name__}", (view, kind), {"__slots__": (), "__module__": view.__module__})


def comparison(block: Block) -> Callable[[], bool]:
    """Return a function that returns whether a block's modules are what they were when this one was called.

    It compares the classes and all attributes of all modules by identity: tensors, submodules and hooks included.
    This takes some microseconds; to ask a traced block for its form takes hundreds.
    """
    modules = list(block.modules())
    live = [
        attributes
        for module in modules
        for attributes in (module.__dict__, *(module.__dict__[name] for name in DICTIONARIES))
    ]
    live += GLOBAL_HOOKS
    before = [*map(type, modules), *chain.from_iterable(map(dict.values, live))]

    def unchanged() -> bool:
        now = [*map(type, modules), *chain.from_iterable(map(dict.values, live))]
        return len(now) == len(before) and all(map(is_, now, before))

    return unchanged
