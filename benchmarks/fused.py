"""The steps on fused modules: BN mode ``batch``, the triton engine against cuda, ResNet-200, training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import pathnet
from benchmarks import truth
from benchmarks.baselines import graphed
from benchmarks.cases import Setup, batch, fit_statistics, network, path_flops
from benchmarks.outcome import Failed, Findings
from benchmarks.timing import interleaved
from pathnet.models import ResidualNet, preact_resnet_imagenet
from pathnet.nn import fused_residual

__all__ = [
    "IMAGENET_PRECISION",
    "batch_sweep",
    "imagenet",
    "imagenet_network",
    "running_triton",
    "training",
    "training_compiled",
]

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest relative errors of a sample's norm, against float64 on the same record."""

IMAGENET_PRECISION = "bfloat16"
"""The only precision for ResNet-200, since each needs as many kernels again."""

IMAGE_BATCHES = 8


def batch_sweep(setup: Setup) -> Findings:
    """Time the paper's sweep in BN mode ``batch``, batch after batch, and the share of its forward passes."""
    findings: Findings = {"error": _errors(setup, "batch"), "precisions": {}}
    net, batches = network(setup), [batch(setup, number) for number in range(IMAGE_BATCHES)]
    paths = [pathnet.paths.one_of_each_length(net.n, batch=number) for number in range(setup.sweep_batches)]
    for precision in setup.precisions:
        record = pathnet.Recorder(net, bn="batch", precision=precision)  # type: ignore[arg-type]
        tape = record(*batches[0])
        tape.path_gradient_norms(paths[0])
        alone = interleaved(setup, {"record": lambda record=record: record(*batches[0])}, rounds=5)["record"].median  # type: ignore[misc]
        setup.synchronize()
        norms: list[Tensor] = []
        began = time.perf_counter()
        for number, codes in enumerate(paths):
            norms.append(record(*batches[number % IMAGE_BATCHES]).path_gradient_norms(codes))
            if number % 50 == 49:
                setup.synchronize()
                if time.perf_counter() - began > setup.seconds:
                    break
        measured = torch.stack(norms).cpu()
        seconds = time.perf_counter() - began
        findings["precisions"][precision] = {
            "engine": tape.engine,
            "seconds": seconds,
            "batches": len(norms),
            "complete": len(norms) == 1000,
            "seconds_for_1000_batches": seconds * 1000 / len(norms),
            "record_share": alone * len(norms) / seconds,
            "positive_and_finite": bool(((measured > 0) & measured.isfinite()).all()),
        }
    return findings


def running_triton(setup: Setup) -> Findings:
    """Time a sweep of one path of every length in BN mode ``running``, by triton and by cuda in turn."""
    engines = {"triton": "triton", "cuda": "cuda"} if setup.cuda else {"triton": "cpu", "cuda": "cpu"}
    findings: Findings = {"error": _errors(setup, "running", engines["triton"]), "precisions": {}}
    net, (images, labels) = network(setup), batch(setup)
    codes = pathnet.paths.one_of_each_length(net.n)
    for precision in setup.precisions:
        works: dict[str, Callable[[], object]] = {}
        for name, engine in engines.items():
            record = pathnet.Recorder(net, engine=engine, precision=precision)  # type: ignore[arg-type]
            works[name] = lambda record=record: record(images, labels).path_gradient_norms(codes)  # type: ignore[misc]
        timings = interleaved(setup, works)
        findings["precisions"][precision] = {
            "timings": {name: timing.facts() for name, timing in timings.items()},
            "times_of_cuda": timings["triton"].median / timings["cuda"].median,
        }
    return findings


