"""The public names of the package: the only list of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any

__all__ = ["NAMES", "PUBLIC", "public_functions", "value_of"]

PUBLIC = {
    "pathnet": (
        *("AdaptedNet", "EffectiveDepth", "LengthSums", "Recorder", "ScaledGradient", "Tape", "adapt", "record"),
        *("routed", "routed_gradient", "data", "effective_depth", "engines", "experiments", "figures", "lesion"),
        *("measure", "models", "nn", "paper", "paths", "progress", "results", "signed", "training", "workers"),
    ),
    "pathnet.data": (
        *("Batches", "Data", "Images", "InMemory", "OnDisk", "cifar10", "class_folders", "digits", "load"),
        "synthetic",
    ),
    "pathnet.effective_depth": ("Depth", "EffectiveDepth", "read"),
    "pathnet.engines": ("Engine", "Job", "Prepared", "Walk", "available", "check_engine", "choose", "refusals"),
    "pathnet.experiments": ("PathGradients", "Plan"),
    "pathnet.figures": (
        *("figure_1", "figure_2", "figure_3", "figure_5a", "figure_5b", "figure_6", "figure_7", "figure_8"),
        *("figure_depth", "figure_effective", "figure_highway", "figure_sums"),
        *("table_6", "table_exact", "table_signed"),
    ),
    "pathnet.lesion": (
        *("RECALIBRATION_BATCHES", "BatchNormPolicy", "Errors", "Lesion", "Ranking", "delete", "errors", "rank"),
        *("recalibrated", "reorder"),
    ),
    "pathnet.models": (
        *("Block", "FusedForm", "HighwayBlock", "PostActivationForm", "PostactBlock", "PreactBlock", "ResidualNet"),
        *("Unit", "VggLayer", "build", "fingerprint", "highway", "load", "preact_resnet", "preact_resnet_imagenet"),
        *("resnet", "save", "vgg"),
    ),
    "pathnet.nn": ("FusedNet", "fuse", "fused_residual"),
    "pathnet.paths": (
        *("check_paths", "enumerate_all", "length_distribution", "one_of_each_length", "remaining_fraction"),
        *("routing", "sample", "signs"),
    ),
    "pathnet.progress": ("reporter",),
    "pathnet.paper": ("EXPERIMENTS", "Driver", "Experiment", "claims", "draw"),
    "pathnet.results": (
        *("LARGEST", "Measurements", "Range", "Row", "Run", "check_run", "read", "weights_of", "writing"),
    ),
    "pathnet.signed": ("Judgement", "aligned_variances", "judge", "tail_index"),
    "pathnet.training": ("Epoch", "Progress", "Recipe", "evaluate", "train"),
    "pathnet.workers": ("ALONE", "Workers", "torchrun"),
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]


def value_of(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def public_functions(value: Any) -> dict[str, Callable[..., Any]]:
    """Return a public function itself, or the public methods and properties that a class defines."""
    if not inspect.isclass(value):
        return {value.__name__: value}
    members = {}
    for name, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if isinstance(function, FunctionType) and (not name.startswith("_") or name in ("__init__", "__call__")):
            members[name] = function
    return members
