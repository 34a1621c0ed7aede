"""Networks of torchvision, timm and transformers with random weights, and where their residual modules are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

VOCABULARY = 19


@dataclass(frozen=True)
class Residual:
    """Location of a residual module in the model.

    Attributes:
        first: the submodule that reads the source of the skip connection.
        last: the submodule to whose output (or first output) the skip is added.
        submodules: the submodules whose weights belong to the residual module alone.
    """

    first: str
    last: str
    submodules: tuple[str, ...]


@dataclass(frozen=True)
class Original:
    """A third-party model and its residual modules, from input to output.

    Attributes:
        entry: the submodule whose input is ``y_0``.
        stem_weight: name of the first convolution's weight.
    """

    id: str
    make: Callable[[], nn.Module]
    entry: str
    residuals: tuple[Residual, ...]
    stem_weight: str = "conv1.weight"

    @property
    def n(self) -> int:
        return len(self.residuals)

    def model(self) -> nn.Module:
        """Return the model in evaluation mode, with random weights and statistics.

        Initial values would hide errors, and make residual modules negligible.
        """
        torch.manual_seed(0)
        model = self.make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
                nn.init.normal_(module.running_mean, 0, 0.3)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and not name.endswith("bias"):
                    nn.init.uniform_(parameter, 0.5, 1.5)
                else:
                    nn.init.normal_(parameter, 0, 0.3)
        return model.eval()

    def batch(self, size: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and target: images and classes, or tokens and the following ones."""
        generator = torch.Generator().manual_seed(seed)
        if self.is_language_model:
            tokens = torch.randint(0, VOCABULARY, (size, 7), generator=generator)
            return tokens[:, :-1].clone(), tokens[:, 1:].clone()
        return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(0, 5, (size,), generator=generator)

    @property
    def is_language_model(self) -> bool:
        return self.entry.endswith(("h.0", "layers.0", "layer.0"))


def _convolutional(names: Sequence[str], convolutions: int) -> tuple[Residual, ...]:
    """Return the residual modules of post-activation blocks, by the blocks' names."""
    parts = [f"{kind}{i}" for i in range(1, convolutions + 1) for kind in ("conv", "bn")]
    return tuple(
        Residual(f"{name}.conv1", f"{name}.{parts[-1]}", tuple(f"{name}.{part}" for part in parts)) for name in names
    )


def _stages(counts: Sequence[int]) -> list[str]:
    return [f"layer{stage}.{block}" for stage, count in enumerate(counts, 1) for block in range(count)]


def _preactivation(counts: Sequence[int]) -> tuple[Residual, ...]:
    """Return the residual modules of a bottleneck `ResNetV2`.

    The first block of each stage shares its first BN with the projection.
    """
    residuals = []
    for stage, count in enumerate(counts):
        for block in range(count):
            name = f"stages.{stage}.blocks.{block}"
            submodules = tuple(f"{name}.{part}" for part in ("conv1", "norm2", "conv2", "norm3", "conv3"))
            if block == 0:
                residuals.append(Residual(f"{name}.conv1", f"{name}.conv3", submodules))
            else:
                residuals.append(Residual(f"{name}.norm1", f"{name}.conv3", (f"{name}.norm1", *submodules)))
    return tuple(residuals)


def _transformer(name: str, parts: Sequence[tuple[str, ...]], layers: int = 2) -> tuple[Residual, ...]:
    residuals = []
    for layer in range(layers):
        for part in parts:
            submodules = [f"{name}.{layer}.{module}" for module in part]
            residuals.append(Residual(submodules[0], submodules[-1], tuple(submodules)))
    return tuple(residuals)


def _resnet(kind: Any, layers: list[int]) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.resnet.ResNet(kind, layers, num_classes=5)


def _gpt2(attention: str) -> Original:
    def make() -> nn.Module:
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=8,
            n_embd=12,
            n_layer=2,
            n_head=2,
            attn_implementation=attention,
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.GPT2LMHeadModel(config)

    parts = _transformer("transformer.h", [("ln_1", "attn"), ("ln_2", "mlp")])
    return Original(f"gpt2-{attention}", make, "transformer.h.0", parts)


