"""Results of the paper's experiments as one small file: ``python -m benchmarks.paper FILE RUN... --command TEXT``.

Each RUN is the folder of a run, or of a study with many of them. The file holds what the runs say: their networks,
amounts and times, the paper's claims with their bounds, and the numbers behind them with 95 % intervals; and how the
networks were trained, where it is given their checkpoints.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu.facts import processor
from benchmarks.facts import commit_here
from benchmarks.results import PAPERS_MODE, write
from benchmarks.trainings import depths, trainings
from pathnet import lesion, models, paper, results
from pathnet.data import load
from pathnet.experiments import by_size, effective_training, highway, lesion_single
from pathnet.experiments.comparison import compare
from pathnet.experiments.findings import findings_of
from pathnet.experiments.lesion_single import SingleDeletions
from pathnet.experiments.summary import findings

__all__ = ["check_commands", "gathered", "main", "rankings"]

DIGITS = 6
"""Significant digits that are kept of each number."""

FACTS = ("pathnet", "torch", "python", "device")
NETWORK = ("config", "hash", "blocks")
LEFT_OUT = ("count", "std", "quantile_05", "quantile_50", "quantile_95", "zeros", "share", "log_intercept")
"""Numbers by length that a run's Parquet files tell."""


def gathered(runs: Sequence[results.Run], commands: Sequence[str], commit: str) -> dict[str, Any]:
    """Return the results of runs on one data set, as JSON holds them.

    Args:
        runs: the runs, each with the experiment's name in its identity.
        commands: the commands that measured them.
        commit: the commit of the code that measured them.

    Raises:
        ValueError: there are no runs, they are of several data sets, or the commands measure other experiments.
    """
    names = sorted({run.fact("data", "name") for run in runs if "data" in run.identity})
    if len(names) != 1:
        raise ValueError(f"runs: expected runs on one data set, got {', '.join(names) or 'none'}")
    check_commands(commands, {run.experiment for run in runs})
    attempts = [attempt for run in runs for attempt in run.facts["attempts"]]
    experiments: dict[str, list[dict[str, Any]]] = {}
    networks: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=_place):
        for kind, nets in _networks(run).items():
            known = networks.setdefault(kind, [])
            known += [net for net in nets if net not in known]
        experiments.setdefault(run.experiment, []).append(_experiment(run))
    facts = {key: sorted({attempt[key] for attempt in attempts if key in attempt}) for key in FACTS}
    return {
        "kind": "paper",
        "data": names[0],
        "date": max(attempt["started"] for attempt in attempts)[:10],
        "commit": commit,
        "processor": processor(),
        "facts": facts,
        "commands": list(commands),
        "networks": _kept(networks),
        "experiments": _kept(experiments),
    }


def _place(run: results.Run) -> tuple[int, bool]:
    """Return the place of a run in the file: by experiment as in the paper, first those in the paper's mode."""
    return list(paper.EXPERIMENTS).index(run.experiment), run.identity.get("bn", PAPERS_MODE) != PAPERS_MODE


def check_commands(commands: Sequence[str], experiments: Collection[str]) -> None:
    """Refuse commands that do not measure exactly these experiments.

    Raises:
        ValueError: a command measures nothing, an experiment has no command, or a command's experiment has no run.
    """
    measured: set[str] = set()
    for command in commands:
        match shlex.split(command):
            case ["pathnet", "gradients", *_]:
                measured.add("path-gradients")
            case ["pathnet", "figures", *options] if "--all" in options:
                measured |= paper.EXPERIMENTS.keys()
            case ["pathnet", name, *_] if name in paper.EXPERIMENTS:
                measured.add(name)
            case _:
                form = "`pathnet EXPERIMENT ...`, `pathnet gradients ...` or `pathnet figures --all ...`"
                raise ValueError(f"commands: expected {form}, got {command!r}")
    if missing := sorted(set(experiments) - measured):
        raise ValueError(f"commands: expected a command that runs {', '.join(missing)}, got {list(commands)}")
    if missing := sorted(measured - set(experiments)):
        raise ValueError(f"commands: expected runs of {', '.join(missing)}, got {', '.join(sorted(experiments))}")


def _networks(run: results.Run) -> dict[str, list[dict[str, Any]]]:
    """Return the networks of a run by kind; one of path gradients alone counts as residual."""
    networks = run.identity.get("networks", {})
    if "model" in run.identity:
        networks = {"residual": [run.fact("model")]}
    return {kind: [{key: net.get(key) for key in NETWORK} for net in nets] for kind, nets in networks.items()}


