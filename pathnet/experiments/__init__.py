"""One driver for each figure and table of the paper: the measurements, and the claims they test.

`pathnet.paper` lists the experiments; each driver is a module here, such as `pathnet.experiments.path_gradients`.
"""

from pathnet.extras import require

require("scipy", "pathnet.experiments tests hypotheses with scipy")

from pathnet.experiments.plans import PathGradients, Plan

__all__ = ["PathGradients", "Plan"]
