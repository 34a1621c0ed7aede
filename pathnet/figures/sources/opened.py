"""The choice between a run, the folder of one, a summary, and arrays; and the heading of a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from pathnet import results
from pathnet.checks import described
from pathnet.experiments.run import title
from pathnet.figures.sources.arrays import Arrays, Frame

__all__ = ["Source", "heading_of", "opened", "summary_of"]

Source: TypeAlias = results.Run | str | Path | Arrays
"""A run, the folder of a run, or arrays by name."""

Summary = TypeVar("Summary")


def opened(value: object) -> object:
    """Return the run of a folder; anything else as it is.

    Raises:
        ValueError: the folder holds no run.
    """
    return results.read(value) if isinstance(value, str | Path) else value


def heading_of(value: object, chosen: str | None, default: str = "") -> str:
    """Return the heading of a figure: the caller's, or that of a run, or a default.

    Args:
        value: the results, as `opened` returns them.
        chosen: the caller's; None for another one.
        default: the heading of results that are no run.

    Raises:
        ValueError: ``chosen`` is no string.
    """
    if chosen is not None and not isinstance(chosen, str):
        raise ValueError(f"title: expected a string, got {described(chosen)}")
    if chosen is not None:
        return chosen
    return title(value.identity) or default if isinstance(value, results.Run) else default


def summary_of(
    value: object,
    kind: type[Summary] | None,
    experiments: Sequence[str],
    of_run: Callable[[results.Run], Summary],
    of_arrays: Callable[[Arrays], Summary],
) -> Summary:
    """Return the summary that a figure shows.

    Args:
        value: the results, as `opened` returns them.
        kind: class of the summary; None if arrays hold it.
        experiments: names of the experiments that measure it.
        of_run: summarises a run.
        of_arrays: summarises arrays.

    Raises:
        ValueError: ``value`` is something else, or a run of another experiment.
    """
    if kind is not None and isinstance(value, kind):
        return value
    if isinstance(value, results.Run):
        if value.experiment not in experiments:
            expected = " or ".join(experiments)
            raise ValueError(f"results: expected a run of {expected}, got one of {value.experiment} ({value.folder})")
        return of_run(value)
    if isinstance(value, Mapping | Frame):
        return of_arrays(value)
    summary = "" if kind is None else f"its {kind.__name__}, "
    forms = f"a run of {experiments[0]}, its folder, {summary}or arrays by name"
    raise ValueError(f"results: expected {forms}, got {described(value)}")
