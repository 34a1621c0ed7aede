"""Lesions: a trained network with blocks deleted or reordered at test time (section 4 of the paper).

The engine runs all lesioned copies of a batch together, and copies that begin alike share their beginning: all
single deletions of n blocks cost about half of n forward passes.
"""

from pathnet.lesion.measuring import Errors, errors
from pathnet.lesion.networks import Lesion, delete, reorder
from pathnet.lesion.ranking import Ranking, rank
from pathnet.lesion.recalibration import RECALIBRATION_BATCHES, recalibrated
from pathnet.recording import BatchNormPolicy

__all__ = [
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
]
