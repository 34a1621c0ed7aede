"""The registry of engines, fastest first, and the choice of one for a job."""

from __future__ import annotations

import warnings

from torch import nn

from pathnet.checks import described
from pathnet.engines.autograd import AutogradEngine
from pathnet.engines.cpu import CpuEngine
from pathnet.engines.cuda import CudaEngine
from pathnet.engines.engine import Engine, Job, Prepared, Walk
from pathnet.engines.reference import ReferenceEngine
from pathnet.engines.triton import TritonEngine
from pathnet.models.residual_net import ResidualNet

__all__ = ["Engine", "Job", "Prepared", "Walk", "available", "check_engine", "choose", "refusals"]

ENGINES: tuple[Engine, ...] = (CudaEngine(), TritonEngine(), CpuEngine(), AutogradEngine(), ReferenceEngine())
"""All engines, fastest first."""


def available() -> dict[str, str | None]:
    """Return every engine's name, fastest first, with None where it is usable here and otherwise the reason.

    Example:
        >>> from pathnet import engines
        >>> list(engines.available())
        ['cuda', 'triton', 'cpu', 'autograd', 'reference']
        >>> print(engines.available()["autograd"])
        None
    """
    return {engine.name: engine.unavailable() for engine in ENGINES}


def refusals(job: Job) -> dict[str, str | None]:
    """Return every engine's name, fastest first, with None where it serves the job and otherwise the reason.

    Args:
        job: the network and how its passes are to run.

    Raises:
        ValueError: ``job`` is no `Job`.

    Example:
        >>> import torch
        >>> from pathnet import engines, models
        >>> net = models.preact_resnet(depth=14, width=8, in_channels=1).eval()
        >>> job = engines.Job(net, "running", "bfloat16", (8, 8, 8), torch.device("cpu"))
        >>> engines.refusals(job)["autograd"]
        'no precision="bfloat16"'
    """
    _check_job(job)
    return {engine.name: engine.unavailable() or engine.unsupported(job) for engine in ENGINES}


def check_engine(name: str, value: object) -> None:
    """Check that a value is ``auto`` or the name of an engine.

    Args:
        name: name of the argument in an error.
        value: the value to check.

    Raises:
        ValueError: it is neither.

    Example:
        >>> from pathnet import engines
        >>> engines.check_engine("engine", "cpu")
        >>> engines.check_engine("engine", "tpu")
        Traceback (most recent call last):
            ...
        ValueError: engine: expected auto, cuda, triton, cpu, autograd, reference, got 'tpu'
    """
    names = [engine.name for engine in ENGINES]
    if not isinstance(value, str) or value not in ("auto", *names):
        raise ValueError(f"{name}: expected auto, {', '.join(names)}, got {described(value)}")


def _is_convolutional(net: ResidualNet) -> bool:
    """Return whether a block has both convolutions and batch normalisation, as all blocks of fused engines have."""
    kinds = ({type(module) for module in block.modules()} for block in net)
    return any(
        any(issubclass(kind, nn.Conv2d) for kind in of_block)
        and any(issubclass(kind, nn.BatchNorm2d) for kind in of_block)
        for of_block in kinds
    )


def choose(name: str, job: Job) -> Engine:
    """Return the engine of that name, or for ``auto`` the fastest that serves the job.

    Warn where a faster engine exists for the device, and something could be done about its refusal. Networks without
    both convolutions and batch normalisation in a block (transformers, ConvNeXt) give no warning: faster engines have
    no form for them at all.

    Args:
        name: name of an engine, or ``auto``.
        job: the network and how its passes are to run.

    Raises:
        ValueError: there is no such engine, or it cannot serve this job.

    Example:
        >>> import torch
        >>> from pathnet import engines, models
        >>> net = models.preact_resnet(depth=14, width=8, in_channels=1).eval()
        >>> job = engines.Job(net, "running", "float64", (8, 8, 8), torch.device("cpu"))
        >>> engines.choose("auto", job).name
        'autograd'
    """
    check_engine("name", name)
    _check_job(job)
    refusals: list[str] = []
    faster: list[str] = []
    for engine in ENGINES:
        if name not in ("auto", engine.name):
            continue
        reason = engine.unavailable() or engine.unsupported(job)
        if reason is None:
            if faster and job.precision not in ("float64", "network") and _is_convolutional(job.net):
                reasons = "; ".join(faster)
                message = f"engine: {engine.name!r} was chosen; faster engines refuse the job ({reasons})"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
            return engine
        if engine.device_type in (None, job.device.type):
            faster.append(f"{engine.name}: {reason}")
        refusals.append(f"{engine.name}: {reason}")
    raise ValueError(f"engine: expected one that serves this job, got {name!r} ({'; '.join(refusals)})")


def _check_job(job: object) -> None:
    if not isinstance(job, Job):
        raise ValueError(f"job: expected a pathnet.engines.Job, got {described(job)}")
