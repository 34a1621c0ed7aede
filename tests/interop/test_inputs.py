"""Hugging Face batches: masks, other lengths, encoder-decoders and heads that pick a position, against hooks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

from helpers.oracles import relative_error  # noqa: E402
from helpers.tolerances import EXACT_WALK  # noqa: E402
from hooked import changed, without_skip_gradient  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import pathnet  # noqa: E402

VOCABULARY = 19
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2}
T5 = {"d_model": 12, "d_kv": 6, "d_ff": 14, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its batches, and where its residual modules are.

    Attributes:
        make: returns the model.
        entry: the submodule whose input is ``y_0``.
        residuals: for each residual module the submodules that read the skip connection's source and that end it.
        padding: the side on which sentences are padded.
        further: further inputs of a batch.
        output: the output that is followed.
        arguments: further arguments of `pathnet.adapt`.
    """

    id: str
    make: Callable[[], nn.Module]
    entry: str
    residuals: Sequence[tuple[str, str]]
    padding: str = "right"
    further: Callable[[Tensor, Tensor, torch.Generator], dict[str, Tensor]] | None = None
    output: str = "logits"
    arguments: Mapping[str, Any] | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("bias"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.normal_(parameter, 0, 0.3)
        return model.eval()

    def batch(self, size: int, length: int, seed: int) -> Any:
        """Return a batch of sentences as a tokenizer returns it."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY - 1, (size, length), generator=generator)
        lengths = torch.randint(2, length + 1, (size, 1), generator=generator)
        lengths[0] = length
        positions = torch.arange(length)
        mask = (positions < lengths if self.padding == "right" else positions >= length - lengths).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        if self.further is not None:
            batch.update(self.further(ids, mask, generator))
        return transformers.BatchEncoding(batch)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        return model(**inputs, **({"use_cache": False} if takes_cache else {}))[self.output]


def pairs(prefix: str, parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{prefix}.{i}.{first}", f"{prefix}.{i}.{last}") for i in range(2) for first, last in parts]


def decoded(ids: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    length = ids.shape[1] - 1
    return {"decoder_input_ids": torch.randint(3, VOCABULARY, (len(ids), length), generator=generator)}


def labelled(ids: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    return {"labels": ids.where(mask == 1, -100)}


def kinds(ids: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    return {"token_type_ids": torch.randint(0, 2, ids.shape, generator=generator)}


def ended(ids: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Put the end of the text, the token with the largest number, where the mask ends."""
    last = mask.sum(1, keepdim=True) - 1
    return {"input_ids": (ids * mask).scatter(1, last, VOCABULARY - 1)}


def gpt2(kind: str, **settings: Any) -> nn.Module:
    config = transformers.GPT2Config(**GPT2, bos_token_id=None, eos_token_id=None, **settings)
    return getattr(transformers, kind)(config)


def llama(kind: str, **settings: Any) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, max_position_embeddings=16, num_key_value_heads=1, **settings)
    return getattr(transformers, kind)(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=16))


def bloom() -> nn.Module:
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=12, n_layer=2, n_head=2)
    return transformers.BloomForCausalLM(config)


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **T5))


def clip_text() -> nn.Module:
    config = transformers.CLIPTextConfig(
        **SMALL, max_position_embeddings=16, projection_dim=8, eos_token_id=VOCABULARY - 1, bos_token_id=1
    )
    return transformers.CLIPTextModelWithProjection(config)


OF_GPT2 = pairs("transformer.h", [("ln_1", "attn.resid_dropout"), ("ln_2", "mlp")])
OF_LLAMA = pairs("model.layers", [("input_layernorm", "self_attn.o_proj"), ("post_attention_layernorm", "mlp")])
OF_BERT = [("attention.self", "attention.output.dropout"), ("intermediate", "output.dropout")]
OF_BLOOM = [("input_layernorm", "self_attention.dense"), ("post_attention_layernorm", "mlp.dense_4h_to_h")]
OF_T5 = [(f"layer.{i}.layer_norm", f"layer.{i}.dropout") for i in range(3)]
OF_CLIP = [("layer_norm1", "self_attn.out_proj"), ("layer_norm2", "mlp")]

