"""The baselines on a processor, and the facts and peaks of this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pathnet
from benchmarks.cases import batch, network
from benchmarks.composed import Convolution
from benchmarks.cpu import competitors
from benchmarks.cpu.cases import FULL, SMALL
from benchmarks.cpu.facts import processor_facts
from benchmarks.cpu.peaks import Peaks, matrix_product
from benchmarks.cpu.unit_forms import SavedUnit, compiled_normalize, fastest, normalize, unit_forms
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.mark.parametrize("stride", [1, 2])
def test_all_ways_back_are_one(stride: int) -> None:
    """This includes forms that are not the fastest here."""
    generator = torch.Generator().manual_seed(stride)

    def random(*shape: int) -> Tensor:
        images = torch.randn(shape, generator=generator, requires_grad=len(shape) == 4)
        return images.to(memory_format=torch.channels_last) if len(shape) == 4 else images

    x, weight, gamma, beta = random(3, 5, 8, 8), random(6, 5, 3, 3).detach(), random(5).abs(), random(5)
    out = torch.nn.functional.batch_norm(x, None, None, gamma, beta, True, 0, 1e-5)
    y = torch.nn.functional.conv2d(out.relu(), weight, None, stride, 1)
    grad = torch.randn(y.shape, generator=generator).to(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(y, x, grad)
    normalized, _, inverse = torch.native_batch_norm(x.detach(), None, None, None, None, True, 0.0, 1e-5)
    saved = SavedUnit((out > 0).float(), normalized.contiguous(memory_format=torch.channels_last), gamma * inverse)
    forms = unit_forms(Convolution(weight, stride, 1, (5, 8, 8)), True, normalize_masked)
    assert len(forms) >= 6
    for form in forms.values():
        torch.testing.assert_close(form(grad, saved), expected, rtol=1e-4, atol=1e-5)


def normalize_masked(grad: Tensor, saved: SavedUnit) -> Tensor:
    """Replace the compiled form, which takes seconds to compile."""
    return normalize(grad * saved.mask, saved)


def test_what_is_refused_is_not_the_fastest() -> None:
    def refuses() -> None:
        raise RuntimeError("not on this processor")

    assert fastest({"refuses": refuses, "slow": lambda: torch.randn(1 << 16), "quick": lambda: None}) == "quick"


def test_the_compositions_slices_are_the_batch() -> None:
    setup = replace(SMALL.checked, batch=5)
    net, (images, labels) = network(setup), batch(setup)
    composition = competitors.Composition(net, images, labels, "running", torch.float32)
    path, code = [1, 0] * 3, pathnet.paths.sample(net.n, 2, 1)[0].tolist()
    for samples in (5, 2, 1):
        composition.samples = samples
        assert len(composition.gradients(path)) == -(-5 // samples)
        whole = torch.cat(composition.gradients(code))
        torch.testing.assert_close(composition.norm(code), whole.norm())
        torch.testing.assert_close(
            whole, competitors.loop(net, images, labels, False).gradients(torch.tensor([code]))[0]
        )


def test_peaks() -> None:
    peaks, product = Peaks.compile(), matrix_product(torch.float32, 0.02)
    assert product > 0
    if peaks.fma is None:
        assert peaks.why_not
    else:
        assert peaks.fma(0.02) > 1e9


def test_without_a_compiler_there_is_no_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Peaks.compile().why_not == "no C++ compiler"


def test_facts_name_no_place() -> None:
    text = json.dumps(processor_facts())
    assert "/" not in text.replace("+cpu", "") and processor_facts()["cores_usable"]


def test_torch_compile_takes_part_in_full_runs_only() -> None:
    assert FULL.compiled and not SMALL.compiled and callable(compiled_normalize)
