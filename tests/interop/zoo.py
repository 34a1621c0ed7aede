"""Models of other libraries, and plain ones, for the tests of `adapt`: how to build, feed and take them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 19


@dataclass(frozen=True)
class Branch:
    """A residual module in the model.

    Attributes:
        first: the submodule that reads the source of the skip connection.
        last: the submodule whose output (or first output) is added; None for ``first`` itself.
        call: the number of the call of both that counts, if the model calls them several times.
    """

    first: str
    last: str
    call: int = 0


Addition = tuple[Branch, ...]
"""The residual modules that are added to one skip connection, in the order of their execution."""


@dataclass(frozen=True)
class Kind:
    """A model and where its residual modules are, from input to output.

    Attributes:
        batch: returns a batch of the model's input, for a number of samples, a length and a seed: a tensor, a tuple
            of positional arguments, or a mapping of keyword arguments.
        entry: the submodule whose first argument is the place of the gradients, the model itself if empty.
        additions: the residual modules of each block.
        length: length of the example's sequence, where the model takes sequences.
        other_lengths: further lengths that the adapted network serves.
        options: further arguments of `adapt`.
        output: name of the output that the loss takes, of models with several.
        tolerance: greatest relative error of gradients in float64; more if the model itself computes in float32.
        at: the name of the place of the gradients.
        batch_dim: the dimension of the batch in the argument of ``entry``.
    """

    id: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, int, int], Any]
    entry: str
    additions: tuple[Addition, ...]
    length: int = 6
    other_lengths: tuple[int, ...] = ()
    options: Mapping[str, Any] | None = None
    output: str | None = None
    tolerance: float = 1e-10
    at: str = "y0"
    batch_dim: int = 0

    @property
    def n(self) -> int:
        return len(self.additions)

    def model(self) -> nn.Module:
        """Return the model in evaluation mode, with random weights and statistics.

        Initial values would hide errors, and make residual modules negligible.
        """
        torch.manual_seed(0)
        model = self.make()
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            nn.init.normal_(norm.running_mean, 0, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("bias"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif not norms or parameter.ndim <= 2:
                nn.init.normal_(parameter, 0, 0.3)
        return model.eval()

    def example(self) -> Any:
        return self.batch(2, self.length, 0)


def images(side: int = 32) -> Callable[[int, int, int], Tensor]:
    def batch(size: int, _: int, seed: int) -> Tensor:
        return torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(seed))

    return batch


def tokens(size: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(seed))


def padded(size: int, length: int, seed: int) -> dict[str, Tensor]:
    """Return a batch as a tokenizer pads it, each sample with a length of its own."""
    mask = torch.ones(size, length, dtype=torch.int64)
    for sample in range(size):
        mask[sample, length - (sample + seed) % (length // 2) :] = 0
    return {"input_ids": tokens(size, length, seed) * mask, "attention_mask": mask}


def padded_left(size: int, length: int, seed: int) -> dict[str, Tensor]:
    """Return a batch padded on the left, as for generating text."""
    return {name: tensor.flip(1) for name, tensor in padded(size, length, seed).items()}


def layers(name: str, count: int, *branches: tuple[str, str] | tuple[tuple[str, str], ...]) -> tuple[Addition, ...]:
    """Return the additions of equal layers, by the names of their submodules.

    Args:
        branches: for each addition in a layer, (first, last); or several of them, which are added to one skip.
    """
    additions: list[Addition] = []
    for layer in range(count):
        for branch in branches:
            pairs: Sequence[Any] = branch if isinstance(branch[0], tuple) else (branch,)
            additions.append(tuple(Branch(f"{name}.{layer}.{a}", f"{name}.{layer}.{b}") for a, b in pairs))
    return tuple(additions)


def modules(*branches: tuple[str, str]) -> tuple[Addition, ...]:
    return tuple((Branch(first, last),) for first, last in branches)
