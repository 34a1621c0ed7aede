"""Hooks, compiled modules and messages: what runs while a model is traced or recorded, and what stays as it was."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.oracles import relative_error
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, prune

import pathnet
from pathnet.models.tracing.quiet import quiet


class Network(nn.Module):
    """A network of residual blocks on vectors.

    Attributes:
        path: for each block, the branch that a gradient flows through; None for both.
        activation: a function that the residual modules end with.
    """

    def __init__(self, exported: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.exported = nn.Linear(5, 8), nn.Linear(8, 3), exported
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.path: tuple[int | None, ...] = (None,) * 3
        self.activation: Callable[[Tensor], Tensor] = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        if self.exported:
            assert x.shape[1] == 5
        return self.after_stem(self.stem(x))

    def after_stem(self, x: Tensor) -> Tensor:
        for branch, taken in zip(self.branches, self.path, strict=True):
            y = self.activation(branch(x))
            x = (x.detach() if taken == 1 else x) + (y.detach() if taken == 0 else y)
        return self.head(x)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 5, generator=generator), torch.randint(3, (4,), generator=generator)


def assert_paths_are(model: Any, tape: pathnet.Tape) -> None:
    """Check a tape of `batch` against the gradients of a model, which becomes float64, with detached branches."""
    model = model.double().eval()
    x, target = batch()
    paths = list(itertools.product((0, 1), repeat=3))
    for path, grad in zip(paths, tape.path_gradients(torch.tensor(paths)), strict=True):
        model.path = path
        y0 = model.stem(x.double()).detach().requires_grad_()
        loss = nn.functional.cross_entropy(model.after_stem(y0), target)
        (expected,) = torch.autograd.grad(loss, y0)
        assert relative_error(grad, expected) < 1e-10


@pytest.mark.parametrize("exported", [False, True])
def test_hooks_do_not_fire_and_remain(exported: bool) -> None:
    model, calls = Network(exported), []

    def log(*args: Any) -> None:
        calls.append(args)

    for module in (model, model.stem, model.branches[0], model.branches[1][0]):  # type: ignore[index]
        module.register_forward_hook(log)
        module.register_forward_pre_hook(log)
        module.register_full_backward_hook(log)
        module.register_full_backward_pre_hook(log)
    model.stem.weight.register_hook(log)
    handle = module_hooks.register_module_forward_hook(log)
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    x, target = batch()
    try:
        net = pathnet.adapt(model, x)
        assert calls == []
        assert handle.id in module_hooks._global_forward_hooks
    finally:
        handle.remove()
    assert "without the hooks of the model itself, stem, branches.0 and 1 more" in str(net)
    assert hooks == [dict(module._forward_hooks) for module in model.modules()]
    tape = pathnet.record(net, x, target, precision="float64", engine="reference")
    assert tape.gradient().shape == (4, 8) and calls == []
    model(x).sum().backward()
    assert len(calls) == 4 * 4 + 1
    calls.clear()
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    assert_paths_are(Network(exported), tape)


def test_a_recorder_copies_no_hook() -> None:
    model = Network()
    net = pathnet.adapt(model, batch()[0])
    # A lock can be neither copied nor pickled.
    lock = threading.Lock()
    model.stem.register_forward_hook(lambda *args, lock=lock: None)

    class Logger:
        def __init__(self) -> None:
            self.lock = lock

        def log(self, *args: Any) -> None:
            raise AssertionError

    model.branches[0][0].register_forward_hook(Logger().log)  # type: ignore[index]
    assert_paths_are(Network(), pathnet.record(net, *batch(), precision="float64", engine="reference"))


WEIGHTS: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": lambda linear: nn.utils.weight_norm(linear),
    "weight norm parametrization": parametrizations.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "spectral norm parametrization": parametrizations.spectral_norm,
    "pruning": lambda linear: prune.random_unstructured(linear, "weight", 0.5),
    "two prunings": lambda linear: prune.ln_structured(
        prune.random_unstructured(linear, "weight", 0.3), "weight", 0.3, 2, 0
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_hooks_that_compute_weights_are_part_of_the_model(kind: str, exported: bool) -> None:
    def weighted() -> Network:
        model = Network(exported)
        for branch in model.branches:
            WEIGHTS[kind](branch[0])  # type: ignore[index]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    model = weighted()
    net = pathnet.adapt(model, batch()[0])
    assert "hooks" not in str(net)
    assert_paths_are(weighted(), pathnet.record(net, *batch(), precision="float64", engine="reference"))
    outputs = model(batch()[0])
    with torch.no_grad():
        for parameter in model.branches[0].parameters():
            parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
    torch.testing.assert_close(net(batch()[0]), model(batch()[0]))
    assert (model(batch()[0]) - outputs).abs().max() > 1e-3


def test_compiled_modules_and_functions_are_traced_as_they_are_written() -> None:
    compiled = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(module)
        return module.forward

    def compile_whole(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend=backend)  # type: ignore[return-value]

    def compile_part(model: Any) -> nn.Module:
        model.branches[1] = torch.compile(model.branches[1], backend=backend)
        model.stem = torch.compile(model.stem, backend=backend)
        return model

    def compile_in_place(model: Any) -> nn.Module:
        model.branches[0].compile(backend=backend)
        model.compile(backend=backend)
        return model

    def compile_function(model: Any) -> nn.Module:
        model.activation = torch.compile(torch.tanh, backend=backend)
        return model

    x, target = batch()
    for change in (compile_whole, compile_part, compile_in_place, compile_function):
        model = change(Network())
        net = pathnet.adapt(model, x)
        assert (net.n, net.traced_by) == (3, "torch.fx")
        tape = pathnet.record(net, x, target, precision="float64", engine="reference")
        assert compiled == [], change.__name__
        assert_paths_are(Network(), tape)
        torch.testing.assert_close(model(x), Network()(x))
        assert compiled, change.__name__
        compiled.clear()
        torch._dynamo.reset()
        net.train()
        assert all(module.training for module in model.modules())


class Untraceable(Network):
    def after_stem(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return self.head(x)
        return super().after_stem(x)


def test_a_refusal_prints_and_logs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.root.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match="cannot be traced"):
            warnings.simplefilter("always")
            pathnet.adapt(Untraceable(), batch()[0])
    finally:
        logging.root.removeHandler(handler)
    assert capfd.readouterr() == ("", "")
    assert [record for record in records if record.levelno >= logging.WARNING] == [] and caught == []
    assert handler.filters == []


def test_other_threads_are_heard(capfd: pytest.CaptureFixture[str]) -> None:
    def speak(words: str) -> None:
        print(words, file=sys.stderr)

    with quiet():
        speak("here")
        thread = threading.Thread(target=speak, args=["there"])
        thread.start()
        thread.join()
    speak("after")
    assert capfd.readouterr().err == "there\nafter\n"


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_named() -> None:
    model = torch.ao.quantization.quantize_dynamic(Network().eval(), {nn.Linear})
    with pytest.raises(
        ValueError, match=r"^model: expected layers .* quantised ones: stem, head, branches.0.0 and 5 m"
    ):
        pathnet.adapt(model, batch()[0])


def test_weights_dequantised_in_forward_are_served() -> None:
    class Dequantised(nn.Module):
        """A linear layer whose weights are int8 with a scale."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            scale = linear.weight.detach().abs().max() / 127
            self.register_buffer("scale", scale)
            self.register_buffer("quantised", (linear.weight.detach() / scale).round().to(torch.int8))
            self.bias = linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.quantised.to(x.dtype) * self.scale).t() + self.bias  # type: ignore[operator,union-attr]

    model = Network()
    for branch in model.branches:
        branch[0] = Dequantised(branch[0])  # type: ignore[index]
    net = pathnet.adapt(model, batch()[0])
    assert_paths_are(model, pathnet.record(net, *batch(), precision="float64", engine="reference"))
