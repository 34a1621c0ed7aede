"""Integer inputs and one output per position: every path of a small language model against the `detach` loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import Case
from helpers.oracles import relative_error
from helpers.token_nets import VOCABULARY, WIDTH, language_model, sentences
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet
from pathnet.models import Block, ResidualNet
from pathnet.recording import cross_entropy


def gradient(
    net: ResidualNet,
    tokens: Tensor,
    loss: Callable[[Tensor], Tensor],
    route: Callable[[int, Tensor, Tensor], Tensor] = lambda i, skip, residual: skip + residual,
) -> Tensor:
    """Return dloss/dy_0 in float64, with each block's branches joined by ``route``."""
    net = copy.deepcopy(net).double()
    y0 = net.stem(tokens).detach().requires_grad_()
    y = y0
    for i, block in enumerate(net.blocks):
        y = route(i, y, block.residual(y))
    return torch.autograd.grad(loss(net.head(y)), y0)[0]


def along(net: ResidualNet, tokens: Tensor, loss: Callable[[Tensor], Tensor], path: Tensor) -> Tensor:
    """Return the gradient along a path, which detaches the other branches."""
    return gradient(
        net, tokens, loss, lambda i, skip, residual: skip.detach() + residual if path[i] else skip + residual.detach()
    )


def mean_over_positions(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy by its definition, position by position."""
    losses = [output[b, t].logsumexp(0) - output[b, t, target[b, t]] for b, t in (target != -100).nonzero().tolist()]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("blocks", "batch", "length"), [(1, 1, 9), (2, 3, 1), (3, 2, 5), (4, 3, 4)])
def test_every_path_equals_the_detach_loop_and_their_sum_autograd(
    blocks: int, batch: int, length: int, ignored: bool
) -> None:
    net, (tokens, target) = language_model(blocks, seed=blocks), sentences(batch, length, seed=blocks)
    if ignored:
        target[0, 0] = -100
        target[-1, 1::2] = -100
    tape = pathnet.record(net, tokens, target, precision="float64")
    assert tape.output.shape == (batch, length, VOCABULARY)

    def loss(output: Tensor) -> Tensor:
        return mean_over_positions(output, target)

    codes = pathnet.paths.enumerate_all(blocks)
    grads = tape.path_gradients(codes)
    assert grads.shape == (len(codes), batch, length, WIDTH)
    expected = torch.stack([along(net, tokens, loss, code) for code in codes])
    for grad, truth in zip(grads, expected, strict=True):
        assert relative_error(grad, truth) < EXACT_WALK
    assert relative_error(tape.path_gradient_norms(codes), expected.flatten(1).norm(dim=1)) < EXACT_WALK
    samples = tape.path_gradient_norms(codes, per_sample=True)
    assert relative_error(samples, expected.flatten(2).norm(dim=2)) < EXACT_WALK
    ordinary = gradient(net, tokens, loss)
    assert relative_error(grads.sum(0), ordinary) < EXACT_WALK
    assert relative_error(tape.gradient(), ordinary) < EXACT_WALK
    for path_length, total in enumerate(tape.gradient_by_length()):
        assert relative_error(total, expected[codes.sum(1) == path_length].sum(0)) < EXACT_WALK


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_float32_recorder_does_not_cast_tokens(dtype: torch.dtype) -> None:
    net, (tokens, target) = language_model(4), sentences(2, 5)
    recorder = pathnet.Recorder(net)
    tape = recorder(tokens.to(dtype), target)
    expected = gradient(net, tokens, lambda output: mean_over_positions(output, target))
    assert relative_error(tape.gradient(), expected) < 1e-5
    torch.testing.assert_close(tape.output, net(tokens), rtol=1e-5, atol=1e-6)
    # The same recorder accepts sentences of another length.
    tokens, target = sentences(3, 2, seed=1)
    expected = gradient(net, tokens, lambda output: mean_over_positions(output, target))
    assert relative_error(recorder(tokens, target).gradient(), expected) < 1e-5


@pytest.mark.parametrize("built", [True, False])
def test_networks_that_no_other_engine_could_run_cause_no_warning(
    monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    """Check that networks of convolutions do cause one if the native code is not built."""
    if not built:
        monkeypatch.setattr(pathnet.engines.cpu.CpuEngine, "unavailable", lambda _: "is not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pathnet.record(language_model(2), *sentences(2, 5)).engine == "autograd"
    if not built:
        case = Case("convolutions", 8)
        with pytest.warns(RuntimeWarning, match=r"'autograd' was chosen; .* \(cpu: is not built"):
            assert pathnet.record(case.net(), *case.images()).engine == "autograd"


def test_a_custom_loss_and_a_routed_forward_pass() -> None:
    net, (tokens, _) = language_model(3), sentences(2, 5)
    regression_target = torch.randn(2, 5, VOCABULARY, dtype=torch.float64)
    recorder = pathnet.Recorder(net, precision="float64", loss=F.mse_loss)
    code = torch.tensor([[1, 0, 1]])
    expected = along(net, tokens, lambda output: F.mse_loss(output, regression_target), code[0])
    assert relative_error(recorder(tokens, regression_target).path_gradients(code)[0], expected) < EXACT_WALK

    routing = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [0.5, 2.0], [0.0, 1.0]]])
    outputs = recorder.routed_outputs(tokens, routing)
    double = copy.deepcopy(net).double()
    for coefficients, output in zip(routing.tolist(), outputs, strict=True):
        y = double.stem(tokens)
        for (a, c), block in zip(coefficients, double, strict=True):
            y = a * y + c * block.residual(y)
        assert relative_error(output, double.head(y).detach()) < EXACT_WALK
    with pathnet.lesion.delete(net, [1]) as lesioned, torch.no_grad():
        assert relative_error(lesioned(tokens), outputs[0]) < 1e-5


def test_inputs_of_other_shapes() -> None:
    """Check vectors, [B, C], and sequences of vectors."""

    class Plain(Block):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

        def residual(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.f(x))

    torch.manual_seed(0)
    net = ResidualNet(nn.Identity(), [Plain() for _ in range(3)], nn.Linear(3, 4))
    for shape in ((5, 3), (2, 4, 3), (1, 2, 3, 3), (2, 2, 1, 2, 3)):
        inputs, target = torch.randn(shape), torch.randint(0, 4, shape[:-1])
        tape = pathnet.record(net, inputs, target, precision="float64", at="image")
        codes = pathnet.paths.enumerate_all(3)
        for code, grad in zip(codes, tape.path_gradients(codes), strict=True):
            leaf = inputs.double().requires_grad_()
            y = leaf
            for bit, block in zip(code, copy.deepcopy(net).double(), strict=True):
                y = y.detach() + block.f(y) if bit else y + block.f(y).detach()
            logits = copy.deepcopy(net.head).double()(y)
            mean = F.cross_entropy(logits.flatten(0, -2), target.flatten())
            assert relative_error(grad, torch.autograd.grad(mean, leaf)[0]) < EXACT_WALK
        norms = tape.path_gradient_norms(codes, per_sample=True)
        assert relative_error(norms, tape.path_gradients(codes).flatten(2).norm(dim=2)) < EXACT_WALK


class Flattened(nn.Module):
    """A model whose residual modules see all positions of all sentences in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.shortcut = nn.Embedding(VOCABULARY, WIDTH), nn.Identity()
        self.modules_ = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.from_embedding(self.embedding(tokens), lambda i, skip, residual: skip + residual)

    def from_embedding(self, y: Tensor, join: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        for i, module in enumerate(self.modules_):
            flat = y.reshape(-1, WIDTH)
            y = join(i, self.shortcut(flat), module(flat)).view(y.shape)
        return torch.as_tensor(self.head(y))


def test_additions_of_flattened_positions() -> None:
    torch.manual_seed(0)
    model = Flattened()
    net = pathnet.adapt(model, sentences(2, 4)[0])
    assert net.n == 3 and "identity" in str(net)
    (tokens, target), double = sentences(3, 4, seed=1), copy.deepcopy(model).double()
    tape = pathnet.record(net, tokens, target, precision="float64")
    codes = pathnet.paths.enumerate_all(3)
    samples = tape.path_gradient_norms(codes, per_sample=True)
    for code, grad, norms in zip(codes, tape.path_gradients(codes), samples, strict=True):
        y0 = double.embedding(tokens).detach().requires_grad_()
        output = double.from_embedding(
            y0, lambda i, skip, residual, code=code: skip.detach() + residual if code[i] else skip + residual.detach()
        )
        (expected,) = torch.autograd.grad(mean_over_positions(output, target), y0)
        assert relative_error(grad, expected) < EXACT_WALK
        assert relative_error(norms, expected.flatten(1).norm(dim=1)) < EXACT_WALK


def test_the_cross_entropy_of_sequences_is_pytorchs() -> None:
    output, target = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))
    target[0, 1:3] = -100
    expected = F.cross_entropy(output.double().mT, target)
    torch.testing.assert_close(cross_entropy(output, target), expected, rtol=1e-14, atol=0)
    assert cross_entropy(output, target.index_fill(1, torch.tensor([0]), 5)).isnan()
    assert cross_entropy(output, torch.full((3, 4), -100)).isnan()


