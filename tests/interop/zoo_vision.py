"""Vision models of transformers, timm and torchvision, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import transformers
from timm.models import (
    beit,
    cait,
    convnext,
    deit,
    metaformer,
    mlp_mixer,
    res2net,
    resnet,
    swin_transformer,
    xcit,
)
from torch import nn
from zoo import Kind, images, layers, modules, tokens
from zoo_language import SIZES

VIT = (("norm1", "attn"), ("norm2", "mlp"))


def built(architecture: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = getattr(transformers, architecture)
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        }
        model: nn.Module = module(getattr(transformers, config)(**{**sizes, **options}))
        return model

    return make


def clip_text() -> Kind:
    """Return CLIP's text model, whose pooled output is that of one position, which depends on values."""

    def make() -> nn.Module:
        config = transformers.CLIPTextConfig(**{**SIZES, "projection_dim": 16})
        model: nn.Module = transformers.CLIPTextModel(config)
        return model

    additions = layers("encoder.layers", 2, ("layer_norm1", "self_attn"), ("layer_norm2", "mlp"))
    output = "pooler_output"
    return Kind(
        "clip-text",
        make,
        tokens,
        "encoder.layers.0",
        additions,
        other_lengths=(4, 9),
        options={"output": output},
        output=output,
    )


def clip_vision() -> Kind:
    additions = layers("encoder.layers", 2, ("layer_norm1", "self_attn"), ("layer_norm2", "mlp"))
    make = built("CLIPVisionModel", "CLIPVisionConfig")
    return Kind("clip-vision", make, images(), "encoder.layers.0", additions, options={"output": "last_hidden_state"})


def hf_swin() -> Kind:
    make = built(
        "SwinForImageClassification",
        "SwinConfig",
        num_attention_heads=[2, 2],
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        drop_path_rate=0.0,
    )
    additions = [
        *layers("swin.encoder.layers.0.blocks", 2, ("layernorm_before", "drop_path"), ("layernorm_after", "mlp")),
        *layers("swin.encoder.layers.1.blocks", 1, ("layernorm_before", "drop_path"), ("layernorm_after", "mlp")),
    ]
    return Kind("hf-swin", make, images(), "swin.encoder.layers.0.blocks.0", tuple(additions))


