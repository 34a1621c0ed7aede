"""One command for each experiment of the paper: ``pathnet lesion-single`` and the like."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from pathnet import study as studies
from pathnet.commands.flags import Callback, command_of
from pathnet.commands.shared import device_of, reporter_of
from pathnet.commands.studies import StudySettings, loaded, study_on
from pathnet.experiments.plans import Plan
from pathnet.paper import EXPERIMENTS, Experiment
from pathnet.settings import Flag, Help
from pathnet.study import KINDS
from pathnet.training import Recipe
from pathnet.workers import torchrun

__all__ = ["EPILOG", "ExperimentSettings", "experiment_command"]

EPILOG = (
    "Settings default to the preset's. All settings of pathnet figures --all are accepted; those not listed have no "
    "effect here."
)


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings(StudySettings):
    """Settings of the command of an experiment."""

    weights: Annotated[
        list[str] | None,
        Help("Use this trained network instead of the preset's: FILE or KIND=FILE, repeatable."),
        Flag(value="FILE", default="train it"),
    ] = None


def experiment_command(name: str) -> Callback:
    """Return the command of an experiment, whose help shows the settings that the experiment reads."""
    experiment = EXPERIMENTS[name]

    def run(settings: ExperimentSettings) -> None:
        from pathnet.commands.runs import print_runs

        study, place, workers = settings.study, settings.place, torchrun()
        with study_on(settings, workers) as (data, networks):
            from_files = loaded(settings.weights or [], experiment, device_of(settings.device, workers))
            nets, trained_by = (from_files, None) if from_files else (networks(name), study)
            runs = studies.measured(name, nets, data, study.plan, place, reporter_of(workers), trained_by, workers)
        if workers.leads:
            print_runs(runs, settings.as_json)

    run.__doc__ = f"{experiment.about} ({experiment.paper})"
    return command_of(ExperimentSettings, run, _unread(experiment))


def _unread(experiment: Experiment) -> set[str]:
    """Return the names of the settings that change nothing in an experiment."""
    of_plan = {field.name for field in fields(Plan)} - set(experiment.settings)
    of_networks = {name for _, arguments in KINDS.values() for name in arguments.values()}
    read = {name for kind in experiment.networks for name in KINDS[kind][1].values()}
    unread = of_plan | (of_networks - read)
    if not experiment.networks:
        unread |= {"seeds", "weights", *(field.name for field in fields(Recipe))}
    return unread