def _experiment(run: results.Run) -> dict[str, Any]:
    left_out = ("experiment", "data", "networks", "model")
    return {
        "settings": {key: value for key, value in run.identity.items() if key not in left_out},
        "amounts": dict(run.planned),
        "seconds": _seconds(run),
        "networks": {kind: [net["hash"] for net in nets] for kind, nets in _networks(run).items()},
        "claims": [vars(claim) for claim in paper.claims(run)],
        "numbers": _numbers(run),
    }


def _seconds(run: results.Run) -> float | None:
    """Return the time that all attempts took together; None if one was killed, or none was recorded yet."""
    times = [attempt.get("seconds") for attempt in run.facts["attempts"]]
    return None if None in times else math.fsum(times)


def _numbers(run: results.Run) -> dict[str, Any]:
    if run.experiment in ("lesion-single", "lesion-stochastic-depth"):
        return {kind: _deletions(deletions) for kind, deletions in lesion_single.summarise(run).items()}
    if run.experiment in ("lesion-many", "lesion-reorder"):
        return _by_size(run)
    if run.experiment == "path-gradients":
        comparison = compare(run)
        said = [*(findings(comparison.sampled) if comparison.sampled else []), *findings_of(comparison)]
        kept = {key: value for key, value in comparison.as_json().items() if key not in LEFT_OUT}
        return {**kept, "findings": said}
    if run.experiment == "effective-training":
        return asdict(effective_training.summarise(run))
    if run.experiment == "highway":
        summary = highway.summarise(run)
        return {**asdict(summary), "deletions": _deletions(summary.deletions)}
    return {}


def _deletions(deletions: SingleDeletions) -> dict[str, Any]:
    kept = {key: value for key, value in asdict(deletions).items() if key != "misclassified"}
    return {**kept, "intact": np.stack([deletions.intact, *deletions.intact_ends], 1)}


def _by_size(run: results.Run) -> dict[str, Any]:
    errors = by_size.summarise(run)
    if run.experiment == "lesion-reorder":
        errors = by_size.by_tau(errors)
    return {
        "sizes": errors.sizes,
        "means": [asdict(mean) for mean in errors.means],
        "tau": [tau.mean() for tau in errors.tau],
        "intact": errors.intact,
        **asdict(by_size.smooth(errors)),
        "draws": errors.draws,
        "seeds": errors.seeds,
    }


def rankings(weights: Sequence[Path], data: str, images: int) -> list[dict[str, Any]]:
    """Return how well first-order estimates rank the blocks of networks, as `pathnet.lesion.Ranking.agreement`.

    Args:
        weights: files of the networks.
        data: the data set, as `pathnet.data.load` takes it.
        images: number of test images; 0 for all.
    """
    rows = []
    for file in weights:
        ranking = lesion.rank(models.load(file).eval(), load(data), images=images)
        agreement = {by: ranking.agreement(by) for by in ("taylor", "first_order")}
        rows.append({"network": file.stem, "blocks": len(ranking.loss), "images": images, "agreement": agreement})
    return rows


def _kept(value: Any) -> Any:
    """Return plain lists and numbers of a few digits, and None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _kept(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _kept(value.tolist())
    if isinstance(value, list | tuple):
        return [_kept(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("file", type=Path, help="the file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs or of studies")
    parser.add_argument("--command", action="append", default=[], help="a command that measured them; repeatable")
    parser.add_argument("--commit", help="the commit that measured them, if it is not the one here")
    parser.add_argument("--rank", type=Path, action="append", default=[], help="a network to rank; repeatable")
    parser.add_argument("--data", default="digits", help="the data set to rank on")
    parser.add_argument(
        "--trained",
        type=Path,
        action="append",
        default=[],
        help="the checkpoint of a training that has ended; repeatable",
    )
    parser.add_argument(
        "--depths",
        type=Path,
        action="append",
        default=[],
        help="the CSV file of effective depths of a --trained, with its name; repeatable",
    )
    parser.add_argument("--images", type=int, default=0, help="test images to rank on; 0 for all")
    options = parser.parse_args(arguments)
    folders = sorted({file.parent for place in options.runs for file in place.rglob("run.json")})
    runs = [results.read(folder) for folder in folders]
    content = gathered(runs, options.command, options.commit or commit_here() or "unknown")
    trained = trainings(options.trained, {run.fact("data", "hash") for run in runs if "data" in run.identity})
    measured = depths(options.depths, trained)
    ranked = _kept(rankings(options.rank, options.data, options.images))
    write(options.file, {**content, "rankings": ranked, "trainings": _kept(trained), "depths": _kept(measured)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
