"""Tables and numbers in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["file_names", "listed", "number", "percent", "spread", "table", "with_ends"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, whose cells must hold no line break and no bar."""
    lines = [header, ["---"] * len(header), *rows]
    for cells in lines:
        if len(cells) != len(header) or any("\n" in cell or "|" in cell for cell in cells):
            raise ValueError(f"cells: expected {len(header)} of one line without bars, got {cells}")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number to some significant digits, never as a power of ten from 1e-4 on; nothing for None."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text else text


def percent(share: float | None, digits: int = 3) -> str:
    """Return a share as a percentage."""
    return "" if share is None else f"{number(100 * share, digits)} %"


def spread(mean: float, low: float | None, high: float | None) -> str:
    """Return a share as a percentage with its 95 % interval, if it has one."""
    ends = "" if low is None or high is None else f" ({number(100 * low)} to {number(100 * high)})"
    return f"{percent(mean)}{ends}"


def with_ends(value: float, low: float | None, high: float | None) -> str:
    """Return a number with its 95 % interval, if it has one."""
    ends = "" if low is None or high is None else f" ({number(low)} to {number(high)})"
    return f"{number(value)}{ends}"


def listed(words: Sequence[str]) -> str:
    """Return words as an enumeration: ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def file_names(names: Sequence[str]) -> str:
    """Return the paths of results files, as code."""
    return listed([f"`benchmarks/results/{name}`" for name in names])
