"""``pathnet bench``: the cpu engine, and the one for any model, against plain PyTorch, on the current processor."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pathnet
from pathnet.commands.places import check_folder_to_write
from pathnet.commands.shared import Json
from pathnet.progress import reporter
from pathnet.settings import Above, Checked, Flag, Help, check_settings

__all__ = ["BenchSettings", "bench"]

CHECKOUT = Path(pathnet.__file__).resolve().parent.parent


@dataclass(frozen=True)
class BenchSettings:
    """Settings of ``pathnet bench``."""

    small: Annotated[bool, Help("Rehearse: seconds, and numbers without meaning.")] = False
    out: Annotated[
        Path | None,
        Help("Folder of the results."),
        Flag(value="FOLDER", default="benchmarks/results/cpu"),
        Checked(check_folder_to_write),
    ] = None
    minutes: Annotated[float, Help("Minutes that it may take; the results say what was cut to fit."), Above(0)] = 15.0
    as_json: Json = False

    def __post_init__(self) -> None:
        check_settings(self)


def bench(settings: BenchSettings) -> None:
    """Benchmark the cpu engine, and the one for any model, against plain PyTorch; all results are checked first.

    Needs a source checkout.
    """
    from pathnet.commands.printing import console, print_json
    from pathnet.commands.streams import say, standard_output

    benchmarks = _benchmarks(CHECKOUT)
    budget = benchmarks("budget").Budget(60 * settings.minutes)
    sizes = benchmarks("cases").SMALL if settings.small else benchmarks("cases").FULL
    with reporter("benchmarks") as progress:
        run = benchmarks("run").measure(sizes, settings.out, progress, budget=budget)
    if settings.as_json:
        print_json(run.results, [run.file])
    else:
        with standard_output():
            benchmarks("report").show(run.results, console())
        say(run.file)
    if run.wrong:
        raise ValueError(f"benchmarks: {run.wrong}")


def _benchmarks(checkout: Path) -> Callable[[str], Any]:
    """Return a function that imports a module of the processor's benchmarks, which only a source checkout has.

    Raises:
        ValueError: there are no benchmarks, or no cpu engine.
    """
    from pathnet import native

    if not (checkout / "benchmarks" / "cpu" / "run.py").exists():
        raise ValueError(f"bench: expected a checkout of pathnet, found no benchmarks in {checkout}")
    if not native.LOADED:
        raise ValueError(f"bench: the cpu engine is not built ({native.WHY_NOT})")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return lambda name: importlib.import_module(f"benchmarks.cpu.{name}")
