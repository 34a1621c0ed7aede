"""The forms that one run times: those that the time allows, each warmed up and compared with the first."""

from __future__ import annotations

import time

from benchmarks.cpu.budget import Budget
from benchmarks.cpu.field import AGREEMENT, Field
from benchmarks.cpu.training.forms import FORMS, Form, Trainer
from benchmarks.outcome import Failed
from benchmarks.timing import LEAST_ROUNDS

__all__ = ["Admitted", "admitted_forms"]

WARM_UP = 3
COMPILING_S = 60.0
"""Seconds that compiling the blocks in one precision may take; it took 23 on two cores of an EPYC."""
WITH_DRAWS = 1.5
"""Approximate time of a form in a round, in times of its step, if steps with modules drawn are timed too."""


class Admitted:
    """A form that is timed.

    Attributes:
        trainer: takes its steps.
        seconds: seconds of a step, the fastest but the first.
        first_s: seconds of the first step, in which blocks are compiled.
    """

    def __init__(self, form: Form, field: Field) -> None:
        self.trainer = Trainer(form, field.net, field.images, field.labels)
        times = []
        for _ in range(WARM_UP):
            start = time.perf_counter()
            self.trainer.step()
            times.append(time.perf_counter() - start)
            if len(times) == 1:
                self.loss, self.norm = float(self.trainer.loss), self.trainer.gradient_norm()
        self.first_s, self.seconds = times[0], min(times[1:])


def admitted_forms(field: Field, budget: Budget) -> dict[Form, Admitted]:
    """Return the forms to time, in their order; compiled blocks in the layout that is faster without compilation.

    Raises:
        Failed: the loss or the gradient of a form is not that of the first.
    """
    admitted: dict[Form, Admitted] = {}
    for form in FORMS:
        if form.compiled and (form.layout != _faster_layout(admitted) or not field.sizes.compiled):
            continue
        reason = _no_time_for(form, admitted, budget)
        if reason is None:
            try:
                admitted[form] = Admitted(form, field)
            except RuntimeError as error:
                if not form.compiled:
                    raise
                reason = f"it could not be compiled ({str(error).strip().splitlines()[0]})"
        if reason is not None:
            budget.cut(f"training step of {form}", True, None, reason)
            continue
        _check_agreement(form, admitted)
    return admitted


def _check_agreement(form: Form, admitted: dict[Form, Admitted]) -> None:
    first, judged = next(iter(admitted.values())), admitted[form]
    for name, error in (("loss", judged.loss / first.loss - 1), ("gradient", judged.norm / first.norm - 1)):
        # Compared with <, because a NaN must not pass.
        if not abs(error) < AGREEMENT[form.precision]:
            raise Failed(f"the {name} of {form}, is off by {error:.1g} on the network that is timed", {})


def _faster_layout(admitted: dict[Form, Admitted]) -> str:
    eager = [form for form in admitted if form.by == "torch" and not form.compiled and form.precision == "float32"]
    return min(eager, key=lambda form: admitted[form].seconds).layout


def _no_time_for(form: Form, admitted: dict[Form, Admitted], budget: Budget) -> str | None:
    """Return why there is no time for a form, or None; the first form of each side always takes part.

    A form is expected to take as long as the slowest so far.
    """
    if len(admitted) < 2:
        return None
    steps = WITH_DRAWS * (LEAST_ROUNDS + 1)
    slowest = max(entry.seconds for entry in admitted.values())
    needed = steps * sum(entry.seconds for entry in admitted.values()) + (steps + WARM_UP) * slowest
    needed += COMPILING_S if form.compiled else 0
    if needed <= budget.left:
        return None
    return f"with it the fewest rounds would take some {needed:.3g} s, and {max(0.0, budget.left):.3g} s are left"
