"""Figures and tables of measurements; `pathnet.paper` says which experiment has which."""

from __future__ import annotations

from pathnet.extras import require

require("matplotlib", "pathnet.figures draws with matplotlib")
require("rich", "pathnet.figures prints tables with rich")

from pathnet.figures.depth import figure_depth
from pathnet.figures.gradients import figure_6, table_6
from pathnet.figures.sums import figure_sums, table_exact, table_signed

__all__ = ["figure_6", "figure_depth", "figure_sums", "table_6", "table_exact", "table_signed"]
