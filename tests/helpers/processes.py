"""Processes that share work over gloo, in a test that fails rather than hangs and shows where they were."""

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
"""Seconds that one process waits for another: on a busy machine, importing torch alone may take a minute."""


@contextmanager
def together(rank: int, folder: Path, count: int = 2, hang_s: float = HANG_S) -> Iterator[None]:
    """Join a group of ``count`` processes, which meet in ``folder``."""
    torch.set_num_threads(1)
    with (folder / f"stack-{rank}.txt").open("w") as stack:
        # For what no time limit of gloo ends, such as a wait for a peer that is gone.
        faulthandler.dump_traceback_later(2 * hang_s, exit=True, file=stack)
        dist.init_process_group(
            "gloo", f"file://{folder / 'store'}", timedelta(seconds=hang_s), world_size=count, rank=rank
        )
        yield
        # The first process to leave would close the connection before the others have read everything.
        dist.barrier()
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def run(target: Callable[..., None], folder: Path, *arguments: Any, count: int = 2, hang_s: float = HANG_S) -> None:
    """Run ``target(rank, folder, *arguments)`` in ``count`` new processes, each of which must enter `together`."""
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
    deadline = time.monotonic() + 3 * hang_s
    try:
        # Each call waits for one process.
        while not context.join(max(0.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                pytest.fail(f"{count} processes did not end, {where(folder)}")
    except torch.multiprocessing.ProcessExitedException as error:
        pytest.fail(f"{error}, {where(folder)}")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def where(folder: Path) -> str:
    """Return the stacks of the processes that hung."""
    stacks = {file.stem: file.read_text() for file in sorted(folder.glob("stack-*.txt"))}
    return "\n".join(["where they were:", *(f"{name}\n{stack or 'unknown'}" for name, stack in stacks.items())])
