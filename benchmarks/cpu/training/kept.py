"""Training steps in a process that keeps the memory it frees, as a good user of PyTorch may arrange.

By default glibc returns a step's activations to the system, and the next step pays for clean pages. The setting must
be in the environment before the process starts. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.cases import batch, network
from benchmarks.cpu.budget import Budget
from benchmarks.cpu.cases import FULL, SMALL
from benchmarks.cpu.training.forms import FORMS, Trainer
from benchmarks.outcome import Findings

__all__ = ["KEEPING", "steps_with_kept_memory"]

KEEPING = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
"""Environment in which glibc keeps what is freed; the second is its largest."""


def steps_with_kept_memory(images: int, rounds: int, budget: Budget, small: bool = False) -> Findings:
    """Return the timing of a step of pathnet's forms and of PyTorch's in channels_last, by name.

    Args:
        images: number of images of the batch.
        small: whether the network is that of the rehearsal.
    """
    setup = (SMALL if small else FULL).setup
    net, (inputs, labels) = network(setup), batch(setup, size=images)
    forms = [form for form in FORMS if form.layout == "channels_last" and not form.compiled]
    works = {str(form): Trainer(form, net, inputs, labels).step for form in forms}
    return {name: timing.facts() for name, timing in budget.timed(works, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.training.kept", description=__doc__)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="number of images")
    parser.add_argument("--seconds", type=float, required=True, help="time limit")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = Budget(options.seconds)
    print(json.dumps(steps_with_kept_memory(options.batch, options.rounds, budget, options.small)))


if __name__ == "__main__":
    main()
