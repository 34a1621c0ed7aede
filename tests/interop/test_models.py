"""Adapted networks against the original models, which `hooked.truth` runs with hooks on their submodules."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from helpers.oracles import relative_error
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="torchvision is not installed (make test-interop has it)")
pytest.importorskip("timm", reason="timm is not installed (make test-interop has it)")
pytest.importorskip("transformers", reason="transformers is not installed (make test-interop has it)")

from hooked import logits, loss, truth, without  # noqa: E402
from originals import BY_ID, ORIGINALS, Original  # noqa: E402

import pathnet  # noqa: E402
from pathnet import native  # noqa: E402
from pathnet.models import PostActivationForm, ResidualNet  # noqa: E402

FLOAT32_INSIDE = 1e-6
"""Tolerance for Llama, whose RMSNorm always computes in float32; other originals are float64 throughout."""


def tolerance(original: Original) -> float:
    return FLOAT32_INSIDE if original.id.startswith("llama") else 1e-10


@cache
def adapted(original: Original) -> tuple[nn.Module, ResidualNet]:
    model = original.model()
    return model, pathnet.adapt(model, original.batch()[0])


@cache
def recorded(original: Original) -> pathnet.Tape:
    return pathnet.record(adapted(original)[1], *original.batch(3, seed=1), precision="float64")


def some_paths(n: int) -> list[tuple[int, ...]]:
    """Return all paths if there are few; else the shortest, the longest, and some of other lengths."""
    if n <= 5:
        return list(itertools.product((0, 1), repeat=n))
    codes = [(0,) * n, (1,) * n, *map(tuple, pathnet.paths.sample(n, n // 2, count=4).tolist())]
    return [*codes, tuple(int(i == 0) for i in range(n)), tuple(int(i < n - 1) for i in range(n))]


all_originals = pytest.mark.parametrize("original", ORIGINALS, ids=lambda original: original.id)


@all_originals
def test_the_network_is_the_model(original: Original) -> None:
    model, net = adapted(original)
    assert net.n == original.n
    for size in (1, 2, 3):
        x, _ = original.batch(size, seed=size)
        with torch.no_grad():
            torch.testing.assert_close(net(x), logits(model, x), rtol=1e-5, atol=1e-6)
    assert {id(weight) for weight in net.parameters()} == {id(weight) for weight in model.parameters()}


@all_originals
def test_the_ordinary_gradient_is_the_models(original: Original) -> None:
    tape = recorded(original)
    expected = truth(original, adapted(original)[0], original.batch(3, seed=1), None)
    assert relative_error(tape.gradient(), expected) < tolerance(original)
    assert relative_error(tape.gradient_by_length().sum(0), expected) < tolerance(original)


@all_originals
def test_single_paths_equal_those_of_the_model(original: Original) -> None:
    tape, model, batch = recorded(original), adapted(original)[0], original.batch(3, seed=1)
    paths = some_paths(original.n)
    expected = torch.stack([truth(original, model, batch, path) for path in paths])
    codes = torch.tensor(paths)
    for grad, true in zip(tape.path_gradients(codes), expected, strict=True):
        assert relative_error(grad, true) < tolerance(original)
    samples = tape.path_gradient_norms(codes, per_sample=True)
    assert relative_error(samples, expected.flatten(2).norm(dim=2)) < tolerance(original)
    if len(paths) == 2**original.n:
        for length, total in enumerate(tape.gradient_by_length()):
            true = expected[codes.sum(1) == length].sum(0)
            assert relative_error(total, true) < tolerance(original)
        assert relative_error(expected.sum(0), tape.gradient()) < tolerance(original)


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("at", ["y0", "image", "stem_weight"])
@pytest.mark.parametrize("name", ["torchvision-basic-4", "timm-resnetv2", "timm-vit"])
def test_every_place_and_mode_of_batch_normalisation(name: str, at: Any, bn: Any) -> None:
    original = BY_ID[name]
    model, net = adapted(original)
    batch = original.batch(4, seed=6)
    tape = pathnet.record(net, *batch, precision="float64", at=at, bn=bn)
    paths = some_paths(original.n)[1::7]
    for grad, path in zip(tape.path_gradients(torch.tensor(paths)), paths, strict=True):
        assert relative_error(grad, truth(original, model, batch, path, bn, at)) < 1e-8
    assert relative_error(tape.gradient(), truth(original, model, batch, None, bn, at)) < 1e-8


@pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)
@pytest.mark.parametrize(
    ("name", "bn"),
    [
        ("timm-resnetv2", "running"),
        ("timm-resnetv2", "batch"),
        ("torchvision-resnet18", "running"),
        ("torchvision-resnet50", "running"),
    ],
)
def test_the_cpu_engine_runs_supported_networks(name: str, bn: Any) -> None:
    original = BY_ID[name]
    model, net = adapted(original)
    batch = original.batch(4, seed=7)
    tape = pathnet.record(net, *batch, bn=bn)
    assert tape.engine == "cpu"
    paths = some_paths(original.n)[::5]
    for norm, path in zip(tape.path_gradient_norms(torch.tensor(paths)), paths, strict=True):
        assert norm == pytest.approx(truth(original, model, batch, path, bn).norm().item(), rel=1e-3)


@all_originals
def test_a_deletion_is_the_model_without_the_module(original: Original) -> None:
    model, net = adapted(original)
    x, _ = original.batch(2, seed=2)
    n = original.n
    for deleted in [(0,), (n - 1,), (n // 2,), (0, n - 1)]:
        with torch.no_grad(), without(original, model, deleted):
            expected = logits(model, x)
        with torch.no_grad():
            assert relative_error(net(x), expected) > 1e-2
            torch.testing.assert_close(pathnet.lesion.delete(net, deleted)(x), expected, rtol=1e-5, atol=1e-6)
            with pathnet.lesion.delete(net, deleted) as lesioned:
                torch.testing.assert_close(lesioned(x), expected, rtol=1e-5, atol=1e-6)
    routing = torch.ones(n, n, 2)
    routing[range(n), range(n), 1] = 0
    outputs = pathnet.Recorder(net, engine="reference").routed_outputs(x, routing)
    for i, output in enumerate(outputs):
        with torch.no_grad(), without(original, model, [i]):
            torch.testing.assert_close(output, logits(model, x), rtol=1e-4, atol=1e-5)


@all_originals
def test_a_training_step_leaves_out_modules_that_are_not_drawn(original: Original) -> None:
    model = original.model()
    net = pathnet.adapt(model, original.batch()[0])
    batch, drawn = original.batch(3, seed=3), [i % 2 == 0 for i in range(original.n)]
    left_out = [i for i, is_drawn in enumerate(drawn) if not is_drawn]
    truth_model = copy.deepcopy(model)
    with without(original, truth_model, left_out):
        loss(logits(truth_model, batch[0]), batch[1]).backward()
    loss(net(batch[0], drawn=drawn), batch[1]).backward()
    undrawn = {
        id(weight)
        for i in left_out
        for name in original.residuals[i].submodules
        for weight in model.get_submodule(name).parameters()
    }
    assert undrawn and all(weight.grad is None for weight in model.parameters() if id(weight) in undrawn)
    for (name, weight), (_, true) in zip(model.named_parameters(), truth_model.named_parameters(), strict=True):
        if id(weight) in undrawn:
            assert true.grad is None or not true.grad.any(), name
        else:
            assert weight.grad is not None, name
            torch.testing.assert_close(weight.grad, true.grad, rtol=1e-4, atol=1e-5)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1).step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (id(weight) in undrawn), name
    with torch.no_grad():
        torch.testing.assert_close(net(batch[0]), logits(model, batch[0]), rtol=1e-5, atol=1e-6)


def test_errors_of_lesioned_networks() -> None:
    original = BY_ID["torchvision-basic-4"]
    model, net = adapted(original)
    data = pathnet.data.synthetic(images=160, classes=5)
    images = data.normalise(data.test.take(torch.arange(len(data.test))))
    with torch.no_grad():
        answers = logits(model, images).argmax(1)
    test = pathnet.data.InMemory(data.test.images, answers)  # type: ignore[attr-defined]
    labelled = dataclasses.replace(data, test=test)
    lesions = [pathnet.lesion.Lesion(), *(pathnet.lesion.Lesion(deleted=(i,)) for i in range(4))]
    errors = pathnet.lesion.errors(net, labelled, lesions)
    expected = [0]
    for i in range(4):
        with torch.no_grad(), without(original, model, [i]):
            expected.append(int((logits(model, images).argmax(1) != answers).sum()))
    assert errors.wrong.tolist() == expected and sum(expected) > 0


def test_training_with_modules_drawn_trains_the_model() -> None:
    original = BY_ID["torchvision-basic-4"]
    model = original.model()
    net = pathnet.adapt(model, original.batch()[0])
    data = pathnet.data.synthetic(images=64, classes=5)
    before = copy.deepcopy(model.state_dict())
    recipe = pathnet.training.Recipe(epochs=2, batch_size=32, modules=2, warmup_steps=0, learning_rate=0.01)
    history = pathnet.training.train(net, data, recipe)
    assert history[-1].train_loss < history[0].train_loss
    assert any(
        not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if "running" in name
    )
    images, _ = next(data.test_batches(8))
    with torch.no_grad():
        torch.testing.assert_close(net(images), model.eval()(images), rtol=1e-4, atol=1e-5)


def test_deleting_both_modules_of_a_layer_removes_the_layer() -> None:
    """Compare with the model built without the layer."""
    for original in ORIGINALS:
        if not original.id.startswith(("gpt2", "llama", "opt", "timm-vit")):
            continue
        model, net = adapted(original)
        x, _ = original.batch(2, seed=4)
        shorter = copy.deepcopy(model)
        layers = shorter.get_submodule(original.entry.rpartition(".")[0])
        assert isinstance(layers, nn.ModuleList | nn.Sequential)
        del layers[0]
        if hasattr(shorter, "config"):
            shorter.config.num_hidden_layers -= 1
        with torch.no_grad():
            expected = logits(shorter, x)
            torch.testing.assert_close(pathnet.lesion.delete(net, [0, 1])(x), expected, rtol=1e-5, atol=1e-6)
            assert relative_error(expected, net(x)) > 1e-2


def post_activation_originals() -> list[Original]:
    return [
        original for original in ORIGINALS if original.id.startswith("torchvision") or original.id == "timm-resnet26d"
    ]


@pytest.mark.parametrize("original", post_activation_originals(), ids=lambda original: original.id)
def test_post_activation_blocks_are_recognised(original: Original) -> None:
    _, net = adapted(original)
    for block, residual in zip(net, original.residuals, strict=True):
        form = block.form()
        if form is not None:
            assert len(form.convs) == len(form.bns) == len(residual.submodules) // 2
    recognised = [isinstance(block.form(), PostActivationForm) for block in net]
    # A block with average pooling before the projection (the d of 26d) has no such form.
    expected = [original.id != "timm-resnet26d" or i % 2 == 1 or i == 0 for i in range(net.n)]
    assert recognised == expected


def test_the_kinds_of_skips_are_named() -> None:
    """Check the kind without the part that both branches share, such as a normalisation."""

    def kinds(name: str) -> list[str]:
        return [block.skip_kind().split(" after ")[0] for block in adapted(BY_ID[name])[1]]  # type: ignore[attr-defined]

    for name in ("timm-convnext", "timm-vit", "bert", "gpt2-eager"):
        assert set(kinds(name)) == {"identity"}
    assert kinds("timm-resnetv2") == ["projection", "identity", "projection", "projection", "identity"]


def test_blocks_deleted_from_a_resnet_are_identities() -> None:
    original = BY_ID["torchvision-resnet18"]
    model, net = adapted(original)
    x, _ = original.batch(2, seed=5)
    without_it = copy.deepcopy(model)
    without_it.layer2[1] = nn.Identity()  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(pathnet.lesion.delete(net, [3])(x), without_it(x), rtol=1e-5, atol=1e-6)


def test_the_head_and_the_embedding_of_gpt2_remain_tied() -> None:
    original = BY_ID["gpt2-sdpa"]
    model, net = adapted(original)
    embedding: Tensor = model.get_submodule("transformer.wte").weight  # type: ignore[assignment]
    assert any(weight is embedding for weight in net.stem.parameters())
    assert any(weight is embedding for weight in net.head.parameters())
    assert recorded(original)._record.y0_shape == (3, 6, 12)
