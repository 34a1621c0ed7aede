"""The native library gives correct results with other versions of torch than the one that it was compiled with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import SMALL, Case, measured_net
from helpers.judging import TOLERANCES, check
from helpers.oracles import detach_loop, in_float64, relative_error
from helpers.tolerances import FLOAT32_SAMPLE_NORM, FORWARD

import pathnet
from pathnet import native

BUILT_BY = str(native.build_facts()["torch_version"]) if native.LOADED else ""

pytestmark = pytest.mark.skipif(
    BUILT_BY in ("", torch.__version__), reason=native.WHY_NOT or f"torch {BUILT_BY} itself built the library"
)


def test_the_loaded_library_is_the_one_in_this_folder() -> None:
    library = Path(pathnet.__file__).with_name("_ops.so")
    assert library == Path(__file__).parents[2] / "pathnet" / "_ops.so"
    assert str(library) in Path("/proc/self/maps").read_text()
    assert pathnet.engines.available()["cpu"] is None


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("case", SMALL[:5:2], ids=lambda case: case.id)
def test_every_path_by_the_cpu_engine_against_the_detach_loop(case: Case, bn: Any) -> None:
    net, (images, labels) = case.net(), case.images()
    tape = pathnet.record(net, images, labels, bn=bn, engine="cpu")
    codes = pathnet.paths.enumerate_all(tape.n)
    for code, walked in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(walked, detach_loop(net, images, labels, code, bn)) < FLOAT32_SAMPLE_NORM


@pytest.mark.parametrize("isa", native.build_facts()["instruction_sets"] if native.LOADED else [])
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("bn", ["running", "batch"])
def test_walks_and_forward_passes_of_every_instruction_set(
    bn: Any, precision: Any, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATHNET_ISA", isa)
    net, images, labels = measured_net(3, small=True)
    recorder = pathnet.Recorder(net, bn, "cpu", precision)
    tape = recorder(images, labels)
    codes = pathnet.paths.sample(net.n, net.n // 2, count=4)
    check(tape, pathnet.paths.routing(codes), precision)
    exact = in_float64(net, bn)(images.double()).detach()
    assert relative_error(tape.output, exact) < FORWARD
    ordinary = recorder.routed_outputs(images, torch.ones(1, net.n, 2))[0]
    assert relative_error(ordinary, exact) < FORWARD
