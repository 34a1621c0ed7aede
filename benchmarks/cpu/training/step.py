"""The training step in all its forms: checked, timed in turn, with modules drawn, its memory and its input pipeline.

Modules that are not drawn run neither forward nor backward (`pathnet.training`), so a step should take a little
more than the share of the modules that are drawn: stem, head and projections run in each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from benchmarks.cases import batch, network
from benchmarks.cpu.budget import LeftOut
from benchmarks.cpu.facts import has_amx
from benchmarks.cpu.field import Field
from benchmarks.cpu.separate import measured_alone
from benchmarks.cpu.training.accuracy import Step, check_gradients
from benchmarks.cpu.training.admission import Admitted, admitted_forms
from benchmarks.cpu.training.bounds import bounds
from benchmarks.cpu.training.cases import CIFAR_10, FULL
from benchmarks.cpu.training.forms import Drawn, Form
from benchmarks.cpu.training.goals import PRECISIONS
from benchmarks.cpu.training.kept import KEEPING
from benchmarks.outcome import Failed, Findings
from benchmarks.timing import Timing
from pathnet.data import Data, InMemory
from pathnet.models import ResidualNet
from pathnet.training import Recipe
from pathnet.training.sampling import drawn_modules, training_batch

__all__ = ["training_step"]

CHECKED_STEPS, CHECKED_DRAWS = 4, 2
TIMES = 2 / 3
"""Share of the time for compiling and timing; the rest is for memory."""
PIPELINE = "input pipeline"


def training_step(field: Field) -> Findings:
    """Check and time forward pass, backward pass and SGD step in all forms, and measure their memory.

    Raises:
        Failed: a gradient is wrong; nothing is timed.
    """
    setup, sizes = field.sizes.setup, field.sizes.training
    findings: Findings = {"drawn": sizes.drawn, "modules": field.n, "batch": setup.batch, "amx": has_amx()}
    findings["error"] = check_gradients(*_checked(field))
    share = field.budget.share(TIMES)
    admitted = admitted_forms(field, share)
    timings = share.timed(_works(field, admitted), sizes.rounds, "steps")
    for form, entry in admitted.items():
        if not torch.isfinite(entry.trainer.loss):
            raise Failed(f"the loss of {form}, is {float(entry.trainer.loss)} after its steps", findings)
    findings["forms"] = [_row(form, entry, timings) for form, entry in admitted.items()]
    pipeline = timings[PIPELINE]
    findings["input_pipeline"] = pipeline.facts() | {"images": sizes.images}
    findings["bounds"] = bounds(field.net, setup.batch, setup.side, field.sizes.peak_seconds)
    findings["kept"] = _steps_with_kept_memory(field)
    _measure_memory(field, findings["forms"])
    return findings | _conclusions(findings, pipeline.median)


def _checked(field: Field) -> tuple[ResidualNet, list[Step]]:
    """Return a small network, and steps of it on which gradients are checked: whole ones, then with modules drawn."""
    setup = field.sizes.checked
    net = network(setup)
    drawn = [_draw(net, min(field.sizes.training.drawn, net.n - 1), step) for step in range(CHECKED_DRAWS)]
    draws = [*([None] * CHECKED_STEPS), *drawn]
    return net, [(*batch(setup, number), drawn) for number, drawn in enumerate(draws)]


def _draw(net: ResidualNet, modules: int, step: int) -> Drawn:
    drawn = drawn_modules(net, Recipe(modules=modules), step)
    assert drawn is not None
    return drawn


def _works(field: Field, admitted: dict[Form, Admitted]) -> dict[str, Callable[[], object]]:
    """Return a step of each form, one with modules drawn of those that time them, and the next batch's images."""
    works: dict[str, Callable[[], object]] = {str(form): entry.trainer.step for form, entry in admitted.items()}

    def drawn_step(entry: Admitted, rounds: Any) -> None:
        entry.trainer.step(_draw(field.net, field.sizes.training.drawn, next(rounds)))

    for form, entry in admitted.items():
        if _draws(form):
            works[_drawn(form)] = partial(drawn_step, entry, count())
    data, steps = _data(field), count()
    recipe = Recipe(batch_size=field.sizes.setup.batch)
    works[PIPELINE] = lambda: training_batch(data, recipe, next(steps))
    return works


def _draws(form: Form) -> bool:
    return form.layout == "channels_last" and not form.compiled


