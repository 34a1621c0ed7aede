"""Half-precision models, whose copies have another type, and the layouts and masks of torch's own encoder."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.oracles import relative_error
from helpers.routed_models import Padded, cast, padded, sentences, squared
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet


class Halved(nn.Module):
    """A model of half-precision weights, with a mask in their type and a softmax in float32.

    Args:
        exported: whether `torch.fx` cannot trace it.
    """

    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.exported, self.model = exported, Padded()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.exported and ids.shape[1] < 2:
            raise ValueError(ids.shape)
        model = self.model
        dtype = next(model.parameters()).dtype
        bias = (1 - mask.to(dtype))[:, None, None] * -1e4
        weights = torch.arange(1, ids.shape[1] + 1, dtype=dtype) / 8
        y = model.begin(model.tokens(ids) * weights[:, None])
        for i, (attention, perceptron) in enumerate(model.layers):
            y = model.join(2 * i, y, attention(y, bias).to(dtype))
            y = model.join(2 * i + 1, y, perceptron(y))
        return model.out(y)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_of_half_precision_models_are_float64_throughout(dtype: torch.dtype, exported: bool) -> None:
    torch.manual_seed(0)
    model = Halved(exported).to(dtype).eval()
    net = pathnet.adapt(model, sentences(2, 5, torch.Generator().manual_seed(0)))
    assert net.n == 4 and net.traced_by == ("torch.export" if exported else "torch.fx")
    inputs = sentences(3, 7, torch.Generator().manual_seed(1))
    target = torch.randn(3, 7, 5, dtype=torch.float64)
    tape = pathnet.record(net, inputs, target, precision="float64", loss=squared)
    double = copy.deepcopy(model).double()
    assert relative_error(tape.output, double(**inputs).detach()) < EXACT_WALK
    double.model.path = [1, 0, 0, 1]
    value = squared(double(**inputs), target)
    (expected,) = torch.autograd.grad(value, double.model.y0)
    assert relative_error(tape.path_gradients(torch.tensor([[1, 0, 0, 1]]))[0], expected) < EXACT_WALK


def test_the_encoder_of_torch_with_all_its_masks() -> None:
    """Check both of its layouts: one of them holds the batch in the second dimension."""
    for batch_first in (True, False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=batch_first, norm_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

        def batch(size: int, length: int, seed: int, batch_first: bool = batch_first) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(seed)
            _, mask = padded(size, length, generator)
            x = torch.randn(size, length, 8, generator=generator)
            causal = torch.full((length, length), -torch.inf).triu(1)
            src = x if batch_first else x.transpose(0, 1)
            return {"src": src, "mask": causal, "src_key_padding_mask": torch.where(mask == 1, 0.0, -torch.inf)}

        net = pathnet.adapt(model, batch(3, 5, 0))
        assert net.n == 4
        inputs = batch(2, 7, 1)
        torch.testing.assert_close(net(inputs), model(**inputs), rtol=1e-4, atol=1e-5)
        x = inputs["src"].double().requires_grad_()
        output = copy.deepcopy(model).double()(**{**cast(inputs, torch.float64), "src": x})
        tape = pathnet.record(net, inputs, torch.ones_like(output), precision="float64", at="image", loss=squared)
        (grad,) = torch.autograd.grad(squared(output, torch.ones_like(output)), x)
        assert relative_error(tape.gradient(), grad if batch_first else grad.transpose(0, 1)) < EXACT_WALK
