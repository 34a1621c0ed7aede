"""Gradients of single parameters of other people's models, by the models' names, against hooks on the originals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.oracles import relative_error

pytest.importorskip("torchvision", reason="torchvision is not installed (make test-interop has it)")
pytest.importorskip("timm", reason="timm is not installed (make test-interop has it)")
pytest.importorskip("transformers", reason="transformers is not installed (make test-interop has it)")

from hooked import truth  # noqa: E402
from originals import BY_ID  # noqa: E402

import pathnet  # noqa: E402


@pytest.mark.parametrize("name", ["torchvision-basic-4", "timm-resnetv2", "timm-vit", "gpt2-sdpa", "bert"])
def test_paths_to_a_parameter_of_a_residual_module_are_those_of_the_model(name: str) -> None:
    original = BY_ID[name]
    model, batch = original.model(), original.batch(2, seed=4)
    net = pathnet.adapt(model, original.batch()[0])
    for block in (original.n - 1, original.n - 2):
        module = original.residuals[block].last
        # Where the module ends with dropout, the layer before it.
        within = (f"{module}.", f"{module.rpartition('.')[0]}.")
        names = [each for prefix in within for each, _ in model.named_parameters() if each.startswith(prefix)]
        at = names[0]
        tape = pathnet.record(net, *batch, precision="float64", at=at)
        assert tape.n == original.n - block
        for path in itertools.product((0, 1), repeat=tape.n):
            expected = truth(original, model, batch, (0,) * block + path, at=at)
            grad = tape.path_gradients(torch.tensor([path]))[0]
            assert bool(expected.any()) == (path[0] == 1) == bool(grad.any())
            assert relative_error(grad, expected) < 1e-8
        assert relative_error(tape.gradient(), truth(original, model, batch, None, at=at)) < 1e-8


@pytest.mark.parametrize(
    ("name", "at"),
    [("torchvision-basic-4", "bn1.weight"), ("timm-vit", "pos_embed"), ("bert", "bert.embeddings.LayerNorm.weight")],
)
def test_paths_to_a_parameter_of_the_stem_are_those_of_the_model(name: str, at: Any) -> None:
    original = BY_ID[name]
    model, batch = original.model(), original.batch(2, seed=4)
    tape = pathnet.record(pathnet.adapt(model, original.batch()[0]), *batch, precision="float64", at=at)
    for path in [(0,) * tape.n, *itertools.islice(itertools.product((0, 1), repeat=tape.n), 1, None, 5)][:4]:
        expected = truth(original, model, batch, path, at=at)
        assert relative_error(tape.path_gradients(torch.tensor([path]))[0], expected) < 1e-8
