"""What a run's findings come to: the ratios that the design asks for, each beside its goal.

Times are means over all lengths 1 to n, from the lengths that were timed and straight lines between them. A forward
pass is counted once a batch, on which one path of each length is measured: an n-th of it falls to each path.
"""

from __future__ import annotations

from typing import Any

from benchmarks.cpu.fitting import mean_over_lengths, straight_line

__all__ = ["Figure", "figures", "lines_by_length"]

Figure = dict[str, Any]
"""``figure``; ``sense`` (at least, at most); ``goal`` or None; ``walks`` without the forward pass, ``counted`` with
it; ``met``, or None where nothing was measured. The goal is held against ``counted`` where there is one."""

LOOP = {"float32": 30.0, "bfloat16": 80.0}
COMPOSITION = {
    ("running", "float32"): 4.5,
    ("running", "bfloat16"): 7.0,
    ("batch", "float32"): 2.5,
    ("batch", "bfloat16"): 2.5,
}
PEAK_SHARE, DELETIONS_SHARE, TRAINING_SHARE = 0.85, 0.25, 0.5
SUMS_SHARE = 1.3
SUMS_SECONDS = {("running", "float32", 32): 0.5}


def figures(found: dict[str, Any]) -> list[Figure]:
    """All ratios; those whose step failed, or whose competitor was refused, hold no number."""
    rows = found.get("lengths", {}).get("rows", [])
    n = found.get("lengths", {}).get("blocks", 0)
    swept = {(row["bn"], row["precision"]): row["median_s"] for row in found.get("sweep", {}).get("rows", [])}
    asked = [("loop", "running", precision, goal) for precision, goal in LOOP.items()]
    asked += [("composition", bn, precision, goal) for (bn, precision), goal in COMPOSITION.items()]
    judged = []
    for name, bn, precision, goal in asked:
        other_precision = "float32" if name == "loop" else precision
        other, other_forward = _mean(rows, n, name, bn, other_precision)
        own, own_forward = _mean(rows, n, "pathnet", bn, precision)
        title = f"times faster than the {name}, {bn}, {precision}"
        judged.append(_figure(title, "at least", goal, _ratio(other, own), _ratio(other_forward, own_forward)))
        sweep = swept.get((bn, precision))
        walks = None if sweep is None else sweep / n
        forward = None if walks is None or own is None or own_forward is None else walks + own_forward - own
        title += ", one call"
        judged.append(_figure(title, "at least", None, _ratio(other, walks), _ratio(other_forward, forward)))
    share = found.get("peak_share", {}).get("share_of_peak", {}).get("float32")
    judged.append(_figure(_peak_title(found), "at least", PEAK_SHARE, share, None))
    for precision, own in found.get("deletions", {}).get("share_of_eager", {"float32": None}).items():
        title = f"deletions, share of eager forward passes, {precision}"
        judged.append(_figure(title, "at most", DELETIONS_SHARE, None, own))
    for row in found.get("sums", {}).get("rows", []):
        which = row["bn"], row["precision"], row["batch"]
        title = f"exact sums by length, share of as many modules one by one, {', '.join(map(str, which))} images"
        judged.append(_figure(title, "at most", SUMS_SHARE, row["share"], None))
        if "norms_share" in row:
            judged.append(_figure(f"{title}, norms alone", "at most", SUMS_SHARE, row["norms_share"], None))
        if which in SUMS_SECONDS:
            seconds = row["timings"]["sums"]["median_s"]
            title = f"exact sums by length, seconds, {', '.join(map(str, which))} images"
            judged.append(_figure(title, "at most", SUMS_SECONDS[which], seconds, None))
    training = found.get("training", {})
    modules = f"{training['drawn']} of {training['modules']} modules" if training else "modules"
    title = f"training step with {modules} drawn, share of a whole one, float32"
    judged.append(_figure(title, "at most", TRAINING_SHARE, None, training.get("share")))
    return judged


def lines_by_length(found: dict[str, Any]) -> dict[str, Figure]:
    """Straight lines through everyone's time against length, of the walk alone."""
    walks: dict[str, list[tuple[int, float]]] = {}
    for row in found.get("lengths", {}).get("rows", []):
        if row["part"] == "walk":
            name = f"{row['name']}, {row['bn']}, {row['precision']}"
            walks.setdefault(name, []).append((row["length"], row["median_s"]))
    return {name: vars(straight_line(*zip(*own, strict=True))) for name, own in walks.items()}


def _mean(rows: list[Any], n: int, name: str, bn: str, precision: str) -> tuple[float | None, float | None]:
    """Mean seconds a path, of the walks alone and with the forward pass; the loop's walk holds its own forward."""
    own = [row for row in rows if (row["name"], row["bn"], row["precision"]) == (name, bn, precision)]
    walks = [row for row in own if row["part"] == "walk"]
    if not walks:
        return None, None
    walk = mean_over_lengths([row["length"] for row in walks], [row["median_s"] for row in walks], n)
    return walk, walk + sum(row["median_s"] for row in own if row["part"] == "forward") / n


def _peak_title(found: dict[str, Any]) -> str:
    own = found.get("peak_share", {})
    peak, name = own.get("peak", {}).get("float32", "peak"), own.get("instruction_set", "no tiles")
    return f"share of the peak of {peak}, {name}"


def _ratio(other: float | None, own: float | None) -> float | None:
    return None if other is None or own is None else other / own


def _figure(title: str, sense: str, goal: float | None, walks: float | None, counted: float | None) -> Figure:
    judged = walks if counted is None else counted
    met = None
    if judged is not None and goal is not None:
        met = judged >= goal if sense == "at least" else judged <= goal
    return {"figure": title, "sense": sense, "goal": goal, "walks": walks, "counted": counted, "met": met}
