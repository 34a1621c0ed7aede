"""Training of compiled blocks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import shaken
from helpers.training import DRAWS, SMALL, fresh

from pathnet import data, models
from pathnet.training import train


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_blocks_give_the_same_gradients_by_one_program_a_shape(compiling: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.manual_seed(0)
    plain = shaken(models.preact_resnet(14, 4)).double().train()
    net = copy.deepcopy(plain)
    programs = CompileCounterWithBackend("aot_eager")
    for block in net:
        block.compile(backend=programs)
    batch, labels = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (5,))
    for drawn in ((True,) * 6, *DRAWS, (False, False, True, True, True, False)):
        for either in (net, plain):
            either.zero_grad()
            F.cross_entropy(either(batch, drawn), labels).backward()
        # Two stages begin with a block that changes the shape.
        assert programs.frame_count == 5
        for name, p in net.named_parameters():
            expected = plain.get_parameter(name).grad
            assert (p.grad is None) == (expected is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)


def test_training_runs_compiled_blocks_as_they_are(compiling: None, images: data.Data) -> None:
    recipe, plain, net = dataclasses.replace(SMALL, epochs=1, modules=2), fresh(), fresh()
    for block in net:
        block.compile(backend="eager")
    train(plain, images, recipe, engine="none")
    train(net, images, recipe)
    assert models.fingerprint(net) == models.fingerprint(plain)
