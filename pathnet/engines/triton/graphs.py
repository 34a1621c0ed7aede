"""Passes as graphs: a hundred launches cost the host as much as one.

On NVIDIA's and AMD's devices the second pass of a kind is captured as a graph, and all later ones replay it. All
passes of a network share one arena, since only one runs at a time; each uses fixed offsets in it. The arena is as
large as the largest pass, whatever sizes batches have. It begins with a record's saved tensors, where a backward pass
over the latest record finds them; those of any other record are copied there, 285 MB in BN mode ``batch`` for
ResNet-110 at batch 128 in bfloat16, 0.2 ms at 3 TB/s (computed, not measured).
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pathnet.engines.triton.launch import launching
from pathnet.engines.triton.state import Allocate, Saved

__all__ = ["MAX_GRAPHS", "Capturable", "Graphs", "bytes_of", "capacity_for", "max_routings_within"]

MAX_GRAPHS = 32
"""Maximum number of graphs of one network, for records, backward and forward passes, each by the batch's size and the
number of routings. Besides the shared arena, a graph holds only its launches' arguments; capturing it again is
expensive."""

ALIGNMENT = 512
"""Alignment in bytes, that of PyTorch's allocations: kernels compiled for those also serve an arena's tensors."""

_CAPTURE = Lock()
"""Held during a capture, which another thread's calls to the same device may end."""


class Capturable(Protocol):
    """A pass whose tensors have fixed addresses; `run` launches it without synchronising."""

    def run(self) -> None: ...


Pass = TypeVar("Pass", bound=Capturable)
Build = Callable[[Allocate], Pass]