def imagenet(setup: Setup) -> Findings:
    """Time backward passes of ResNet-200 on 224 x 224 images in bfloat16, both BN modes, by length."""
    net, side, size = imagenet_network(setup)
    images, labels = batch(replace(setup, side=side, batch=size))
    net, rows = fit_statistics(net, images), []
    for bn in ("running", "batch"):
        record = pathnet.Recorder(net, bn=bn, precision=IMAGENET_PRECISION)  # type: ignore[arg-type]
        tape = record(images, labels)
        works: dict[str, Callable[[], object]] = {"record": partial(record, images, labels)}
        codes = {}
        for length in sorted({1, net.n // 6, net.n // 2, net.n}):
            codes[f"length {length}"] = paths = pathnet.paths.sample(net.n, length, 4)
            works[f"length {length}"] = partial(tape.path_gradient_norms, paths)
        for name, timing in interleaved(setup, works, rounds=3).items():
            row = {"bn": bn, "precision": IMAGENET_PRECISION, "engine": tape.engine, "what": name, **timing.facts()}
            if name in codes:
                flops = path_flops(net, side // 4, codes[name]) * size
                row |= {"paths": 4, "flops_per_s": flops / timing.median}
            rows.append(row)
    return {"blocks": net.n, "side": side, "batch": size, "rows": rows}


def imagenet_network(setup: Setup) -> tuple[ResidualNet, int, int]:
    """Return a network with random weights, and the side and the number of its images."""
    depth, width, side, size = setup.imagenet
    torch.manual_seed(0)
    return preact_resnet_imagenet(depth, num_classes=10, width=width).to(setup.device), side, size


def training(setup: Setup) -> Findings:
    """Time training steps of all modules and with every second one skipped: eager, and through fused blocks."""
    net, (images, labels) = network(setup), batch(setup)
    all_modules, half_of_them = [1.0] * net.n, [float(i % 2) for i in range(net.n)]
    findings: Findings = {"error": _training_error(setup)}
    works: dict[str, Callable[[], object]] = {}
    for name, drawn in (("whole", all_modules), ("half", half_of_them)):
        works[f"eager, {name}"] = _step(net, images, labels, drawn, _eager)
        works[f"fused, {name}"] = step = _step(net, images, labels, drawn, fused_residual)
        if setup.cuda:
            works[f"fused in a graph, {name}"] = graphed(step)
    timings = interleaved(setup, works)
    return {**findings, "timings": {name: timing.facts() for name, timing in timings.items()}}


def training_compiled(setup: Setup) -> Findings:
    """Time training steps under torch.compile (max-autotune), of the network's own modules and of fused blocks.

    The network has few blocks, since the compiler takes a second and more for each, and they are all alike.
    """
    net, (images, labels) = network(setup, depth=setup.compiled_depth), batch(setup)
    options = {"mode": "max-autotune"} if setup.cuda else {"backend": "eager"}
    works: dict[str, Callable[[], object]] = {}
    for name, block_forward in (("compiled", _eager), ("fused and compiled", fused_residual)):
        works[name] = _step(net, images, labels, [1.0] * net.n, block_forward, options)
    step = _step(net, images, labels, [1.0] * net.n, fused_residual)
    works["fused in a graph"] = graphed(step) if setup.cuda else step
    timings = interleaved(setup, works)
    best = min(timings["fused and compiled"].median, timings["fused in a graph"].median)
    return {
        "depth": setup.compiled_depth,
        "timings": {name: timing.facts() for name, timing in timings.items()},
        "times_faster_than_compiled": timings["compiled"].median / best,
    }


BlockForward = Callable[..., Tensor]
"""Function of a block, its input and the coefficients a and c; returns the output."""


def _eager(block: pathnet.models.Block, x: Tensor, a: float = 1.0, c: float = 1.0) -> Tensor:
    return block(x) if c == 1 else block.skip(x)


def _step(
    net: ResidualNet,
    images: Tensor,
    labels: Tensor,
    drawn: Sequence[float],
    block_forward: BlockForward,
    compiled: dict[str, str] | None = None,
) -> Callable[[], Tensor]:
    """Return a training step of a copy of the network, bfloat16 under autocast; the step returns the loss."""
    model = copy.deepcopy(net).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def forward(images: Tensor) -> Tensor:
        y = model.stem(images)
        for block, c in zip(model.blocks, drawn, strict=True):
            y = block_forward(block, y, 1.0, c)
        return torch.as_tensor(model.head(y))

    run = forward if compiled is None else torch.compile(forward, **compiled)  # type: ignore[call-overload]

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16):
            output = run(images)
        loss = F.cross_entropy(output.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def _training_error(setup: Setup) -> Findings:
    """Return the errors of bfloat16 gradients of a small network, eager and fused, against float32.

    Raises:
        Failed: the fused error is twice the eager one or more.
    """
    small = replace(setup, depth=min(setup.depth, 14), batch=8)
    net, (images, labels) = network(small), batch(small)
    grads = []
    for block_forward, autocast in ((_eager, False), (_eager, True), (fused_residual, True)):
        model = copy.deepcopy(net).train()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            y = model.stem(images)
            for block in model.blocks:
                y = block_forward(block, y)
            output = model.head(y)
        loss = F.cross_entropy(output.float(), labels)
        grads.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))]))
    eager, fused = (float((grad - grads[0]).norm() / grads[0].norm()) for grad in grads[1:])
    if not fused < 2 * eager:
        raise Failed(f"gradients through fused blocks are off by {fused:.1g}", {"eager": eager, "fused": fused})
    return {"eager": eager, "fused": fused}


def _errors(setup: Setup, bn: str, engine: str = "auto") -> Findings:
    """Return the largest relative error of a sample's norm on a small network, by precision.

    Raises:
        Failed: an error is beyond its tolerance.
    """
    # Images of the same side, which need the same kernels.
    small = replace(setup, depth=min(setup.depth, 14), batch=8, side=max(16, setup.side))
    net, (images, labels) = network(small), batch(small)
    routing = pathnet.paths.routing(pathnet.paths.one_of_each_length(net.n))
    errors: Findings = {}
    for precision in setup.precisions:
        tape = pathnet.record(net, images, labels, bn=bn, engine=engine, precision=precision)  # type: ignore[arg-type]
        errors[precision] = truth.sample_error(tape, routing)
    wrong = [precision for precision, error in errors.items() if not error <= TOLERANCES[precision]]
    if wrong:
        raise Failed(f"norms off in {', '.join(wrong)}", {"error": errors})
    return errors
