"""Stubs of CUDA's streams, events and graphs on the CPU: a capture notes its operations, and a replay repeats them
over the same memory; calls of streams and events are noted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Cuda", "install"]


@dataclass
class Cuda:
    """Calls to the device.

    Attributes:
        device: the current device's index.
        notes: calls in order: kind, and arguments.
        graphs: number of captured graphs.
    """

    device: int = 0
    notes: list[tuple[Any, ...]] = field(default_factory=list)
    graphs: int = 0
    capturing: int = 0
    stream: Any = None

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [note for note in self.notes if note[0] == kind]


class _Written(TorchDispatchMode):
    """Notes every operation and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.again: list[Callable[[], None]] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not self.paused:
            assert "_local_scalar_dense" not in str(func), "a value was read during a capture"
            self.again.append(lambda: _repeat(func, args, kwargs or {}, results))
        return results


def _repeat(func: Any, args: Any, kwargs: Any, results: Any) -> None:
    for before, now in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(before, Tensor) and before.untyped_storage().data_ptr() != now.untyped_storage().data_ptr():
            before.copy_(now)


def install(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Make the CPU a CUDA device for `pathnet.engines.triton.graphs` alone."""
    from pathnet.engines.triton import arrivals, dgrad, endings, folding, forward, graphs, statistics, sums

    cuda, numbers = Cuda(), itertools.count()
    written: list[_Written] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.number, self.device = next(numbers), torch.device(device or "cuda")

        def wait_stream(self, other: Any) -> None:
            cuda.notes.append(("wait_stream", self, other))

        def wait_event(self, event: Any) -> None:
            cuda.notes.append(("wait_event", self, event))

    class Event:
        def record(self, stream: Any) -> None:
            cuda.notes.append(("record", self, stream))

        def synchronize(self) -> None:
            cuda.notes.append(("synchronize", self))

    class Graph:
        again: list[Callable[[], None]]

        def replay(self) -> None:
            cuda.notes.append(("replay", self))
            for operation in self.again:
                operation()

        def pool(self) -> Any:
            return self

    @contextmanager
    def graph(
        target: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        assert cuda.capturing == 0, "two captures at a time"
        cuda.capturing, mode = 1, _Written()
        cuda.notes.append(("capture", target, stream, cuda.device, pool, capture_error_mode))
        written.append(mode)
        try:
            with mode:
                yield
        finally:
            written.pop()
            cuda.capturing = 0
        target.again = mode.again
        cuda.graphs += 1

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        before, cuda.stream = cuda.stream, stream
        yield
        cuda.stream = before

    @contextmanager
    def on_device(device: Any) -> Iterator[None]:
        before, cuda.device = cuda.device, torch.device(device).index or 0
        yield
        cuda.device = before

    def noting(launch: Callable[..., None]) -> Callable[..., None]:
        def launched(*positional: Any, **arguments: Any) -> None:
            if not written:
                launch(*positional, **arguments)
                return
            # The tensor operations of an interpreted kernel are none of the graph's, and a capture runs no kernel.
            written[-1].again.append(lambda: launch(*positional, **arguments))

        return launched

    cuda.stream = Stream("cuda:0")
    fakes = SimpleNamespace(
        Stream=Stream,
        Event=Event,
        CUDAGraph=Graph,
        graph=graph,
        stream=on_stream,
        device=on_device,
        current_stream=lambda device: cuda.stream,
        OutOfMemoryError=torch.cuda.OutOfMemoryError,
    )
    stubbed = SimpleNamespace(**{name: getattr(torch, name) for name in ("Size", "empty", "uint8")}, cuda=fakes)
    monkeypatch.setattr(graphs, "torch", stubbed)
    monkeypatch.setattr(graphs, "_captures", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: cuda.notes.append(("lives", stream)))
    for module in (arrivals, dgrad, endings, folding, forward, statistics, sums):
        monkeypatch.setattr(module, "launch", noting(module.launch))
    return cuda