class Graphs:
    """The graphs of one network on one device, and the memory that they run in.

    They run one after the other, even from several threads and on several streams: a lock orders the host's work, an
    event the device's.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._graphs: OrderedDict[Hashable, _Graph[Any]] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._arena: Tensor | None = None
        self._refused = math.inf
        self._device: _Device | None = None
        self._record: weakref.ref[Saved] | None = None
        self._most: dict[Hashable, int] = {}

    def __del__(self) -> None:
        # Memory and graphs stay as long as any of them runs.
        if self._graphs and self._device is not None:
            self._device.done.synchronize()

    def most(self, key: Hashable, count: Callable[[], int]) -> int:
        """Return ``count()``, the maximum number of routings of a pass; computed once for each key."""
        if key not in self._most:
            self._most[key] = count()
        return self._most[key]

    def holds(self, saved: Saved) -> bool:
        """Return whether a record's saved tensors are in the arena; valid while a pass is `replayed`."""
        return self._record is not None and self._record() is saved

    def hold(self, saved: Saved | None) -> None:
        """Note whose saved tensors begin the arena."""
        self._record = None if saved is None else weakref.ref(saved)

    @contextmanager
    def replayed(
        self, key: Hashable, device: torch.device, build: Build[Pass], begin: Callable[[Pass], None]
    ) -> Iterator[Pass | None]:
        """Run a pass on the current stream, captured on its second time here and replayed from then on.

        Args:
            key: all that the pass's launches depend on.
            build: makes the pass, from a function that allocates all tensors that the pass will use.
            begin: copies the pass's inputs to their places.

        Yields:
            The pass after its run, whose results the caller copies before this ends. None if nothing ran and the
            caller has to launch kernel by kernel: on devices without graphs, the first time, or without room for an
            arena.
        """
        with ExitStack() as held:
            graph = None
            if _captures(device):
                held.enter_context(self._lock)
                graph = self._graph(key, device, build)
            if graph is None:
                held.close()
                yield None
                return
            assert self._device is not None and self._arena is not None
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self._device.done)
            # PyTorch does not reuse a dropped arena while this stream works on it.
            self._arena.record_stream(stream)
            try:
                begin(graph.body)
                if graph.captured is None:
                    pools = [each.captured.pool() for each in self._graphs.values() if each.captured is not None]
                    graph.captured = self._device.capture(graph.body, pools[0] if pools else None)
                graph.captured.replay()
                yield graph.body
            except BaseException:
                # The arena may hold half of a record.
                self._record = None
                raise
            finally:
                self._device.done.record(stream)

    def _graph(self, key: Hashable, device: torch.device, build: Build[Pass]) -> _Graph[Pass] | None:
        """Return the graph of a pass, a new one if needed; None the first time, and if memory is short."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key not in self._seen:
            if len(self._seen) > 100 * MAX_GRAPHS:
                self._seen.clear()
            self._seen.add(key)
            return None
        self._device = self._device or _Device.of(device)
        needed = bytes_of(build)
        if self._arena is None or self._arena.numel() < needed:
            if needed >= self._refused:
                return None
            # All graphs use an arena that is too small now; they are captured again when needed.
            self._drop(len(self._graphs))
            self._arena = self._record = None
            try:
                self._arena = torch.empty(needed, dtype=torch.uint8, device=device)
            except torch.cuda.OutOfMemoryError:
                self._refused = needed
                return None
        self._drop(len(self._graphs) + 1 - MAX_GRAPHS)
        graph = _Graph(build(_Arena(self._arena)))
        self._graphs[key] = graph
        return graph

    def _drop(self, count: int) -> None:
        """Drop ``count`` graphs, the least recently used first, once none of them runs."""
        if count > 0 and self._device is not None:
            self._device.done.synchronize()
        for _ in range(count):
            self._graphs.popitem(last=False)


@dataclass
class _Graph(Generic[Pass]):
    """A pass and, once captured, its graph, which reads and writes the tensors of the pass and the network."""

    body: Pass
    captured: Any = None


class _Arena:
    """An allocator that cuts tensors from an arena, one after the other."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.used = memory, 0

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        first, self.used = self.used, self.used + -(-size // ALIGNMENT) * ALIGNMENT
        return self.memory[first : first + size].view(dtype).view(*shape)


def bytes_of(build: Build[Pass]) -> int:
    """Return the bytes of a pass's tensors."""
    total = 0

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nonlocal total
        tensor = torch.empty(*shape, dtype=dtype, device="meta")
        total += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return tensor

    build(allocate)
    return total


@dataclass
class _Device:
    """Stream and event of a network's graphs on their device.

    Attributes:
        stream: the stream of all captures, since memory of a shared pool belongs to a stream. PyTorch's own capture
            stream is one for the whole process, on the device that came first.
        done: recorded after the last pass and the copies of its results.
    """

    device: torch.device
    stream: Any
    done: Any

    @staticmethod
    def of(device: torch.device) -> _Device:
        with torch.cuda.device(device):
            stream, done = torch.cuda.Stream(device), torch.cuda.Event()  # type: ignore[no-untyped-call]
            return _Device(device, stream, done)

    def capture(self, body: Capturable, pool: Any) -> Any:
        """Return the graph of a pass.

        Args:
            pool: the memory pool of earlier captures; None for a new one.
        """
        with _CAPTURE, torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            # Run once before the capture, during which no kernel may be compiled or loaded.
            with torch.cuda.stream(self.stream):
                body.run()
            graph = torch.cuda.CUDAGraph()
            with (
                _uncollected(),
                torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                body.run()
            current.wait_stream(self.stream)
            return graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python from collecting garbage: a collected graph waits for its device, which would end a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and launching()


def capacity_for(count: int) -> int:
    """Round a number of routings up to a graph size: 1, 2, 3, 4, 6, 8, 12, ...

    At most a third of a graph's rows stay empty; their programs have nothing to do.
    """
    size = 1 << max(0, count - 1).bit_length()
    return size * 3 // 4 if size >= 4 and count <= size * 3 // 4 else size


def max_routings_within(room: int, build: Callable[[int], Build[Pass]]) -> int:
    """Return the maximum number of routings, at least one, of a pass whose tensors and graph fit the memory.

    Args:
        room: bytes.
        build: returns, for a capacity, the function that builds the pass.
    """
    at_16, at_32 = bytes_of(build(16)), bytes_of(build(32))
    count = max(1, 16 + 16 * (room - at_16) // (at_32 - at_16))
    while capacity_for(count) > count:
        count -= 1
    return count
