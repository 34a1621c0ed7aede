"""Networks whose blocks run fused: numbers, what they share with the network, and what runs unfused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.fused_networks import batch, count_runs, network
from helpers.oracles import relative_error
from torch import Tensor, nn

import pathnet
from pathnet import models, native
from pathnet.models import Block, PreactBlock, ResidualNet
from pathnet.nn import FusedNet, fuse

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)

GRADIENT = 1e-4
"""Relative error of each parameter's gradient in a network of six blocks, if no ReLU's bit flips."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_runs(monkeypatch)


def gradients(net: ResidualNet, x: Tensor, drawn: list[bool] | None = None) -> dict[str, Tensor | None]:
    net.zero_grad()
    F.cross_entropy(net(x, drawn), batch()[1]).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def check_step(net: ResidualNet, drawn: list[bool] | None = None) -> None:
    """Compare a step's gradients and running statistics with those of the network in float64."""
    x, fused = batch()[0], fuse(net, "cpu")
    plain = copy.deepcopy(net).double()
    exact = gradients(plain, x.double(), drawn)
    for name, grad in gradients(fused, x, drawn).items():
        expected = exact[name]
        assert (grad is None) == (expected is None), name
        assert grad is None or expected is None or relative_error(grad, expected) < GRADIENT, name
    for (name, buffer), truth in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), truth.double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["projection", "pad", "pad_around"])
def test_a_step_is_that_of_the_network(shortcut: str, block: str, runs: list[str]) -> None:
    net = network(shortcut, block)
    check_step(net)
    assert runs == ["cpu"] * net.n


def test_modules_that_are_not_drawn_run_nothing_and_get_no_gradient(runs: list[str]) -> None:
    net = network(survival=0.5)
    check_step(net, [True, False, True, False, False, True])
    # Three modules, and the skip connection of block 4, which is a projection of the pre-activated input.
    assert runs == ["cpu"] * 4


def test_evaluation_and_autocast() -> None:
    net, (x, _) = network(), batch()
    fused = fuse(net, "cpu").eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(fused(x), net.float()(x).double()) < 0.05


def test_it_shares_all_that_the_network_has() -> None:
    net = network()
    fused = fuse(net, "cpu")
    assert isinstance(fused, FusedNet) and type(fused).__name__ == "FusedResidualNet"
    assert list(fused.state_dict()) == list(net.state_dict())
    assert all(one is other for one, other in zip(fused.parameters(), net.parameters(), strict=True))
    assert all(one is other for one, other in zip(fused.buffers(), net.buffers(), strict=True))
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in net.named_modules()]
    assert fused.stem is net.stem and fused.head is net.head and fused.config is net.config
    assert fused.n == net.n and all(isinstance(block, PreactBlock) for block in fused)
    assert "FusedPreactBlock(\n      engine=cpu" in repr(fused)
    assert [type(block) for block in net] == [PreactBlock] * 6, "the network itself stays as it is"


def test_the_mode_is_that_of_the_network_in_both_directions() -> None:
    net = network(survival=0.5)
    fused = fuse(net, "cpu")
    for change, other in ((fused, net), (net, fused)):
        for mode in (False, True):
            change.train(mode)
            assert {module.training for module in other.modules() if not isinstance(module, nn.ModuleList)} == {mode}
    net.blocks[2].survival = 0.25  # type: ignore[assignment]
    assert fused.blocks[2].survival == 0.25
    fused.blocks[2].settle()  # type: ignore[operator]
    assert net.blocks[2].survival == 1.0


