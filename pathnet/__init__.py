"""pathnet: how gradient travels through the single paths of a residual network."""

from pathnet import data, engines, lesion, models, nn, paths, training
from pathnet.adapt import AdaptedNet, adapt
from pathnet.tape import Recorder, Tape, record

__all__ = [
    "AdaptedNet",
    "Recorder",
    "Tape",
    "adapt",
    "data",
    "engines",
    "lesion",
    "models",
    "nn",
    "paths",
    "record",
    "training",
]

__version__ = "0.1.0"
