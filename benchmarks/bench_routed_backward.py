"""The cpu engine compared with plain PyTorch: ``python -m pytest -s benchmarks/bench_routed_backward.py [--small]``.

The steps are those of ``pathnet bench``. A step times its competitors in turn; its findings are in its
``extra_info``, in the table at the end and in the results file, and the table of pytest-benchmark holds only the
duration of each step. ``test_one_path`` repeats one path of a middle length by each competitor, one after the other,
for a quick look.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from benchmarks.cpu.cases import FULL, SMALL
from benchmarks.cpu.competitors import BUILDERS, Key
from benchmarks.cpu.report import show
from benchmarks.cpu.run import Run
from benchmarks.cpu.steps import STEPS
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run(SMALL if request.config.getoption("--small") else FULL)
    yield run
    console = Console(width=130)
    console.print()
    show(run.results, console)
    console.print(str(run.file), soft_wrap=True)


@pytest.mark.parametrize("name", STEPS)
def test_step(name: str, run: Run, benchmark: Any) -> None:
    benchmark.extra_info["found"] = benchmark.pedantic(run.perform, (name,), rounds=1, iterations=1)


@pytest.mark.parametrize("key", BUILDERS, ids=str)
def test_one_path(key: Key, run: Run, benchmark: Any) -> None:
    competitors, lengths = run.field.competitors, run.field.sizes.setup.lengths
    assert key in competitors, run.field.refused[str(key)]
    path = run.field.paths[lengths[len(lengths) // 2]]
    benchmark.pedantic(competitors[key].norms, (path,), rounds=run.field.sizes.setup.rounds, warmup_rounds=1)