HUGGING_FACE = [
    Kind(
        "hf-vit",
        built("ViTForImageClassification", "ViTConfig"),
        images(),
        "vit.layers.0",
        layers("vit.layers", 2, ("layernorm_before", "attention"), ("layernorm_after", "mlp")),
    ),
    Kind(
        "hf-deit",
        built("DeiTForImageClassification", "DeiTConfig"),
        images(),
        "deit.layers.0",
        layers("deit.layers", 2, ("layernorm_before", "attention"), ("layernorm_after", "mlp")),
    ),
    Kind(
        "hf-dinov2",
        built("Dinov2ForImageClassification", "Dinov2Config"),
        images(),
        "dinov2.encoder.layer.0",
        layers("dinov2.encoder.layer", 2, ("norm1", "layer_scale1"), ("norm2", "layer_scale2")),
    ),
    clip_text(),
    clip_vision(),
    hf_swin(),
    Kind(
        "hf-convnext",
        built(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            patch_size=4,
            hidden_sizes=[8, 12],
            depths=[2, 1],
            num_stages=2,
        ),
        images(),
        "convnext.encoder.stages.0.layers.0",
        (
            *layers("convnext.encoder.stages.0.layers", 2, ("dwconv", "drop_path")),
            *layers("convnext.encoder.stages.1.layers", 1, ("dwconv", "drop_path")),
        ),
    ),
    Kind(
        "hf-segformer",
        built(
            "SegformerForImageClassification",
            "SegformerConfig",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_encoder_blocks=2,
            num_attention_heads=[1, 2],
            sr_ratios=[2, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
        ),
        images(),
        "segformer.stages.0.blocks.0",
        modules(
            *[
                (f"segformer.stages.{i}.blocks.0.{a}", f"segformer.stages.{i}.blocks.0.{b}")
                for i in range(2)
                for a, b in (("layernorm_before", "attention"), ("layernorm_after", "mlp"))
            ]
        ),
    ),
]


def stages(counts: tuple[int, ...], name: str, *branches: tuple[str, str]) -> Any:
    return [
        (f"{name.format(stage, block)}.{first}", f"{name.format(stage, block)}.{last}")
        for stage, count in enumerate(counts)
        for block in range(count)
        for first, last in branches
    ]


def inverted(id: str, architecture: str, blocks: str) -> Kind:
    """Return a network of inverted bottlenecks, some of which have a skip connection."""

    def make() -> nn.Module:
        model: nn.Module = timm.create_model(architecture, num_classes=5)
        return model

    submodules = dict(make().named_modules())
    names = [f"blocks.{block}" for block in blocks.split()]
    firsts = ["conv_pw" if f"{name}.conv_pwl" in submodules else "conv_dw" for name in names]
    pairs = [(f"{name}.{first}", f"{name}.drop_path") for name, first in zip(names, firsts, strict=True)]
    return Kind(id, make, images(), names[0], modules(*pairs))


TIMM = [
    Kind(
        "timm-seresnet",
        lambda: resnet.ResNet(resnet.BasicBlock, (1, 2, 1, 1), num_classes=5, block_args={"attn_layer": "se"}),
        images(),
        "layer1.0",
        modules(*[(f"layer{s}.{b}.conv1", f"layer{s}.{b}.se") for s, b in ((1, 0), (2, 0), (2, 1), (3, 0), (4, 0))]),
    ),
    Kind(
        "timm-resnetv2",
        lambda: timm.create_model("resnetv2_50", layers=(2, 1), channels=(16, 32), stem_chs=8, num_classes=5),
        images(),
        "stages.0.blocks.0",
        modules(
            ("stages.0.blocks.0.conv1", "stages.0.blocks.0.conv3"),
            ("stages.0.blocks.1.norm1", "stages.0.blocks.1.conv3"),
            ("stages.1.blocks.0.conv1", "stages.1.blocks.0.conv3"),
        ),
    ),
    Kind(
        "timm-regnety",
        lambda: timm.create_model("regnety_002", num_classes=5),
        images(),
        "s1.b1",
        modules(
            *[
                (f"s{s + 1}.b{b + 1}.conv1", f"s{s + 1}.b{b + 1}.conv3")
                for s, n in enumerate((1, 1, 4, 7))
                for b in range(n)
            ]
        ),
    ),
    inverted("timm-mobilenetv3", "mobilenetv3_small_100", "1.1 2.1 2.2 3.1 4.1 4.2"),
    Kind(
        "timm-vit",
        lambda: timm.models.VisionTransformer(
            32, 8, num_classes=5, embed_dim=16, depth=2, num_heads=2, init_values=0.5
        ),
        images(),
        "blocks.0",
        layers("blocks", 2, ("norm1", "ls1"), ("norm2", "ls2")),
    ),
    Kind(
        "timm-deit",
        lambda: deit.VisionTransformerDistilled(
            img_size=32, patch_size=8, num_classes=5, embed_dim=16, depth=2, num_heads=2
        ),
        images(),
        "blocks.0",
        layers("blocks", 2, *VIT),
        options={"blocks": ["blocks.0", "blocks.1"]},
    ),
    Kind(
        "timm-cait",
        lambda: cait.Cait(
            img_size=32, patch_size=8, num_classes=5, embed_dim=16, depth=2, num_heads=2, depth_token_only=1
        ),
        images(),
        "blocks.0",
        layers("blocks", 2, *VIT),
        options={"blocks": ["blocks.0", "blocks.1"]},
    ),
    Kind(
        "timm-xcit",
        lambda: xcit.Xcit(
            img_size=32, patch_size=8, num_classes=5, embed_dim=16, depth=2, num_heads=2, cls_attn_layers=1, eta=1.0
        ),
        images(),
        "blocks.0",
        layers("blocks", 2, ("norm1", "attn"), ("norm3", "local_mp"), ("norm2", "mlp")),
        options={"blocks": ["blocks.0", "blocks.1"]},
        tolerance=1e-6,
    ),
    Kind(
        "timm-beit",
        lambda: beit.Beit(
            img_size=32, patch_size=8, num_classes=5, embed_dim=16, depth=2, num_heads=2, init_values=0.1
        ),
        images(),
        "blocks.0",
        layers("blocks", 2, *VIT),
    ),
    Kind(
        "timm-swin",
        lambda: swin_transformer.SwinTransformer(
            img_size=32, patch_size=2, num_classes=5, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=4
        ),
        images(),
        "layers.0.blocks.0",
        (
            *layers("layers.0.blocks", 2, ("norm1", "drop_path1"), ("norm2", "drop_path2")),
            *layers("layers.1.blocks", 1, ("norm1", "drop_path1"), ("norm2", "drop_path2")),
        ),
    ),
    Kind(
        "timm-mixer",
        lambda: mlp_mixer.MlpMixer(img_size=32, patch_size=8, num_classes=5, embed_dim=16, num_blocks=2),
        images(),
        "blocks.0",
        layers("blocks", 2, ("norm1", "mlp_tokens"), ("norm2", "mlp_channels")),
    ),
    Kind(
        "timm-resmlp",
        lambda: mlp_mixer.MlpMixer(
            img_size=32,
            patch_size=8,
            num_classes=5,
            embed_dim=16,
            num_blocks=2,
            block_layer=mlp_mixer.ResBlock,
            norm_layer=mlp_mixer.Affine,
            mlp_ratio=2,
        ),
        images(),
        "blocks.0",
        layers("blocks", 2, ("norm1", "linear_tokens"), ("norm2", "mlp_channels")),
    ),
    Kind(
        "timm-poolformer",
        lambda: metaformer.MetaFormer(
            num_classes=5,
            depths=(2, 1, 1, 1),
            dims=(8, 8, 12, 12),
            token_mixers=metaformer.Pooling,
            mlp_act=nn.GELU,
            mlp_bias=True,
            norm_layers=metaformer.GroupNorm1,
            downsample_norm=None,
            layer_scale_init_values=1.0,
            res_scale_init_values=None,
            use_mlp_head=False,
        ),
        images(),
        "stages.0.blocks.0",
        modules(*stages((2, 1, 1, 1), "stages.{}.blocks.{}", ("norm1", "layer_scale1"), ("norm2", "layer_scale2"))),
    ),
    Kind(
        "timm-res2net",
        lambda: resnet.ResNet(
            res2net.Bottle2neck, (1, 2, 1, 1), base_width=8, num_classes=5, block_args={"scale": 4}
        ),
        images(),
        "layer1.0",
        modules(*[(f"layer{s}.{b}.conv1", f"layer{s}.{b}.bn3") for s, b in ((1, 0), (2, 0), (2, 1), (3, 0), (4, 0))]),
    ),
    Kind(
        "timm-convnext",
        lambda: convnext.ConvNeXt(num_classes=5, depths=(1, 2, 1, 1), dims=(8, 8, 12, 12)),
        images(),
        "stages.0.blocks.0",
        modules(*stages((1, 2, 1, 1), "stages.{}.blocks.{}", ("conv_dw", "drop_path"))),
    ),
]
