"""The processes that train together, and the lock that keeps other trainings off their checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pathnet.files import locked, remove_leftovers, telling

__all__ = ["hold_checkpoint", "rank_and_processes"]


def rank_and_processes() -> tuple[int, int]:
    """Return the number of this process, from 0, and the number of processes that train together."""
    initialized = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)


@contextmanager
def hold_checkpoint(checkpoint: Path | None, device: torch.device) -> Iterator[None]:
    """Hold the checkpoint's lock in the first process; if it cannot, raise in all processes.

    Raises:
        ValueError: another training holds the lock.
        OSError: the lock file cannot be created.
    """
    (rank, processes), refusal = rank_and_processes(), None
    with ExitStack() as stack:
        if checkpoint is not None and rank == 0:
            lock = checkpoint.with_name(f".{checkpoint.name}.pathnet-lock")
            try:
                with telling(checkpoint, "checkpoint"):
                    checkpoint.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(lock, "checkpoint", f"training on {checkpoint}", keep=False))
                remove_leftovers(checkpoint.parent, re.escape(checkpoint.name))
            except (ValueError, OSError) as error:
                refusal = error
        if processes > 1:
            refused = torch.tensor([float(refusal is not None)], device=device)
            dist.all_reduce(refused)
            if refused.item() and refusal is None:
                refusal = ValueError(f"checkpoint: the first process was refused {checkpoint}")
        if refusal is not None:
            raise refusal
        yield
