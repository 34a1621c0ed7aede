"""Networks, plan and drivers for runs of lesions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from helpers.cases import shaken
from pathnet import models, results
from pathnet.experiments import effective_training, lesion_many, lesion_reorder, lesion_single
from pathnet.experiments.errors import ErrorCount
from pathnet.experiments.run import Networks, Plan
from pathnet.models import ResidualNet

__all__ = ["DRIVERS", "PLAN", "Measure", "networks", "nine_blocks", "rows_of"]

PLAN = Plan(draws=3, deletions=4, swaps=3, modules=2)
Measure = Callable[..., results.Run]
DRIVERS: dict[str, tuple[Measure, Plan]] = {
    "lesion-single": (lesion_single.measure, PLAN),
    "lesion-many": (lesion_many.measure, PLAN),
    "lesion-reorder": (lesion_reorder.measure, PLAN),
    "effective-training": (effective_training.measure, PLAN),
}


def nine_blocks(seed: int = 0, survival: float = 1.0) -> ResidualNet:
    """Return a network of nine blocks, three per stage; those numbered 3 and 6 from 0 change the shape."""
    torch.manual_seed(seed)
    return shaken(models.preact_resnet(20, 3, survival=survival)).eval()


def networks(name: str, net: ResidualNet) -> Networks:
    """Return the networks that a driver takes."""
    effective = {"effective": [nine_blocks(2)]} if name == "effective-training" else {}
    return {"residual": [net, nine_blocks(1)]} | effective


def rows_of(run: results.Run, **values: object) -> list[ErrorCount]:
    """Return the error counts of a run whose fields equal ``values``."""
    return [row for row in run.rows(ErrorCount) if all(getattr(row, name) == value for name, value in values.items())]
