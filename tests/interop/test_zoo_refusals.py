"""Models of other libraries that `adapt` refuses, each with one line that names the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="timm is not installed (make test-interop has it)")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed (make test-interop has it)")
pytest.importorskip("transformers", reason="transformers is not installed (make test-interop has it)")

from timm.models import cait, hrnet  # noqa: E402
from zoo import images, tokens  # noqa: E402
from zoo_language import GROUPED, bart_decoder, built, decoder_inputs, t5_decoder  # noqa: E402
from zoo_vision import HUGGING_FACE  # noqa: E402

import pathnet  # noqa: E402

LONGEST = 720
"""Most characters of a message: what torch says is cut, and no list is printed whole."""


class QuantizedBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.layers = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def mixtral(implementation: str) -> Callable[[], nn.Module]:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    return built("MixtralForCausalLM", "MixtralConfig", experts_implementation=implementation, **{**GROUPED, **sizes})


def clip_vision() -> nn.Module:
    return next(kind for kind in HUGGING_FACE if kind.id == "clip-vision").make()


def whole_cait() -> nn.Module:
    model: nn.Module = cait.Cait(
        img_size=32, patch_size=8, num_classes=5, embed_dim=16, depth=2, num_heads=2, depth_token_only=1
    )
    return model


REFUSED = {
    "hrnet": (
        lambda: hrnet.HighResolutionNet(hrnet.cfg_cls["hrnet_w18_small"], num_classes=5),
        images(64),
        "more in both the skip connection and the residual module",
    ),
    "densenet": (
        lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=5),
        images(),
        "joined by concatenation (dense connections), not by addition",
    ),
    "shufflenet": (
        lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
        images(),
        "joined by concatenation (dense connections), not by addition",
    ),
    "squeezenet-chain": (
        lambda: torchvision.models.AlexNet(num_classes=5).features,
        images(64),
        "no residual connection was found; its operations are one chain",
    ),
    "cait-with-class-attention": (whole_cait, images(), "since other paths bypass it up to a concatenation"),
    "t5-without-stream": (t5_decoder().make, decoder_inputs, "expected stream="),
    "bart-without-stream": (bart_decoder().make, decoder_inputs, "expected stream="),
    "mixtral-grouped": (mixtral("grouped_mm"), tokens, 'model.set_experts_implementation("batched_mm")'),
    "mixtral-loop": (mixtral("eager"), tokens, 'model.set_experts_implementation("batched_mm")'),
    "clip-of-several-outputs": (clip_vision, images(), "names 'last_hidden_state', 'pooler_output'"),
    "quantized": (
        QuantizedBranches,
        lambda size, _, seed: torch.randn(size, 8),
        "expected layers that autograd differentiates, got quantised ones: layers.0, layers.1",
    ),
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_no_residual_networks_are_refused_with_the_reason(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, batch, reason = REFUSED[name]
    torch.manual_seed(0)
    model: Any = make().eval()
    example = batch(2, 6, 0)
    capfd.readouterr()
    with pytest.raises(ValueError, match=re.escape(reason)) as refusal:
        pathnet.adapt(model, example)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) <= LONGEST
    assert capfd.readouterr().err == ""
