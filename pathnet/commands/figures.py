"""``pathnet figures``: redraw the figures of a run, or reproduce the whole paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathnet import study as studies
from pathnet.commands.places import check_existing_run, check_folder_to_write
from pathnet.commands.shared import reporter_of
from pathnet.commands.streams import say
from pathnet.commands.studies import StudySettings, study_on
from pathnet.paper import EXPERIMENTS, claims
from pathnet.settings import Checked, Flag, Help
from pathnet.workers import Workers, torchrun

if TYPE_CHECKING:
    from pathnet.results import Run

__all__ = ["EPILOG", "FiguresSettings", "figures"]

EPILOG = "With --all, settings default to the preset's."


def _check_run(name: str, run: Path) -> None:
    check_existing_run(name, run)
    check_folder_to_write(name, run)


@dataclass(frozen=True, kw_only=True)
class FiguresSettings(StudySettings):
    """Settings of ``pathnet figures``."""

    run: Annotated[
        Path | None,
        Help("Folder of a run whose figures are redrawn."),
        Flag(value="FOLDER", positional=True),
        Checked(_check_run),
    ] = None
    everything: Annotated[
        bool, Help("Reproduce the whole paper with a preset: train, measure, draw, write report.html."), Flag("--all")
    ] = False


def figures(settings: FiguresSettings) -> None:
    """Redraw a run's figures from its measurements, or reproduce the whole paper with --all."""
    from pathnet import report, results
    from pathnet.commands.printing import print_claims, print_json
    from pathnet.commands.runs import print_run
    from pathnet.experiments.claims import in_words

    if settings.everything == (settings.run is not None):
        got = "both" if settings.everything else "neither"
        raise typer.BadParameter(f"run: expected a run's folder or --all, got {got}")
    if settings.run is not None:
        print_run(results.read(settings.run), settings.as_json)
        return
    workers = torchrun()
    name, runs = _measured(settings, workers)
    if not workers.leads:
        return
    place = settings.place
    page = report.write(runs, f"All of the paper on {name}", place / "report.html")
    said = [claim for run in runs for claim in claims(run)]
    if settings.as_json:
        print_json({"claims": list(map(vars, said))}, [page])
    else:
        print_claims(said)
        say(f"of {len(said)} claims, {in_words(said)}", place, page)


def _measured(settings: FiguresSettings, workers: Workers) -> tuple[str, list[Run]]:
    """Return the name of the data, and the runs of every experiment, after training and measuring what is missing."""
    study, runs, show = settings.study, list["Run"](), reporter_of(workers)
    with study_on(settings, workers) as (data, networks):
        for name in EXPERIMENTS:
            runs += studies.measured(name, networks(name), data, study.plan, settings.place, show, study, workers)
    return data.name, runs
