"""No network of the library asks oneDNN for the weight gradient of a strided 1x1 convolution.

As torch 2.13 ships it, that kernel writes beyond its buffers on processors with AVX2 and without AVX-512, where the
convolution has 2 to 6 input channels in channels_last. Any processor can be made to run the kernels of such a one.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from ctypes.util import find_library

import pytest
import torch

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
"""The environment of the fault. With two threads it strikes elsewhere, where the test does not look for it."""

CHECKED_HEAP = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
"""glibc's own: it ends a process that has written beyond a block as soon as the block is given back."""

TRAINED = """
import copy
import torch
import torch.nn.functional as F
import pathnet
from pathnet import models, training

recipe = training.Recipe(epochs=1, batch_size=8, warmup_steps=0)
for width in range(1, 9):
    data = pathnet.data.synthetic(images=16, classes=3, shape=(1 + width % 3, 8, 8))
    shape = {"num_classes": 3, "in_channels": 1 + width % 3}
    nets = [
        models.preact_resnet(8, width, **shape),
        models.preact_resnet(11, width, block="bottleneck", **shape),
        models.resnet(8, width, shortcut="projection", **shape),
        models.highway(8, width, **shape),
    ]
    for net in nets:
        training.train(copy.deepcopy(net), data, recipe)
        training.train(copy.deepcopy(net), data, recipe, engine="none")
        # As a loop of one's own would, in the layout that strikes.
        net.train().to(memory_format=torch.channels_last)
        images, labels = data.random_batch(8, seed=0, batch=0)
        for _ in range(3):
            F.cross_entropy(net(images.contiguous(memory_format=torch.channels_last)), labels).backward()
print("trained")
"""

FAULT = """
import torch
import torch.nn.functional as F
x = torch.randn(32, 4, 8, 8).contiguous(memory_format=torch.channels_last)
w = torch.randn(8, 4, 1, 1, requires_grad=True)
for _ in range(80):
    y = F.conv2d(x, w, stride=2)
    y.backward(torch.randn_like(y))
"""

STRIDED_POINTWISE = re.compile(r"convolution,\S+,backward_weights,.*kh1sh[2-9]")


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, **AVX2, **environment}
    return subprocess.run([sys.executable, "-c", program], env=everything, capture_output=True, text=True)


pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="oneDNN's kernels for AVX2 are not here",
)


def test_the_kernel_is_never_asked_for() -> None:
    ended = run(TRAINED, ONEDNN_VERBOSE="1")
    assert ended.returncode == 0, ended.stderr[-2000:]
    launched = [line for line in ended.stdout.splitlines() if "backward_weights" in line]
    assert len(launched) > 100 and not [line for line in launched if STRIDED_POINTWISE.search(line)]


def test_what_is_asked_for_would_be_seen() -> None:
    assert STRIDED_POINTWISE.search(run(FAULT, ONEDNN_VERBOSE="1").stdout)


@pytest.mark.skipif(find_library("c_malloc_debug") is None, reason="no checked heap: glibc's is not here")
def test_narrow_networks_are_trained_without_a_write_beyond_the_heaps_blocks() -> None:
    ended = run(TRAINED, **CHECKED_HEAP)
    assert (ended.returncode, ended.stdout) == (0, "trained\n"), ended.stderr[-2000:]


def test_narrow_networks_lie_as_they_come_and_wide_ones_in_channels_last() -> None:
    from pathnet import data, models, training

    recipe = training.Recipe(epochs=1, batch_size=8, warmup_steps=0)
    images = data.synthetic(images=8, classes=3, shape=(3, 8, 8))
    for width, expected in ((4, torch.contiguous_format), (8, torch.channels_last)):
        net = models.preact_resnet(8, width, num_classes=3)
        training.train(net, images, recipe, engine="none")
        assert net.blocks[0].convs[1].weight.is_contiguous(memory_format=expected)  # type: ignore[union-attr, index]
