"""The package ``helpers``, importable from any test file, and Triton's interpreter where there is no GPU."""

import os
import sys
from pathlib import Path

# Before torch is imported: tests are many small operations, in which threads wait longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402

# Without a GPU Triton's kernels are interpreted, which is settled when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
