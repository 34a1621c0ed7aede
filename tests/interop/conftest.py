"""Tests that need torchvision, timm and transformers, or another torch than the one that built the library.

`make test-interop` sets up a Python that has them; elsewhere each file says what it lacks.
"""

import os

# Nothing is to be fetched: all models have random weights.
os.environ["HF_HUB_OFFLINE"] = "1"
