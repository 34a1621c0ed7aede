"""A walk of each precision on the paper's network, and its record, once: what the profiler looks at."""

from __future__ import annotations

import torch

import pathnet
from benchmarks.cases import PAPER


def main() -> None:
    device = torch.device("cuda")
    net, (images, labels) = PAPER.net(device), PAPER.images(device)
    for precision in ("bfloat16", "float32"):
        tape = pathnet.record(net, images, labels, engine="cuda", precision=precision)  # type: ignore[arg-type]
        tape.path_gradient_norms(pathnet.paths.sample(net.n, 27, 54))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
