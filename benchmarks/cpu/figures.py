"""The figures of a run: the ratios that have goals in the design, with their goals.

Times are means over all lengths 1 to n, interpolated linearly between timed lengths. A forward pass counts once a
batch, on which one path of each length is measured, so each path bears 1/n of it.
"""

from __future__ import annotations

from typing import Any

from benchmarks.cpu.fitting import mean_over_lengths, straight_line
from benchmarks.cpu.training.goals import goals

__all__ = ["Figure", "figures", "lines_by_length"]

Figure = dict[str, Any]
"""``figure``; ``sense`` (at least, at most); ``goal`` or None; ``walks`` without the forward pass, ``counted`` with
it;
``met``, or None if nothing was measured. The goal applies to ``counted`` if there is one, else to ``walks``."""

LOOP = {"float32": 30.0, "bfloat16": 80.0}
COMPOSITION = {
    ("running", "float32"): 4.5,
    ("running", "bfloat16"): 7.0,
    ("batch", "float32"): 2.5,
    ("batch", "bfloat16"): 2.5,
}
PEAK_SHARE, DELETIONS_SHARE = 0.85, 0.25
SUMS_SHARE = 1.3
SUMS_SECONDS = {("running", "float32", 32): 0.5}


def figures(findings: dict[str, Any]) -> list[Figure]:
    """Return all ratios; without a number if their step failed or their competitor was refused."""
    rows = findings.get("lengths", {}).get("rows", [])
    n = findings.get("lengths", {}).get("blocks", 0)
    swept = {(row["bn"], row["precision"]): row["median_s"] for row in findings.get("sweep", {}).get("rows", [])}
    ratios = [("loop", "running", precision, goal) for precision, goal in LOOP.items()]
    ratios += [("composition", bn, precision, goal) for (bn, precision), goal in COMPOSITION.items()]
    judged = []
    for name, bn, precision, goal in ratios:
        rival_precision = "float32" if name == "loop" else precision
        rival, rival_counted = _mean(rows, n, name, bn, rival_precision)
        ours, ours_counted = _mean(rows, n, "pathnet", bn, precision)
        title = f"times faster than the {name}, {bn}, {precision}"
        judged.append(_figure(title, "at least", goal, _ratio(rival, ours), _ratio(rival_counted, ours_counted)))
        sweep = swept.get((bn, precision))
        walks = None if sweep is None else sweep / n
        counted = None if walks is None or ours is None or ours_counted is None else walks + ours_counted - ours
        title += ", one call"
        judged.append(_figure(title, "at least", None, _ratio(rival, walks), _ratio(rival_counted, counted)))
    share = findings.get("peak_share", {}).get("share_of_peak", {}).get("float32")
    judged.append(_figure(_peak_title(findings), "at least", PEAK_SHARE, share, None))
    for precision, share in findings.get("deletions", {}).get("share_of_eager", {"float32": None}).items():
        title = f"deletions, share of eager forward passes, {precision}"
        judged.append(_figure(title, "at most", DELETIONS_SHARE, None, share))
    for row in findings.get("sums", {}).get("rows", []):
        which = row["bn"], row["precision"], row["batch"]
        title = f"exact sums by length, share of as many modules one by one, {', '.join(map(str, which))} images"
        judged.append(_figure(title, "at most", SUMS_SHARE, row["share"], None))
        if "norms_share" in row:
            judged.append(_figure(f"{title}, norms alone", "at most", SUMS_SHARE, row["norms_share"], None))
        if which in SUMS_SECONDS:
            seconds = row["timings"]["sums"]["median_s"]
            title = f"exact sums by length, seconds, {', '.join(map(str, which))} images"
            judged.append(_figure(title, "at most", SUMS_SECONDS[which], seconds, None))
    training = goals(findings.get("training", {}))
    judged += [_figure(goal.title, goal.sense, goal.limit, None, goal.value) for goal in training]
    return judged


def lines_by_length(findings: dict[str, Any]) -> dict[str, Figure]:
    """Return straight lines through each competitor's time of the backward pass alone against length."""
    walks: dict[str, list[tuple[int, float]]] = {}
    for row in findings.get("lengths", {}).get("rows", []):
        if row["part"] == "walk":
            name = f"{row['name']}, {row['bn']}, {row['precision']}"
            walks.setdefault(name, []).append((row["length"], row["median_s"]))
    return {name: vars(straight_line(*zip(*points, strict=True))) for name, points in walks.items()}


def _mean(rows: list[Any], n: int, name: str, bn: str, precision: str) -> tuple[float | None, float | None]:
    """Return mean seconds per path, without and with the forward pass; the loop's backward pass includes its forward
    pass."""
    timed = [row for row in rows if (row["name"], row["bn"], row["precision"]) == (name, bn, precision)]
    walks = [row for row in timed if row["part"] == "walk"]
    if not walks:
        return None, None
    walk = mean_over_lengths([row["length"] for row in walks], [row["median_s"] for row in walks], n)
    return walk, walk + sum(row["median_s"] for row in timed if row["part"] == "forward") / n


def _peak_title(findings: dict[str, Any]) -> str:
    peak_share = findings.get("peak_share", {})
    peak, name = peak_share.get("peak", {}).get("float32", "peak"), peak_share.get("instruction_set", "no tiles")
    return f"share of the peak of {peak}, {name}"


def _ratio(rival: float | None, ours: float | None) -> float | None:
    return None if rival is None or ours is None else rival / ours


def _figure(title: str, sense: str, goal: float | None, walks: float | None, counted: float | None) -> Figure:
    judged = walks if counted is None else counted
    met = None
    if judged is not None and goal is not None:
        met = judged >= goal if sense == "at least" else judged <= goal
    return {"figure": title, "sense": sense, "goal": goal, "walks": walks, "counted": counted, "met": met}
