"""An example of a model's inputs: the caller's, or a guess from the model's layers and configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pathnet.checks import check_tensor, listed
from pathnet.models.inputs import InputStructure, batch_dims_of, map_tensors, repeated_batch, structure_of
from pathnet.models.tracing.graphs import first_line

__all__ = ["Example", "checked_example", "example_of"]

BATCH = 2
TOKENS = 16
SIDES = (64, 224, 32, 299)


@dataclass(frozen=True)
class Example:
    """A batch of a model's inputs.

    Attributes:
        structure: how the model is called with the tensors.
        tensors: the tensors among the inputs.
    """

    structure: InputStructure
    tensors: tuple[Tensor, ...]

    @classmethod
    def of_tensor(cls, x: Tensor) -> Example:
        """Return the example of a module that takes one tensor, the batch first."""
        return cls(InputStructure("tensor", (None,)), (x,))

    def copies(self) -> tuple[Tensor, ...]:
        """Return copies of the tensors, which the model may change in place."""
        return tuple(tensor.clone() for tensor in self.tensors)

    def twice(self) -> Example:
        """Return the batch repeated twice."""
        return replace(self, tensors=repeated_batch(self.tensors, self.structure.batch_dims))

    def with_batch_second(self) -> Example | None:
        """Return the example read with the batch in the second dimension, [T, B, ...]; None if it has only one."""
        dims = batch_dims_of(self.tensors, 1)
        return None if 1 not in dims else replace(self, structure=replace(self.structure, batch_dims=dims))

    def shapes(self) -> str:
        """Return the tensors' shapes and types in words."""
        if self.structure.kind == "tensor":
            return f"shape {list(self.tensors[0].shape)} in {self.tensors[0].dtype}"
        keys = self.structure.tensor_keys
        tensors = zip(keys, self.tensors, strict=True)
        return f"shapes {', '.join(f'{key!r} {list(t.shape)} in {t.dtype}' for key, t in tensors)}"


def example_of(model: nn.Module, inputs: Any) -> Example:
    """Return an example from a tensor, a tuple or a mapping.

    Raises:
        ValueError: the inputs are none of those, or no tensor among them holds a batch.
    """
    structure, tensors = structure_of(model, inputs)
    for i, tensor in enumerate(tensors):
        check_tensor(structure.name(i, "example"), tensor)
    dims = batch_dims_of(tensors)
    first = next((tensor for tensor, dim in zip(tensors, dims, strict=True) if dim is not None), None)
    if first is None or first.numel() == 0 or tensors[0].numel() == 0:
        raise ValueError(f"example: expected a batch of inputs as a tensor, got {list(tensors[0].shape)}")
    return Example(replace(structure, batch_dims=dims), tuple(tensor.detach() for tensor in tensors))


def checked_example(model: nn.Module, inputs: Any) -> Example:
    """Return inputs that the model accepts: the caller's, or a guess if those are None.

    Raises:
        ValueError: the model rejects the example, or every guess.
    """
    if inputs is not None:
        example = example_of(model, inputs)
        try:
            example.structure.call(model, example.copies())
        except Exception as error:
            raise ValueError(f"example: the model rejects the {example.shapes()} ({first_line(error)})") from error
        return example
    rejected = []
    for guess in _guesses(model):
        example = example_of(model, guess)
        try:
            example.structure.call(model, example.copies())
            return example
        except Exception as error:
            rejected.append(f"{example.shapes()}: {first_line(error)}")
    raise ValueError(
        f"example: none could be guessed, expected a batch of inputs ({listed(rejected, between='; ') or 'no layer'})"
    )


def _guesses(model: nn.Module) -> Iterator[Any]:
    """Yield batches of two samples that the model may accept, likeliest first."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for dummy in _dummy_inputs(model):
        yield map_tensors(dummy, lambda tensor: tensor.to(device))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            vocabulary = module.num_embeddings
            yield torch.randint(vocabulary // 2, vocabulary, (BATCH, TOKENS), generator=generator).to(device)
            break
    kinds = dict.fromkeys(
        (module.in_channels, len(module.kernel_size), module.weight.dtype)
        for module in model.modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    )
    # The first layer need not be registered first, but images have three channels or one.
    for channels, dims, dtype in sorted(kinds, key=lambda kind: kind[0] not in (1, 3)):
        for side in (*_configured_sides(model), *SIDES):
            shape = (BATCH, channels, *((side,) * dims if isinstance(side, int) else side))
            yield torch.randn(shape, generator=generator).to(device, dtype)
    widths = dict.fromkeys(
        (module.in_features, module.weight.dtype) for module in model.modules() if isinstance(module, nn.Linear)
    )
    for width, dtype in widths:
        yield torch.randn(BATCH, width, generator=generator).to(device, dtype)


def _dummy_inputs(model: nn.Module) -> Iterator[Any]:
    """Yield the example inputs that a Hugging Face model provides: its main one, or all of them."""
    dummies: Any = getattr(model, "dummy_inputs", None)
    if isinstance(dummies, Mapping):
        for name in ("input_ids", "pixel_values"):
            if isinstance(dummies.get(name), Tensor):
                yield dummies[name]
        if all(isinstance(value, Tensor) for value in dummies.values()):
            yield dict(dummies)


def _configured_sides(model: nn.Module) -> Iterator[int | tuple[int, ...]]:
    """Yield the image sizes in the configuration of a timm or Hugging Face model."""
    for name in ("pretrained_cfg", "default_cfg"):
        size = (getattr(model, name, None) or {}).get("input_size")
        if size:
            yield tuple(size[1:])
    size = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, int):
        yield size