def test_an_optimizer_of_either_trains_both() -> None:
    net, (x, labels) = network(), batch()
    fused = fuse(net, "cpu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(fused(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.testing.assert_close(F.cross_entropy(net(x), labels), F.cross_entropy(fused(x), labels))


def test_types_and_parameters_may_change(runs: list[str]) -> None:
    net, (x, _) = network(), batch()
    fused = fuse(net, "cpu")
    fused.double()
    assert net.stem.weight.dtype == torch.float64
    assert fused.unfused == dict.fromkeys(range(6), "its parameters are torch.float64")
    torch.testing.assert_close(fused(x.double()), copy.deepcopy(net)(x.double()))
    assert runs == []
    net.float()
    assert fused.unfused == {}
    fused.load_state_dict(network("projection").state_dict(), assign=True)
    assert all(one is other for one, other in zip(fused.parameters(), net.parameters(), strict=True))
    torch.testing.assert_close(fused(x), copy.deepcopy(net)(x), rtol=1e-4, atol=1e-4)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in fused.named_parameters()}
    assert not torch.func.functional_call(fused, zeros, x).any()
    assert runs == ["cpu"] * 12
    fused.bfloat16()
    assert fused(x.bfloat16()).dtype == torch.bfloat16 and len(runs) == 18


COPIES: dict[str, Callable[[FusedNet], FusedNet]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda fused: pickle.loads(pickle.dumps(fused)),
    "torch.save": lambda fused: saved_and_loaded(fused),
}


def saved_and_loaded(fused: FusedNet) -> FusedNet:
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded: FusedNet = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_fused_and_shares_nothing(way: str, runs: list[str]) -> None:
    net, (x, _) = network(), batch()
    fused = fuse(net, "cpu")
    fused.note = "kept"  # type: ignore[assignment]
    fused.compile(backend="eager")
    copied = COPIES[way](fused)
    assert type(copied) is type(fused) and copied.engines == ("cpu",) * 6 and copied.note == "kept"
    assert not {each.data_ptr() for each in copied.parameters()} & {each.data_ptr() for each in net.parameters()}
    copied.eval()
    assert net.training and not copied.blocks[0].training and not copied.training
    expected = copy.deepcopy(net).eval()
    torch.testing.assert_close(copied(x), expected(x), rtol=1e-4, atol=1e-4)
    assert runs == ["cpu"] * 6


def test_a_network_copied_together_with_its_view_still_shares() -> None:
    net = network()
    other_net, other_fused = copy.deepcopy((net, fuse(net, "cpu")))
    assert all(one is other for one, other in zip(other_net.parameters(), other_fused.parameters(), strict=True))
    other_net.eval()
    assert not other_fused.training and not other_fused.blocks[3].training and net.training


def test_a_shallow_copy_of_a_block_has_attributes_of_its_own() -> None:
    block = fuse(network(), "cpu").blocks[0]
    other = copy.copy(block)
    other.survival = 0.5  # type: ignore[assignment]
    assert type(other) is type(block) and block.survival == 1.0


def test_files_are_those_of_the_network(tmp_path: Path) -> None:
    net = network().eval()
    fused = fuse(net, "cpu")
    models.save(fused, tmp_path / "fused.safetensors")
    loaded = models.load(tmp_path / "fused.safetensors")
    assert type(loaded) is ResidualNet and models.fingerprint(loaded) == models.fingerprint(net)
    assert models.fingerprint(fused) == models.fingerprint(net)


def test_fusing_again_takes_the_engine_anew() -> None:
    net = network()
    fused = fuse(fuse(net, "triton"), "cpu")
    assert fused.engines == ("cpu",) * 6
    plain = fuse(fused, "none")
    assert list(plain) == list(net) and plain.engines == ("none",) * 6
    assert plain.unfused == dict.fromkeys(range(6), 'engine="none" runs the modules')
    assert fuse(net).engines == ("cpu",) * 6


