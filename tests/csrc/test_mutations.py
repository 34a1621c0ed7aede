"""A few mutants of the kernels' index arithmetic, each of which must fail; `make mutants` runs all."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pathnet import native

FOLDER = Path(__file__).parent / "mutations"
SAMPLE = 4

pytestmark = [
    pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT),
    pytest.mark.skipif(shutil.which("g++") is None, reason="mutants are compiled with g++"),
]


def module(name: str) -> ModuleType:
    """Load one of the scripts, which belong to no package."""
    spec = importlib.util.spec_from_file_location(f"mutations_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mutations") / "cases.npz"
    module("cases").write(file)
    return file


def test_the_kernels_as_they_are_are_found_right(cases: Path) -> None:
    assert module("run").verdict(None, cases) == ""


@pytest.mark.parametrize("part", range(SAMPLE))
def test_a_mutant_is_found_wrong(part: int, cases: Path) -> None:
    run = module("run")
    mutants = [mutant for mutant in run.mutants() if mutant.after.strip() not in run.EQUIVALENT]
    mutant = mutants[(2 * part + 1) * len(mutants) // (2 * SAMPLE)]
    assert run.verdict(mutant, cases), f"{mutant} survives"
