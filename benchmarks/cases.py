"""The network and batches that are measured, and the sizes of a complete run and of its rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathnet.models import ResidualNet, preact_resnet

__all__ = ["FULL", "REHEARSAL", "Setup", "batch", "fit_statistics", "module_flops", "network", "path_flops"]


@dataclass(frozen=True)
class Setup:
    """The sizes of one run.

    Attributes:
        lengths: lengths of the single paths that are timed and checked, in residual modules.
        path_counts, batches, depths, widths: sizes that the scaling step varies, one at a time.
        sweep_batches: number of batches of the paper's sweep; the paper takes 1,000.
        matmul: side of the square bfloat16 product whose rate is the reference.
        rounds: repeats of each timing, interleaved; fewer if they would take longer than ``seconds``.
        seconds: time for the repeats of one comparison, and for the paper's sweep in one precision.
        compiled_depth: depth of the network whose training is compiled.
        imagenet: depth, width, side of the images and batch of the network for large images.
        cuda_tests, triton_tests: folders that pytest runs in the steps of those names.
    """

    device: str
    engine: str
    depth: int
    width: int
    batch: int
    side: int
    lengths: tuple[int, ...]
    precisions: tuple[str, ...]
    path_counts: tuple[int, ...]
    batches: tuple[int, ...]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    sweep_batches: int
    matmul: int
    rounds: int
    seconds: float
    compiled_depth: int
    imagenet: tuple[int, int, int, int]
    cuda_tests: str
    triton_tests: str

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


FULL = Setup(
    device="cuda",
    engine="cuda",
    depth=110,
    width=16,
    batch=128,
    side=32,
    lengths=(1, 5, 17, 27, 54),
    precisions=("bfloat16", "float32"),
    path_counts=(1, 4, 16, 64, 256, 1024, 4096),
    batches=(32, 128, 512, 1024),
    depths=(20, 56, 110, 218),
    widths=(8, 16, 32),
    sweep_batches=1000,
    matmul=8192,
    rounds=5,
    seconds=5.0,
    compiled_depth=20,
    imagenet=(200, 64, 224, 16),
    cuda_tests="tests/gpu/cuda",
    triton_tests="tests/gpu/triton",
)

REHEARSAL = Setup(
    device="cpu",
    engine="cpu",
    depth=14,
    width=4,
    batch=2,
    side=8,
    lengths=(1, 6),
    precisions=("bfloat16", "float32"),
    path_counts=(1, 3),
    batches=(1, 2),
    depths=(8, 14),
    widths=(4,),
    sweep_batches=3,
    matmul=64,
    rounds=2,
    seconds=1.0,
    compiled_depth=8,
    imagenet=(50, 4, 32, 2),
    cuda_tests="tests/test_scaling.py",
    triton_tests="tests/test_paths.py",
)


def batch(setup: Setup, number: int = 0, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return random float32 images [B, 3, side, side] and int64 labels [B], on the setup's device."""
    generator = torch.Generator().manual_seed(1000 + number)
    size = size or setup.batch
    images = torch.randn(size, 3, setup.side, setup.side, generator=generator)
    labels = torch.randint(0, 10, (size,), generator=generator)
    return images.to(setup.device), labels.to(setup.device)


def network(setup: Setup, depth: int | None = None, width: int | None = None) -> ResidualNet:
    """Return a network with random weights and random BN factors and shifts.

    BN's statistics come from one batch and are then perturbed a little. Statistics that fit the activations keep 54
    blocks from multiplying them by powers of ten.
    """
    torch.manual_seed(0)
    net = preact_resnet(depth or setup.depth, width or setup.width)
    for bn in _norms(net):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, 0, 0.3)
    return fit_statistics(net.to(setup.device), batch(setup, number=-1, size=min(setup.batch, 32))[0])


def fit_statistics(net: ResidualNet, images: Tensor) -> ResidualNet:
    """Set BN's statistics from the images, perturbed a little; return the network in evaluation mode."""
    norms = _norms(net)
    momenta = [bn.momentum for bn in norms]
    for bn in norms:
        bn.momentum = None
        bn.reset_running_stats()
    with torch.no_grad():
        net.train()(images)
    generator = torch.Generator().manual_seed(0)
    for bn, momentum in zip(norms, momenta, strict=True):
        bn.momentum = momentum
        assert bn.running_mean is not None and bn.running_var is not None
        factors = torch.rand(bn.num_features, generator=generator) * 0.4 + 0.8
        shifts = torch.randn(bn.num_features, generator=generator) * 0.05
        bn.running_var *= factors.to(images.device)
        bn.running_mean += shifts.to(images.device) * bn.running_var.sqrt()
    return net.eval()


def _norms(net: ResidualNet) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def module_flops(net: ResidualNet, side: int) -> list[tuple[int, int]]:
    """Return for every block the floating-point operations of its residual module and of its skip, for one sample.

    Only convolutions count, a multiply-add as two. A convolution costs the same in both directions.
    """
    counts, height = [], side
    for block in net.blocks:
        form = block.form()  # type: ignore[operator]
        residual, side_after = 0, height
        for unit in form.units:
            cost, side_after = _convolution(unit.conv, side_after)
            residual += cost
        skip = _convolution(form.projection, height)[0] if form.projection is not None else 0
        counts.append((residual, skip))
        height = side_after
    return counts


def path_flops(net: ResidualNet, side: int, paths: Tensor) -> int:
    """Return the floating-point operations of backward passes along all the paths [P, n], for one sample."""
    residual, skip = torch.tensor(module_flops(net, side)).T
    passes = paths.long().cpu().sum(0)
    return int((passes * residual + (len(paths) - passes) * skip).sum())


def _convolution(conv: nn.Conv2d, side: int) -> tuple[int, int]:
    """Return one sample's floating-point operations, and the side of the output."""
    out = (side + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1
    return 2 * conv.weight.numel() * out * out, out
