"""Runs on stdout: tables, findings, claims and figures."""

from __future__ import annotations

from typing import Any

from pathnet import results
from pathnet.commands.printing import print_claims, print_json, print_table
from pathnet.commands.streams import say
from pathnet.experiments import path_gradients
from pathnet.experiments.comparison import compare
from pathnet.experiments.findings import findings_of
from pathnet.experiments.run import title
from pathnet.experiments.summary import findings
from pathnet.figures import table_6, table_exact, table_signed
from pathnet.paper import claims, draw

__all__ = ["print_gradients", "print_run", "print_runs"]


def print_runs(runs: list[results.Run], as_json: bool) -> None:
    """Draw the figures of runs, and print the runs."""
    if as_json:
        print_json({"runs": list(map(_facts, runs))}, [file for run in runs for file in draw(run)])
        return
    for run in runs:
        print_run(run, as_json=False)


def print_run(run: results.Run, as_json: bool) -> None:
    """Draw the figures of a run, and print its results, claims and files."""
    written = draw(run)
    if as_json:
        print_json(_facts(run), written)
        return
    if run.experiment == path_gradients.NAME:
        _print_tables(run)
    else:
        say(title(run.identity))
    print_claims(claims(run))
    say(run.folder, *written)


def print_gradients(run: results.Run, as_json: bool, test_accuracy: float | None = None) -> None:
    """Print a run of path gradients without its claims, and draw its figures.

    Args:
        test_accuracy: that of a network trained by the same command, for the JSON object.
    """
    if as_json:
        trained = {} if test_accuracy is None else {"test_accuracy": test_accuracy}
        print_json({**trained, **_facts(run)}, draw(run))
        return
    _print_tables(run)
    say(run.folder, *draw(run))


def _facts(run: results.Run) -> dict[str, Any]:
    summary = compare(run).as_json() if run.experiment == path_gradients.NAME else {}
    # run is the earlier name of out.
    return {"out": str(run.folder), "run": str(run.folder), "claims": list(map(vars, claims(run))), **summary}


def _print_tables(run: results.Run) -> None:
    result, heading = compare(run), title(run.identity)
    if result.sampled is not None:
        print_table(table_6(result.sampled, heading))
        say(*findings(result.sampled))
    if result.exact is not None:
        print_table(table_exact(result, result.exact, f"{heading}: exact"))
    if result.signed is not None:
        print_table(table_signed(result, result.signed, f"{heading}: signed"))
    for line in findings_of(result):
        say(line)
