"""A smoke test of an installed pathnet: ``python smoke.py``, anywhere, needs nothing else.

Each path gradient of a small network, by each instruction set of this processor, against a loop over the blocks in
which `detach` closes one of the two branches.
"""

import os
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

import pathnet
from pathnet import native
from pathnet.models import ResidualNet


def detach_loop(net: ResidualNet, images: Tensor, labels: Tensor, path: list[int]) -> Tensor:
    y0 = net.stem(images).detach().requires_grad_()
    y = y0
    for block, through_module in zip(net.blocks, path, strict=True):
        skip, residual = block.skip(y), block.residual(y)
        y = skip.detach() + residual if through_module else skip + residual.detach()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net.head(y), labels), y0)
    return gradient


def main() -> None:
    assert native.LOADED, native.WHY_NOT
    facts, unavailable = native.build_facts(), pathnet.engines.available()
    assert unavailable["cpu"] is None and unavailable["reference"] is None, unavailable
    torch.manual_seed(0)
    net = pathnet.models.preact_resnet(depth=8, width=5).eval()
    images, labels = pathnet.data.synthetic(images=16, shape=(3, 9, 7)).random_batch(3, seed=0, batch=0)
    codes = pathnet.paths.enumerate_all(net.n)
    truth = [detach_loop(net.double(), images.double(), labels, code.tolist()) for code in codes]
    net.float()
    for name in facts["instruction_sets"]:
        os.environ["PATHNET_ISA"] = name
        gradients = pathnet.record(net, images, labels, engine="cpu").path_gradients(codes)
        for gradient, exact in zip(gradients, truth, strict=True):
            error = float((gradient - exact).norm() / exact.norm())
            assert error < 1e-5, f"{name}: relative error {error:.1e}"
    print(
        f"pathnet {pathnet.__version__} in {os.path.dirname(pathnet.__file__)}: built with torch "
        f"{facts['torch_version']}, correct with torch {torch.__version__} and Python {platform.python_version()} on "
        f"{', '.join(facts['instruction_sets'])}"
    )


if __name__ == "__main__":
    main()
