"""Run folders: the identity and the measurements of runs. Only these modules know the paths of a run on disk.

``run.json`` holds the run's identity, which is all that is needed to repeat its measurements. It also
holds the attempts that added to the run (versions, device, time, and the seconds that it took), the planned amounts
and the results.
``measurements/*.parquet`` hold one measurement per row: path gradient norms (``part-*``) as `Measurements`, anything
else as rows of a dataclass (`Row`). Every column says in its metadata what it means.

What is measured goes into a journal at once, which outlives a process that is killed, and every 30 seconds into a
part, which outlives a crash of the machine. At the end the parts become one sorted file of each kind, the same for
any number of processes.

``run.json`` and every part hold SHA-256 digests of their content, which are verified on reading: a bit that flips on
the disk causes an error, never a different result. Files from before there were digests are read without one.

`pathnet.results.run` is the folder, `pathnet.results.opening` opens it to add, `pathnet.results.facts` is its
``run.json``, `pathnet.results.parts` a Parquet file, `pathnet.results.journal` what is not in a part yet,
`pathnet.results.compaction` merges them, `pathnet.results.exporting` hands them on, `pathnet.results.rows` and
`pathnet.results.norms` are the kinds of rows, and `pathnet.results.problems` the checks of what they hold.
"""

from pathnet.extras import require

require("pyarrow", "pathnet.results stores measurements with pyarrow")

from pathnet.results.compaction import compact
from pathnet.results.exporting import export
from pathnet.results.opening import writing
from pathnet.results.rows import LARGEST, Measurements, Range, Row
from pathnet.results.run import Run, check_run, read, weights_of

__all__ = [
    "LARGEST",
    "Measurements",
    "Range",
    "Row",
    "Run",
    "check_run",
    "compact",
    "export",
    "read",
    "weights_of",
    "writing",
]
