"""The networks and devices that the cuda engine serves, and its reasons to refuse others."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.twin import (
    GPUS,
    SMALL,
    job_of,
)
from torch import nn

import pathnet
from pathnet import engines, native
from pathnet.engines import cuda
from pathnet.engines.autograd import AutogradEngine
from pathnet.engines.cuda import CudaEngine, ops
from pathnet.engines.engine import Job
from pathnet.engines.reference import ReferenceEngine
from pathnet.engines.tables import UnitColumn, tables
from pathnet.models import PreactBlock, ResidualNet

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def refused(net: ResidualNet, side: int, shared_bytes: int = 101376) -> str | None:
    channels = net.stem_weight().shape[0]
    return cuda.refusal(job_of(net, (channels, side, side), "bfloat16"), shared_bytes)


def test_what_the_kernels_have_no_form_for_is_named() -> None:
    models = pathnet.models
    assert refused(models.preact_resnet(20), 32) is None
    assert refused(models.preact_resnet(20, width=8), 32) is None
    assert refused(models.preact_resnet(20, width=12, shortcut="pad"), 21) is None
    assert refused(models.resnet(20), 32) is refused(models.resnet(110, shortcut="projection"), 32) is None
    assert refused(models.resnet(20, block="bottleneck"), 32) == "block 0: it is not a basic block (two convolutions)"
    assert refused(models.preact_resnet(20, width=32), 32) == "block 6: it has more than 64 channels"
    assert refused(models.preact_resnet(20, block="bottleneck"), 32) == (
        "block 0: it is not a basic block (two convolutions)"
    )
    assert refused(models.preact_resnet(20), 96) is None
    message = refused(models.preact_resnet(20), 32, 20480)
    assert message and re.fullmatch(
        r"block \d: a window of its images and the weights need \d+ bytes of shared memory, and .* has 20480",
        message,
    )
    wide = ResidualNet(nn.Conv2d(3, 64, 3), [PreactBlock(64, (3, 3), (64, 64), 1, "pad")], nn.Flatten())
    assert refused(wide, 32) is None
    assert refused(wide, 16382) == "block 0: it has images of more than 65536 pixels with their borders"
    # In strips of eight pixels a column is eight times itself, and the elements of many thread blocks are int32.
    tall = cuda.refusal(job_of(wide, (64, 8192, 1), "float32"), GPUS["99 KB"])
    assert tall is None
    tall = cuda.refusal(job_of(wide, (64, 8193, 1), "float32"), GPUS["99 KB"])
    assert tall == "block 0: it has images of more than 4194304 numbers in strips of eight pixels"
    uneven = ResidualNet(nn.Conv2d(3, 16, 3), [PreactBlock(16, (3, 3), (40, 16), 1, "pad")], nn.Flatten())
    assert refused(uneven, 8) == "block 0: it has convolutions of different widths"
    kernels = ResidualNet(nn.Conv2d(3, 16, 3), [PreactBlock(16, (5, 3), (16, 16), 1, "pad")], nn.Flatten())
    assert refused(kernels, 8) == "block 0: it has a convolution that is not 3x3 with padding 1"


def test_the_largest_images_of_the_papers_networks_are_those_that_the_documentation_names() -> None:
    text = (ROOT / "docs" / "how" / "engines.md").read_text()
    side = int(re.findall(r"for these networks, sides up to (\d+) in 99 KB", text)[0])
    for net in (pathnet.models.preact_resnet(20), pathnet.models.resnet(20)):
        for precision in ("bfloat16", "float32"):
            jobs = (job_of(net, (16, size, size), precision) for size in (side, side + 1))
            served, refused_job = (cuda.refusal(job, GPUS["99 KB"]) for job in jobs)
            assert served is None and refused_job and "bytes of shared memory" in refused_job


def test_more_shared_memory_than_any_gpu_has_is_refused() -> None:
    """It would hold more strips than divisions by multiplication count."""
    network = tables(pathnet.models.preact_resnet(8), "running", (16, 8, 8))
    arguments = network.blocks, network.units, network.weights, network.scales, True, 1
    ops.cuda_pack(*arguments, 1 << 18)
    with pytest.raises(RuntimeError, match="shared_bytes: expected 1 to 262144, got 262145"):
        ops.cuda_pack(*arguments, (1 << 18) + 1)


def test_the_walk_forward_takes_two_terms_a_number() -> None:
    network = tables(pathnet.models.preact_resnet(8), "running", (16, 8, 8))
    with pytest.raises(RuntimeError, match="parts: expected 2 for the forward pass, got 1"):
        ops.cuda_pack(network.blocks, network.units, network.weights, network.scales, False, 1, GPUS["227 KB"])


def test_units_without_relu_but_the_networks_first_are_the_cpu_engines_alone() -> None:
    network = tables(pathnet.models.preact_resnet(8), "running", (16, 8, 8))
    arguments = network.weights, network.scales, True, 1, GPUS["227 KB"]
    ops.cuda_pack(network.blocks, network.units, *arguments)
    for unit, block in ((1, 0), (2, 1)):
        units = network.units.clone()
        units[unit, UnitColumn.BITS] = -1
        with pytest.raises(RuntimeError, match=f"block {block}: it has a convolution without BN and ReLU"):
            ops.cuda_pack(network.blocks, units, *arguments)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Act as if this process had a GPU; nothing runs on it."""
    monkeypatch.setattr(engines, "ENGINES", (CudaEngine(), AutogradEngine(), ReferenceEngine()))
    monkeypatch.setattr(CudaEngine, "unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(shared_memory_per_block_optin=GPUS["227 KB"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


def test_a_torch_that_tells_no_shared_memory_gets_what_every_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    device = torch.device("cuda")
    assert CudaEngine().shared_bytes(device) == GPUS["227 KB"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert CudaEngine().shared_bytes(device) == GPUS["99 KB"]


def choose(name: str = "auto", bn: Any = "running", precision: Any = "float32") -> str:
    return engines.choose(name, Job(SMALL.net(), bn, precision, (16, 6, 6), torch.device("cuda"))).name


def test_auto_takes_cuda_on_a_gpu_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "disagreement", lambda *job, small: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == choose(precision="bfloat16") == "cuda"
        assert choose(precision="float64") == "autograd"
    with pytest.warns(RuntimeWarning, match=r"engine: 'autograd' was chosen; .* \(cuda: no bn=\"batch\""):
        assert choose(bn="batch") == "autograd"


def test_an_engine_that_disagrees_with_the_reference_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "disagreement", lambda *job, small: "it disagrees with the reference on a small input")
    with pytest.warns(RuntimeWarning, match=r"'autograd' was chosen; .* \(cuda: it disagrees with the reference"):
        assert choose() == "autograd"
    with pytest.raises(ValueError, match="engine: expected one that serves this job, got 'cuda'"):
        choose("cuda")


def test_where_there_is_no_gpu_the_engine_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {**native.build_facts(), "without_cuda": "no nvcc was found when the library was built"}
    with monkeypatch.context() as changed:
        changed.setattr(native, "build_facts", lambda: facts)
        assert CudaEngine().unavailable() == "no nvcc was found when the library was built"
    with monkeypatch.context() as changed:
        changed.setattr(native, "build_facts", lambda: {**facts, "without_cuda": ""})
        changed.setattr(torch.cuda, "is_available", lambda: False)
        assert CudaEngine().unavailable() == "this process sees no CUDA device"
    on_a_gpu(monkeypatch, capability=(7, 5))
    job = Job(SMALL.net(), "running", "float32", (16, 6, 6), torch.device("cuda"))
    reason = CudaEngine().unsupported(job)
    assert reason == "expected compute capability 8.0 or later, got 7.5 (Some GPU)"
