"""A residual block: skip connection, residual modules, and what joins them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from pathnet.models.coefficients import Coefficient, left_out, scaled
from pathnet.models.context import Context
from pathnet.models.forms import Form

__all__ = ["Block"]


class Block(nn.Module):
    """A residual block ``y = join(skip(x) + residual(x))`` (Veit et al. 2016, equation 1).

    A subclass defines `residual`, and `skip` if that is not the identity, each as a function of the block's input
    alone. If they share work it also overrides `branches`; if more than an addition joins them, `join`. A block with
    several residual modules in parallel, ``y = skip(x) + f(x) + g(x)``, or with a gate also overrides `parts`. Inputs
    and outputs have the batch as their first dimension, and any shape after it.

    Attributes:
        survival: probability that a training step keeps the residual module (stochastic depth). A block with one
            below 1 multiplies ``residual`` by it in evaluation.
        residual_modules: number of residual modules in parallel. `residual` is their sum.
        has_gate: whether the block's Jacobian has a part outside all branches, as that of a highway block has.

    Example:
        >>> import torch
        >>> import pathnet
        >>> class Perceptron(pathnet.models.Block):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(features, features)
        ...
        ...     def residual(self, x):
        ...         return torch.tanh(self.linear(x))
        >>> blocks = [Perceptron(8) for _ in range(4)]
        >>> net = pathnet.models.ResidualNet(torch.nn.Linear(3, 8), blocks, torch.nn.Linear(8, 2))
        >>> tape = pathnet.record(net, torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0]))
        >>> tape.path_gradient_norms(pathnet.paths.enumerate_all(net.n)).shape  # all 2^4 paths
        torch.Size([16])
    """

    survival: float = 1.0
    residual_modules: int = 1
    has_gate: bool = False

    @property
    def part_count(self) -> int:
        """Number of parts of the block's Jacobian: skip connection, residual modules, and gate if there is one."""
        return 1 + self.residual_modules + self.has_gate

    def skip(self, x: Tensor) -> Tensor:
        """Return the skip connection's output; ``x`` unless overridden.

        Args:
            x: the block's input, [B, ...].

        Returns:
            [B, ...], of the shape of the block's output.
        """
        return x

    def residual(self, x: Tensor) -> Tensor:
        """Return the output of the residual module f, the branch with the weights.

        Args:
            x: the block's input, [B, ...].

        Returns:
            [B, ...], of the shape of the block's output.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no residual module")

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(skip(x), residual(x))``, with shared work done once.

        Args:
            x: the block's input, [B, ...].

        Returns:
            Two tensors of one shape, [B, ...].
        """
        return self.skip(x), self.residual(x)

    def join(self, z: Tensor) -> Tensor:
        """Return the block's output for the sum of its branches; the sum itself unless overridden.

        Args:
            z: the sum, [B, ...].

        Returns:
            [B, ...], the block's output.
        """
        return z

    def parts(self, x: Tensor, wanted: Collection[int] | None = None) -> tuple[Tensor | None, ...]:
        """Return the functions of ``x`` whose Jacobians add up to that of ``join``'s input, shared work done once.

        They are the skip connection, each residual module, and the gate if there is one. The values of skip and
        residual modules add up to ``join``'s input; of the gate only the Jacobian is used, not the value.

        Args:
            x: the block's input, [B, ...].
            wanted: the numbers of the parts to return; others may be None. None for all.

        Returns:
            `part_count` tensors [B, ...], of the shape of the block's output, or None for parts that are not wanted.
        """
        if wanted is None or {0, 1} <= set(wanted):
            return self.branches(x)
        return self.skip(x) if 0 in wanted else None, self.residual(x) if 1 in wanted else None

    def summed(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Return the sum of skip connection and residual modules, ``join``'s input, from all `parts`.

        Args:
            parts: skip connection, residual modules and gate, each [B, ...]; None adds nothing.

        Returns:
            [B, ...]
        """
        terms = [part for part in parts[: 1 + self.residual_modules] if part is not None]
        return sum(terms[1:], terms[0])

    def coefficients(self, row: Sequence[Coefficient]) -> tuple[Coefficient, ...]:
        """Return the coefficient of every part.

        Args:
            row: (a, c), where c applies to all residual modules and the gate's coefficient is 0; or one coefficient
                for each part. Further ones, which other blocks of the network have a part for, are ignored.

        Returns:
            `part_count` coefficients.
        """
        if len(row) == 2:
            return (row[0], *[row[1]] * self.residual_modules, *[0.0] * self.has_gate)
        return tuple(row[: self.part_count])

    def routed(self, x: Tensor, forward: Sequence[Coefficient], backward: Sequence[Coefficient]) -> Tensor:
        """Return ``join(a skip(x) + c residual(x))``, with other coefficients in the backward pass.

        A branch whose coefficients are 0 in both directions is not computed.

        Args:
            x: the block's input, [B, ...].
            forward: a row of a routing, see `coefficients`.
            backward: the row for the backward pass. The gate's value is never used, so its coefficient matters here
                alone.

        Returns:
            [B, ...], the block's output.
        """
        ahead = (*self.coefficients(forward)[: 1 + self.residual_modules], *[0.0] * self.has_gate)
        back = self.coefficients(backward)
        wanted = [i for i, pair in enumerate(zip(ahead, back, strict=True)) if not left_out(*pair)] or [0]
        parts = self.parts(x, wanted)
        terms = [scaled(part, ahead[i], back[i]) for i in wanted if (part := parts[i]) is not None]
        return self.join(sum(terms[1:], terms[0]))

    def lesioned(self, x: Tensor) -> Tensor:
        """Return the output of the block when it is deleted (section 4.1): its skip connection, unless overridden.

        Args:
            x: the block's input, [B, ...].

        Returns:
            [B, ...], the block's output.
        """
        return self.join(self.skip(x))

    def settle(self) -> None:
        """Fold constants into weights. Called on copies in evaluation mode that will not be trained."""

    def bound(self, context: Context) -> Block:
        """Return the block over the same modules with a batch's context as constants; itself if it reads none.

        Args:
            context: the values that blocks read besides the residual stream, see `ResidualNet.split`.
        """
        return self

    def plain(self) -> Block:
        """Return the block whose modules run; itself, unless it is a view of a block that runs by fused kernels."""
        return self

    def form(self) -> Form | None:
        """Return the form in which fused engines take the block in its mode, or None if they cannot run it.

        Fused training asks for it too: a block that does more in training, such as dropout, has None there.
        """
        return None

    def unfused_reason(self) -> str:
        """Return why `form` returns None, in words that can follow "block 3: "."""
        return f"its class {type(self).__name__} defines no fused form"

    def forward(self, x: Tensor) -> Tensor:
        skip, residual = self.branches(x)
        return self.join(skip + residual)
