"""One output of a model that may have several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from pathnet.models.inputs import InputStructure

__all__ = ["SingleOutput", "select_output"]


class SingleOutput(nn.Module):
    """A model reduced to its input tensors and one of its outputs, which ``choose`` selects.

    Args:
        structure: how the model is called with the tensors.
    """

    def __init__(self, model: nn.Module, structure: InputStructure, choose: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.structure, self.choose = model, structure, choose

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.choose(self.structure.call(self.model, tensors))  # type: ignore[no-any-return]


def select_output(result: Any, output: str | int | None) -> Tensor:
    """Return one output of the model's result: the one named, else the logits, else the only one."""
    if isinstance(result, fx.Proxy):
        return result  # type: ignore[return-value]
    if output is not None:
        if isinstance(result, Tensor):
            raise ValueError(f"output: expected None for a model that returns one tensor, got {output!r}")
        try:
            by_attribute = isinstance(output, str) and hasattr(result, output)
            selected = getattr(result, str(output)) if by_attribute else result[output]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"output: the model has no output {output!r}, it has {_output_names(result)}") from None
        return selected  # type: ignore[no-any-return]
    result = getattr(result, "logits", result)
    if isinstance(result, Mapping) and "logits" in result:
        result = result["logits"]
    if isinstance(result, (Mapping, tuple, list)):
        values = list(result.values() if isinstance(result, Mapping) else result)
        if len(values) != 1:
            raise ValueError(
                f"output: the model has several, expected the name or index of one: {_output_names(result)}"
            )
        (result,) = values
    return result  # type: ignore[no-any-return]


def _output_names(result: Any) -> str:
    if isinstance(result, Mapping):
        return "names " + ", ".join(map(repr, result))
    if isinstance(result, (tuple, list)):
        return f"indices 0 to {len(result) - 1}"
    return type(result).__name__
