"""Networks of torchvision, timm and transformers with random weights, and the gradients along their paths, found with
forward hooks on their own submodules: no code in common with pathnet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

VOCABULARY = 19


@dataclass(frozen=True)
class Residual:
    """Where a residual module lies in the model.

    Attributes:
        first: the submodule that reads what the skip connection reads too.
        last: the one whose output (or the first of its outputs) the skip is added to.
        own: those whose weights only the residual module has.
    """

    first: str
    last: str
    own: tuple[str, ...]


@dataclass(frozen=True)
class Original:
    """A model of somebody else's and its residual modules, from input to output.

    Attributes:
        entry: the submodule whose input is ``y_0``.
        stem_weight: the first convolution's weight.
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
        """In evaluation mode; away from initial values that hide errors, and residual modules that hardly count."""
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
        """Inputs and target: images and classes, or tokens and those that follow."""
        generator = torch.Generator().manual_seed(seed)
        if self.speaks:
            tokens = torch.randint(0, VOCABULARY, (size, 7), generator=generator)
            return tokens[:, :-1].clone(), tokens[:, 1:].clone()
        return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(0, 5, (size,), generator=generator)

    @property
    def speaks(self) -> bool:
        return self.entry.endswith(("h.0", "layers.0", "layer.0"))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x, use_cache=False) if hasattr(model, "config") else model(x)
    return torch.as_tensor(getattr(output, "logits", output))


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def truth(
    original: Original,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    path: Sequence[int] | None,
    bn: str = "running",
    at: str = "y0",
) -> Tensor:
    """dloss/d(place) in float64 along one path, or the ordinary gradient where there is none.

    Where the path takes a skip connection, what the residual module gives is detached. Where it takes a residual
    module, the gradient at their common source is replaced by the part that came through the residual module.
    """
    model, (x, target) = copy.deepcopy(model).double(), batch
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(bn == "batch")
    x = x.double().requires_grad_() if x.is_floating_point() else x
    leaves: list[Tensor] = []

    def enter(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        leaves.append(given[0].detach().requires_grad_())
        return (leaves[0] * 1.0, *given[1:])

    with ExitStack() as hooks:
        if at == "y0":
            hooks.enter_context(model.get_submodule(original.entry).register_forward_pre_hook(enter))
        for residual, taken in zip(original.residuals, path or (), strict=path is not None):
            if taken:
                first = model.get_submodule(residual.first)
                hooks.enter_context(first.register_forward_pre_hook(_only_through_here))
            else:
                last = model.get_submodule(residual.last)
                hooks.enter_context(last.register_forward_hook(_changed(Tensor.detach)))
        output = logits(model, x)
    places = {"image": [x], "stem_weight": [dict(model.named_parameters()).get(original.stem_weight)]}
    (gradient,) = torch.autograd.grad(loss(output, target), places.get(at, leaves))
    return gradient


def _only_through_here(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    source, *others = given
    own, came = source.view_as(source), []
    own.register_hook(came.append)
    source.register_hook(lambda _: came[0])
    return (own, *others)


def _changed(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


@contextmanager
def without(original: Original, model: nn.Module, blocks: Sequence[int]) -> Iterator[nn.Module]:
    """The model while the residual modules of some blocks give zeros."""
    with ExitStack() as hooks:
        for i in blocks:
            last = model.get_submodule(original.residuals[i].last)
            hooks.enter_context(last.register_forward_hook(_changed(torch.zeros_like)))
        yield model


def _convolutional(names: Sequence[str], convolutions: int) -> tuple[Residual, ...]:
    """Of post-activation blocks with those names."""
    parts = [f"{kind}{i}" for i in range(1, convolutions + 1) for kind in ("conv", "bn")]
    return tuple(
        Residual(f"{name}.conv1", f"{name}.{parts[-1]}", tuple(f"{name}.{part}" for part in parts)) for name in names
    )


def _stages(counts: Sequence[int]) -> list[str]:
    return [f"layer{stage}.{block}" for stage, count in enumerate(counts, 1) for block in range(count)]


def _preactivation(counts: Sequence[int]) -> tuple[Residual, ...]:
    """Of a bottleneck `ResNetV2`, whose first blocks of a stage share their first BN with the projection."""
    found = []
    for stage, count in enumerate(counts):
        for block in range(count):
            name = f"stages.{stage}.blocks.{block}"
            own = tuple(f"{name}.{part}" for part in ("conv1", "norm2", "conv2", "norm3", "conv3"))
            if block == 0:
                found.append(Residual(f"{name}.conv1", f"{name}.conv3", own))
            else:
                found.append(Residual(f"{name}.norm1", f"{name}.conv3", (f"{name}.norm1", *own)))
    return tuple(found)


def _transformer(name: str, parts: Sequence[tuple[str, ...]], layers: int = 2) -> tuple[Residual, ...]:
    found = []
    for layer in range(layers):
        for part in parts:
            own = [f"{name}.{layer}.{module}" for module in part]
            found.append(Residual(own[0], own[-1], tuple(own)))
    return tuple(found)


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
    """Normalised behind each addition, so that the normalisation is a part of both branches of the next block."""

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
    """Whose second addition in a layer is one of all samples laid end to end."""

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
    """Whose skip connections are modules that do nothing."""
    residuals = []
    for name in (
        "stages.0.blocks.0",
        "stages.1.blocks.0",
        "stages.1.blocks.1",
        "stages.2.blocks.0",
        "stages.3.blocks.0",
    ):
        own = tuple(f"{name}.{part}" for part in ("conv_dw", "norm", "mlp"))
        residuals.append(Residual(own[0], f"{name}.drop_path", own))
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
