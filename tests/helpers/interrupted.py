"""A program with passes of the cpu engine that signals interrupt, and `result_of`, by which tests run it.

    python tests/helpers/interrupted.py FUNCTION [ARGUMENT]

It prints the function's result as JSON.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import pathnet
from helpers import ROOT, TESTS
from pathnet.engines.cpu import ops
from pathnet.models import PreactBlock, ResidualNet

CHANNELS, SIDE, BLOCKS = 32, 8, 200
LONG_S = 12.0
BEGUN_S = 0.5

Call = Callable[[], Tensor]


def result_of(*command: str) -> dict[str, Any]:
    """Run a function of this file in a process, and return its result."""
    run = subprocess.run(
        [sys.executable, "tests/helpers/interrupted.py", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def network() -> ResidualNet:
    """Return a network of many blocks, whose passes are long and need little memory."""
    torch.manual_seed(0)
    blocks = [PreactBlock(CHANNELS, (3, 3), (CHANNELS, CHANNELS), 1, "projection") for _ in range(BLOCKS)]
    for block in blocks:
        block.convs[1].weight.data *= 0.1
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 5))
    return ResidualNet(nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), blocks, head).eval()


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator), torch.arange(count) % 5


def routings(count: int) -> Tensor:
    return torch.rand(count, BLOCKS, 2, generator=torch.Generator().manual_seed(2)) + 0.5


class Walks:
    """Calls of one recorder, each of which spends its time in one call of a native op."""

    def __init__(self, bn: str) -> None:
        # In BN mode `batch` threads meet after every convolution; on busy cores they wait far longer than they work.
        torch.set_num_threads(2 if bn == "running" else 1)
        self.recorder = pathnet.Recorder(network(), bn, "cpu")  # type: ignore[arg-type]
        self.tape = self.recorder(*images(2))

    def norms(self, count: int) -> Call:
        paths = (routings(count)[..., 0] > 1).int()
        return lambda: self.tape.path_gradient_norms(paths)

    def sums(self, count: int) -> Call:
        tape = self.recorder(*images(count))
        return lambda: tape.squared_norms_by_length(draws=1)

    def outputs(self, count: int) -> Call:
        routing, (batch, _) = routings(count), images(2)
        return lambda: self.recorder.routed_outputs(batch, routing)

    def record(self, count: int) -> Call:
        batch = images(count)
        return lambda: self.recorder(*batch).output


SMALL = {"norms": 16, "sums": 2, "outputs": 8, "record": 16}
"""Number of paths, images, routings and images of a pass of some tenths of a second."""


def sized(walk: Callable[[int], Call], count: int, seconds: float) -> Call:
    """Return a pass that takes ``seconds``, sized by the time that ``count`` items take."""
    call = walk(count)
    call()
    began = time.perf_counter()
    call()
    return walk(math.ceil(count * seconds / (time.perf_counter() - began)))


@contextmanager
def signalled(kind: signal.Signals) -> Iterator[list[float]]:
    """Send the process a signal after `BEGUN_S` seconds, and yield a list that gets the time of it."""
    sent: list[float] = []

    def send() -> None:
        time.sleep(BEGUN_S)
        sent.append(time.monotonic())
        os.kill(os.getpid(), kind)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        thread.join()


def stopped(call: Callable[[], object], kind: signal.Signals, expected: type[BaseException]) -> float:
    """Return the seconds from the signal to the exception."""
    with signalled(kind) as sent:
        try:
            call()
        except expected as error:
            seconds = time.monotonic() - sent[0]
            assert error.__context__ is None, error.__context__
            return seconds
    raise AssertionError("the walk was over before the signal came")


def interrupt(bn: str) -> dict[str, Any]:
    """Return each pass's delay of Ctrl-C in seconds, and whether the recorder then returns the same numbers."""
    walks, delays, same = Walks(bn), {}, True
    # The record of such a batch would take too much memory in BN mode `batch`.
    for name in [name for name in SMALL if bn == "running" or name != "record"]:
        walk = getattr(walks, name)
        before = walk(SMALL[name])()
        delays[name] = stopped(sized(walk, SMALL[name], LONG_S), signal.SIGINT, KeyboardInterrupt)
        same = same and torch.equal(walk(SMALL[name])(), before)
    return {"delays": delays, "same": same}