CASES = [
    Case("bert", bert, "bert.encoder.layer.0", pairs("bert.encoder.layer", OF_BERT), further=kinds),
    Case("gpt2", lambda: gpt2("GPT2LMHeadModel"), "transformer.h.0", OF_GPT2, "left"),
    Case(
        "gpt2's loss",
        lambda: gpt2("GPT2LMHeadModel"),
        "transformer.h.0",
        OF_GPT2,
        further=labelled,
        output="loss",
        arguments={"output": "loss"},
    ),
    Case(
        "gpt2 classifies",
        lambda: gpt2("GPT2ForSequenceClassification", pad_token_id=0, num_labels=3),
        "transformer.h.0",
        OF_GPT2,
    ),
    Case("llama", lambda: llama("LlamaForCausalLM"), "model.layers.0", OF_LLAMA, "left"),
    Case(
        "llama classifies",
        lambda: llama("LlamaForSequenceClassification", pad_token_id=0, num_labels=3),
        "model.layers.0",
        OF_LLAMA,
    ),
    Case("bloom", bloom, "transformer.h.0", pairs("transformer.h", OF_BLOOM)),
    Case(
        "t5's decoder",
        t5,
        "decoder.block.0",
        pairs("decoder.block", OF_T5),
        "right",
        decoded,
        "logits",
        {"stream": "decoder"},
    ),
    Case(
        "t5's encoder",
        t5,
        "encoder.block.0",
        pairs("encoder.block", OF_T5[:2]),
        "right",
        decoded,
        "logits",
        {"stream": "encoder"},
    ),
    Case(
        "clip's text",
        clip_text,
        "text_model.encoder.layers.0",
        pairs("text_model.encoder.layers", OF_CLIP),
        further=ended,
        output="text_embeds",
        arguments={"output": "text_embeds"},
    ),
]


@cache
def adapted(case: Case) -> tuple[nn.Module, Any]:
    model = case.model()
    return model, pathnet.adapt(model, case.batch(3, 7, 0), **(case.arguments or {}))


def along(case: Case, model: nn.Module, loss: Callable[[nn.Module], Tensor], path: Sequence[int]) -> Tensor:
    """Return the loss's gradient at ``y_0`` along a path in float64, by hooks on the model."""
    model = copy.deepcopy(model).double()
    leaves: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        leaves.append(args[0].detach().requires_grad_())
        return (leaves[0] * 1.0, *args[1:])

    with ExitStack() as hooks:
        hooks.enter_context(model.get_submodule(case.entry).register_forward_pre_hook(enter))
        for (first, last), takes_residual in zip(case.residuals, path, strict=True):
            if takes_residual:
                hooks.enter_context(model.get_submodule(first).register_forward_pre_hook(without_skip_gradient))
            else:
                hooks.enter_context(model.get_submodule(last).register_forward_hook(changed(Tensor.detach)))
        value = loss(model)
    return torch.autograd.grad(value, leaves[0])[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_paths_of_padded_batches_of_another_length_equal_hooks(case: Case) -> None:
    model, net = adapted(case)
    assert net.n == len(case.residuals)
    inputs = case.batch(2, 11, seed=1)
    shape = case.run(model, inputs).shape
    target = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def squared(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum() + output.square().sum()

    tape = pathnet.record(net, inputs, target, precision="float64", loss=squared)
    double = copy.deepcopy(model).double()
    # The others compute normalisations, softmax, GELU or the loss in float32 in any copy.
    tolerance = EXACT_WALK if case.id in ("bert", "gpt2", "gpt2 classifies", "clip's text") else 1e-5
    assert relative_error(tape.output, case.run(double, inputs).detach()) < tolerance
    codes = pathnet.paths.sample(net.n, net.n // 2, count=3)
    for code, grad in zip(codes, tape.path_gradients(codes), strict=True):
        expected = along(case, model, lambda model: squared(case.run(model, inputs), target), code.tolist())
        assert relative_error(grad, expected) < tolerance
    torch.testing.assert_close(net(inputs), case.run(model, inputs), rtol=1e-4, atol=1e-5)
