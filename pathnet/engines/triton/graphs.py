"""Passes that a GPU has recorded: a hundred launches cost the host what one costs.

On NVIDIA's and AMD's devices a pass that is asked for a second time is captured as a graph, and replayed from then
on. What it reads and writes lies at fixed places of the network's one arena, which all of its passes share, since
none of them runs beside another: memory is that of the largest pass, whatever sizes of batches come along. What a
record keeps begins the arena, so that a walk over the record made last finds it in place, and any other record is
copied there: 285 MB in BN mode ``batch`` for ResNet-110 at batch 128 in bfloat16, 0.2 ms at 3 TB/s (reckoned).
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

__all__ = ["MOST_GRAPHS", "Graphs", "Capturable", "bytes_of", "capacity_for", "most_within"]

MOST_GRAPHS = 32
"""Of one network: of records, walks back and forward passes, by the size of the batch and the number of routings.
Beside the arena, which all share, a graph holds its launches' arguments alone; to capture one anew is dear."""

ALIGNMENT = 512
"""Bytes, as PyTorch's own allocations have it: kernels compiled for those serve an arena's tensors too."""

_CAPTURE = Lock()
"""Held during a capture, which what another thread asks of the same device may end."""


class Capturable(Protocol):
    """A pass whose tensors lie at fixed places; `run` launches it and waits for nothing."""

    def run(self) -> None: ...


Pass = TypeVar("Pass", bound=Capturable)
Build = Callable[[Allocate], Pass]


class Graphs:
    """The graphs of one network on one device, and the memory that they run in.

    From several threads and on several streams they run one after the other: a lock for what the host does, an event
    for what the device does.
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
        # Memory and graphs stay as long as something of them is running.
        if self._graphs and self._device is not None:
            self._device.done.synchronize()

    def most(self, key: Hashable, count: Callable[[], int]) -> int:
        """Return ``count()``, how many routings a pass takes at once; counted once for a key."""
        if key not in self._most:
            self._most[key] = count()
        return self._most[key]

    def holds(self, saved: Saved) -> bool:
        """Whether what a record keeps lies in the arena; to be asked while a pass is `replayed`."""
        return self._record is not None and self._record() is saved

    def hold(self, saved: Saved | None) -> None:
        """Say whose numbers begin the arena."""
        self._record = None if saved is None else weakref.ref(saved)

    @contextmanager
    def replayed(
        self, key: Hashable, device: torch.device, build: Build[Pass], begin: Callable[[Pass], None]
    ) -> Iterator[Pass | None]:
        """Run a pass on the current stream, captured on its second time here and replayed from then on.

        Args:
            key: everything that the pass's launches hang on.
            build: makes the pass of tensors that it asks for; all that it runs on later is made then.
            begin: brings what the pass runs on to its places.

        Yields:
            The pass, whose results are to be copied before this ends; None, and nothing has run, where it is to be
            launched one by one: on devices without graphs, the first time, and where there is no room for an arena.
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
            # Not to be given to others while this stream is at it, should it be dropped meanwhile.
            self._arena.record_stream(stream)
            try:
                begin(graph.job)
                if graph.captured is None:
                    pools = [other.captured.pool() for other in self._graphs.values() if other.captured is not None]
                    graph.captured = self._device.capture(graph.job, pools[0] if pools else None)
                graph.captured.replay()
                yield graph.job
            except BaseException:
                # Whatever was left half done is not to be taken for a record's.
                self._record = None
                raise
            finally:
                self._device.done.record(stream)

    def _graph(self, key: Hashable, device: torch.device, build: Build[Pass]) -> _Graph[Pass] | None:
        """Return the graph of a pass, a new one if need be; None the first time, and where there is no room."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key not in self._seen:
            if len(self._seen) > 100 * MOST_GRAPHS:
                self._seen.clear()
            self._seen.add(key)
            return None
        self._device = self._device or _Device.of(device)
        needed = bytes_of(build)
        if self._arena is None or self._arena.numel() < needed:
            if needed >= self._refused:
                return None
            # The others were captured over memory that is too small; they are captured anew when they are needed.
            self._drop(len(self._graphs))
            self._arena = self._record = None
            try:
                self._arena = torch.empty(needed, dtype=torch.uint8, device=device)
            except torch.cuda.OutOfMemoryError:
                self._refused = needed
                return None
        self._drop(len(self._graphs) + 1 - MOST_GRAPHS)
        graph = _Graph(build(_Arena(self._arena)))
        self._graphs[key] = graph
        return graph

    def _drop(self, count: int) -> None:
        """Let so many graphs go, those first that were not used for longest, once nothing of them is running."""
        if count > 0 and self._device is not None:
            self._device.done.synchronize()
        for _ in range(count):
            self._graphs.popitem(last=False)


@dataclass
class _Graph(Generic[Pass]):
    """A pass and, once captured, its graph, which reads and writes what the pass and the network hold."""

    job: Pass
    captured: Any = None


class _Arena:
    """Hands out an arena's memory from its beginning on."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.used = memory, 0

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        first, self.used = self.used, self.used + -(-size // ALIGNMENT) * ALIGNMENT
        return self.memory[first : first + size].view(dtype).view(*shape)


def bytes_of(build: Build[Pass]) -> int:
    """Return how many bytes a pass takes."""
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
    """What graphs of one network have of their device.

    Attributes:
        stream: on which they are captured, theirs alone: PyTorch's own is one for the whole process, of whichever
            device came first. All on the same, since memory of a pool that they share belongs to a stream.
        done: when the last of them, and what copies its results, has run.
    """

    device: torch.device
    stream: Any
    done: Any

    @staticmethod
    def of(device: torch.device) -> _Device:
        with torch.cuda.device(device):
            stream, done = torch.cuda.Stream(device), torch.cuda.Event()  # type: ignore[no-untyped-call]
            return _Device(device, stream, done)

    def capture(self, job: Capturable, pool: Any) -> Any:
        """Return the graph of a pass.

        Args:
            pool: where others have what they allocate on the way; None for a new one.
        """
        with _CAPTURE, torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            # Once outside of the capture, in which nothing may be compiled or loaded.
            with torch.cuda.stream(self.stream):
                job.run()
            graph = torch.cuda.CUDAGraph()
            with (
                _uncollected(),
                torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                job.run()
            current.wait_stream(self.stream)
            return graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python from collecting garbage: graphs among it wait for their device, which would end a capture."""
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
    """Return for how many routings there is a graph that so many go through: 1, 2, 3, 4, 6, 8, 12 and so on.

    A third of them at most are none; their programs have nothing to do.
    """
    size = 1 << max(0, count - 1).bit_length()
    return size * 3 // 4 if size >= 4 and count <= size * 3 // 4 else size


def most_within(room: int, build: Callable[[int], Build[Pass]]) -> int:
    """Return for how many routings at once a pass, and its graph, takes no more memory than there is; one at least.

    Args:
        room: bytes.
        build: takes a capacity to what makes the pass.
    """
    some, more = bytes_of(build(16)), bytes_of(build(32))
    most = max(1, 16 + 16 * (room - some) // (more - some))
    while capacity_for(most) > most:
        most -= 1
    return most
