"""Tables of the paper's claims, from the files of `benchmarks.paper`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from benchmarks.results import PAPERS_MODE
from benchmarks.tables.markdown import file_names, listed, number, percent, spread, table, with_ends
from pathnet.experiments.claims import all_of

__all__ = ["TABLES"]

Results = dict[str, Any]
Entry = dict[str, Any]

VERDICTS = {"held": "held", "did not hold": "**did not hold**", "open": "open"}


def _measured(_: list[Entry], claims: list[Entry]) -> str:
    """Return the measurement of the first network's claim up to the first semicolon."""
    return str(claims[0]["measured"]).split(";")[0]


def _step(entries: list[Entry], _: list[Entry]) -> str:
    numbers = entries[0]["numbers"]
    last = numbers["means"][-1]
    return (
        f"from {percent(numbers['intact'])} to {spread(last['mean'], last['low'], last['high'])}; largest step "
        f"{spread(*numbers['rise'])} of the rise"
    )


def _decay(entries: list[Entry], _: list[Entry]) -> str:
    """Return the factor of each network with its 95 % interval."""
    return f"factor {listed([with_ends(*entry['numbers']['decay']) for entry in entries])}"


def _mean_length(entries: list[Entry], _: list[Entry]) -> str:
    lengths = [with_ends(*entry["numbers"]["mean_length"]) for entry in entries]
    return f"mean length {listed(lengths)} of {entries[0]['numbers']['n']}"


def _explained(entries: list[Entry], _: list[Entry]) -> str:
    n = entries[0]["numbers"]["n"]
    shares = [entry["numbers"]["exact"]["explained"] for entry in entries]
    short = int(SHORT * n)
    cells = [spread(share["mean"][short], share["low"][short], share["high"][short]) for share in shares]
    return f"lengths up to {short} of {n} explain {listed(cells)}"


def _effective(entries: list[Entry], _: list[Entry]) -> str:
    numbers = entries[0]["numbers"]
    best = min(numbers["effective"], key=lambda way: sum(numbers["effective"][way]))
    more = numbers["difference"][best]
    if more["low"] is None:
        return f"{number(100 * more['mean'])} points more error, {best}"
    ends = f"{number(100 * more['low'])} to {number(100 * more['high'])}"
    return f"{number(100 * more['mean'])} points more error ({ends}), {best}"


def _three_parts(entries: list[Entry], _: list[Entry]) -> str:
    numbers = entries[0]["numbers"]
    frozen = numbers["frozen"]
    left = spread(frozen["mean"], frozen["low"], frozen["high"])
    return f"within {number(numbers['parts_off'], 1)}; with frozen gates {left} of its norm is left"


SHORT = 0.4
ROWS: list[tuple[str, str, str, Callable[[list[Entry], list[Entry]], str]]] = [
    ("a network equals the sum over its paths", "unraveled", "With ReLU bits", _measured),
    (
        "deleting one block, except a downsampling one, hardly matters",
        "lesion-single",
        "Deleting any one residual module",
        _measured,
    ),
    (
        "deleting any layer of a VGG leaves nothing of its accuracy above chance",
        "lesion-single",
        "Deleting any layer of a VGG",
        _measured,
    ),
    ("error rises smoothly with the number of deleted blocks", "lesion-many", "Error rises", _step),
    ("error rises smoothly as blocks are reordered", "lesion-reorder", "Error rises", _step),
    ("the gradient falls exponentially with a path's length", "path-gradients", "The gradient along", _decay),
    ("it comes from paths much shorter than most", "path-gradients", "The gradient comes", _mean_length),
    ("exact sums of short lengths explain 95 % of it", "path-gradients", "Almost all", _explained),
    ("training on short paths only is not worse", "effective-training", "Training with", _effective),
    ("stochastic depth makes single deletions cost less", "lesion-stochastic-depth", "Training with", _measured),
    ("a highway block's gradient is the sum of three parts", "highway", "The gradient through", _three_parts),
    ("gates biased towards carrying prefer short paths", "highway", "Gates biased", _measured),
]
"""Claims in short: the experiment, the first words of the claim, and the numbers to show."""


def claims(files: Mapping[str, Results]) -> str:
    """Return the paper's claims in short, with a column for each data set."""
    rows = [
        [title, *(_cell(results["experiments"].get(experiment, []), words, show) for results in files.values())]
        for title, experiment, words, show in ROWS
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


def _cell(entries: list[Entry], words: str, show: Callable[[list[Entry], list[Entry]], str]) -> str:
    """Return the verdict on a claim, and its numbers; it must hold for each of several networks.

    Args:
        entries: the runs of an experiment.
        words: first words of the claim.
        show: returns the numbers, from the runs and their claims.
    """
    # Where another mode was measured too, that of the paper is the first.
    in_papers_mode = _by_mode(entries)[0] if entries else []
    tests = [[claim for claim in entry["claims"] if claim["paper"].startswith(words)] for entry in in_papers_mode]
    if not all(tests) or not tests:
        return "not measured"
    claims = [of_entry[0] for of_entry in tests]
    mode = entries[0]["settings"].get("bn", PAPERS_MODE)
    other = "" if mode == PAPERS_MODE else f" in mode `{mode}`"
    return f"{_verdict(claims)}{other}: {show(in_papers_mode, claims)}"


def _by_mode(entries: list[Entry]) -> list[list[Entry]]:
    """Return runs grouped by their mode of batch normalisation, in the order of the file."""
    modes = dict.fromkeys(entry["settings"].get("bn") for entry in entries)
    return [[entry for entry in entries if entry["settings"].get("bn") == mode] for mode in modes]


def _verdict(claims: list[Entry]) -> str:
    return VERDICTS[all_of(*(claim["verdict"] for claim in claims))]


def verdicts(files: Mapping[str, Results]) -> str:
    """Return every claim of one file with its place in the paper, its bound, and what was measured."""
    ((_, results),) = files.items()
    rows = []
    for of_experiment in results["experiments"].values():
        modes = _by_mode(of_experiment)
        statements = dict.fromkeys(claim["paper"] for entry in of_experiment for claim in entry["claims"])
        for statement, entries in product(statements, modes):
            mode = entries[0]["settings"].get("bn", PAPERS_MODE)
            named = f", in mode `{mode}`" if len(modes) > 1 or mode != PAPERS_MODE else ""
            if row := _row(entries, statement, named):
                rows.append(row)
    return table(["the paper", "it holds if", "", "measured"], rows)


def _row(entries: list[Entry], statement: str, mode: str) -> list[str]:
    """Return a claim with its verdict, over the runs that test it; nothing if none does."""
    tested = {
        seed: claim for seed, entry in enumerate(entries) for claim in entry["claims"] if claim["paper"] == statement
    }
    if not tested:
        return []
    several = [f"network {seed}: {claim['measured']}" for seed, claim in tested.items()]
    first = next(iter(tested.values()))
    measured = "; ".join(several) if len(entries) > 1 else first["measured"]
    return [f"{statement} ({first['where']}{mode})", first["bound"], _verdict(list(tested.values())), measured]


TABLES = {"claims": claims, "verdicts": verdicts}
"""Tables by name."""
