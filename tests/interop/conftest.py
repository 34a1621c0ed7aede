"""Tests that need torchvision, timm and transformers, or another torch than the one that built the library.

`make test-interop` sets up a Python with them; elsewhere each file skips itself and names the missing package.
"""

import os

# All models have random weights, so nothing need be downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
