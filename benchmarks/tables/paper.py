"""Tables of the paper's claims, from the files of `benchmarks.paper`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.tables.markdown import file_names, listed, number, percent, spread, table

__all__ = ["TABLES"]

Results = dict[str, Any]
Entry = dict[str, Any]

HELD = {True: "held", False: "**not**"}


def _worst(entries: list[Entry]) -> str:
    """Return the cost of the block whose deletion costs most, except downsampling ones, and that of the median."""
    numbers = entries[0]["numbers"]["residual"]
    plain = {i: cost for i, cost in enumerate(_costs(numbers)) if i not in numbers["downsampling"]}
    worst = max(plain, key=plain.__getitem__)
    middle = sorted(plain.values())
    median = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
    return f"block {worst} costs {number(100 * plain[worst], 2)} points of error, the median block {_points(median)}"


def _costs(numbers: Entry) -> list[float]:
    """Return the increase of the error without each block, the mean over seeds."""
    seeds = list(zip(numbers["rate"], numbers["intact"], strict=True))
    return [sum(rates[i] - intact[0] for rates, intact in seeds) / len(seeds) for i in range(len(numbers["rate"][0]))]


def _points(value: float) -> str:
    return number(100 * value, 2)


def _measured(index: int) -> Callable[[list[Entry]], str]:
    """Return a function that quotes a claim's measurement up to the first semicolon or bracket."""
    return lambda entries: entries[0]["claims"][index]["measured"].split(";")[0].split(" (")[0]


def _step(entries: list[Entry]) -> str:
    numbers = entries[0]["numbers"]
    last = numbers["means"][-1]
    return (
        f"from {percent(numbers['intact'])} to {spread(last['mean'], last['low'], last['high'])}; largest step "
        f"{percent(numbers['largest_step'], 2)} of the rise"
    )


def _decay(entries: list[Entry]) -> str:
    """Return the factor of each network with its 95 % interval."""
    factors = [entry["numbers"]["decay"] for entry in entries]
    return f"factor {listed([f'{number(mean)} ({number(low)} to {number(high)})' for mean, low, high in factors])}"


def _mean_length(entries: list[Entry]) -> str:
    lengths = [
        number(sum(length * share for length, share in enumerate(entry["numbers"]["product"], 1)))
        for entry in entries
    ]
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


def _openness(entries: list[Entry]) -> str:
    gates = [gate["mean"] for gate in entries[0]["numbers"]["openness"]]
    return f"open by {number(sum(gates) / len(gates))} in the mean"


SHORT = 0.4
ROWS: list[tuple[str, str, int, Callable[[list[Entry]], str]]] = [
    ("a network equals the sum over its paths", "unraveled", 1, _measured(1)),
    ("deleting one block, except a downsampling one, hardly matters", "lesion-single", 0, _worst),
    ("deleting any layer of a VGG leaves nothing of its accuracy above chance", "lesion-single", 2, _measured(2)),
    ("error rises smoothly with the number of deleted blocks", "lesion-many", 0, _step),
    ("error rises smoothly as blocks are reordered", "lesion-reorder", 0, _step),
    ("the gradient falls exponentially with a path's length", "path-gradients", 0, _decay),
    ("it comes from paths much shorter than most", "path-gradients", 1, _mean_length),
    ("exact sums of short lengths explain 95 % of it", "path-gradients", 2, _explained),
    ("training on short paths only is not worse", "effective-training", 0, _effective),
    ("stochastic depth makes single deletions cost less", "lesion-stochastic-depth", 0, _measured(0)),
    ("a highway block's gradient is the sum of three parts", "highway", 1, _three_parts),
    ("gates biased towards carrying prefer short paths", "highway", 2, _openness),
]
"""Claims in short: the experiment, the number of the claim among its claims, and the numbers to show."""


def claims(files: Mapping[str, Results]) -> str:
    """Return the paper's claims in short, with a column for each data set."""
    rows = [
        [title, *(_cell(results["experiments"].get(experiment), index, show) for results in files.values())]
        for title, experiment, index, show in ROWS
    ]
    header = ["claim", *(results["data"] for results in files.values())]
    return f"{table(header, rows)}\n\nFiles: {file_names(list(files))}."


def _cell(entries: list[Entry] | None, index: int, show: Callable[[list[Entry]], str]) -> str:
    """Return whether a claim held, and its numbers; of several networks, all must hold."""
    if entries is None:
        return "not measured"
    return f"{HELD[all(entry['claims'][index]['held'] for entry in entries)]}: {show(entries)}"


def verdicts(files: Mapping[str, Results]) -> str:
    """Return every claim of one file with its place in the paper, its bound, and what was measured."""
    ((_, results),) = files.items()
    rows = []
    for entries in results["experiments"].values():
        for index, claim in enumerate(entries[0]["claims"]):
            texts = [entry["claims"][index]["measured"] for entry in entries]
            several = [f"network {seed}: {text}" for seed, text in enumerate(texts)]
            held = HELD[all(entry["claims"][index]["held"] for entry in entries)]
            measured = "; ".join(several if len(texts) > 1 else texts)
            rows.append([f"{claim['paper']} ({claim['where']})", claim["bound"], held, measured])
    return table(["the paper", "it holds if", "", "measured"], rows)


TABLES = {"claims": claims, "verdicts": verdicts}
"""Tables by name."""
