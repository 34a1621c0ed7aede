"""One driver for each figure and table of the paper: the measurements, and the claims they test.

`pathnet.paper` lists the experiments.
"""

from pathnet.extras import require

require("scipy", "pathnet.experiments tests hypotheses with scipy")
