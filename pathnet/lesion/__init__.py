"""Lesions: a trained network with blocks deleted or in another order, at test time (section 4 of the paper).

Lesioned copies of a batch go through the engine together, and those that begin alike share their beginning: all
single deletions of n blocks cost about half of n forward passes.
"""

from pathnet.lesion.measuring import BatchNormPolicy, Errors, errors
from pathnet.lesion.networks import BATCH, RECALIBRATION_BATCHES, Lesion, delete, recalibrated, reorder, shapes
from pathnet.lesion.ranking import Ranking, rank

__all__ = [
    "BATCH",
    "RECALIBRATION_BATCHES",
    "BatchNormPolicy",
    "Errors",
    "Lesion",
    "Ranking",
    "delete",
    "errors",
    "rank",
    "recalibrated",
    "reorder",
    "shapes",
]
