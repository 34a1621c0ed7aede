"""Figure 6: how much gradient do the paths of each length carry? (section 5, "The importance of short paths")

For each length, the paper draws 1,000 random paths and a random training batch for each of them. Here every batch
serves one path of every length, so one forward pass gives n measurements. On the same batches, the same run can also
hold the sums over all 2^n paths (`pathnet.experiments.by_length`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pathnet
from pathnet import models, paths, results
from pathnet.checks import check_path, described
from pathnet.data import Batches, Data
from pathnet.data.batches import sent
from pathnet.data.passes import of_element
from pathnet.experiments import by_length
from pathnet.experiments.claims import Claim, all_of, at_least, at_most
from pathnet.experiments.comparison import Exact, compare
from pathnet.experiments.plans import PathGradients, Plan
from pathnet.experiments.run import (
    Networks,
    attempt,
    check_amount,
    check_arguments,
    check_data,
    check_progress,
    facts_of_data,
    in_memory,
)
from pathnet.experiments.summary import MOST, Summary, percent
from pathnet.experiments.units import Amounts, measure_units
from pathnet.intervals import bracketed
from pathnet.models import ResidualNet
from pathnet.models.residual_net import check_net
from pathnet.results import Measurements
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers, check_workers

__all__ = ["NAME", "PathGradients", "claims", "measure", "measure_each"]

NAME = "path-gradients"
WHERE = "section 5, Figure 6"
EXPONENTIAL = 0.95
SHORT = 0.4


def measure(
    net: ResidualNet,
    data: Data | Batches | Iterable[Any],
    plan: PathGradients,
    folder: str | Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> results.Run:
    """Measure the part of the plan that the run folder lacks, and return the whole run.

    What is measured is on disk after each batch, so an interrupt or a kill costs one batch.

    Args:
        net: the network.
        data: the data set; or a caller's own batches, an iterable that is read into memory or `pathnet.data.Batches`.
            Random batch b is then batch b as it comes, and the run records the largest batch's size.
        plan: the method and its settings.
        folder: folder of a new run, or of one with the same network, data and plan; method, batches and draws may
            differ.
        progress: called with (batches done, batches in total, a note), in the first process alone.
        workers: the processes that measure together, each of which calls this function alike, such as those of
            `pathnet.workers.torchrun`.

    Raises:
        ValueError: an argument has the wrong type, the network does not accept the data, no engine serves the
            network, or the folder holds another run.

    Example:
        >>> import torch
        >>> import pathnet
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, num_classes=2, in_channels=1)
        >>> batches = [(torch.randn(16, 1, 8, 8), torch.randint(2, (16,))) for _ in range(12)]
        >>> plan = pathnet.experiments.PathGradients(batches=12)
        >>> run = pathnet.measure(net, batches, plan, "run")
        >>> run
        <Run of path-gradients in run: 72 rows measured, planned batches 12; results written>
        >>> figure = pathnet.figures.figure_6(run)
    """
    check_net(net)
    source = in_memory(data)
    check_data(net, source)
    if max(net.residual_modules) > 1:
        raise ValueError(
            f"net: expected one residual module in each block, got up to {max(net.residual_modules)} in parallel; "
            'adapt(..., parallel="together") makes them one'
        )
    if not isinstance(plan, PathGradients):
        raise ValueError(f"plan: expected PathGradients, got {described(plan)}")
    check_amount("batches", source, plan.batches)
    if isinstance(source, Batches):
        plan = replace(plan, batch_size=source.batch_size(plan.batch_size))
    folder = check_path("folder", folder)
    check_progress(progress)
    check_workers(workers)
    recorder = pathnet.Recorder(net, plan.bn, plan.engine, plan.precision, plan.at)
    device = next(net.parameters()).device
    images, _ = source.random_batch(plan.batch_size, plan.seed, 0)
    engine = recorder.engine_for(sent(images, device))  # raises before a run folder is created
    on_gpu, any_threads = device.type == "cuda", engine == "cpu" and plan.at == PathGradients.at

    def record(batch: int) -> pathnet.Tape:
        images, labels = source.random_batch(plan.batch_size, plan.seed, batch)
        with of_element(batch, named=isinstance(source, Batches)):
            return recorder(_sent(images, device), _sent(labels, device))

    identity = _identity(net, source, plan, folder)
    with results.writing(folder, identity, plan.planned, attempt(device), workers) as run:
        if plan.method == "sampled":
            _measure_sampled(record, plan, run, progress, on_gpu, any_threads)
        elif plan.method == "exact":
            by_length.measure_exact(run, plan.batches, record, progress, on_gpu or any_threads)
        else:
            by_length.measure_signed(
                run, plan.batches, plan.draws, plan.seed, record, progress, on_gpu or any_threads
            )
        run.settle()
        workers.agree(lambda: run.conclude(compare(run).as_json()))
        return run


def measure_each(
    nets: Networks,
    data: Data | Batches | Iterable[Any],
    plan: Plan,
    folder: Path,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> list[results.Run]:
    """Measure sampled paths and exact sums of each residual network of a study: one run for each network.

    The run of the first network is in the folder itself.
    """
    source = check_arguments(nets, data, plan, folder, progress, ("residual",))
    settings = PathGradients(batches=plan.batches, seed=plan.plan_seed)
    settings = replace(settings, batch_size=source.batch_size(settings.batch_size))
    runs = []
    for seed, net in enumerate(nets["residual"]):
        place = folder / f"seed-{seed}" if seed else folder
        run = measure(net, source, settings, place, progress, workers)
        if plan.exact_batches:
            exact = replace(settings, method="exact", batches=min(plan.batches, plan.exact_batches))
            run = measure(net, source, exact, place, progress, workers)
        runs.append(run)
    return runs


def _measure_sampled(
    record: by_length.RecordBatch,
    plan: PathGradients,
    run: results.Run,
    progress: Progress | None,
    on_gpu: bool,
    any_threads: bool,
) -> None:
    n = run.n
    units = run.workers.agree(lambda: _missing(run.measurements(), plan.batches, n))

    def begin(unit: list[Any], _: object) -> Callable[[], tuple[Measurements, str]]:
        batch, lengths = unit
        b = paths.one_of_each_length(n, plan.seed, batch)
        if lengths is not None:
            b = b[torch.tensor(lengths) - 1]
        tape = record(batch)
        in_flight = _PathsInFlight(batch, b, tape.path_gradient_norms(b), tape.engine)
        return lambda: (in_flight.measurements(), f"batches, engine {in_flight.engine}")

    amounts = Amounts(plan.batches, plan.batches - len(units), [1] * len(units))
    measure_units(run, units, begin, amounts, progress, on_gpu, any_threads)


def _missing(measured: Measurements, batches: int, n: int) -> list[tuple[int, list[int] | None]]:
    """Return the batches that lack measurements, each with the lengths that it lacks; None for all of them."""
    counts = np.bincount(measured.batch, minlength=batches)[:batches]
    partly = {batch: set(range(1, n + 1)) for batch in np.flatnonzero((counts > 0) & (counts < n)).tolist()}
    if partly:
        for batch, length in zip(measured.batch.tolist(), measured.length.tolist(), strict=True):
            partly.get(batch, set()).discard(length)
    incomplete = np.flatnonzero(counts < n).tolist()
    return [(batch, sorted(partly[batch]) if batch in partly else None) for batch in incomplete]


def _sent(batch: Any, device: torch.device) -> Any:
    """Copy a tensor to the device; to a GPU from pinned memory, or else the copy waits for the GPU's work."""
    if not isinstance(batch, Tensor) or device.type != "cuda" or batch.is_cuda:
        return sent(batch, device)
    return batch.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class _PathsInFlight:
    """Backward passes along one path per length on one batch; a GPU may still be computing them.

    Attributes:
        batch: the number of the batch.
        b: uint8 [M, n], the binary codes of the paths.
        norms: float64 [M], on the network's device.
        engine: the name of the engine.
    """

    batch: int
    b: Tensor
    norms: Tensor
    engine: str

    def measurements(self) -> Measurements:
        """Wait for the norms and return them.

        Raises:
            ValueError: a norm is not finite.
        """
        norm, length = self.norms.cpu().numpy(), self.b.sum(1).numpy().astype(np.int16)
        wrong = ~np.isfinite(norm)
        if wrong.any():
            raise ValueError(
                f"engine: expected finite norms, got {norm[wrong][0]} from {self.engine} (batch {self.batch}, "
                f"length {length[wrong][0]})"
            )
        batch = np.full(len(norm), self.batch, np.int32)
        return Measurements(batch, length, self.b.numpy(), norm, [self.engine] * len(norm))


