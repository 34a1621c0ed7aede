"""Tables of the paper's claims, from the files of `benchmarks.paper`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.tables.markdown import file_names, listed, number, percent, spread, table, with_ends
from pathnet.experiments.claims import all_of

__all__ = ["TABLES"]

Results = dict[str, Any]
Entry = dict[str, Any]

VERDICTS = {"held": "held", "did not hold": "**did not hold**", "open": "open"}


def _measured(index: int) -> Callable[[list[Entry]], str]:
    """Return a function that quotes a claim's measurement up to the first semicolon."""
    return lambda entries: entries[0]["claims"][index]["measured"].split(";")[0]


def _step(entries: list[Entry]) -> str:
    numbers = entries[0]["numbers"]
    last = numbers["means"][-1]
    return (
        f"from {percent(numbers['intact'])} to {spread(last['mean'], last['low'], last['high'])}; largest step "
        f"{spread(*numbers['rise'])} of the rise"
    )


def _decay(entries: list[Entry]) -> str:
    """Return the factor of each network with its 95 % interval."""
    return f"factor {listed([with_ends(*entry['numbers']['decay']) for entry in entries])}"


def _mean_length(entries: list[Entry]) -> str:
    lengths = [with_ends(*entry["numbers"]["mean_length"]) for entry in entries]
    return f"mean length {listed(lengths)} of {entries[0]['numbers']['n']}"


def _explained(entries: list[Entry]) -> str:
    n = entries[0]["numbers"]["n"]
    shares = [entry["numbers"]["exact"]["explained"] for entry in entries]
    short = int(SHORT * n)
    cells = [spread(share["mean"][short], share["low"][short], share["high"][short]) for share in shares]
    return f"lengths up to {short} of {n} explain {listed(cells)}"


def _effective(entries: list[Entry]) -> str:
    numbers = entries[0]["numbers"]
    best = min(numbers["effective"], key=lambda way: sum(numbers["effective"][way]))
    more = {key: number(100 * numbers["difference"][best][key]) for key in ("mean", "low", "high")}
    return f"{more['mean']} points more error ({more['low']} to {more['high']})"


def _three_parts(entries: list[Entry]) -> str:
    numbers = entries[0]["numbers"]
    frozen = numbers["frozen"]
    left = spread(frozen["mean"], frozen["low"], frozen["high"])
    return f"within {number(numbers['parts_off'], 1)}; with frozen gates {left} of its norm is left"


SHORT = 0.4
ROWS: list[tuple[str, str, int, Callable[[list[Entry]], str]]] = [
    ("a network equals the sum over its paths", "unraveled", 1, _measured(1)),
    ("deleting one block, except a downsampling one, hardly matters", "lesion-single", 0, _measured(0)),
    ("deleting any layer of a VGG leaves nothing of its accuracy above chance", "lesion-single", 2, _measured(2)),
    ("error rises smoothly with the number of deleted blocks", "lesion-many", 0, _step),
    ("error rises smoothly as blocks are reordered", "lesion-reorder", 0, _step),
    ("the gradient falls exponentially with a path's length", "path-gradients", 0, _decay),
    ("it comes from paths much shorter than most", "path-gradients", 1, _mean_length),
    ("exact sums of short lengths explain 95 % of it", "path-gradients", 2, _explained),
    ("training on short paths only is not worse", "effective-training", 0, _effective),
    ("stochastic depth makes single deletions cost less", "lesion-stochastic-depth", 0, _measured(0)),
    ("a highway block's gradient is the sum of three parts", "highway", 1, _three_parts),
    ("gates biased towards carrying prefer short paths", "highway", 2, _measured(2)),
]
"""Claims in short: the experiment, the number of the claim among its claims, and the numbers to show."""


def claims(files: Mapping[str, Results]) -> str:
    """Return the paper's claims in short, with a column for each data set."""
    rows = [
        [title, *(_cell(results["experiments"].get(experiment), index, show) for results in files.values())]
        for title, experiment, index, show in ROWS
    ]
    header = ["claim", *map(_title, files.values())]
    return f"{table(header, rows)}\n\nFiles: {file_names(list(files))}."


def _title(results: Results) -> str:
    """Return the data, the depth of the residual networks, and the accuracy of those whose blocks were deleted."""
    entries = results["experiments"].get("lesion-single", [{"numbers": {}}])
    rates = [rate for rate, *_ in entries[0]["numbers"].get("residual", {}).get("intact", [])]
    accuracy = f", {percent(1 - sum(rates) / len(rates))} accuracy" if rates else ""
    blocks = f", {nets[0]['blocks']} blocks" if (nets := results["networks"].get("residual")) else ""
    return f"{results['data']}{blocks}{accuracy}"


def _cell(entries: list[Entry] | None, index: int, show: Callable[[list[Entry]], str]) -> str:
    """Return the verdict on a claim, and its numbers; it must hold for each of several networks."""
    if entries is None:
        return "not measured"
    # Where another mode was measured too, that of the paper is the first.
    in_papers_mode = _by_mode(entries)[0]
    return f"{_verdict(in_papers_mode, index)}: {show(in_papers_mode)}"


def _by_mode(entries: list[Entry]) -> list[list[Entry]]:
    """Return runs grouped by their mode of batch normalisation, in the order of the file."""
    modes = dict.fromkeys(entry["settings"].get("bn") for entry in entries)
    return [[entry for entry in entries if entry["settings"].get("bn") == mode] for mode in modes]


def _verdict(entries: list[Entry], index: int) -> str:
    return VERDICTS[all_of(*(entry["claims"][index]["verdict"] for entry in entries))]


def verdicts(files: Mapping[str, Results]) -> str:
    """Return every claim of one file with its place in the paper, its bound, and what was measured."""
    ((_, results),) = files.items()
    rows = []
    for of_experiment in results["experiments"].values():
        modes = _by_mode(of_experiment)
        for index, claim in enumerate(of_experiment[0]["claims"]):
            for entries in modes:
                texts = [entry["claims"][index]["measured"] for entry in entries]
                several = [f"network {seed}: {text}" for seed, text in enumerate(texts)]
                measured = "; ".join(several if len(texts) > 1 else texts)
                mode = f", in mode `{entries[0]['settings']['bn']}`" if len(modes) > 1 else ""
                paper = f"{claim['paper']} ({claim['where']}{mode})"
                rows.append([paper, claim["bound"], _verdict(entries, index), measured])
    return table(["the paper", "it holds if", "", "measured"], rows)


TABLES = {"claims": claims, "verdicts": verdicts}
"""Tables by name."""
