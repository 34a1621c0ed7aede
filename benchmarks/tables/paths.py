"""Tables of the numbers behind the claims, from the files of `benchmarks.paper`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.tables.markdown import listed, number, percent, spread, table, with_ends
from benchmarks.tables.runs import differences
from pathnet.experiments.summary import MOST, PAPER_BLOCKS, PAPER_CENTRAL, PAPER_EFFECTIVE

__all__ = ["TABLES"]

Results = dict[str, Any]

PAPER_MEASUREMENTS = 1000 * PAPER_BLOCKS
"""Path gradients that the paper measures: 1,000 of each length."""
PAPER_SHORT = 0.0045
"""Share of all paths that the paper's effective lengths hold."""


def source(files: Mapping[str, Results]) -> str:
    """Return where and when a file's numbers were measured, and by which commands."""
    ((file, results),) = files.items()
    facts = results["facts"]
    commands = "\n".join(f"- `{command}`" for command in results["commands"])
    return (
        f"`benchmarks/results/{file}`: {results['date']}, commit {results['commit']}, pathnet "
        f"{listed(facts['pathnet'])}, torch {listed(facts['torch'])}, {results['processor']} "
        f"({listed(facts['device'])}), by\n\n{commands}"
    )


def deletions(files: Mapping[str, Results]) -> str:
    """Return the errors of networks of each kind, intact and without the blocks that cost most."""
    ((_, results),) = files.items()
    kinds: dict[str, dict[str, Any]] = {}
    for experiment in ("lesion-single", "lesion-stochastic-depth", "highway"):
        for entry in results["experiments"].get(experiment, []):
            numbers = {"highway": entry["numbers"]["deletions"]} if experiment == "highway" else entry["numbers"]
            kinds |= {kind: of_kind for kind, of_kind in numbers.items() if kind not in kinds}
    rows = []
    for kind, numbers in kinds.items():
        for seed, intact in enumerate(numbers["intact"]):
            ends = list(zip(numbers["rate"][seed], numbers["low"][seed], numbers["high"][seed], strict=True))
            first, changing = numbers["first"], numbers["downsampling"]
            texts = [f"{i + first}: {spread(*error)}" for i, error in enumerate(ends)]
            order = sorted(range(len(ends)), key=lambda i: -ends[i][0])
            plain = [i for i in order if i not in changing]
            rows.append(
                [
                    f"{kind} {seed}" if len(numbers["intact"]) > 1 else kind,
                    str(numbers["images"]),
                    spread(*intact),
                    "; ".join(texts[i] for i in plain[:3]),
                    percent(ends[plain[len(plain) // 2]][0]),
                    texts[order[-1]],
                    "; ".join(texts[i] for i in changing),
                ]
            )
    header = [
        "network",
        "test images",
        "intact",
        "without one of the worst three",
        "median",
        "without the least",
        "without a downsampling or pooling one",
    ]
    return table(header, rows)


def sizes(files: Mapping[str, Results]) -> str:
    """Return the mean errors of random lesions by their size: a column for each run."""
    runs = _named(files, "lesion-many")
    columns = [
        {0: percent(numbers["intact"])}
        | {
            size: spread(mean["mean"], mean["low"], mean["high"])
            for size, mean in zip(numbers["sizes"], numbers["means"], strict=True)
        }
        for _, numbers in runs
    ]
    shown = sorted({size for column in columns for size in column} & SIZES)
    rows = [[str(size), *(column.get(size, "") for column in columns)] for size in shown]
    return table(["blocks deleted", *(name for name, _ in runs)], rows)


def _named(files: Mapping[str, Results], experiment: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the numbers of the runs of an experiment by a name that tells them apart."""
    names = [results["data"] for results in files.values()]
    runs = []
    for results in files.values():
        entries = results["experiments"].get(experiment, [])
        for entry, words in zip(entries, differences(entries), strict=True):
            # Files on one data set hold networks of different depths.
            blocks = [f"{_blocks(results, entry)} blocks"] if names.count(results["data"]) > 1 else []
            runs.append((", ".join([results["data"], *blocks, *words]), entry["numbers"]))
    return runs


def _blocks(results: Results, entry: Mapping[str, Any]) -> int:
    """Return the number of blocks of a run's networks."""
    return int(entry["numbers"]["n"] if "n" in entry["numbers"] else results["networks"]["residual"][0]["blocks"])


SIZES = {0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20}


def orders(files: Mapping[str, Results]) -> str:
    """Return the mean errors of reordered networks by Kendall's tau: two columns for each run."""
    columns, cells = [], []
    for name, numbers in _named(files, "lesion-reorder"):
        columns += [f"tau, {name}", "error"]
        taus = [number(tau) for tau in numbers["tau"]]
        cells += [taus, [spread(mean["mean"], mean["low"], mean["high"]) for mean in numbers["means"]]]
    return table(columns, list(zip(*cells, strict=True)))


def gradients(files: Mapping[str, Results]) -> str:
    """Return what the gradients of paths add up to: a column for each run, and the paper's beside its network."""
    runs = _named(files, "path-gradients")
    columns = [(name, _gradients(numbers)) for name, numbers in runs]
    if PAPER_BLOCKS in [numbers["n"] for _, numbers in runs]:
        columns.insert(0, ("the paper", PAPER))
    titles = [title for title in TITLES if any(title in cells for _, cells in columns)]
    rows = [[title, *(cells.get(title, "") for _, cells in columns)] for title in titles]
    return table(["", *(name for name, _ in columns)], rows)


AMOUNTS = "blocks, path gradients, batches"
DECAY = "each module multiplies the mean norm by"
ENDS = "mean norm at length 1, and at the longest"
EFFECTIVE = "effective paths"
CENTRAL = "most paths"
LENGTH = "mean length by frequency times magnitude"
EXACT = "batches with exact sums"
LENGTH_BY_EXACT = "mean length by the norms of exact sums"
EXPLAINED = "lengths that explain 95 % of the gradient"
WITHIN = "cancelling between paths of one effective length"
BETWEEN = "cancelling between lengths"
COSINE = "cosine of neighbouring lengths"
TITLES = (
    AMOUNTS,
    DECAY,
    ENDS,
    EFFECTIVE,
    CENTRAL,
    LENGTH,
    EXACT,
    LENGTH_BY_EXACT,
    EXPLAINED,
    WITHIN,
    BETWEEN,
    COSINE,
)
"""Rows of the table of gradients; a run that lacks a method leaves the method's cells empty."""
PAPER = {
    AMOUNTS: f"{PAPER_BLOCKS}, {PAPER_MEASUREMENTS}",
    EFFECTIVE: f"lengths {PAPER_EFFECTIVE[0]} to {PAPER_EFFECTIVE[1]}: almost all of the gradient, "
    f"{percent(PAPER_SHORT)} of all paths",
    CENTRAL: f"lengths {PAPER_CENTRAL[0]} to {PAPER_CENTRAL[1]}: more than {percent(MOST)} of all paths",
}
"""What the paper says of its network, by row."""


def _gradients(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of a run by the titles of their rows."""
    cells = _sampled(numbers) if "decay" in numbers else {AMOUNTS: str(numbers["n"])}
    cells |= _exact(numbers) if "exact" in numbers else {}
    if "cancelling" in numbers:
        effective, ratios = numbers["effective"], numbers["cancelling"]["mean"]
        times = [1 / ratios[length - 1] for length in range(effective["first"], effective["last"] + 1)]
        cells[WITHIN] = (
            f"their norms add up to {number(min(times))} to {number(max(times))} times the norm of their sum"
        )
    return cells


def _sampled(numbers: Mapping[str, Any]) -> dict[str, str]:
    return {
        AMOUNTS: f"{numbers['n']}, {number(numbers['measurements'], 6)}, {numbers['batches']}",
        DECAY: with_ends(*numbers["decay"]),
        ENDS: ", ".join(number(numbers["mean"][i], 2) for i in (0, -1)),
        EFFECTIVE: _shares(numbers["effective"]),
        CENTRAL: _shares(numbers["central"]),
        LENGTH: with_ends(*numbers["mean_length"]),
    }


def _exact(numbers: Mapping[str, Any]) -> dict[str, str]:
    n, exact = numbers["n"], numbers["exact"]
    most = next(k for k in range(n + 1) if min(exact["explained"]["mean"][k:]) >= MOST)
    short = sum(math.comb(n, length) for length in range(most + 1)) / 2**n
    norms = exact["norm"]["mean"]
    by_exact = sum(length * norm for length, norm in enumerate(norms)) / sum(norms[1:])
    # A sum that is exactly 0 has no direction.
    cosine = [value for value in exact["next_cosine"]["mean"] if value is not None]
    left, between = percent(exact["left"]["mean"][most]), number(sum(norms) / exact["full_norm"])
    return {
        EXACT: str(exact["batches"]),
        LENGTH_BY_EXACT: number(by_exact),
        EXPLAINED: f"up to {most}, {percent(short)} of all paths; they leave {left} of its norm",
        BETWEEN: f"the norms of their sums add up to {between} times the norm of the gradient",
        COSINE: f"{number(min(cosine), 2)} to {number(max(cosine), 2)}",
    }


def _shares(lengths: Mapping[str, Any]) -> str:
    shares = f"{percent(lengths['gradient'])} of frequency times magnitude, {percent(lengths['paths'])} of all paths"
    return f"lengths {lengths['first']} to {lengths['last']}: {shares}"


def costs(files: Mapping[str, Results]) -> str:
    """Return the relative standard deviations of a sampled path and of a signed draw of equal cost by length."""
    ((_, results),) = files.items()
    numbers = next(
        entry["numbers"] for entry in results["experiments"]["path-gradients"] if "cost" in entry["numbers"]
    )
    cost, trusted = numbers["cost"], numbers["signed"]["trusted"]
    rows = []
    for length, (path, draw, settled) in enumerate(
        zip(cost["sampled"], cost["signed"], cost["settled"], strict=True), 1
    ):
        less = ("the draw" if draw < path else "the path") if settled else "open"
        rows.append([str(length), number(path, 2), number(draw, 2), less, "yes" if trusted[length] else "no"])
    header = ["length", "one sampled path", "one signed draw", "varies less", "draws can be trusted"]
    return f"{cost['batches']} batches:\n\n{table(header, rows)}"


def rankings(files: Mapping[str, Results]) -> str:
    """Return how well first-order estimates rank blocks: a row for each network."""
    rows = [
        [
            results["data"],
            row["network"],
            str(row["blocks"]),
            "all" if row["images"] == 0 else str(row["images"]),
            *(number(row["agreement"][by], 2) for by in ("taylor", "first_order")),
        ]
        for results in files.values()
        for row in results["rankings"]
    ]
    return table(["data", "network", "blocks", "test images", "tau of `taylor`", "tau of `first_order`"], rows)


TABLES = {
    "costs": costs,
    "deletions": deletions,
    "gradients": gradients,
    "orders": orders,
    "rankings": rankings,
    "sizes": sizes,
    "source": source,
}
"""Tables by name."""
