"""The peak of memory of a training step, in a process of its own. Prints one line of JSON."""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.cases import batch, network
from benchmarks.cpu.alone import forget_peak, peak_bytes
from benchmarks.cpu.cases import FULL, SMALL
from benchmarks.cpu.training.forms import FORMS, Form, Trainer
from benchmarks.outcome import Findings

__all__ = ["memory_of_a_step"]


def memory_of_a_step(form: Form, images: int, small: bool = False) -> Findings:
    """Return the peak of resident memory in a second step, in bytes, above that before the first.

    So what the first step leaves behind counts: momenta, gradients and buffers that are kept. Of compiled blocks it
    does not count, since most of it is the compiler.

    Args:
        images: number of images of the batch.
        small: whether the network is that of the rehearsal.
    """
    setup = (SMALL if small else FULL).setup
    trainer = Trainer(form, network(setup), *batch(setup, size=images))
    before = _resident()
    trainer.step()
    rest = _resident()
    trainer.step()
    peak = peak_bytes()
    return {
        "bytes": peak - (rest if form.compiled else before),
        "kept_bytes": rest - before,
        "step_bytes": peak - rest,
    }


def _resident() -> int:
    """Return the resident memory after what is free was returned to the system; the peak begins here."""
    forget_peak()
    return peak_bytes()


def main() -> None:
    by_name = {str(form): form for form in FORMS}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.training.memory", description=__doc__)
    parser.add_argument("form", choices=by_name)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="number of images")
    parser.add_argument("--seconds", type=float, help="time limit, which the caller keeps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(memory_of_a_step(by_name[options.form], options.batch, options.small)))


if __name__ == "__main__":
    main()
