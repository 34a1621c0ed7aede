"""Every form of the kernels once, on small shapes: what compute-sanitizer and the profiler watch."""

from __future__ import annotations

import sys

import torch

import pathnet
from benchmarks.cases import Case, network


def main(engine: str, device: torch.device) -> None:
    for case in (Case(14, 16, 32, 3), Case(8, 8, 9, 5)):
        net = network(case.depth, case.width).to(device)
        images, labels = case.images(device)
        for precision in ("float32", "bfloat16") if engine == "cuda" else ("float32",):
            recorder = pathnet.Recorder(net, engine=engine, precision=precision)  # type: ignore[arg-type]
            tape = recorder(images, labels)
            norms = tape.path_gradient_norms(pathnet.paths.one_of_each_length(net.n))
            assert torch.isfinite(norms).all()
            tape.routed_gradients(torch.randn(2, net.n, 2))
            recorder.routed_outputs(images, torch.randn(2, net.n, 2))


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    main(name, torch.device("cuda" if name == "cuda" else "cpu"))
