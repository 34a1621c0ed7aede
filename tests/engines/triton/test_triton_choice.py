"""Networks that the triton engine refuses, and its choice among the engines."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.interpreted import Interpreted, recorded
from torch import nn

import pathnet
from pathnet import engines
from pathnet.engines import self_check
from pathnet.engines.autograd import AutogradEngine
from pathnet.engines.cuda import CudaEngine
from pathnet.engines.engine import Job
from pathnet.engines.forms import unsupported_form
from pathnet.engines.reference import ReferenceEngine
from pathnet.engines.triton import TritonEngine, TritonWalk
from pathnet.engines.triton.limits import unsupported_side
from pathnet.models import PostactBlock, PreactBlock, ResidualNet, resnet
from pathnet.recording import snapshot

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU: tests/gpu/triton"),
    pytest.mark.usefixtures("interpreted"),
]


def test_the_engine_refuses_by_name() -> None:
    torch.manual_seed(0)

    def net(block: PreactBlock | PostactBlock) -> ResidualNet:
        return ResidualNet(nn.Conv2d(3, 4, 3, padding=1), [block], nn.Flatten()).eval()

    block = PreactBlock(4, (3, 3), (4, 4), 1, "projection")
    block.convs[0] = nn.Conv2d(4, 4, 3, padding=0, bias=False)
    reason = "block 0: it has a convolution that changes the side by more than its stride"
    assert unsupported_side(net(block)) == reason
    post = PostactBlock(4, (3, 3), (4, 4), 1, "projection")
    assert unsupported_side(net(post)) is None
    with pytest.raises(ValueError, match="images: expected more than one value per channel for batch statistics"):
        recorded(net(post), torch.randn(1, 3, 1, 1), torch.tensor([0]), "batch")
    bare = PostactBlock(4, (3, 3), (4, 6), 1, "projection")
    bare.projection_bn = None
    assert unsupported_form(net(bare), "running") is None
    assert (
        unsupported_form(net(bare), "batch")
        == "block 0: its skip connection is a projection without batch normalisation"
    )
    post.convs[1] = nn.Conv2d(4, 4, 3, padding=0)
    assert unsupported_side(net(post)) == reason
    for kind in (PreactBlock, PostactBlock):
        strided = kind(4, (3, 3), (6, 6), 3, "projection")
        assert unsupported_side(net(strided)) is None
        # On a side of 4 both give 2, from other pixels.
        strided.projection = nn.Conv2d(4, 6, 1, 2, bias=False)
        assert (
            unsupported_side(net(strided))
            == "block 0: its skip connection is a projection whose stride differs from its module's"
        )
    engine = TritonEngine()
    supported = net(PreactBlock(4, (3, 3), (4, 4), 1, "projection"))
    on_cpu = Job(supported, "batch", "float32", (4, 6, 6), torch.device("cpu"))
    assert engine.unsupported(on_cpu) == "the network is on cpu"
    on_cuda = Job(supported, "batch", "float64", (4, 6, 6), torch.device("cuda"))
    assert engine.unsupported(on_cuda) == 'no precision="float64"'
    assert engine.unavailable() == "this process sees no GPU"
    with pytest.raises(ValueError, match="images: expected more than one value per channel for batch statistics"):
        recorded(supported, torch.randn(1, 3, 1, 1), torch.tensor([0]), "batch")


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, check: Any) -> None:
    """Pretend that this process has a GPU; nothing runs on it."""
    monkeypatch.setattr(engines, "ENGINES", (CudaEngine(), TritonEngine(), AutogradEngine(), ReferenceEngine()))
    for kind in (CudaEngine, TritonEngine):
        monkeypatch.setattr(kind, "unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for module in ("cuda", "triton"):
        monkeypatch.setattr(f"pathnet.engines.{module}.disagreement", check)


def choose(net: ResidualNet, bn: Any = "running", precision: Any = "float32") -> str:
    shape = (net.stem_weight().shape[0], 6, 6)
    return engines.choose("auto", Job(net, bn, precision, shape, torch.device("cuda"))).name


def test_auto_takes_cuda_then_triton_then_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: set[str] = set()
    tried: list[ResidualNet] = []

    def disagreement(engine: Any, job: Job, *rest: Any, **options: Any) -> str | None:
        tried.append(job.net)
        return "it disagrees" if engine.name in wrong else None

    on_a_gpu(monkeypatch, disagreement)
    net = Case("auto", 8, width=16, side=6).net()
    bottleneck = Case("auto", 11, block="bottleneck", width=16, side=6).net()
    post = resnet(11, block="bottleneck")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(net) == choose(resnet(8)) == "cuda"
    tried[1:] = []
    with pytest.warns(RuntimeWarning, match=r"engine: 'triton' was chosen; .* \(cuda: no bn=\"batch\""):
        assert choose(net, "batch", "bfloat16") == "triton"
    with pytest.warns(RuntimeWarning, match=r"'triton' was chosen; faster engines refuse the job \(cuda: "):
        assert choose(bottleneck) == "triton"
    with pytest.warns(RuntimeWarning, match=r"'triton' was chosen; .* \(cuda: block 0: it is not a basic block"):
        assert choose(post) == "triton"
    # Each has checked itself on the network that it serves.
    assert tried == [net, net, bottleneck, post]
    wrong.add("cuda")
    with pytest.warns(RuntimeWarning, match=r"'triton' was chosen; .* \(cuda: it disagrees"):
        assert choose(net) == "triton"
    wrong.add("triton")
    with pytest.warns(RuntimeWarning, match=r"'autograd' was chosen; .* \(cuda: it disagrees; triton: it disagrees"):
        assert choose(net) == "autograd"


@pytest.mark.usefixtures("big_tiles")
@pytest.mark.parametrize(("bn", "post"), [("running", False), ("batch", False), ("running", True)])
def test_the_engines_check_of_itself(bn: Any, post: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = snapshot((pathnet.models.resnet if post else pathnet.models.preact_resnet)(8, 4), bn, torch.float32)

    def check_itself() -> str | None:
        monkeypatch.setattr(self_check, "_reasons", {})
        return self_check.disagreement(Interpreted(), Job(net, bn, "float32", (4, 8, 8), torch.device("cpu")))

    if bn == "batch" or post:
        assert check_itself() is None
        return
    right = TritonWalk.norms
    monkeypatch.setattr(TritonWalk, "norms", lambda *arguments: right(*arguments) * 1.03)
    assert check_itself() == "it disagrees with the reference on a small input (relative error 0.03 in float32)"