def _identity(net: ResidualNet, data: Data | Batches, plan: PathGradients, folder: str | Path) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(plan).items() if name not in ("batches", "method", "draws")}
    model = {"hash": models.fingerprint(net), "config": net.config, "blocks": net.n}
    if net.parts > 2:
        model["gates"] = True
    return {
        "experiment": NAME,
        **settings,
        "model": model,
        "data": facts_of_data(data, folder),
    }


def claims(run: results.Run) -> list[Claim]:
    """Test the claims of Figure 6 on a run."""
    comparison = compare(run)
    return [
        *(_claims_of_sampled(comparison.sampled) if comparison.sampled else []),
        *(_claims_of_exact(comparison.exact, comparison.gradient) if comparison.exact else []),
    ]


def _claims_of_sampled(sampled: Summary) -> list[Claim]:
    factor, low, high = sampled.decay
    straight, least, most = sampled.straightness
    mean_length, shortest, longest = sampled.mean_length
    effective, central = sampled.effective, sampled.central
    return [
        Claim(
            "The gradient along a path falls about exponentially with its length.",
            WHERE,
            f"a falling line explains at least {EXPONENTIAL:.0%} of the variance of the mean norm's logarithm",
            f"the line explains {100 * straight:.3g} % ({bracketed(100 * least, 100 * most, sampled.batches)}); each "
            f"module multiplies the norm by {factor:.3g} ({bracketed(low, high, sampled.batches)})",
            all_of(at_least(least, most, EXPONENTIAL), at_most(low, high, 1.0)),
        ),
        Claim(
            "The gradient comes from paths that are much shorter than most.",
            WHERE,
            f"weighted by frequency times magnitude, the mean length is at most {SHORT:g} of the number of blocks; "
            "most paths pass through about half of the blocks",
            f"{mean_length:.3g} of {sampled.n} blocks ({bracketed(shortest, longest, sampled.batches)}); lengths "
            f"{effective.first} to {effective.last} carry 95 % of the gradient and are {percent(effective.paths)} of "
            f"all paths; lengths {central.first} to {central.last} are {percent(central.paths)} of all paths",
            at_most(shortest, longest, SHORT * sampled.n),
        ),
    ]


def _claims_of_exact(exact: Exact, gradient: str) -> list[Claim]:
    n = len(exact.norm.mean) - 1
    short = int(SHORT * n)
    low, high = (100 * float(end[short]) for end in (exact.explained.low, exact.explained.high))
    return [
        Claim(
            "Almost all of the gradient comes from short paths.",
            WHERE,
            f"the exact sums of lengths up to {SHORT:g} of the number of blocks explain at least {MOST:.0%} of "
            f"{gradient}",
            f"lengths up to {short} of {n} explain {100 * exact.explained.mean[short]:.3g} % of {gradient} "
            f"({bracketed(low, high, exact.batches)}), and leave {100 * exact.left.mean[short]:.3g} % of its norm; "
            f"lengths up to {exact.first_to_explain(MOST)} explain {MOST:.0%}",
            at_least(exact.explained.low[short:].min(), exact.explained.high[short:].min(), MOST),
        )
    ]
