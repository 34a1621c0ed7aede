"""Figures and tables of measurements; `pathnet.paper` says which experiment has which.

A figure accepts a run, the folder of one, the summary of its measurements, or arrays by name that you measured
yourself: of NumPy, PyTorch, pandas or polars, or lists. A DataFrame takes the place of a mapping, with a single
number such as ``blocks`` in each of its rows.
"""

from __future__ import annotations

from pathnet.extras import require

require("matplotlib", "pathnet.figures draws with matplotlib")
require("rich", "pathnet.figures prints tables with rich")

from pathnet.figures.depth import figure_depth
from pathnet.figures.gates import figure_highway
from pathnet.figures.gradients import figure_6, table_6
from pathnet.figures.lesions import figure_3, figure_5a, figure_5b, figure_8
from pathnet.figures.paths import figure_1, figure_2, figure_7, figure_effective
from pathnet.figures.sums import figure_sums, table_exact, table_signed

__all__ = [
    "figure_1",
    "figure_2",
    "figure_3",
    "figure_5a",
    "figure_5b",
    "figure_6",
    "figure_7",
    "figure_8",
    "figure_depth",
    "figure_effective",
    "figure_highway",
    "figure_sums",
    "table_6",
    "table_exact",
    "table_signed",
]
