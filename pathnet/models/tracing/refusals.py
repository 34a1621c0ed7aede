"""Refusals of models: of those that no tracing can adapt, and of those that it did not, with what can be done."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pathnet.checks import described, listed
from pathnet.models.tracing.tracers import untraceable

__all__ = ["advice_on_experts", "check_model", "untraced"]

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)


def check_model(model: object) -> None:
    """Raise ValueError unless ``model`` is a module that autograd differentiates, outside any wrapper."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {described(model)}")
    if isinstance(model, WRAPPERS):
        raise ValueError(f"model: expected the module inside the wrapper or script, got {type(model).__name__}")
    _check_differentiable(model)


def _check_differentiable(model: nn.Module) -> None:
    """Raise ValueError if layers are of the kinds of torch that have no gradient, or weights are."""
    quantised = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if not name.endswith("_packed_params")
        and type(module).__module__.startswith(
            ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic")
        )
    }
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model: expected weights that autograd differentiates, got some of torch.inference_mode")
    if quantised:
        raise ValueError(
            f"model: expected layers that autograd differentiates, got quantised ones: {listed(list(quantised))}"
        )


def untraced(model: nn.Module, failures: Mapping[str, str]) -> ValueError:
    """Return the error for a model that cannot be traced, by its reasons and what can be done."""
    experts = advice_on_experts(model)
    ways_out = "blocks= takes the names of blocks, to trace one by one, or their branches, (skip, residual), by hand"
    return ValueError(f"model: {untraceable(failures, *filter(None, (experts, ways_out)))}")


def advice_on_experts(model: nn.Module) -> str:
    """Return how to make a mixture of experts of Hugging Face traceable; empty for other models."""
    experts = any("Experts" in type(module).__name__ for module in model.modules())
    if not experts or not hasattr(model, "set_experts_implementation"):
        return ""
    return 'its experts can be traced after model.set_experts_implementation("batched_mm")'
