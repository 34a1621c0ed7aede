"""Processes that share out work by gloo, in a test that fails rather than hangs, and says where they were."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

HANG_S = 120.0
"""That one process waits for another: on a busy machine, to import torch alone may take a minute."""


@contextmanager
def together(rank: int, folder: Path, count: int = 2, hang_s: float = HANG_S) -> Iterator[None]:
    """One of ``count`` processes that meet in ``folder``."""
    torch.set_num_threads(1)
    with (folder / f"stack-{rank}.txt").open("w") as stack:
        # What no time limit of gloo's ends, such as a wait for a peer that is gone.
        faulthandler.dump_traceback_later(2 * hang_s, exit=True, file=stack)
        dist.init_process_group(
            "gloo", f"file://{folder / 'store'}", timedelta(seconds=hang_s), world_size=count, rank=rank
        )
        yield
        # Whoever left first would take the connection away from the others, which may not have read all of it.
        dist.barrier()
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def run(target: Callable[..., None], folder: Path, *arguments: Any, count: int = 2, hang_s: float = HANG_S) -> None:
    """``target(rank, folder, *arguments)`` in processes of their own, each of which enters `together`."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    before = dict(os.environ)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        context = torch.multiprocessing.spawn(target, (folder, *arguments), nprocs=count, join=False)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert context is not None
    until = time.monotonic() + 3 * hang_s
    try:
        # Each call waits for one of them.
        while not context.join(max(0.0, until - time.monotonic())):
            if time.monotonic() > until:
                pytest.fail(f"{count} processes do not end, {where(folder)}")
    except torch.multiprocessing.ProcessExitedException as error:
        pytest.fail(f"{error}, {where(folder)}")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def where(folder: Path) -> str:
    stacks = {file.stem: file.read_text() for file in sorted(folder.glob("stack-*.txt"))}
    return "\n".join(["where they were:", *(f"{name}\n{stack or 'not told'}" for name, stack in stacks.items())])
