"""Run folders: the identity and the measurements of runs. Only these modules know the paths of a run on disk.

``run.json`` holds the run's identity, which is all that is needed to repeat its measurements. It also
holds the attempts that added to the run (versions, device, time), the planned amounts and the results.
``measurements/*.parquet`` hold one measurement per row: path gradient norms (``part-*``) as `Measurements`, anything
else as rows of a dataclass (`Row`). A part is written under a temporary name and then renamed, so a killed run leaves
only complete parts.

``run.json`` and every part hold a SHA-256 digest of their content, which is verified on reading: a bit that flips on
the disk causes an error, never a different result. Files from before there were digests are read without one.

`pathnet.results.run` is the folder, `pathnet.results.facts` its ``run.json``, `pathnet.results.parts` a Parquet file,
`pathnet.results.rows` the kinds of rows, and `pathnet.results.problems` the checks of what a part holds.
"""

from pathnet.extras import require

require("pyarrow", "pathnet.results stores measurements with pyarrow")

from pathnet.results.rows import LARGEST, Measurements, Range, Row
from pathnet.results.run import Run, check_run, read, weights_of, writing

__all__ = ["LARGEST", "Measurements", "Range", "Row", "Run", "check_run", "read", "weights_of", "writing"]
