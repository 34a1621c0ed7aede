"""Makes ``cases``, ``oracles`` and ``tolerances`` importable by name from any test file; Triton's interpreter."""

import importlib.util
import os
import sys
from pathlib import Path

# Before torch is imported: tests are many small operations, in which threads wait longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402

# Without a GPU Triton's kernels are interpreted, which is settled when they are imported; nothing else of this process
# shall be.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import pathnet.engines.triton.recording
    import pathnet.engines.triton.routed_backward  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
