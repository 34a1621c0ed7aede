"""Behaviour in training of models of timm, torchvision and transformers, and experts that can be traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.oracles import relative_error
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="torchvision is not installed (make test-interop has it)")
pytest.importorskip("timm", reason="timm is not installed (make test-interop has it)")
pytest.importorskip("transformers", reason="transformers is not installed (make test-interop has it)")

import torchvision  # noqa: E402
import transformers  # noqa: E402
from hooked import logits, truth  # noqa: E402
from originals import VOCABULARY, Original, Residual  # noqa: E402
from timm.models.convnext import ConvNeXt  # noqa: E402
from timm.models.resnet import BasicBlock, ResNet  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torchvision.models.convnext import CNBlockConfig  # noqa: E402
from torchvision.models.efficientnet import MBConvConfig  # noqa: E402

import pathnet  # noqa: E402


def efficientnet() -> nn.Module:
    settings = [MBConvConfig(1, 3, 1, 32, 16, 1), MBConvConfig(2, 3, 1, 16, 16, 3)]
    return torchvision.models.EfficientNet(settings, dropout=0.2, stochastic_depth_prob=0.4, num_classes=5)


def torchvision_convnext() -> nn.Module:
    settings = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 2)]
    return torchvision.models.ConvNeXt(settings, stochastic_depth_prob=0.4, layer_scale=1.0, num_classes=5)


LIVE: dict[str, Callable[[], nn.Module]] = {
    "timm-convnext": lambda: ConvNeXt(
        num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 12, 12), drop_path_rate=0.3, ls_init_value=None
    ),
    "timm-vit": lambda: VisionTransformer(
        img_size=32, patch_size=16, embed_dim=12, depth=2, num_heads=2, num_classes=5,
        drop_path_rate=0.3, attn_drop_rate=0.2, proj_drop_rate=0.1,
    ),
    "timm-resnet": lambda: ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, drop_path_rate=0.3),
    "torchvision-efficientnet": efficientnet,
    "torchvision-convnext": torchvision_convnext,
}  # fmt: skip


def seeded(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return torch.as_tensor(module(x))


@pytest.mark.parametrize("name", LIVE)
def test_stochastic_depth_and_dropout_train_as_the_model_does(name: str) -> None:
    torch.manual_seed(0)
    model = LIVE[name]().eval()
    x = torch.randn(6, 3, 32, 32)
    net = pathnet.adapt(model, x[:2])
    evaluated = model(x)
    torch.testing.assert_close(net(x), evaluated)
    net.train()
    assert all(module.training for module in model.modules())
    expected = seeded(model, x)
    torch.testing.assert_close(seeded(net, x), expected)
    assert (expected - evaluated).abs().max() > 1e-3
    net.eval()
    assert not any(module.training for module in model.modules())


def language_model(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 8, "hidden_size": 16, "num_hidden_layers": 2}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, num_attention_heads=2, bos_token_id=None, eos_token_id=None, **settings
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()  # type: ignore[no-any-return]


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))


def opt(**settings: float) -> nn.Module:
    return language_model("OPT", word_embed_proj_dim=16, ffn_dim=24, **settings)


def llama(**settings: float) -> nn.Module:
    return language_model("Llama", intermediate_size=24, **settings)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: llama(attention_dropout=0.1), "'model.layers.0.self_attn', 'model.layers.1.self_attn'"),
        (lambda: opt(dropout=0.1, attention_dropout=0.0), "'model.decoder.layers.0', 'model.decoder.layers.1'"),
        (lambda: opt(dropout=0.0, layerdrop=1e-6), "'model.decoder'"),
    ],
    ids=["attention", "layers", "layerdrop"],
)
def test_dropout_that_tracing_fixes_is_named(model: Callable[[], nn.Module], what: str) -> None:
    net = pathnet.adapt(model(), tokens())
    with pytest.raises(ValueError, match=f"^net: expected evaluation mode, .* training branch of {what}; training"):
        net.train()


@pytest.mark.parametrize("model", [llama, lambda: opt(dropout=0.0)], ids=["llama", "opt"])
def test_models_that_read_their_mode_without_effect_train(model: Callable[[], nn.Module]) -> None:
    original = model()
    original.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    net = pathnet.adapt(original, tokens()).train()
    assert all(module.training for module in original.modules())
    torch.testing.assert_close(net(tokens()), logits(original, tokens()), rtol=1e-4, atol=1e-5)


def mixtral() -> nn.Module:
    return language_model(
        "Mixtral", intermediate_size=32, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
    )


def test_experts_that_cannot_be_traced_are_referred_to_those_that_can(capfd: pytest.CaptureFixture[str]) -> None:
    for implementation in ("eager", "grouped_mm"):
        model: Any = mixtral()
        model.set_experts_implementation(implementation)
        with pytest.raises(ValueError, match=r'set_experts_implementation\("batched_mm"\)'):
            pathnet.adapt(model, tokens())
    assert "def forward" not in capfd.readouterr().err


def test_paths_through_experts_are_the_models() -> None:
    def make() -> nn.Module:
        model: Any = mixtral()
        model.set_experts_implementation("batched_mm")
        return model  # type: ignore[no-any-return]

    parts = [("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")]
    residuals = tuple(
        Residual(*(names := [f"model.layers.{layer}.{module}" for module in part])[:: len(part) - 1], tuple(names))
        for layer in range(2)
        for part in parts
    )
    original = Original("mixtral", make, "model.layers.0", residuals)
    model = original.model()
    net = pathnet.adapt(model, original.batch()[0])
    assert net.n == 4
    batch = original.batch(3, seed=1)
    tape = pathnet.record(net, *batch, precision="float64")
    paths = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 0), (1, 0, 0, 1), (0, 0, 1, 1)]
    for path, grad in zip(paths, tape.path_gradients(torch.tensor(paths)), strict=True):
        assert relative_error(grad, truth(original, model, batch, path)) < 1e-6
