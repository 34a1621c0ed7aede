"""``pathnet doctor``: what is installed, built and usable."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

import pathnet
from pathnet.commands.shared import Json

__all__ = ["DoctorSettings", "doctor"]

LABELS = {
    "torch_version": "built with torch",
    "torch_target": "runs on torch",
    "cuda_compiler": "CUDA compiler",
    "cuda_architectures": "CUDA architectures",
    "without_cuda": "built without CUDA",
}
"""Names of facts of the build that `pathnet.native.build_facts` names otherwise."""


@dataclass(frozen=True)
class DoctorSettings:
    """Settings of ``pathnet doctor``."""

    as_json: Json = False


def doctor(settings: DoctorSettings) -> None:
    """Show what is installed, built and usable, and why the rest is not."""
    from pathnet.commands.printing import print_facts, print_json

    facts = _facts()
    if settings.as_json:
        print_json(facts, [])
    else:
        texts = {name: fact if isinstance(fact, str) else ", ".join(fact) for name, fact in facts.items()}
        print_facts(texts)


def _facts() -> dict[str, Any]:
    from pathnet import engines, native

    return {
        "pathnet": pathnet.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "native library": native.WHY_NOT or "built",
        **_build_facts(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
        **{f"engine {name}": reason or "usable" for name, reason in engines.available().items()},
    }


def _build_facts() -> dict[str, Any]:
    from pathnet import native

    try:
        facts = native.build_facts() if native.LOADED else {}
    except RuntimeError as error:
        facts = {"build": str(error)}
    if target := facts.get("torch_target"):
        # A byte each for the major and the minor version, before those of patches.
        major, minor, *_ = int(str(target), 16).to_bytes(8)
        facts["torch_target"] = f"{major}.{minor} and later"
    return {LABELS.get(name, name.replace("_", " ")): fact for name, fact in facts.items() if fact}
