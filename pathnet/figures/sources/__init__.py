"""The results that figures accept: a run, the folder of one, a summary of its measurements, or a caller's own arrays.

Each figure has one function here, which returns the summary that the figure shows. Arrays are columns by name, with
the names of the summary, or of the run's own files: of NumPy, PyTorch, pandas or polars, or lists.
"""

from pathnet.figures.sources.arrays import Frame
from pathnet.figures.sources.depths import depths_of
from pathnet.figures.sources.gates import highway_of
from pathnet.figures.sources.gradients import comparison_of
from pathnet.figures.sources.lesions import deletions_of, errors_of, stochastic_depth_of
from pathnet.figures.sources.opened import Source, heading_of, opened
from pathnet.figures.sources.paths import effective_of, remaining_of

__all__ = [
    "Frame",
    "Source",
    "comparison_of",
    "deletions_of",
    "depths_of",
    "effective_of",
    "errors_of",
    "heading_of",
    "highway_of",
    "opened",
    "remaining_of",
    "stochastic_depth_of",
]
