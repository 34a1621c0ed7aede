"""Every form of the cuda engine's programs: widths, windows of images, slices of weights; those of each GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.cases import shaken
from helpers.judging import TOLERANCES, check, random_routings
from helpers.oracles import in_float64, relative_error
from helpers.tolerances import FORWARD
from helpers.twin import (
    FEW,
    GPUS,
    Twin,
    job_of,
)
from torch import nn

import pathnet
from pathnet import native
from pathnet.engines import cuda
from pathnet.engines.cuda import CudaEngine, ops
from pathnet.models import PreactBlock, ResidualNet

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)
PAGE = (ROOT / "docs" / "how" / "engines.md").read_text()


@pytest.mark.parametrize("width", [16, 32, 48, 64])
@pytest.mark.parametrize("shared_bytes", [FEW, 101376], indirect=True)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_width(width: int, shared_bytes: int, precision: Any) -> None:
    """A stage of one width, at a side with whole and broken strips; many samples per thread block."""
    torch.manual_seed(width)
    blocks = [PreactBlock(width, (3, 3), (width, width), 1, "projection") for _ in range(2)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    net = shaken(ResidualNet(nn.Conv2d(3, width, 3, padding=1), blocks, head)).eval()
    for side in (8, 13):
        images, labels = torch.randn(5, 3, side, side), torch.arange(5)
        tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
        check(tape, torch.randn(2, 2, 2), precision)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(("height", "width", "batch"), [(37, 9, 1), (18, 21, 3)])
def test_every_number_of_windows(
    height: int, width: int, batch: int, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run from the least shared memory that serves up to resident images.

    Windows end within images, at both kinds of skip and both strides; thread blocks own one sample or several, the
    last of them fewer.
    """
    torch.manual_seed(height)
    sides = ((16, 16, 1, "pad"), (16, 24, 2, "projection"), (24, 24, 1, "pad"), (24, 38, 2, "pad_around"))
    blocks = [PreactBlock(i, (3, 3), (o, o), stride, skip) for i, o, stride, skip in sides]  # type: ignore[arg-type]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(38, 5))
    net = shaken(ResidualNet(nn.Conv2d(3, 16, 3, padding=1), blocks, head)).eval()
    images, labels = torch.randn(batch, 3, height, width), torch.arange(batch)
    exact, routing = in_float64(net, "running"), random_routings(4, height)
    expected = exact(images.double()).detach()
    forms: list[set[ops.CudaForm]] = [set(), set()]
    for shared_bytes in range(14 << 10, 160 << 10, 3 << 10):
        monkeypatch.setattr(Twin, "twin_shared_bytes", shared_bytes)
        job = job_of(net, (16, height, width), precision)
        if cuda.refusal(job, shared_bytes):
            continue
        network = Twin().prepare(job)
        programs = network.backward, network.forward
        new = False
        for seen, program in zip(forms, programs, strict=True):
            form = ops.cuda_form(program.host)._replace(shared_bytes=0)
            new |= form not in seen
            seen.add(form)
        if not new:
            continue
        tape = pathnet.record(net, images, labels, engine="twin", precision=precision)
        assert relative_error(tape.output, expected) < FORWARD
        check(tape, routing, precision)
    for seen in forms:
        assert {form.windows for form in seen} >= {0, 2, 3}
        assert {form.slices for form in seen} == ({1, 3, 9} if precision == "float32" or seen is forms[1] else {1, 3})
    assert any(form.samples > 1 and form.windows > 1 for form in forms[0])


def described(form: ops.CudaForm) -> str:
    samples = f"{form.samples} sample{'s' if form.samples > 1 else ''}"
    weights = {1: "", 3: ", weights by columns", 9: ", weights by taps"}[form.slices]
    return f"{samples} {'in windows' if form.windows else 'resident'}{weights}"


@pytest.mark.parametrize("depth", [20, 110])
@pytest.mark.parametrize("gpu", GPUS)
def test_the_papers_networks_fit_every_gpu_as_the_documentation_says(
    gpu: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaEngine, "twin_shared_bytes", GPUS[gpu])
    net, forms = pathnet.models.preact_resnet(depth), {}
    for precision in TOLERANCES:
        network = CudaEngine().prepare(job_of(net, (16, 32, 32), precision))
        programs = network.backward, network.forward
        forms[precision], forward = (ops.cuda_form(program.host) for program in programs)
        assert max(forms[precision].shared_bytes, forward.shared_bytes) <= GPUS[gpu]
    cells = gpu, described(forms["bfloat16"]), described(forms["float32"]), described(forward)
    assert f"| {' | '.join(cells)} |" in PAGE
