"""One command for each experiment of the paper: ``pathnet lesion-single`` and the like."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from pathnet import study as studies
from pathnet.commands.flags import Command, command_of
from pathnet.commands.shared import device_of
from pathnet.commands.studies import OnStudy, loaded, study_on
from pathnet.experiments.plans import Plan
from pathnet.paper import EXPERIMENTS, Experiment
from pathnet.progress import reporter
from pathnet.settings import Flag, Help
from pathnet.study import KINDS
from pathnet.training import Recipe

__all__ = ["EPILOG", "OfExperiment", "experiment_command"]

EPILOG = (
    "Settings default to the preset's. The settings of pathnet figures --all that are not listed here are accepted, "
    "and change nothing."
)


@dataclass(frozen=True, kw_only=True)
class OfExperiment(OnStudy):
    """Settings of the command of an experiment."""

    weights: Annotated[
        list[str] | None,
        Help("Network to take in place of the preset's, as FILE or KIND=FILE; can be repeated."),
        Flag(value="FILE", default="trained"),
    ] = None


def experiment_command(name: str) -> Command:
    """Return the command of an experiment, whose help shows the settings that the experiment reads."""
    experiment = EXPERIMENTS[name]

    def run(settings: OfExperiment) -> None:
        from pathnet.commands.runs import print_runs

        study, place = settings.study, settings.place
        with study_on(settings) as (data, networks):
            from_files = loaded(settings.weights or [], experiment, device_of(settings.device))
            nets, trained_by = (from_files, None) if from_files else (networks(name), study)
            runs = studies.measured(name, nets, data, study.plan, place, reporter, trained_by)
        print_runs(runs, settings.as_json)

    run.__doc__ = f"{experiment.about} ({experiment.paper})"
    return command_of(OfExperiment, run, _unread(experiment))


def _unread(experiment: Experiment) -> set[str]:
    """Return the names of the settings that change nothing in an experiment."""
    of_plan = {field.name for field in fields(Plan)} - set(experiment.settings)
    of_networks = {name for _, arguments in KINDS.values() for name in arguments.values()}
    read = {name for kind in experiment.networks for name in KINDS[kind][1].values()}
    unread = of_plan | (of_networks - read)
    if not experiment.networks:
        unread |= {"seeds", "weights", *(field.name for field in fields(Recipe))}
    return unread
