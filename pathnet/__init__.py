"""pathnet: how gradient travels through the single paths of a residual network."""

from pathnet import interrupts

if interrupts.is_command():
    interrupts.end_at_once()

from pathnet import data, effective_depth, engines, lesion, models, nn, paths, training
from pathnet.adaptation import AdaptedNet, adapt
from pathnet.effective_depth import EffectiveDepth
from pathnet.recorder import Recorder, record
from pathnet.routing import routed, routed_gradient
from pathnet.tape import Tape

__all__ = [
    "AdaptedNet",
    "EffectiveDepth",
    "Recorder",
    "Tape",
    "adapt",
    "data",
    "effective_depth",
    "engines",
    "lesion",
    "models",
    "nn",
    "paths",
    "record",
    "routed",
    "routed_gradient",
    "training",
]

__version__ = "0.1.0"