def _drawn(form: Form) -> str:
    return f"{form}, modules drawn"


def _data(field: Field) -> Data:
    """Return random images of the timed size, as many as a pass over the training split of CIFAR-10 reads."""
    generator = torch.Generator().manual_seed(0)
    shape = field.sizes.training.images, 3, field.sizes.setup.side, field.sizes.setup.side
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    split = InMemory(images, torch.randint(0, 10, shape[:1], generator=generator))
    return Data("random", split, InMemory(images[:1], split.labels[:1]), tuple(map(str, range(10))))


def _row(form: Form, entry: Admitted, timings: dict[str, Timing]) -> Findings:
    timing = timings[str(form)]
    rounds = len(timing.seconds)
    parts = np.median(entry.trainer.parts[-rounds:], axis=0).tolist()
    row: Findings = {
        "form": str(form),
        "by": form.by,
        "precision": form.precision,
        "compiled": form.compiled,
        **timing.facts(),
        "first_s": entry.first_s,
        "parts": dict(zip(("forward_s", "backward_s", "update_s"), parts, strict=True)),
    }
    if form.by == "pathnet":
        row["engines"] = {name: entry.trainer.engines.count(name) for name in dict.fromkeys(entry.trainer.engines)}
    if _draws(form):
        drawn = timings[_drawn(form)]
        row["drawn"] = drawn.facts() | {"seconds": drawn.seconds, "share": drawn.median / timing.median}
    return row


def _steps_with_kept_memory(field: Field) -> Findings:
    """Return timings in a process that keeps the memory it frees, by form; none if there is no time."""
    rounds, small = field.sizes.training.kept_rounds, field.unlimited.training != FULL
    if rounds == 0:
        return {}
    arguments = (str(rounds), f"--batch={field.sizes.setup.batch}")
    try:
        return measured_alone(
            field.budget, "benchmarks.cpu.training.kept", *arguments, small=small, environment=KEEPING
        )
    except LeftOut as left_out:
        field.budget.cut("steps in a process that keeps its memory", rounds, None, str(left_out))
        return {}


def _measure_memory(field: Field, rows: list[Findings]) -> None:
    """Add the memory of a step to the rows, in a process for each."""
    batch_size, small = field.sizes.setup.batch, field.unlimited.training != FULL
    for row in rows[: field.sizes.training.memory_forms]:
        try:
            row["memory"] = measured_alone(
                field.budget, "benchmarks.cpu.training.memory", row["form"], f"--batch={batch_size}", small=small
            )
        except LeftOut as left_out:
            field.budget.cut(f"memory of {row['form']}", 1, None, str(left_out))


def _conclusions(findings: Findings, pipeline_s: float) -> Findings:
    """Return by precision the ratios to the best of PyTorch, the time of an epoch, and the share of the pipeline.

    In bfloat16 the best of PyTorch may be a form in float32.
    """
    ratios: Findings = {}
    rows, kept = findings["forms"], findings["kept"]
    for precision in PRECISIONS:
        ours = next((row for row in rows if row["by"] == "pathnet" and row["precision"] == precision), None)
        rivals = [row for row in rows if row["by"] == "torch" and row["precision"] in ("float32", precision)]
        if ours is None:
            continue
        best = min(rivals, key=lambda row: row["median_s"])
        ratios[precision] = {
            "best": best["form"],
            "times_faster": best["median_s"] / ours["median_s"],
            "drawn_share": ours["drawn"]["share"],
            "pipeline_share": pipeline_s / ours["median_s"],
            "epoch_s": CIFAR_10 // findings["batch"] * (ours["median_s"] + pipeline_s),
        }
        seconds = [kept[row["form"]]["median_s"] for row in rivals if row["form"] in kept]
        if seconds:
            ratios[precision]["kept_times_faster"] = min(seconds) / kept[ours["form"]]["median_s"]
        measured = [row for row in rivals if "memory" in row]
        if measured and "memory" in ours:
            least = min(measured, key=lambda row: row["memory"]["bytes"])
            ratios[precision] |= {
                "least_memory": least["form"],
                "memory_share": ours["memory"]["bytes"] / least["memory"]["bytes"],
            }
    # The share of old files, for the tables that read these too.
    return {"conclusions": ratios, "share": ratios["float32"]["drawn_share"]}
