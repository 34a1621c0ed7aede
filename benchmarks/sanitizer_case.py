"""The program for compute-sanitizer and ncu: every form of every kernel once, on small and awkward shapes.

``python -m benchmarks.sanitizer_case [small | whole] [--device cuda] [--engine cuda]``: ``whole`` runs one backward
pass of the paper's network along a path of every length, for a profile.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import pathnet
from benchmarks.cases import FULL, Setup, batch, network

SMALL = ((8, 16, 8, "projection"), (8, 16, 7, "pad"), (8, 8, 9, "projection"), (14, 16, 5, "projection"))
"""Depth, width, side of the images and shortcut of the networks."""


def small(setup: Setup) -> None:
    for depth, width, side, shortcut in SMALL:
        sizes = replace(setup, side=side, batch=3)
        torch.manual_seed(0)
        net = pathnet.models.preact_resnet(depth, width, shortcut=shortcut).to(setup.device).eval()  # type: ignore[arg-type]
        images, labels = batch(sizes)
        codes = torch.cat([pathnet.paths.one_of_each_length(net.n), torch.zeros(1, net.n, dtype=torch.uint8)])
        routing = torch.randn(2, net.n, 2, generator=torch.Generator().manual_seed(0))
        for precision in setup.precisions:
            recorder = pathnet.Recorder(net, engine=setup.engine, precision=precision)  # type: ignore[arg-type]
            tape = recorder(images, labels)
            tape.path_gradient_norms(codes, per_sample=True)
            tape.path_gradients(codes)
            tape.routed_gradients(routing)
            recorder.routed_outputs(images, routing)
            print(f"depth {depth}, width {width}, side {side}, {shortcut}, {precision}: done", flush=True)
    setup.synchronize()


def whole(setup: Setup) -> None:
    net, (images, labels) = network(setup), batch(setup)
    for precision in setup.precisions:
        tape = pathnet.record(net, images, labels, engine=setup.engine, precision=precision)  # type: ignore[arg-type]
        tape.path_gradient_norms(pathnet.paths.one_of_each_length(net.n))
    setup.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=["small", "whole"], nargs="?", default="small")
    parser.add_argument("--device", default=FULL.device)
    parser.add_argument("--engine", default=FULL.engine)
    parser.add_argument("--precisions", nargs="+", default=list(FULL.precisions))
    options = parser.parse_args()
    setup = replace(FULL, device=options.device, engine=options.engine, precisions=tuple(options.precisions))
    {"small": small, "whole": whole}[options.size](setup)


if __name__ == "__main__":
    main()
