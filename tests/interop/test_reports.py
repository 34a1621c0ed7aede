"""Reports of adapted models: the kinds of their residual modules, and additions that are no blocks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="timm is not installed (make test-interop has it)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-interop has it)")

from originals import BY_ID  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.hrnet import HighResolutionNet, cfg_cls  # noqa: E402

import pathnet  # noqa: E402


def report_of(model: nn.Module, x: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        net = pathnet.adapt(model.eval(), x)
        labels = torch.zeros(x.shape if x.dtype == torch.int64 else len(x), dtype=torch.int64)
        pathnet.record(net, x, labels)
    return str(net)


@pytest.mark.parametrize("name", ["opt", "llama-sdpa", "gpt2-eager", "bert"])
def test_the_perceptrons_of_transformers_are_called_so_without_a_warning_about_engines(name: str) -> None:
    lines = report_of(BY_ID[name].model(), BY_ID[name].batch()[0]).splitlines()
    assert lines[0].startswith("4 residual blocks, found by ")
    assert [line.split()[0] for line in lines[2:6]] == ["0", "1", "2", "3"]
    assert [line.split("  ")[-1] for line in lines[2:6]] == ["attention", "perceptron"] * 2


def test_experts_are_called_so() -> None:
    config = transformers.MixtralConfig(
        vocab_size=19,
        hidden_size=12,
        intermediate_size=14,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=8,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    kinds = [block.kind() for block in pathnet.adapt(model.eval(), torch.randint(0, 19, (2, 6)))]
    assert kinds == ["attention", "mixture of experts"]


def test_the_two_classifiers_of_a_distilled_deit_are_its_head() -> None:
    torch.manual_seed(0)
    model = VisionTransformerDistilled(32, 8, num_classes=5, embed_dim=12, depth=2, num_heads=2)
    nn.init.normal_(model.head_dist.weight)
    report = report_of(model, torch.randn(2, 3, 32, 32))
    assert report.startswith("4 residual blocks, ")
    assert "no blocks, since they add the outputs of linear classifiers: add (node 'add_" in report


def test_an_hrnet_is_refused_with_the_layers_that_its_branches_share() -> None:
    torch.manual_seed(0)
    model = HighResolutionNet(cfg_cls["hrnet_w18_small"], num_classes=5)
    message = r"got the layers transition1.0.0, transition1.1.0.0, .* and \d+ more in both the skip connection"
    with pytest.raises(ValueError, match=message):
        pathnet.adapt(model.eval(), torch.randn(2, 3, 64, 64))