def test_an_engine_that_does_not_serve_leaves_the_modules(monkeypatch: pytest.MonkeyPatch, runs: list[str]) -> None:
    net, (x, _) = network().eval(), batch()
    monkeypatch.setattr("pathnet.nn.serving._interpreted", lambda: False)
    monkeypatch.setattr("pathnet.nn.serving._has_triton", lambda: True)
    fused = fuse(net, "triton")
    assert fused.unfused == dict.fromkeys(range(6), "the triton engine does not run on cpu")
    assert torch.equal(fused(x), net(x))
    monkeypatch.setattr("pathnet.nn.serving._has_triton", lambda: False)
    assert fused.unfused[0] == "triton is not installed"
    monkeypatch.setattr(native, "LOADED", False)
    monkeypatch.setattr(native, "WHY_NOT", "the native library is not built")
    fused = fuse(net)
    assert fused.engines == ("none",) * 6 and fused.unfused[5] == "the native library is not built"
    assert torch.equal(fused(x), net(x)) and runs == []
    assert fuse(net.to("meta"), "cpu").unfused[0] == "the cpu engine does not run on meta"


class Halved(PreactBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def test_blocks_that_cannot_run_fused_stay_the_same_objects() -> None:
    for net, reason in [
        (models.highway(8, 4), "its gate multiplies skip connection and residual module"),
        (models.resnet(8, 4), "expected a pre-activation block, got a post-activation one"),
        (models.vgg(width=4), "its class VggLayer defines no fused form"),
    ]:
        fused = fuse(net, "cpu")
        assert list(fused) == list(net) and set(fused.engines) == {"none"}
        assert fused.unfused[1] == reason, fused.unfused
    net = network()
    net.blocks[0].__class__ = Halved
    fused = fuse(net, "cpu")
    assert fused.blocks[0] is net.blocks[0] and fused.engines == ("none", *["cpu"] * 5)
    assert fused.unfused == {0: "its class Halved computes by its own forward method"}
    net = network()
    net.blocks[1].compile(backend="eager")
    fused = fuse(net, "cpu")
    assert fused.blocks[1] is net.blocks[1] and fused.engines[1] == "none"
    assert fused.unfused == {1: "it was compiled before it could be fused"}


def test_a_compiled_network_does_not_run_in_place_of_its_view(runs: list[str]) -> None:
    net, (x, _) = network(), batch()
    net.compile(backend="eager")
    fuse(net, "cpu")(x)
    assert runs == ["cpu"] * 6


def test_a_module_scaled_in_evaluation_runs_fused_in_training_alone(runs: list[str]) -> None:
    net, (x, _) = network(survival=0.5).eval(), batch()
    fused = fuse(net, "cpu")
    assert torch.equal(fused(x), net(x)) and runs == []
    assert fused.unfused[5] == "its residual module is scaled by a survival probability of 0.5"
    fused.train()(x)
    assert fused.unfused == {} and runs == ["cpu"] * 6


def test_hooks_of_blocks_and_of_the_network_run() -> None:
    net, (x, _) = network(), batch()
    fused, seen = fuse(net, "cpu"), []
    net.blocks[2].register_forward_hook(lambda module, inputs, output: seen.append("block"))
    fused.blocks[2].register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    net.register_forward_hook(lambda module, inputs, output: seen.append("network"))
    fused(x).sum().backward()
    assert seen == ["block", "network", "backward"] and fused.engines[2] == "cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_inputs_of_other_types_run_as_in_the_modules(dtype: torch.dtype, runs: list[str]) -> None:
    block = fuse(network(), "cpu").eval().blocks[0]
    x = torch.randn(2, 4, 5, 5, dtype=dtype)
    with pytest.raises(RuntimeError):
        block(x)
    assert torch.equal(block.to(dtype)(x), Block.forward(block, x)) and runs == []  # type: ignore[arg-type]


def test_one_value_per_channel_is_refused_as_by_the_modules() -> None:
    fused = fuse(network(), "cpu")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused.blocks[0](torch.ones(1, 4, 1, 1))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="net: expected a pathnet ResidualNet, got a Linear"):
        fuse(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="engine: expected 'auto' or 'cpu' or 'triton' or 'none', got 'cuda'"):
        pathnet.nn.fuse(network(), "cuda")  # type: ignore[arg-type]
