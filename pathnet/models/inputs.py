"""The inputs of a model that takes more than one tensor: positional arguments, or keyword arguments by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pathnet.checks import described

__all__ = ["InputStructure", "batch_dims_of", "map_tensors", "repeated_batch", "structure_of", "tensors_of"]

Kind = Literal["tensor", "tuple", "keywords", "mapping"]
CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class InputStructure:
    """The structure of a model's inputs: which tensors there are, and how the model is called with them.

    Attributes:
        kind: one ``tensor``, a ``tuple`` of positional arguments, a mapping of ``keywords``, or a ``mapping`` that is
            the model's single argument.
        keys: for each entry its index in the tuple or its name in the mapping; for a tensor a single None.
        constants: the entries that are no tensors, by key.
        batch_dims: for each tensor the dimension that holds the batch; None where samples share it.
        arguments: further keyword arguments of every call.
    """

    kind: Kind
    keys: tuple[Any, ...]
    constants: tuple[tuple[Any, Any], ...] = ()
    batch_dims: tuple[int | None, ...] = (0,)
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def tensor_keys(self) -> tuple[Any, ...]:
        """The keys of the tensors, in order."""
        constants = dict(self.constants)
        return tuple(key for key in self.keys if key not in constants)

    def name(self, index: int, whole: str = "images") -> str:
        """Return the name of a tensor in an error: ``images``, ``images[1]`` or ``images['attention_mask']``."""
        return whole if self.kind == "tensor" else f"{whole}[{self.tensor_keys[index]!r}]"

    def tensors(self, inputs: Any, whole: str = "images") -> tuple[Tensor, ...]:
        """Return the tensors among the inputs, in the example's order.

        Args:
            whole: the name of the inputs in errors.

        Raises:
            ValueError: the inputs are not of the example's structure.
        """
        if self.kind == "tensor":
            if not isinstance(inputs, Tensor):
                raise ValueError(f"{whole}: expected a tensor, got {described(inputs)}")
            return (inputs,)
        entries = self._entries(inputs, whole)
        for key, constant in self.constants:
            if not isinstance(entries[key], CONSTANTS) or entries[key] != constant:
                raise ValueError(
                    f"{whole}[{key!r}]: expected {constant!r}, as in adapt's example, got {described(entries[key])}"
                )
        tensors = tuple(entries[key] for key in self.tensor_keys)
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{self.name(i, whole)}: expected a tensor, got {described(tensor)}")
        return tensors

    def _entries(self, inputs: Any, whole: str) -> Mapping[Any, Any]:
        if self.kind == "tuple":
            if not isinstance(inputs, tuple):
                raise ValueError(f"{whole}: expected a tuple of {len(self.keys)}, got {described(inputs)}")
            if len(inputs) != len(self.keys):
                raise ValueError(f"{whole}: expected a tuple of {len(self.keys)}, got one of {len(inputs)}")
            return dict(enumerate(inputs))
        names = ", ".join(map(repr, self.keys))
        if not isinstance(inputs, Mapping):
            raise ValueError(f"{whole}: expected a mapping with {names}, got {described(inputs)}")
        missing = [repr(key) for key in self.keys if key not in inputs]
        further = [repr(key) for key in inputs if key not in self.keys]
        if missing or further:
            parts = [f"none of {', '.join(missing)}"] * bool(missing) + [f"also {', '.join(further)}"] * bool(further)
            raise ValueError(f"{whole}: expected a mapping with {names}, got {' and '.join(parts)}")
        return inputs

    def inputs(self, tensors: Sequence[Any]) -> Any:
        """Return the inputs with these tensors, as a caller passes them."""
        if self.kind == "tensor":
            return tensors[0]
        entries = {**dict(self.constants), **dict(zip(self.tensor_keys, tensors, strict=True))}
        ordered = {key: entries[key] for key in self.keys}
        return tuple(ordered.values()) if self.kind == "tuple" else ordered

    def call(self, model: Callable[..., Any], tensors: Sequence[Any]) -> Any:
        """Return the model's result for its tensors, or for a tracer's stand-ins for them."""
        inputs, further = self.inputs(tensors), dict(self.arguments)
        if self.kind == "tuple":
            return model(*inputs, **further)
        return model(**inputs, **further) if self.kind == "keywords" else model(inputs, **further)

    def batch(self, tensors: Sequence[Tensor]) -> int:
        """Return the number of samples: the size of the first tensor with a batch dimension."""
        return next(t.shape[dim] for t, dim in zip(tensors, self.batch_dims, strict=True) if dim is not None)


def structure_of(model: nn.Module, example: Any, name: str = "example") -> tuple[InputStructure, tuple[Tensor, ...]]:
    """Return the structure of an example of a model's inputs, and its tensors.

    Raises:
        ValueError: the example is neither a tensor nor a tuple or mapping with at least one.
    """
    parameters = inspect.signature(model.forward).parameters
    arguments: tuple[tuple[str, Any], ...] = ()
    kind: Kind
    entries: dict[Any, Any]
    if isinstance(example, Tensor):
        kind, entries = "tensor", {None: example}
    elif isinstance(example, tuple):
        kind, entries = "tuple", dict(enumerate(example))
    elif isinstance(example, Mapping):
        entries = dict(example)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        kind = "keywords" if takes_any or set(entries) <= set(parameters) else "mapping"
    else:
        raise ValueError(
            f"{name}: expected a tensor, a tuple of positional arguments or a mapping of keyword arguments, got "
            f"{described(example)}"
        )
    # A cache of keys and values is neither needed nor traced.
    if "use_cache" in parameters and "use_cache" not in entries:
        arguments = (("use_cache", False),)
    for key, value in entries.items():
        if not isinstance(value, (Tensor, *CONSTANTS)):
            raise ValueError(f"{name}[{key!r}]: expected a tensor, a number or None, got {described(value)}")
    constants = tuple((key, value) for key, value in entries.items() if not isinstance(value, Tensor))
    tensors = tuple(value for value in entries.values() if isinstance(value, Tensor))
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    return InputStructure(kind, tuple(entries), constants, (None,) * len(tensors), arguments), tensors


def batch_dims_of(tensors: Sequence[Tensor], dim: int = 0) -> tuple[int | None, ...]:
    """Return for each tensor the dimension that holds the batch, None where samples share it.

    Args:
        dim: the dimension whose size is the batch's, of the first tensor with more than one (and more than ``dim``).
            It also holds the batch of tensors of as many dimensions, where the size fits; others hold it first.
    """
    main = next((tensor for tensor in tensors if tensor.ndim > max(dim, 1)), None)
    main = next((tensor for tensor in tensors if tensor.ndim), None) if main is None else main
    if main is None or main.ndim <= dim:
        return (None,) * len(tensors)
    batch = main.shape[dim]

    def dim_of(tensor: Tensor) -> int | None:
        likely = (dim, 0) if tensor.ndim == main.ndim else (0, dim)
        return next((d for d in likely if d < tensor.ndim and tensor.shape[d] == batch), None)

    return tuple(dim if tensor is main else dim_of(tensor) for tensor in tensors)


def map_tensors(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the inputs with each tensor changed: a tensor, a tuple, or a dictionary for a mapping."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, tuple):
        return tuple(map_tensors(value, change) for value in inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(value, change) for key, value in inputs.items()}
    return inputs


def tensors_of(inputs: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the inputs, with their names in errors."""
    if isinstance(inputs, Tensor):
        yield name, inputs
    elif isinstance(inputs, tuple):
        for i, value in enumerate(inputs):
            yield from tensors_of(value, f"{name}[{i}]")
    elif isinstance(inputs, Mapping):
        for key, value in inputs.items():
            yield from tensors_of(value, f"{name}[{key!r}]")


def repeated_batch(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> tuple[Tensor, ...]:
    """Return the tensors of the batch repeated twice."""
    return tuple(
        tensor if dim is None else torch.cat([tensor, tensor], dim) for tensor, dim in zip(tensors, dims, strict=True)
    )
