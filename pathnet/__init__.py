"""pathnet: how gradient travels through the single paths of a residual network."""

from pathnet import data, models, paths, training

__all__ = ["data", "models", "paths", "training"]

__version__ = "0.1.0"