def _llama(attention: str) -> Original:
    def make() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=8,
            hidden_size=12,
            intermediate_size=14,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attn_implementation=attention,
        )
        return transformers.LlamaForCausalLM(config)

    parts = [("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")]
    return Original(f"llama-{attention}", make, "model.layers.0", _transformer("model.layers", parts))


def _bert() -> Original:
    """Return BERT, which normalises after each addition: part of both branches of the next block."""

    def make() -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=8,
            hidden_size=12,
            intermediate_size=14,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        return transformers.BertForMaskedLM(config)

    parts = [
        ("attention.self", "attention.output.dense", "attention.output.dropout"),
        ("intermediate", "output.dense", "output.dropout"),
    ]
    return Original("bert", make, "bert.encoder.layer.0", _transformer("bert.encoder.layer", parts))


def _opt() -> Original:
    """Return OPT, whose second addition in a layer works on samples laid end to end."""

    def make() -> nn.Module:
        config = transformers.OPTConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=8,
            hidden_size=12,
            word_embed_proj_dim=12,
            ffn_dim=14,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        return transformers.OPTForCausalLM(config)

    parts = [("self_attn_layer_norm", "self_attn"), ("final_layer_norm", "fc1", "fc2")]
    return Original("opt", make, "model.decoder.layers.0", _transformer("model.decoder.layers", parts))


def _convnext() -> Original:
    """Return ConvNeXt, whose skip connections are identity modules."""
    residuals = []
    for name in (
        "stages.0.blocks.0",
        "stages.1.blocks.0",
        "stages.1.blocks.1",
        "stages.2.blocks.0",
        "stages.3.blocks.0",
    ):
        submodules = tuple(f"{name}.{part}" for part in ("conv_dw", "norm", "mlp"))
        residuals.append(Residual(submodules[0], f"{name}.drop_path", submodules))
    return Original(
        "timm-convnext",
        lambda: ConvNeXt(num_classes=5, depths=(1, 2, 1, 1), dims=(8, 8, 12, 12), ls_init_value=None),
        "stages.0.blocks.0",
        tuple(residuals),
        "stem.0.weight",
    )


BASIC = torchvision.models.resnet.BasicBlock

ORIGINALS = [
    Original("torchvision-basic-4", _resnet(BASIC, [1, 1, 1, 1]), "layer1.0", _convolutional(_stages([1] * 4), 2)),
    Original(
        "torchvision-resnet18",
        lambda: torchvision.models.resnet18(num_classes=5),
        "layer1.0",
        _convolutional(_stages([2] * 4), 2),
    ),
    Original(
        "torchvision-resnet50",
        lambda: torchvision.models.resnet50(num_classes=5),
        "layer1.0",
        _convolutional(_stages([3, 4, 6, 3]), 3),
    ),
    Original(
        "timm-resnet26d",
        lambda: timm.create_model("resnet26d", num_classes=5),
        "layer1.0",
        _convolutional(_stages([2] * 4), 3),
        "conv1.0.weight",
    ),
    Original(
        "timm-resnetv2",
        lambda: timm.create_model("resnetv2_50", layers=(2, 1, 2), channels=(16, 32, 32), stem_chs=8, num_classes=5),
        "stages.0.blocks.0",
        _preactivation([2, 1, 2]),
        "stem.conv.weight",
    ),
    Original(
        "timm-vit",
        lambda: VisionTransformer(32, 8, num_classes=5, embed_dim=12, depth=2, num_heads=2, init_values=0.5),
        "blocks.0",
        _transformer("blocks", [("norm1", "attn", "ls1"), ("norm2", "mlp", "ls2")]),
        "patch_embed.proj.weight",
    ),
    _gpt2("eager"),
    _gpt2("sdpa"),
    _llama("eager"),
    _llama("sdpa"),
    _bert(),
    _opt(),
    _convnext(),
]

BY_ID = {original.id: original for original in ORIGINALS}
