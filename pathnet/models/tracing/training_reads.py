"""The modules that read whether the model trains, and those whose branch in training a trace has fixed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pathnet.models.tracing.graphs import Dropout
from pathnet.models.tracing.live import TrainingOnly
from pathnet.models.tracing.random_states import random_states, random_states_restored, set_draws

__all__ = ["TrainingReads", "called_whole", "calling_whole", "fixed_branches", "lost_overrides", "observed_reads"]

DRAWS: tuple[Literal["seeded", "least", "most"], ...] = ("seeded", "least", "most")
CONSTANTS = (type(None), bool, int, float, str)
MOST_CONFIRMED = 3
"""Maximum number of modules whose effect in training is tried one by one."""


@dataclass(frozen=True)
class TrainingReads:
    """The modules of a model by their use of the mode in a forward pass.

    Attributes:
        readers: the modules that read the attribute ``training``.
        unary: the modules that take one tensor, beside constants, and return one, in every call.
        unchanged: those of them that take nothing else and return their very input, in every call.
        whole: the modules that a trace calls whole, so that they keep their behaviour in training.
    """

    readers: frozenset[nn.Module] = frozenset()
    unary: frozenset[nn.Module] = frozenset()
    unchanged: frozenset[nn.Module] = frozenset()
    whole: frozenset[nn.Module] = frozenset()

    def calling(self, modules: Collection[nn.Module]) -> TrainingReads:
        """Return the same with further modules that a trace calls whole."""
        return replace(self, whole=self.whole | frozenset(modules))

    def attribute(self, value: Any) -> Any:
        """Return a module as a trace calls it: as `TrainingOnly` if it returns its input in evaluation."""
        if value in self.whole and value in self.unchanged and not isinstance(value, Dropout):
            return TrainingOnly(value)
        return value


_WHOLE: ContextVar[TrainingReads | None] = ContextVar("_WHOLE", default=None)


def called_whole() -> TrainingReads:
    """Return the modules that traces call whole in this thread."""
    return _WHOLE.get() or TrainingReads()


@contextmanager
def calling_whole(reads: TrainingReads) -> Iterator[None]:
    """Let traces in this thread call modules whole."""
    token = _WHOLE.set(reads)
    try:
        yield
    finally:
        _WHOLE.reset(token)


class _ObservedMode:
    """The attribute ``training`` of all modules, which notes the modules whose mode one thread reads."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.readers: set[nn.Module] = set()

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        if threading.get_ident() == self.thread:
            self.readers.add(module)
        try:
            return vars(module)["training"]
        except KeyError:
            raise AttributeError("training") from None

    def __set__(self, module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value


@contextmanager
def _observed_mode() -> Iterator[_ObservedMode]:
    observed = _ObservedMode()
    nn.Module.training = observed  # type: ignore[assignment]
    try:
        yield observed
    finally:
        del nn.Module.training


def observed_reads(model: nn.Module, run: Callable[[], Tensor]) -> tuple[TrainingReads, Tensor]:
    """Return which modules of a model read its mode in a run, and what the run returns.

    Readers without weights that map one tensor to one are called whole: no residual connection is inside, since
    a residual module has weights.

    Args:
        run: runs the model. No other thread may observe at the same time.
    """
    calls: dict[nn.Module, list[tuple[bool, bool]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if not isinstance(value, CONSTANTS)]
        unary = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
        unchanged = unary and len(args) == 1 and not kwargs and output is args[0]
        calls.setdefault(module, []).append((unary, unchanged))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        with _observed_mode() as mode:
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    readers = frozenset(mode.readers)
    unary = frozenset(module for module, shapes in calls.items() if all(is_unary for is_unary, _ in shapes))
    unchanged = frozenset(module for module, shapes in calls.items() if all(same for _, same in shapes))
    whole = frozenset(module for module in readers & unary if not any(True for _ in module.parameters()))
    return TrainingReads(readers, unary, unchanged, whole), output.detach()


def fixed_branches(
    model: nn.Module,
    reads: TrainingReads,
    live: Collection[nn.Module],
    run: Callable[[], Tensor],
    expected: Tensor,
) -> dict[str, nn.Module]:
    """Return the modules, by name, whose training branch a network lacks: they would change the model's output.

    Dropout inside attention with p = 0, or checkpoints in training, change nothing.

    Args:
        live: the modules that the network calls whole, or whose absence from it is known otherwise.
        run: runs the model, which is in evaluation mode.
        expected: its output in evaluation.
    """
    names = {module: name for name, module in model.named_modules()}
    absent = {module for module in names if module not in live}
    readers = [module for module in names if module in absent and module in reads.readers]
    if not readers or not _changes(model, absent, run, expected):
        return {}
    confirmed: list[nn.Module] = []
    for module in readers:
        if len(confirmed) == MOST_CONFIRMED:
            break
        # What only training calls has not read its mode in evaluation, and belongs to the module that calls it.
        inner = {child for child in module.modules() if child in absent and child not in reads.readers}
        if _changes(model, {module, *inner}, run, expected):
            confirmed.append(module)
    if len(confirmed) == MOST_CONFIRMED:
        confirmed += readers[readers.index(confirmed[-1]) + 1 :]
    return {names[module]: module for module in confirmed or readers}


def lost_overrides(
    model: nn.Module, run: Callable[[], Tensor], net: nn.Module, run_net: Callable[[], Tensor]
) -> dict[str, nn.Module]:
    """Return the modules, by name, whose class overrides `train`, if a network lacks what that changes beside modes.

    Args:
        run: runs the model, which is in evaluation mode.
        net: the network, whose mode sets the model's. It is in training mode afterwards.
        run_net: runs the network.
    """
    overriding = {name: m for name, m in model.named_modules() if type(m).train is not nn.Module.train}
    if not overriding:
        return {}
    with _restored(model):
        try:
            model.train()
            modes = [(module, module.training) for module in model.modules()]
            expected = _seeded(run)
            model.eval()
            for module, training in modes:
                module.training = training
            if _is_same(_seeded(run), expected):
                return {}
            model.eval()
            net.train()
            return {} if _is_same(_seeded(run_net), expected) else overriding
        except Exception:
            return overriding
        finally:
            model.eval()


def _seeded(run: Callable[[], Tensor]) -> Tensor:
    set_draws("seeded")
    return run().detach()


def _changes(model: nn.Module, training: Collection[nn.Module], run: Callable[[], Tensor], expected: Tensor) -> bool:
    """Return whether the output changes when some modules are in training mode, whatever random numbers are drawn."""
    with _restored(model):
        for module in training:
            module.training = True
        for draws in DRAWS:
            set_draws(draws)
            before = random_states()
            try:
                output = run()
            except Exception:
                # In training the model may need a target, or return something else.
                return True
            if not _is_same(output, expected):
                return True
            if random_states() == before:
                return False
    return False


def _is_same(output: Any, expected: Tensor) -> bool:
    """Return whether two outputs are equal but for the rounding of other kernels."""
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    distance = (output.detach().double() - expected.double()).norm()
    return bool(distance <= 100 * torch.finfo(expected.dtype).eps * expected.double().norm())


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore modes, buffers and random states afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with random_states_restored():
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, original in buffers:
                buffer.copy_(original)
