"""pathnet: how gradient travels through the single paths of a residual network."""

__version__ = "0.1.0"
