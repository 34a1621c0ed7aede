"""The autograd engine: any network on any device, each block's graph kept, its modules visited as seldom as can be.

`pathnet.engines.reference` computes the same plainly, and judges this engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pathnet.engines import fallback
from pathnet.engines.autograd.blocks import KnownBlock, RecordedBlock
from pathnet.engines.autograd.walk import AutogradWalk
from pathnet.engines.engine import Job
from pathnet.engines.memory import KEPT_SHARE, available, storages
from pathnet.full_precision import Autocast
from pathnet.models.context import NO_CONTEXT, Context

__all__ = ["AutogradEngine", "AutogradPrepared", "AutogradWalk"]


class AutogradEngine:
    """Passes by vector-Jacobian products of the network's modules, on graphs that the record keeps."""

    name = "autograd"
    device_type: str | None = None

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, job: Job) -> str | None:
        return 'no precision="bfloat16"' if job.precision == "bfloat16" else None

    def prepare(self, job: Job) -> AutogradPrepared:
        weights = storages(job.net.state_dict().values())
        choices, visits = dict[object, int](), dict[object, int]()
        return AutogradPrepared([KnownBlock(block, choices, visits) for block in job.net], frozenset(weights))


@dataclass(frozen=True)
class AutogradPrepared:
    """The network's blocks, and what is known of them for all batches.

    Attributes:
        weights: the storages of the network's weights and buffers, which no record counts as its own.
    """

    blocks: Sequence[KnownBlock]
    weights: frozenset[object]
    context: Context = NO_CONTEXT

    def bound(self, context: Context) -> AutogradPrepared:
        return replace(self, context=context)

    def max_routings(self, y0: Tensor) -> int | None:
        return None

    def record(self, y0: Tensor) -> tuple[Tensor, AutogradWalk]:
        """Run the blocks forward, and keep what their pull-backs need if it fits into `KEPT_SHARE` of the memory that
        is free; otherwise keep each block's input alone, from which walks run the block again for many routings."""
        autocast = Autocast.active(y0.device.type)
        room = int(KEPT_SHARE * available(y0.device))
        records: list[RecordedBlock] = []
        kept: dict[object, int] = {}
        y = y0
        for block in self.blocks:
            y, recorded = RecordedBlock.recorded(block, self.context, autocast, y)
            if sum(kept.values()) <= room:
                sizes = storages(recorded.saved())
                kept |= {storage: size for storage, size in sizes.items() if storage not in self.weights}
            if sum(kept.values()) > room:
                for before in (*records, recorded):
                    before.kept = None
            records.append(recorded)
        return y, AutogradWalk(records)

    def routed_forward(self, y0: Tensor, routing: Tensor) -> Tensor:
        return fallback.routed_forward([known.block.bound(self.context) for known in self.blocks], y0, routing)
