"""``pathnet demo``: a small network from training to figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pathnet import models
from pathnet.commands.gradients import measured
from pathnet.commands.places import check_utf_8
from pathnet.commands.shared import Device, Json, RunFolder, device_of, one_thread
from pathnet.commands.streams import say
from pathnet.commands.train import trained
from pathnet.data import load
from pathnet.experiments.plans import PathGradients
from pathnet.settings import check_settings
from pathnet.study import PRESETS

__all__ = ["DemoSettings", "demo"]


@dataclass(frozen=True)
class DemoSettings:
    """Settings of ``pathnet demo``."""

    out: RunFolder = Path("runs/demo")
    device: Device = "auto"
    as_json: Json = False

    def __post_init__(self) -> None:
        check_settings(self)
        check_utf_8("out", self.out)


def demo(settings: DemoSettings) -> None:
    """Train a small network on digits, measure its path gradients, and draw Figure 6, in about three minutes."""
    from pathnet import results
    from pathnet.commands.printing import print_training
    from pathnet.commands.runs import print_gradients

    study, device = PRESETS["digits"], device_of(settings.device)
    data, recipe = load(study.data), study.recipe_of("residual", 0)
    torch.manual_seed(recipe.seed)
    net, weights = models.build(study.config("residual", data)).to(device), results.weights_of(settings.out)
    with one_thread(True):
        history = trained(net, data, recipe, weights, quiet=settings.as_json).epochs
        if not settings.as_json:
            print_training(history, weights)
        plan = PathGradients(batches=study.plan.batches, seed=study.plan.plan_seed)
        # From the file, as pathnet gradients reads it: training leaves another layout, which rounds otherwise.
        run = measured(models.load(weights).to(device), data, plan, settings.out)
    print_gradients(run, settings.as_json, history[-1].test_accuracy)
    if not settings.as_json:
        say(
            "in the table, product is a length's share in all paths times its mean norm, in per cent of the sum;",
            "bold rows are the effective paths, which hold 95 % of it",
            f"next: open {run.figure_stem('figure-6').with_suffix('.png')}",
        )