def returning() -> dict[str, Any]:
    """Return the calls of a returning handler within one pass of each kind, and whether they changed a number."""
    within, calls, same = Walks("running"), 0, True
    tiny: list[float] = []

    def handle(*_: object) -> None:
        nonlocal calls
        calls += 1
        tiny.append(sys.float_info.min / 2)
        within.norms(2)()

    signal.signal(signal.SIGALRM, handle)
    least = []
    for bn in ("running", "batch"):
        walks = Walks(bn)
        for name in ("norms", "sums", "outputs"):
            call = sized(getattr(walks, name), SMALL[name], 0.5)
            undisturbed, before = call(), calls
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            disturbed = call()
            signal.setitimer(signal.ITIMER_REAL, 0)
            same = same and torch.equal(disturbed, undisturbed)
            least.append(calls - before)
    return {"calls": least, "same": same, "denormals": min(tiny) > 0}


def raising() -> dict[str, Any]:
    """Return the delays of handlers that raise exceptions of other types."""
    walks = Walks("running")
    call = sized(walks.norms, SMALL["norms"], LONG_S)

    def handle(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(number) if number == signal.SIGALRM else SystemExit(number)

    expected = {signal.SIGALRM: TimeoutError, signal.SIGTERM: SystemExit}
    for kind in expected:
        signal.signal(kind, handle)
    return {"delays": {kind.name: stopped(call, kind, error) for kind, error in expected.items()}}


def elsewhere() -> dict[str, Any]:
    """Return the delay of Ctrl-C in the main thread, and whether another thread's pass is undisturbed."""
    walks, results = Walks("running"), []
    call = sized(walks.norms, SMALL["norms"], 4.0)
    undisturbed, done = call(), threading.Event()

    def walk() -> None:
        results.append(call())
        done.set()

    thread = threading.Thread(target=walk)
    thread.start()
    # Python 3.11 takes a thread for ended where its `join` was interrupted.
    delay = stopped(done.wait, signal.SIGINT, KeyboardInterrupt)
    alive = not done.is_set()
    done.wait()
    thread.join()
    return {"delay": delay, "alive": alive, "same": torch.equal(results[0], undisturbed)}


def bare() -> dict[str, Any]:
    """Return the error of the bare op, and that of the next call, which must not be the interruption."""
    walks = Walks("running")
    call = sized(walks.norms, SMALL["norms"], LONG_S)
    wrapped = ops.cpu_backward_running
    ops.cpu_backward_running = wrapped.__wrapped__  # type: ignore[attr-defined]
    with signalled(signal.SIGINT):
        try:
            call()
        except RuntimeError as error:
            message = str(error).splitlines()[0]
    ops.cpu_backward_running = wrapped
    walks.norms(2)()
    try:
        ops.cpu_backward_running(*[torch.zeros(1)] * 5, True)
    except RuntimeError as error:
        return {"message": message, "next": type(error).__name__}
    raise AssertionError("an op took arguments of wrong shapes")


def training() -> dict[str, Any]:
    """Return the share of each pass of a training step that still ran after Ctrl-C, and whether numbers stay."""
    torch.set_num_threads(1)
    net = ResidualNet(nn.Identity(), [PreactBlock(64, (5, 3), (64, 64), 1, "pad")], nn.Identity())
    (block,) = pathnet.nn.fuse(net)

    def output(count: int) -> Tensor:
        images = torch.ones(count, 64, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        return torch.as_tensor(block(images.requires_grad_()))

    def backward(count: int) -> Call:
        result = output(count)
        return lambda: torch.autograd.grad(result, list(net.parameters()), result, retain_graph=True)[0]

    before, shares, count = output(64), {}, 64
    passes: dict[str, Callable[[int], Call]] = {"forward": lambda count: lambda: output(count), "backward": backward}
    for name, make in passes.items():
        call = make(count)
        call()
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        remaining = 3 * BEGUN_S
        call = make(math.ceil(count * (BEGUN_S + remaining) / seconds))
        shares[name] = stopped(call, signal.SIGINT, KeyboardInterrupt) / remaining
    return {"shares": shares, "same": torch.equal(output(64), before)}


if __name__ == "__main__":
    # Tests that run in the background of a script have their interrupts ignored, and hand that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert Path(pathnet.__file__).parent.parent == Path.cwd()
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
