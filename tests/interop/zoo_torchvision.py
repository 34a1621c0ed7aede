"""Vision models of torchvision, with random weights."""

from __future__ import annotations

import torchvision
from zoo import Kind, images, modules

V = torchvision.models
TORCHVISION = [
    Kind(
        "tv-resnext",
        lambda: V.resnet.ResNet(V.resnet.Bottleneck, [1, 2, 1, 1], num_classes=5, groups=4, width_per_group=16),
        images(),
        "layer1.0",
        modules(*[(f"layer{s}.{b}.conv1", f"layer{s}.{b}.bn3") for s, b in ((1, 0), (2, 0), (2, 1), (3, 0), (4, 0))]),
    ),
    Kind(
        "tv-convnext",
        lambda: V.ConvNeXt(
            [V.convnext.CNBlockConfig(8, 12, 2), V.convnext.CNBlockConfig(12, None, 1)],
            num_classes=5,
            layer_scale=0.5,
        ),
        images(),
        "features.1.0",
        modules(
            ("features.1.0.block", "features.1.0.stochastic_depth"),
            ("features.1.1.block", "features.1.1.stochastic_depth"),
            ("features.3.0.block", "features.3.0.stochastic_depth"),
        ),
    ),
    Kind(
        "tv-vit",
        lambda: V.VisionTransformer(32, 8, 2, 2, 16, 20, num_classes=5),
        images(),
        "encoder.layers.encoder_layer_0",
        modules(
            *[
                (f"encoder.layers.encoder_layer_{i}.{a}", f"encoder.layers.encoder_layer_{i}.{b}")
                for i in range(2)
                for a, b in (("ln_1", "dropout"), ("ln_2", "mlp"))
            ]
        ),
    ),
    Kind(
        "tv-swin",
        lambda: V.SwinTransformer([2, 2], 8, [2, 1], [2, 2], [4, 4], num_classes=5),
        images(),
        "features.1.0",
        modules(
            *[
                (f"features.{i}.{a}", f"features.{i}.{b}")
                for i in ("1.0", "1.1", "3.0")
                for a, b in (("norm1", "attn"), ("norm2", "mlp"))
            ]
        ),
    ),
    Kind(
        "tv-maxvit",
        lambda: V.MaxVit((32, 32), 8, 4, [8, 12], [1, 1], 4, 0.0, num_classes=5),
        images(),
        "blocks.0.layers.0.layers.MBconv",
        modules(
            *[
                (f"blocks.{i}.layers.0.layers.{a}", f"blocks.{i}.layers.0.layers.{b}")
                for i in range(2)
                for a, b in (
                    ("MBconv.layers", "MBconv.layers"),
                    ("window_attention.attn_layer", "window_attention.attn_layer"),
                    ("window_attention.mlp_layer", "window_attention.mlp_layer"),
                    ("grid_attention.attn_layer", "grid_attention.attn_layer"),
                    ("grid_attention.mlp_layer", "grid_attention.mlp_layer"),
                )
            ]
        ),
    ),
]
