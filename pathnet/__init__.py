"""pathnet: how the gradient flows along individual paths of a residual network.

Every public name is imported when it is first used, so ``import pathnet`` costs next to nothing and needs no
package that goes unused.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pathnet import interrupts

if interrupts.is_command():
    interrupts.end_at_once()

if TYPE_CHECKING:
    from pathnet import data as data
    from pathnet import effective_depth as effective_depth
    from pathnet import engines as engines
    from pathnet import experiments as experiments
    from pathnet import figures as figures
    from pathnet import lesion as lesion
    from pathnet import models as models
    from pathnet import nn as nn
    from pathnet import paper as paper
    from pathnet import paths as paths
    from pathnet import progress as progress
    from pathnet import results as results
    from pathnet import signed as signed
    from pathnet import training as training
    from pathnet import workers as workers
    from pathnet.adaptation import AdaptedNet as AdaptedNet
    from pathnet.adaptation import adapt as adapt
    from pathnet.effective_depth import EffectiveDepth as EffectiveDepth
    from pathnet.experiments.path_gradients import measure as measure
    from pathnet.gradients import LengthSums as LengthSums
    from pathnet.recorder import Recorder as Recorder
    from pathnet.recorder import record as record
    from pathnet.routing import routed as routed
    from pathnet.routing import routed_gradient as routed_gradient
    from pathnet.scaling import ScaledGradient as ScaledGradient
    from pathnet.tape import Tape as Tape
else:

    def __getattr__(name: str) -> object:
        """Import a public name (PEP 562); type checkers read the imports above instead."""
        if name not in __dir__():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in HOMES:
            value = getattr(import_module(f"pathnet.{HOMES[name]}"), name)
            globals()[name] = value
            return value
        return import_module(f"pathnet.{name}")


__all__ = [
    "AdaptedNet",
    "EffectiveDepth",
    "LengthSums",
    "Recorder",
    "ScaledGradient",
    "Tape",
    "adapt",
    "data",
    "effective_depth",
    "engines",
    "lesion",
    "models",
    "nn",
    "paper",
    "paths",
    "progress",
    "record",
    "routed",
    "routed_gradient",
    "signed",
    "training",
    "workers",
]

EXTRA = ["experiments", "figures", "measure", "results"]
"""Public names that need the extra `paper`, which ``from pathnet import *`` therefore leaves out."""

HOMES = {
    "AdaptedNet": "adaptation",
    "EffectiveDepth": "effective_depth",
    "LengthSums": "gradients",
    "Recorder": "recorder",
    "ScaledGradient": "scaling",
    "Tape": "tape",
    "adapt": "adaptation",
    "measure": "experiments.path_gradients",
    "record": "recorder",
    "routed": "routing",
    "routed_gradient": "routing",
}
"""Modules that define the public classes and functions; every other public name is a module itself."""

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted([*__all__, *EXTRA])
