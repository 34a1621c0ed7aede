"""`Tape`: a recorded forward pass, and all measurements on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from pathnet import gradients, paths, scaling
from pathnet.checks import check_flag, check_integer
from pathnet.full_precision import full_precision
from pathnet.gradients import LengthSums
from pathnet.models.residual_net import Block
from pathnet.places import Place, routed_blocks
from pathnet.pull_backs import place_shape
from pathnet.routing import check_routing
from pathnet.scaling import ScaledGradient
from pathnet.walks import Record

__all__ = ["Tape"]

Result = TypeVar("Result")


class Tape:
    """A recorded forward pass; made by `record` or a `Recorder`.

    Gradients are those of the loss (in nats for cross-entropy) at the place that ``at`` names: ``y0``
    [B, C_0, H_0, W_0] ([B, T, C] of tokens), ``image`` [B, C, H, W], ``stem_weight`` [C_0, C, k, k], the input of a
    block, or a parameter. They are float64, since along 54 modules they can leave the range of float32; or, with
    ``scaled=True``, a pair of a mantissa and an int32 exponent that broadcasts to it.

    Paths to the input of block k, or to a parameter of it, run through the blocks k to n - 1 of a network, and to all
    other places through all blocks. Along a path the parameter's gradient flows only through the branch of block k
    that the path enters: one of the residual module is zero along paths that skip the block, one that both branches
    read has a part in each. The operations after the block's addition are in no branch, so their parameters are
    refused, as are parameters that several blocks share. If the head reads a parameter too (as a language model's
    head reads the embedding), that part of its gradient is on no path, and in no measurement here. The same holds for
    what a batch's context reads.

    In BN mode ``batch`` the batch is one object, and ``per_sample`` norms are those of the samples' slices of the
    batch's gradient. At a parameter, a sample's share is the gradient through its slice where the pull-back begins:
    at ``y0`` for the stem, at the block's output for a block. This takes one backward pass per sample through the
    stem or the block, by autograd in all engines.

    On a GPU the batch's values are checked at the first measurement, after its work is launched; the measurement
    raises the error of a wrong value.

    Attributes:
        at: the place of the gradients.

    Example:
        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1)
        >>> images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        >>> tape = pathnet.record(net, images, labels)
        >>> tape.n, tape.at, tape.output.shape, round(tape.loss, 3)
        (6, 'y0', torch.Size([4, 10]), 2.347)

        The examples of the methods go on from here.
    """

    def __init__(self, record: Record, place: Place, settle: Callable[[], Record]) -> None:
        """
        Args:
            place: the place of the gradients, in the network whose part from block `Place.start` on is recorded.
            settle: checks the values and returns the record, which may start from another gradient; raises ValueError
                if a value is wrong.
        """
        self.at = place.at
        self._place = place
        self._recorded = record
        self._settle: Callable[[], Record] | None = settle

    def __repr__(self) -> str:
        batch, megabytes = len(self._recorded.images), self.nbytes / 1e6
        return f"Tape({self.n} blocks, batch of {batch}, engine={self.engine!r}, at={self.at!r}, {megabytes:.1f} MB)"

    @property
    def _record(self) -> Record:
        """The record, its values checked."""
        settle = self._settle
        if settle is not None:
            self._recorded, self._settle = settle(), None
        return self._recorded

    def _measure(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Return ``work(record, *arguments)``, started before the values are checked, so a GPU computes meanwhile."""
        ahead = self._recorded
        try:
            result = work(ahead, *arguments)
        except Exception:
            # A wrong value is the cause to report, not the error that it led to.
            _ = self._record
            raise
        return result if self._record is ahead else work(self._record, *arguments)

    @property
    def engine(self) -> str:
        """The name of the engine that serves this tape."""
        return self._recorded.engine

    @property
    def n(self) -> int:
        """The number of blocks that paths run through: all, or those from the place's block on."""
        return len(self._blocks)

    @property
    def _blocks(self) -> list[Block]:
        return routed_blocks(self._recorded.net, self._place)

    @property
    def _parts(self) -> int:
        """The maximum number of parts of a block's Jacobian."""
        return max(block.part_count for block in self._blocks)

    @property
    def _modules(self) -> list[int]:
        """The number of residual modules of each block."""
        return [block.residual_modules for block in self._blocks]

    @property
    def loss(self) -> float:
        """The loss of the recorded batch, in nats for cross-entropy."""
        return float(self._record.loss)

    @property
    def output(self) -> Tensor:
        """The network's output for the recorded batch, [B, ...]."""
        return self._record.output

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tape holds; tapes of one `Recorder` share those that no batch changes."""
        return self._recorded.nbytes

    def path_gradient_norms(self, b: Tensor, per_sample: bool = False) -> Tensor:
        """Return Euclidean norms of the gradients along paths (Veit et al. 2016, section 5 and Figure 6 b).

        Args:
            b: the paths, integer or bool [P, n] of zeros and ones; in blocks of m residual modules in parallel, of
                numbers from 0 to m. See `pathnet.paths`.
            per_sample: whether to return the norm of each sample's slice of the gradient of the batch's loss.

        Returns:
            float64 [P], or [P, B] per sample; full relative precision down to 1e-300, as far as the forward pass
            stays in the range of its type: in float32 an activation below 1e-45 is 0, and its ReLU blocks gradients.

        Raises:
            ValueError: ``b`` is not such a tensor, or ``per_sample`` is no bool.

        Example:
            >>> b = pathnet.paths.one_of_each_length(tape.n)
            >>> tape.path_gradient_norms(b)
            tensor([0.0337, 0.0271, 0.0116, 0.0092, 0.0053, 0.0047], dtype=torch.float64)
            >>> tape.path_gradient_norms(b, per_sample=True).shape
            torch.Size([6, 4])
        """
        per_sample, routing = check_flag("per_sample", per_sample), self._routing(b)
        return self._measure(gradients.norms, routing, self._place, per_sample)

    @overload
    def path_gradients(self, b: Tensor, scaled: Literal[False] = False) -> Tensor: ...
    @overload
    def path_gradients(self, b: Tensor, scaled: Literal[True]) -> ScaledGradient: ...
    def path_gradients(self, b: Tensor, scaled: bool = False) -> Tensor | ScaledGradient:
        """Return the gradients along paths: through residual module i where ``b_i`` is 1, else the skip connection.

        Args:
            b: the paths, integer or bool [P, n], as for `path_gradient_norms`.
            scaled: whether to return mantissas and exponents, a `ScaledGradient`, in place of float64.

        Returns:
            float64 ``[P, *shape at the place]``; or the scaled pair.

        Raises:
            ValueError: ``b`` is not such a tensor, or ``scaled`` is no bool.

        Example:
            All 64 add up to the ordinary gradient:

            >>> grads = tape.path_gradients(pathnet.paths.enumerate_all(tape.n))
            >>> grads.shape, grads.dtype
            (torch.Size([64, 4, 8, 8, 8]), torch.float64)
            >>> torch.allclose(grads.sum(0), tape.gradient(), atol=1e-6)
            True
        """
        return self._gradients(self._routing(b), None, check_flag("scaled", scaled))

    @overload
    def routed_gradients(self, routing: Tensor, scaled: Literal[False] = False) -> Tensor: ...
    @overload
    def routed_gradients(self, routing: Tensor, scaled: Literal[True]) -> ScaledGradient: ...
    def routed_gradients(self, routing: Tensor, scaled: bool = False) -> Tensor | ScaledGradient:
        """Return the gradients under routings: ``g <- a J_skip^T g + c J_residual^T g`` from last block to first.

        Args:
            routing: floating-point [P, n, 2], the (a, c) of every block; or [P, n, parts] with a coefficient for each
                part (`pathnet.models.ResidualNet.parts`). In a block of several residual modules in parallel,
                ``y = skip(x) + f(x) + g(x)``, those are (a, c_f, c_g), by default (a, c, c). In a network with gates
                (highway) the third is the coefficient of the gate itself, by default 0. Ones for all parts give the
                ordinary gradient.
            scaled: as for `path_gradients`.

        Returns:
            float64 ``[P, *shape at the place]``; or the scaled pair.

        Raises:
            ValueError: ``routing`` is not such a tensor, or ``scaled`` is no bool.

        Example:
            >>> routing = torch.ones(2, tape.n, 2)
            >>> routing[1, :, 1] = 0.5
            >>> tape.routed_gradients(routing).flatten(1).norm(dim=1)
            tensor([0.1586, 0.0580], dtype=torch.float64)
        """
        check_routing(routing, self.n, self._parts)
        return self._gradients(*scaling.of_coefficients(routing), check_flag("scaled", scaled))

    def gradient(self) -> Tensor:
        """Return the ordinary gradient of the loss: the sum over all 2^n paths, see `Tape` for parameters.

        In a network with gates (highway) it includes the gradient through the gates themselves.

        Returns:
            float64 ``[*shape at the place]``

        Example:
            At the first layer's weight it is the gradient that a backward pass leaves there:

            >>> grad = pathnet.record(net, images, labels, at="stem_weight").gradient()
            >>> torch.nn.functional.cross_entropy(net.eval()(images), labels).backward()
            >>> torch.allclose(grad.float(), net.stem.weight.grad, atol=1e-6)
            True
        """
        ones = torch.ones(1, self.n, self._parts, dtype=torch.float64)
        return self._gradients(ones, None, scaled=False)[0]

    @overload
    def gradient_by_length(self, scaled: Literal[False] = False) -> Tensor: ...
    @overload
    def gradient_by_length(self, scaled: Literal[True]) -> ScaledGradient: ...
    @full_precision()
    def gradient_by_length(self, scaled: bool = False) -> Tensor | ScaledGradient:
        """Return the exact sums of the gradients of all paths of each length.

        2^n paths take n (n + 1) / 2 backward passes through a module: the sums are the coefficients by powers of x of
        ``prod_i (J_skip^T + x J_residual^T) g``, where x multiplies all residual modules of a block, and follow from
        ``G_k <- J_skip^T G_k + J_residual^T G_{k-1}`` from the last block to the first. Each has its own power of
        two, so a sum of 1e-60 keeps its digits next to one of 1e+3. In a network without gates the sums add up to
        `gradient`; the gradient through gates (highway) is in none of them.

        Memory: the n + 1 gradients of the result, in the type of the backward pass and in float64. In addition:

        - the cpu engine holds n + 1 images per thread; in BN mode ``batch``, n + 1 batches of images and 256 MB;
        - the other engines hold n + 1 gradients on either side of a block, and compute as many at a time as fit into
          half of a GPU's free memory, or into 256 MB of host memory.

        Args:
            scaled: as for `path_gradients`.

        Returns:
            float64 ``[n + 1, *shape at the place]``, for the lengths 0 to n; or the scaled pair.

        Raises:
            ValueError: ``scaled`` is no bool.

        Example:
            >>> sums = tape.gradient_by_length()
            >>> sums.flatten(1).norm(dim=1)
            tensor([0.0355, 0.0727, 0.0892, 0.0708, 0.0380, 0.0166, 0.0047],
                   dtype=torch.float64)
            >>> torch.allclose(sums.sum(0), tape.gradient(), atol=1e-6)
            True
        """
        scaled = check_flag("scaled", scaled)
        sums = self._sums_by_length()
        shape = place_shape(self._recorded, self._place)
        return gradients.shaped(sums, self._place, shape) if scaled else gradients.values(sums).reshape(-1, *shape)

    @full_precision()
    def compare_lengths(self) -> LengthSums:
        """Compare the exact sums by length (`gradient_by_length`) with each other and with the gradient, their sum.

        Returns:
            Norms, cosines, and the share of the gradient that each length explains, float64 [n + 1] each.

        Example:
            >>> tape.compare_lengths()
            LengthSums(lengths 0 to 6, full_norm=0.159, length 2 explains most (37%))
        """
        return gradients.compare_lengths(self._sums_by_length())

    def squared_norms_by_length(self, draws: int, seed: int = 0, first: int = 0) -> Tensor:
        """Estimate the sums, over all paths of a length, of the squared norms of their gradients.

        A draw gives every module a random sign e_i and takes the squared norms of the coefficients of ``prod_i
        (J_skip^T + x e_i J_residual^T) g``: cross terms of different paths cancel in the mean, so its
        expectation is the sum over the C(n, k) paths of length k; divide by C(n, k) for their mean. One draw costs as
        much as one sampled path of every length, and covers all paths.

        The estimate is unbiased and heavy-tailed where path gradients align: for 54 modules that are numbers, the
        relative variance of one draw is 3e3 at length 5 and 4e14 at length 27. `pathnet.paths.sample` and
        `path_gradient_norms` have no such tail; experiments use them. `pathnet.signed.judge` tells when
        not to trust the mean of these draws.

        Args:
            draws: number of draws; the signs of draw j are a function of (seed, j) alone.
            seed: seed of the draws, at least 0.
            first: number of the first draw, at least 0.

        Returns:
            float64 [draws, n + 1], for the lengths 0 to n. Squares of norms beyond 1e-162 and 1e154 leave its range.

        Raises:
            ValueError: an argument is out of its range.

        Example:
            Estimates for the lengths 1 and 2, and the exact sum over the 6 paths of length 1:

            >>> tape.squared_norms_by_length(draws=64).mean(0)[1:3]
            tensor([0.0051, 0.0075], dtype=torch.float64)
            >>> tape.path_gradient_norms(torch.eye(6, dtype=torch.int64)).square().sum()
            tensor(0.0051, dtype=torch.float64)
        """
        most = self._columns - 1
        draws = check_integer("draws", draws, 1, paths.MOST_BYTES // (self.n * most))
        signs = paths.signs(self.n * most, draws, seed, first).reshape(draws, self.n, most)
        signs[:, torch.arange(most) >= torch.tensor(self._modules)[:, None]] = 0
        return self._measure(gradients.squared_norms_by_length, signs, self._place)

    def _sums_by_length(self) -> ScaledGradient:
        return self._measure(gradients.sums_by_length, torch.ones(self.n, 2, dtype=torch.float64), self._place)

    def _routing(self, b: Tensor) -> Tensor:
        return paths.routing(paths.check_paths("b", b, self.n, self._modules), parts=self._columns)

    @property
    def _columns(self) -> int:
        """The number of coefficients of a block in a path's routing: skip connection and residual modules."""
        return 1 + max(self._modules)

    @full_precision()
    def _gradients(self, routing: Tensor, powers: Tensor | None, scaled: bool) -> Tensor | ScaledGradient:
        """Return the gradients under routings [P, n, 2 or parts], each times ``2**power``; None for powers of 0."""
        return self._measure(gradients.under_routings, routing, powers, self._place, scaled)