TOKENS, TARGET = sentences(3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"at": "image"},
            r"at: expected a place after the tokens, which have no gradient \(at=\"y0\"\), got 'image'",
        ),
        ({"images": TOKENS + VOCABULARY}, r"images: the network refuses the tokens of shape \[3, 4\] \(index out"),
        ({"images": TOKENS - VOCABULARY}, r"images: the network refuses the tokens of shape \[3, 4\] \(index out"),
        ({"images": TOKENS.repeat(1, 3)}, r"images: the network refuses the tokens of shape \[3, 12\]"),
        ({"images": TOKENS.float()}, r"images: the network refuses the shape \[3, 4\]"),
        ({"images": TOKENS.bool()}, r"images: expected .* or int64 or int32 \(tokens\), got torch.bool"),
        ({"images": TOKENS[:0]}, r"images: expected shape \[B, ...\] with B >= 1, got \[0, 4\]"),
        ({"images": torch.tensor(3)}, r"images: expected shape \[B, ...\] with B >= 1, got \[\]"),
        ({"target": TARGET[:, :3]}, r"target: expected shape \[3, 4\] \(a label for each .* got \[3, 3\]"),
        ({"target": TARGET[:, 0]}, r"target: expected shape \[3, 4\] .* got \[3\]"),
        ({"target": TARGET.where(TARGET > 2, -1)}, "target: expected labels 0 to 10, got -1 to"),
        ({"target": TARGET + 9}, "target: expected labels 0 to 10, got"),
        ({"target": torch.full_like(TARGET, -100)}, "target: expected a label in at least one position, got -100 in"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"net": language_model(2), "images": TOKENS, "target": TARGET, **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        pathnet.record(**arguments, engine="reference")


def test_a_stem_that_moves_the_batch_dimension_is_named() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1)

    net = language_model(1)
    net.stem = nn.Sequential(net.stem, First())
    with pytest.raises(ValueError, match=r"^images: expected the batch first, got \[3, 4\] \(y_0 is \[4, 3, 6\]\)"):
        pathnet.record(net, TOKENS, TARGET, engine="reference")
