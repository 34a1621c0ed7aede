"""``pathnet gradients``: path gradients of one network, into the folder of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pathnet import models
from pathnet.commands.failures import kept
from pathnet.commands.places import check_file_to_read
from pathnet.commands.shared import Device, ExistingData, Json, RunFolder, device_of, reporter_of
from pathnet.data import Data, load
from pathnet.experiments.plans import PathGradients
from pathnet.settings import Checked, Flag, Help, Panel, check_settings
from pathnet.study import SkipBroken
from pathnet.workers import ALONE, Workers, torchrun

if TYPE_CHECKING:
    from pathnet.results import Run

__all__ = ["GradientsSettings", "check_weights", "gradients", "measured"]


def check_weights(name: str, file: Path) -> None:
    """Raise ValueError where there is something other than a file."""
    check_file_to_read(name, file, "a safetensors file of pathnet's")


@dataclass(frozen=True, kw_only=True)
class GradientsSettings:
    """Settings of ``pathnet gradients``."""

    data: ExistingData
    run: RunFolder
    weights: Annotated[
        Path | None,
        Help("Weights of the network."),
        Flag(value="FILE", default="those that the run trained, as pathnet demo does"),
        Checked(check_weights),
    ] = None
    plan: Annotated[PathGradients, Panel("Measurements")]
    skip_broken: SkipBroken = False
    device: Device = "auto"
    as_json: Json = False

    def __post_init__(self) -> None:
        check_settings(self)


def gradients(settings: GradientsSettings) -> None:
    """Measure the gradient along individual paths of your trained network, or along all of them, and draw Figure 6.

    To train the networks of a study and measure them all, take path-gradients.

    An interrupted run resumes. Measurements by other methods with the same plan share the folder and the figure.

    Under torchrun, the processes share the batches.
    """
    from pathnet.commands.runs import print_gradients

    workers = torchrun()
    net = models.load(settings.weights or _weights_of(settings.run)).to(device_of(settings.device, workers))
    run = measured(net, load(settings.data, settings.skip_broken), settings.plan, settings.run, workers)
    if workers.leads:
        print_gradients(run, settings.as_json)


def measured(net: models.ResidualNet, data: Data, plan: PathGradients, folder: Path, workers: Workers = ALONE) -> Run:
    """Measure what a run lacks of a plan, with progress on stderr, and return the run."""
    from pathnet.experiments import path_gradients

    with kept(f"what was measured is kept in {folder}"), reporter_of(workers)("path gradients") as progress:
        return path_gradients.measure(net, data, plan, folder, progress, workers)


def _weights_of(run: Path) -> Path:
    """Return the weights of a run that trained its own network."""
    from pathnet import results

    weights = results.weights_of(run)
    if not weights.exists():
        raise ValueError(f"weights: expected --weights FILE, since {run} holds no weights of its own, got none")
    return weights
