"""Plans: the amounts that experiments measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pathnet.checks import described
from pathnet.recording import At, BatchNormMode, BatchNormPolicy, Precision
from pathnet.settings import AtLeast, Checked, Flag, Help, check_settings, documented

__all__ = ["MOST_DRAWS", "Method", "PathGradients", "Plan", "check_plan"]

Method = Literal["sampled", "exact", "signed"]

MOST_DRAWS = 1_000_000
"""Maximum number of signed draws on one batch.

Draw j on batch b is the tape's draw number b * MOST_DRAWS + j, so none repeats.
"""


def _check_engine(name: str, value: str) -> None:
    # Engines take a fifth of a second to import, and listing settings needs none.
    from pathnet.engines import check_engine

    check_engine(name, value)


Batches = Annotated[int, Help("Number of random training batches for path gradients."), AtLeast(1)]


@documented
@dataclass(frozen=True)
class Plan:
    """Amounts that the experiments of a study measure; each driver reads the settings that it needs.

    `pathnet.paper.EXPERIMENTS` says which driver reads which of them.

    Raises:
        ValueError: a setting has the wrong type or is out of its range.

    Example:
        >>> import pathnet
        >>> from pathnet.experiments import Plan
        >>> plan = Plan(draws=20, deletions=15, images=360)
        >>> plan.draws, plan.bn
        (20, 'running')
        >>> pathnet.paper.EXPERIMENTS["lesion-many"].settings
        ('draws', 'deletions', 'bn', 'images', 'plan_seed')
    """

    draws: Annotated[int, Help("Random lesions of each size, for each network."), AtLeast(1)] = 100
    deletions: Annotated[int, Help("Largest number of blocks deleted at once."), AtLeast(1)] = 20
    swaps: Annotated[int, Help("Largest number of pairs of blocks that swap."), AtLeast(1)] = 20
    bn: Annotated[
        BatchNormPolicy,
        Help(
            "Batch normalisation of lesioned networks: by running statistics (running, as in the paper), by the "
            "batch's (batch), or recalibrated on a few training batches (recalibrated)."
        ),
        Flag(value="MODE"),
    ] = "running"
    images: Annotated[int, Help("Test images, spread evenly over the split; 0 for all."), AtLeast(0)] = 0
    batches: Batches = 1000
    exact_batches: Annotated[
        int, Help("Number of these batches for exact sums by length; 0 for none."), AtLeast(0)
    ] = 100
    modules: Annotated[int, Help("Residual modules that effective training draws for each batch."), AtLeast(1)] = 23
    gate_batches: Annotated[int, Help("Number of random training batches for gates."), AtLeast(1)] = 20
    gate_batch_size: Annotated[int, Help("Images in each of these batches."), AtLeast(1)] = 128
    plan_seed: Annotated[int, Help("Seed of random lesions, paths and batches."), AtLeast(0)] = 0

    def __post_init__(self) -> None:
        check_settings(self)


@documented
@dataclass(frozen=True)
class PathGradients:
    """Amount and method of what one run of path gradients measures (section 5, Figure 6).

    ``pathnet.experiments.path_gradients.measure`` follows it. Runs of one folder share all settings but the method
    and the amounts, which may grow.

    Raises:
        ValueError: a setting has the wrong type or is out of its range, or there are several draws without signs.

    Example:
        >>> import pathnet
        >>> from pathnet.experiments import PathGradients, path_gradients
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(
        ...     depth=14, width=8, num_classes=2, in_channels=1
        ... )
        >>> sampled = PathGradients(batches=3, batch_size=16)
        >>> run = path_gradients.measure(net, data, sampled, "run")
        >>> exact = PathGradients(batches=3, batch_size=16, method="exact")
        >>> path_gradients.measure(net, data, exact, "run").planned
        {'batches': 3, 'exact_batches': 3}
    """

    batches: Batches = 1000
    method: Annotated[
        Method,
        Help(
            "sampled: one random path of every length on each batch. exact: the sums over all paths of each length. "
            "signed: random signs, which estimate the sums over all paths of squared norms (heavy-tailed). One run "
            "can hold all three."
        ),
        Flag(value="METHOD"),
    ] = "sampled"
    draws: Annotated[
        int, Help("Signed draws on each batch; each costs as much as one path of every length."), AtLeast(1)
    ] = 1
    batch_size: Annotated[int, Help("Images per batch."), AtLeast(1)] = 128
    seed: Annotated[int, Help("Seed of the random batches and paths."), AtLeast(0)] = 0
    bn: Annotated[
        BatchNormMode,
        Help("Batch normalisation by running statistics (running) or by the batch's (batch)."),
        Flag(value="MODE"),
    ] = "running"
    at: Annotated[
        At,
        Help(
            "Place of the gradient: the first block's input (y0), the image, or the first convolution (stem_weight)."
        ),
        Flag(value="PLACE"),
    ] = "y0"
    engine: Annotated[
        str, Help("An engine's name, or auto for the fastest usable one."), Flag(value="NAME"), Checked(_check_engine)
    ] = "auto"
    precision: Annotated[
        Precision,
        Help("Precision of the backward pass: float32, bfloat16, float64, or that of the weights (network)."),
        Flag(value="TYPE"),
    ] = "float32"

    def __post_init__(self) -> None:
        check_settings(self)
        if self.draws != 1 and self.method != "signed":
            raise ValueError(f"draws: expected 1 unless the method is signed, got {self.draws} with {self.method}")
        if self.draws > MOST_DRAWS:
            raise ValueError(f"draws: expected at most {MOST_DRAWS:,} on a batch, got {self.draws}")

    @property
    def planned(self) -> dict[str, int]:
        """Planned numbers of batches and draws, by the names that a run records."""
        if self.method == "sampled":
            return {"batches": self.batches}
        draws = {"signed_draws": self.draws} if self.method == "signed" else {}
        return {f"{self.method}_batches": self.batches, **draws}


def check_plan(name: str, value: object) -> Plan:
    """Return ``value`` if it is a `Plan`, else raise ValueError."""
    if not isinstance(value, Plan):
        raise ValueError(f"{name}: expected a Plan, got {described(value)}")
    return value
