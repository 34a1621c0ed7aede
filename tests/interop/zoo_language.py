"""Language models of transformers: decoders, encoders and encoder-decoders, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from zoo import VOCABULARY, Addition, Branch, Kind, layers, padded, padded_left, tokens

FLOAT32_INSIDE = 1e-5
"""Tolerance of models whose normalisations compute in float32."""

SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def built(architecture: str, config: str, without: tuple[str, ...] = (), **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        sizes = {name: value for name, value in SIZES.items() if name not in without}
        module = getattr(transformers, architecture)
        model: nn.Module = module(getattr(transformers, config)(**{**sizes, **options}))
        return model

    return make


def decoder(id: str, architecture: str, config: str, batch: Any = tokens, **options: Any) -> Kind:
    """Return a kind with Llama's names of layers."""
    additions = layers("model.layers", 2, ("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
    return Kind(
        id,
        built(architecture, config, **options),
        batch,
        "model.layers.0",
        additions,
        other_lengths=(4, 9),
        tolerance=FLOAT32_INSIDE,
    )


GROUPED = {"num_key_value_heads": 1, "head_dim": 8}

SANDWICH = layers(
    "model.layers",
    2,
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

GPT2 = layers("transformer.h", 2, ("ln_1", "attn"), ("ln_2", "mlp"))
BERT = (("attention.self", "attention.output.dropout"), ("intermediate", "output.dropout"))


def gpt2(id: str, batch: Any, architecture: str = "GPT2LMHeadModel", **options: Any) -> Kind:
    return Kind(
        id,
        built(architecture, "GPT2Config", n_inner=20, **options),
        batch,
        "transformer.h.0",
        GPT2,
        other_lengths=(4, 9),
    )


def bert(id: str, architecture: str, config: str, name: str, batch: Any, **options: Any) -> Kind:
    additions = layers(f"{name}.encoder.layer", 2, *BERT)
    make = built(architecture, config, **options)
    return Kind(id, make, batch, f"{name}.encoder.layer.0", additions, other_lengths=(4, 9))


def albert() -> Kind:
    """Return ALBERT, whose layers are all the same module."""
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    additions: list[Addition] = []
    for call in range(2):
        last = f"{layer}.attention.output_dropout"
        additions.append(tuple(Branch(f"{layer}.attention.{name}", last, call) for name in ("query", "key", "value")))
        additions.append((Branch(f"{layer}.ffn", f"{layer}.ffn_output", call),))
    make = built("AlbertForMaskedLM", "AlbertConfig", embedding_size=8)
    return Kind("albert", make, padded, layer, tuple(additions), other_lengths=(4, 9))


def decoder_inputs(size: int, length: int, seed: int) -> dict[str, Tensor]:
    """Return a batch of an encoder-decoder, whose two sequences have different lengths."""
    source = padded(size, 7, seed + 100)
    return {**source, "decoder_input_ids": tokens(size, length, seed)}


def t5_decoder(**options: Any) -> Kind:
    additions = []
    for layer in range(2):
        for part in range(3):
            name = f"decoder.block.{layer}.layer.{part}"
            additions.append((Branch(f"{name}.layer_norm", f"{name}.dropout"),))
    return Kind(
        "t5-decoder",
        built("T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2),
        decoder_inputs,
        "decoder.block.0",
        tuple(additions),
        other_lengths=(4, 9),
        options=options,
        tolerance=FLOAT32_INSIDE,
    )


def t5_encoder() -> Kind:
    additions = []
    for layer in range(2):
        for part in range(2):
            name = f"encoder.block.{layer}.layer.{part}"
            additions.append((Branch(f"{name}.layer_norm", f"{name}.dropout"),))
    return Kind(
        "t5-encoder",
        built("T5EncoderModel", "T5Config", d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2),
        padded,
        "encoder.block.0",
        tuple(additions),
        other_lengths=(4, 9),
        tolerance=FLOAT32_INSIDE,
    )


BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def bart_decoder(**options: Any) -> Kind:
    """Return BART's decoder, with cross-attention as a block between self-attention and perceptron."""
    name = "model.decoder.layers"
    additions = layers(name, 2, ("self_attn", "self_attn"), ("encoder_attn", "encoder_attn"), ("fc1", "fc2"))
    make = built("BartForConditionalGeneration", "BartConfig", **BART)
    return Kind("bart-decoder", make, decoder_inputs, f"{name}.0", additions, other_lengths=(4, 9), options=options)


def spectrogram(size: int, _: int, seed: int) -> Tensor:
    return torch.randn(size, 8, 20, generator=torch.Generator().manual_seed(seed))


WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}


def whisper_encoder() -> Kind:
    def make() -> nn.Module:
        config = transformers.WhisperConfig(**{**SIZES, **WHISPER})
        encoder: nn.Module = transformers.WhisperModel(config).get_encoder()
        return encoder

    additions = layers("layers", 2, ("self_attn_layer_norm", "self_attn"), ("final_layer_norm", "fc2"))
    return Kind("whisper-encoder", make, spectrogram, "layers.0", additions)


def gpt_neox(id: str, parallel: bool, batch: Any = tokens) -> Kind:
    attention = ("input_layernorm", "post_attention_dropout")
    perceptron = ("post_attention_layernorm", "post_mlp_dropout")
    branches: Any = ((attention, perceptron),) if parallel else (attention, perceptron)
    return Kind(
        id,
        built("GPTNeoXForCausalLM", "GPTNeoXConfig", use_parallel_residual=parallel, rotary_pct=0.5),
        batch,
        "gpt_neox.layers.0",
        layers("gpt_neox.layers", 2, *branches),
        other_lengths=(4, 9),
    )


def falcon(id: str, branches: Any, batch: Any = tokens, **options: Any) -> Kind:
    return Kind(
        id,
        built("FalconForCausalLM", "FalconConfig", ffn_hidden_size=20, **options),
        batch,
        "transformer.h.0",
        layers("transformer.h", 2, *branches),
        other_lengths=(4, 9),
    )


PARALLEL = [
    Kind(
        "gptj",
        built("GPTJForCausalLM", "GPTJConfig", n_inner=20, rotary_dim=4),
        tokens,
        "transformer.h.0",
        layers("transformer.h", 2, (("ln_1", "attn"), ("ln_1", "mlp"))),
        other_lengths=(4, 9),
    ),
    gpt_neox("pythia", parallel=True),
    falcon(
        "falcon-new",
        [(("ln_attn", "self_attention"), ("ln_mlp", "mlp"))],
        new_decoder_architecture=True,
        num_kv_heads=1,
    ),
    falcon("falcon-old", [(("input_layernorm", "self_attention"), ("input_layernorm", "mlp"))], parallel_attn=True),
]
"""Models whose attention and perceptron read the same source."""

CAUSAL = [
    gpt2("gpt2-padded", padded_left),
    decoder("llama-padded", "LlamaForCausalLM", "LlamaConfig", padded, **GROUPED),
    decoder("mistral", "MistralForCausalLM", "MistralConfig", sliding_window=3, **GROUPED),
    decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **GROUPED),
    Kind(
        "gemma3",
        built("Gemma3ForCausalLM", "Gemma3TextConfig", sliding_window=3, **GROUPED),
        tokens,
        "model.layers.0",
        SANDWICH,
        other_lengths=(4, 9),
        tolerance=FLOAT32_INSIDE,
    ),
    Kind(
        "opt-padded",
        built("OPTForCausalLM", "OPTConfig", ffn_dim=20, word_embed_proj_dim=16),
        padded,
        "model.decoder.layers.0",
        layers("model.decoder.layers", 2, ("self_attn_layer_norm", "self_attn"), ("final_layer_norm", "fc2")),
        other_lengths=(4, 9),
    ),
    Kind(
        "bloom",
        built("BloomForCausalLM", "BloomConfig", n_layer=2, n_head=2),
        padded,
        "transformer.h.0",
        layers(
            "transformer.h",
            2,
            ("input_layernorm", "self_attention.dense"),
            ("post_attention_layernorm", "mlp.dense_4h_to_h"),
        ),
        other_lengths=(4, 9),
        tolerance=FLOAT32_INSIDE,
    ),
    gpt_neox("gpt-neox-sequential", parallel=False),
    falcon(
        "falcon-alibi",
        [("input_layernorm", "self_attention"), ("post_attention_layernorm", "mlp")],
        parallel_attn=False,
        alibi=True,
    ),
    decoder(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="batched_mm",
        **GROUPED,
    ),
    decoder(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="batched_mm",
        **GROUPED,
    ),
    Kind(
        "gpt-neo",
        built(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            attention_types=[[["global", "local"], 1]],
            num_layers=2,
            num_heads=2,
            window_size=4,
        ),
        padded,
        "transformer.h.0",
        GPT2,
        other_lengths=(4, 9),
    ),
]

CLASSIFIERS = [
    gpt2("gpt2-classifier", padded, "GPT2ForSequenceClassification"),
    decoder("llama-classifier", "LlamaForSequenceClassification", "LlamaConfig", padded, **GROUPED),
]
"""Models whose heads read one position, which depends on values."""

ENCODERS = [
    bert("bert-padded", "BertForMaskedLM", "BertConfig", "bert", padded),
    bert("roberta-padded", "RobertaForMaskedLM", "RobertaConfig", "roberta", padded, max_position_embeddings=18),
    Kind(
        "distilbert",
        built("DistilBertForMaskedLM", "DistilBertConfig", dim=16, hidden_dim=20, n_layers=2, n_heads=2),
        padded,
        "distilbert.transformer.layer.0",
        layers("distilbert.transformer.layer", 2, ("attention", "attention"), ("ffn", "ffn")),
        other_lengths=(4, 9),
    ),
    albert(),
    Kind(
        "modernbert",
        built("ModernBertForMaskedLM", "ModernBertConfig", local_attention=4),
        padded,
        "model.layers.0",
        layers("model.layers", 2, ("attn_norm", "attn"), ("mlp_norm", "mlp")),
        other_lengths=(4, 9),
    ),
    t5_encoder(),
    whisper_encoder(),
]

DECODERS = [
    t5_decoder(stream="decoder"),
    bart_decoder(stream="model.decoder"),
]
