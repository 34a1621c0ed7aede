"""Commands on a study: the settings that they share, and the networks that they train or load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from pathnet import models
from pathnet import study as studies
from pathnet.commands.failures import kept
from pathnet.commands.flags import OverPreset
from pathnet.commands.gradients import check_weights
from pathnet.commands.shared import (
    Device,
    Json,
    check_data,
    check_folder_for_weights,
    device_of,
    one_thread,
    reporter_of,
)
from pathnet.data import Data, load
from pathnet.paper import EXPERIMENTS, Experiment
from pathnet.settings import Checked, Flag, Help, Panel, check_settings
from pathnet.study import Preset, Study
from pathnet.workers import Workers

if TYPE_CHECKING:
    from pathnet.experiments.run import Networks

__all__ = ["StudySettings", "loaded", "study_on"]

SMALL_IMAGE = 256
"""Pixels of an image up to which one thread trains and measures faster than several."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of every command on a study."""

    preset: Annotated[
        Preset,
        Help(
            "Defaults of all settings. digits: minutes on two processor cores. cifar10: the scale of the paper, for "
            "GPUs; its images are in the folder cifar10, or in that of --data."
        ),
        Flag(value="NAME"),
        Panel("Study"),
    ] = "digits"
    study: Annotated[Study, OverPreset(), Panel("Networks")]
    folder: Annotated[
        Path | None,
        Help("Folder of the study; an existing study resumes."),
        Flag(value="FOLDER", default="runs/PRESET"),
        Panel("Study"),
        Checked(check_folder_for_weights),
    ] = None
    device: Device = "auto"
    as_json: Json = False

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def place(self) -> Path:
        """Folder of the study, named by the preset unless it is set."""
        return self.folder or Path("runs") / self.preset


@contextmanager
def study_on(settings: StudySettings, workers: Workers) -> Iterator[tuple[Data, Callable[[str], Networks]]]:
    """Yield the data of a study, and a function that trains the networks of an experiment."""
    study, place, device = settings.study, settings.place, device_of(settings.device, workers)
    check_data("data", study.data)
    data, known = load(study.data, study.skip_broken), dict[str, Any]()

    def networks(name: str) -> Networks:
        kinds = EXPERIMENTS[name].networks
        missing = [kind for kind in kinds if kind not in known]
        known.update(studies.trained(study, data, missing, place, device, reporter_of(workers), workers))
        return {kind: known[kind] for kind in kinds}

    small = data.image_shape[1] * data.image_shape[2] <= SMALL_IMAGE
    with kept(f"what was trained and measured is kept in {place}"), one_thread(small):
        yield data, networks


def loaded(weights: Sequence[str], experiment: Experiment, device: torch.device) -> Networks:
    """Return the networks in files by kind.

    Args:
        weights: FILE or KIND=FILE each.
        experiment: the experiment that takes the networks.

    Raises:
        ValueError: a file holds no network, or one of a kind that the experiment does not take.
    """
    networks: dict[str, list[models.ResidualNet]] = {}
    for text in weights:
        is_named = "=" in text and not os.path.lexists(text)
        kind, _, file = text.partition("=") if is_named else ("", "", text)
        check_weights("weights", Path(file))
        net = models.load(file).to(device)
        kind = kind or studies.kind_of(net)
        if kind not in experiment.networks:
            among = f"networks among {', '.join(experiment.networks)}" if experiment.networks else "no networks"
            raise ValueError(f"weights: expected {among}, got {kind} in {text}")
        networks.setdefault(kind, []).append(net)
    return networks
