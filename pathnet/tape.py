"""`Recorder`, `record` and `Tape`: a forward pass, and everything that can be asked of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from pathnet import gradients, paths, scaling
from pathnet.checks import check_callable, check_flag, check_integer, check_tensor, described, one_of
from pathnet.engines import Engine, check_engine, choose
from pathnet.engines.transfers import to_device
from pathnet.full_precision import full_precision
from pathnet.gradients import LengthSums
from pathnet.models.residual_net import ResidualNet, check_net
from pathnet.recording import (
    NOT_FINITE,
    SMALLEST,
    At,
    BatchNormMode,
    Look,
    Loss,
    OutputGradient,
    Precision,
    Prepared,
    Record,
    check_labels,
    cross_entropy,
    output_gradient,
    snapshot,
)
from pathnet.routing import check_routing, routed_forward

__all__ = ["Recorder", "Tape", "record"]

Scaled = tuple[Tensor, Tensor]

Result = TypeVar("Result")


class Tape:
    """A recorded forward pass; made by `record` or a `Recorder`.

    Gradients are of the loss, at the place that ``at`` names: ``y0`` [B, C_0, H_0, W_0] ([B, T, C] of tokens),
    ``image`` [B, C, H, W] or ``stem_weight`` [C_0, C, k, k]. They come back as float64, since along 54 modules they
    can leave the range of float32; or, with ``scaled=True``, as a pair (mantissa, int32 exponent broadcast to it).

    In BN mode ``batch`` the batch is one object, and ``per_sample`` norms are those of the samples' slices of
    the batch's gradient. Of ``stem_weight``, a sample's share is what comes through its slice of the gradient at
    ``y0``; it takes one backward of the stem a sample.

    On a GPU the batch's values are looked at when the tape is first asked for something, behind the work that this
    asks the GPU for; what is wrong with them is told then, instead of a result.
    """

    def __init__(self, engine: Engine, record: Record, at: At, settle: Callable[[], Record]) -> None:
        """
        Args:
            settle: looks at the values, and returns the record, which may start from another gradient then; raises
                ValueError where something is wrong with them.
        """
        self._engine, self.at = engine, at
        self._recorded = record
        self._settle: Callable[[], Record] | None = settle

    @property
    def _record(self) -> Record:
        """The record, once its values are known to be right."""
        settle = self._settle
        if settle is not None:
            self._recorded, self._settle = settle(), None
        return self._recorded

    def _asked(self, work: Callable[[Record], Result]) -> Result:
        """What ``work`` makes of the record, begun before the values are looked at: a GPU computes meanwhile."""
        ahead = self._recorded
        try:
            result = work(ahead)
        except Exception:
            # Of a batch with something wrong that is told, not what came of it.
            _ = self._record
            raise
        return result if self._record is ahead else work(self._record)

    @property
    def engine(self) -> str:
        """The name of the engine that serves this tape."""
        return self._engine.name

    @property
    def n(self) -> int:
        """The number of blocks."""
        return self._recorded.net.n

    @property
    def loss(self) -> float:
        """The loss of the recorded batch."""
        return float(self._record.loss)

    @property
    def output(self) -> Tensor:
        """The network's output for the recorded batch, [B, ...]."""
        return self._record.output

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tape holds; a `Recorder`'s tapes share what does not depend on the batch."""
        return self._recorded.nbytes

    def path_gradient_norms(self, b: Tensor, per_sample: bool = False) -> Tensor:
        """Euclidean norms of the gradients along paths (Veit et al. 2016, section 5 and Figure 6 b).

        Args:
            b: integer or bool [P, n] of zeros and ones; see `pathnet.paths`.
            per_sample: the norm of each sample's slice of the gradient of the batch's loss.

        Returns:
            float64 [P], or [P, B] per sample; full relative precision down to 1e-300, as far as the forward pass
            stays in the range of its type: in float32 an activation below 1e-45 is 0, and its ReLU lets nothing back.

        Raises:
            ValueError: ``b`` is not such a tensor.
        """
        per_sample, routing = check_flag("per_sample", per_sample), self._routing(b)
        return self._asked(lambda record: gradients.norms(self._engine, record, routing, self.at, per_sample))

    @overload
    def path_gradients(self, b: Tensor, scaled: Literal[False] = False) -> Tensor: ...
    @overload
    def path_gradients(self, b: Tensor, scaled: Literal[True]) -> Scaled: ...
    def path_gradients(self, b: Tensor, scaled: bool = False) -> Tensor | Scaled:
        """The gradients along paths: through the residual module where ``b_i = 1``, the skip where it is 0.

        Args:
            b: integer or bool [P, n] of zeros and ones.

        Returns:
            float64 [P, *shape at the place]; or the scaled pair.

        Raises:
            ValueError: ``b`` is not such a tensor.
        """
        return self._gradients(self._routing(b), None, check_flag("scaled", scaled))

    @overload
    def routed_gradients(self, routing: Tensor, scaled: Literal[False] = False) -> Tensor: ...
    @overload
    def routed_gradients(self, routing: Tensor, scaled: Literal[True]) -> Scaled: ...
    def routed_gradients(self, routing: Tensor, scaled: bool = False) -> Tensor | Scaled:
        """The gradients under routings: ``g <- a J_skip^T g + c J_residual^T g`` from the last block to the first.

        Args:
            routing: floating-point [P, n, 2], the (a, c) of every block. Ones give the ordinary gradient. Of a
                network with gates (highway) also [P, n, 3]: the third is that of what flows through the gate
                itself, 0 where it is not given, and ones in all three give the ordinary gradient.

        Returns:
            float64 [P, *shape at the place]; or the scaled pair.

        Raises:
            ValueError: ``routing`` is not such a tensor.
        """
        check_routing(routing, self.n, self._recorded.net.parts)
        return self._gradients(*scaling.of_coefficients(routing), check_flag("scaled", scaled))

    def gradient(self) -> Tensor:
        """The ordinary gradient of the loss, float64: the sum over all 2^n paths.

        In a network with gates (highway) what flows through the gates themselves is added to it.
        """
        everything = torch.ones(1, self.n, self._recorded.net.parts, dtype=torch.float64)
        return self._gradients(everything, None, scaled=False)[0]

    @overload
    def gradient_by_length(self, scaled: Literal[False] = False) -> Tensor: ...
    @overload
    def gradient_by_length(self, scaled: Literal[True]) -> Scaled: ...
    @full_precision()
    def gradient_by_length(self, scaled: bool = False) -> Tensor | Scaled:
        """The exact sums of the gradients of all paths of each length: 2^n paths by n (n + 1) / 2 module backwards.

        They are the coefficients by powers of x of ``prod_i (J_skip^T + x J_residual^T) g``, and follow from ``G_k <-
        J_skip^T G_k + J_residual^T G_{k-1}`` from the last block to the first. Each has its own power of two, so that
        one of 1e-60 beside one of 1e+3 keeps its digits. In a network without gates they add up to `gradient`; what
        flows through gates (highway) is in none of them.

        Memory: the n + 1 gradients that are returned, in the walk's type and in float64. On the way the cpu engine
        holds n + 1 images a thread, in BN mode ``batch`` n + 1 batches of them and 256 MB; the others hold n + 1
        gradients before a block and behind it, and take as many at a time as half of a GPU's free memory, or 256 MB
        of a processor's, has room for.

        Returns:
            float64 [n + 1, *shape at the place], for the lengths 0 to n; or the scaled pair.
        """
        scaled = check_flag("scaled", scaled)
        grads, exponents = self._sums_by_length()
        if scaled:
            return grads, exponents.reshape(*exponents.shape, *(1,) * (grads.ndim - 2))
        result = grads.new_empty(grads.shape, dtype=torch.float64)
        for own, grad, exponent in zip(result, grads, exponents, strict=True):
            own.copy_(scaling.value(grad[None], exponent[None])[0])
        return result

    @full_precision()
    def compare_lengths(self) -> LengthSums:
        """How the exact sums by length (`gradient_by_length`) lie to each other and to the gradient, their sum:
        norms, cosines, and the share of the gradient that each length explains. See `LengthSums`."""
        return gradients.compare_lengths(*self._sums_by_length())

    def squared_norms_by_length(self, draws: int, seed: int = 0, first: int = 0) -> Tensor:
        """A signed estimate of the sums over all paths of a length of the squared norms of their gradients.

        A draw gives every module a random sign e_i and takes the squared norms of the coefficients of ``prod_i
        (J_skip^T + x e_i J_residual^T) g``: cross terms of different paths cancel in the mean, so that its
        expectation is the sum over the C(n, k) paths of length k; divide by C(n, k) for their mean. One draw costs
        what one sampled path of every length costs, and sees all paths.

        The estimate is unbiased and heavy-tailed where path gradients align: of 54 modules that are numbers, the
        relative variance of one draw is 3e3 at length 5 and 4e14 at length 27. `pathnet.paths.sample` and
        `path_gradient_norms` have no such tail, and are what experiments take; see
        `pathnet.signed.judge` for when not to trust the mean of these.

        Args:
            draws: how many: numbers ``first`` to ``first + draws - 1``; the signs of draw j are a function of (seed,
                j) alone.

        Returns:
            float64 [draws, n + 1], for the lengths 0 to n. Squares of norms beyond 1e-162 and 1e154 leave its range.

        Raises:
            ValueError: an argument is out of its range.
        """
        draws = check_integer("draws", draws, 1, paths.MOST_BYTES // self.n)
        signs = paths.signs(self.n, draws, seed, first)
        return self._asked(lambda record: gradients.squared_norms_by_length(self._engine, record, signs, self.at))

    def _sums_by_length(self) -> Scaled:
        ones = torch.ones(self.n, 2, dtype=torch.float64)
        return self._asked(lambda record: gradients.sums_by_length(self._engine, record, ones, self.at))

    def _routing(self, b: Tensor) -> Tensor:
        return paths.routing(paths.check_paths("b", b, self.n))

    @full_precision()
    def _gradients(self, routing: Tensor, powers: Tensor | None, scaled: bool) -> Tensor | Scaled:
        """Return the gradients under routings [P, n, 2], times powers of two: int32 [P]; None for no such powers."""
        return self._asked(lambda record: self._gradients_of(record, routing, powers, scaled))

    def _gradients_of(self, record: Record, routing: Tensor, powers: Tensor | None, scaled: bool) -> Tensor | Scaled:
        place, count = gradients.place_shape(record, self.at), len(routing)
        slots = 1 if self.at == "stem_weight" else len(record.exponent)
        like = record.grad
        mantissa = like.new_empty(count, *place, dtype=like.dtype if scaled else torch.float64)
        exponents = torch.empty(count, slots, dtype=torch.int32, device=like.device)
        for part, grad, exponent in gradients.scaled_gradients(self._engine, record, routing, self.at):
            if powers is not None:
                exponent = exponent + to_device(powers[part, None], exponent.device)
            mantissa[part] = grad if scaled else scaling.value(grad, exponent)
            exponents[part] = exponent
        return (mantissa, exponents.reshape(count, slots, *(1,) * (len(place) - 1))) if scaled else mantissa


@dataclass(frozen=True)
class _Service:
    """The engine that serves inputs of blocks of one shape on one device, and what it made of the network."""

    engine: Engine
    prepared: Prepared
    y0_shape: Sequence[int]
    device: torch.device

    def suits(self, y0: Tensor) -> bool:
        return self.y0_shape == y0.shape[1:] and self.device == y0.device


class Recorder:
    """Records batch after batch through one network: the network is copied, and prepared by the engine, once.

    The network is left as it was, running statistics included, and later changes of it reach neither the recorder
    nor its tapes. The forward pass is float32-accurate in every precision; ``precision`` is that of the walk. The
    engine is chosen on the first batch, and anew for images of another size or on another device.

    Gradients are mantissas and powers of two between blocks, so that their norms may lie anywhere between 1e-300 and
    1e300. At once, a residual module may shrink a gradient by 1e-60, or let it grow by 1e30. Factors of a batch
    normalisation that lie 1e-18 below its largest lose digits; in sums by length the two branches of a block may lie
    1e48 apart. Activations are float32: below 1e-45 they are 0, and their ReLUs pass nothing on.

    Args:
        bn: ``running``, batch normalisation by running statistics, samples independent; or ``batch``, by the
            batch's own statistics, through which the gradient then also flows.
        engine: a name among `pathnet.engines.available`, or ``auto``: the fastest that serves.
        precision: ``float32``, ``bfloat16`` (fastest) or ``float64`` (engine ``reference``).
        at: where gradients are taken: the input of the first block (``y0``; of a language model, the embedded
            tokens), the ``image``, or the first convolution's weight (``stem_weight``; "the first layer" of the
            paper's Figure 6).
        loss: a differentiable function of (output, target), one finite number; the mean cross-entropy by default. One
            in float64 may lie anywhere in that type's range.

    Raises:
        ValueError: an argument is out of its range.
    """

    @full_precision()
    def __init__(
        self,
        net: ResidualNet,
        bn: BatchNormMode = "running",
        engine: str = "auto",
        precision: Precision = "float32",
        at: At = "y0",
        loss: Loss = cross_entropy,
    ) -> None:
        check_net(net)
        one_of("bn", bn, BatchNormMode)
        one_of("precision", precision, Precision)
        one_of("at", at, At)
        check_engine("engine", engine)
        check_callable("loss", loss)
        self._bn, self._engine, self._precision, self._at, self._loss = bn, engine, precision, at, loss
        self._dtype = torch.float64 if precision == "float64" else torch.float32
        self._net = snapshot(net, bn, self._dtype)
        if at == "stem_weight":
            self._net.stem_weight()
        self._service: _Service | None = None
        # The network's copy and its service are shared, and an engine may hook into its modules for a while.
        self._lock = Lock()

    @full_precision()
    def __call__(self, images: Tensor, target: Tensor) -> Tape:
        """Runs the network forward on one batch and keeps what the walks back along its paths need.

        Args:
            images: floating-point [B, C, H, W], normalised, on the network's device; or what else the network takes
                with the batch first, such as tokens, int64 or int32 [B, T], which stay integers.
            target: what the loss compares the output with. For the default loss class labels, int64 [B]; or [B, T]
                for an output [B, T, classes], where a position with -100 is left out.

        Raises:
            ValueError: an argument is out of its range, or no engine serves the job. On a GPU a wrong value among the
                images or labels, and a loss that is not finite, are told by the tape, see `Tape`.
        """
        images = self._own(images)
        if self._at == "image" and not images.is_floating_point():
            raise ValueError(
                f'at: expected a place behind the tokens, which have no gradient (at="y0"), got {self._at!r}'
            )
        labels = None
        # Copies, also of tensors made in inference mode, which autograd does not take.
        target = target.clone() if isinstance(target, Tensor) else target
        if self._loss is cross_entropy:
            labels = target = check_labels(target, images.device)
        with self._lock:
            y0, service = self._enter(images)
            y_n, blocks = service.engine.record(service.prepared, y0)
            gradient = output_gradient(self._net, y_n, target, self._loss, self._bn)
        look = Look(images, labels, gradient.output, gradient.loss, gradient.least)

        def recorded(gradient: OutputGradient) -> Record:
            start = gradient.grad.contiguous(), gradient.exponent
            return Record(self._net, images, y0.shape, blocks, gradient.output, gradient.loss, *start)

        record = recorded(gradient)

        def settle() -> Record:
            _, least = look.numbers()
            if least >= SMALLEST:
                return record
            with self._lock, full_precision():
                return recorded(output_gradient(self._net, y_n, target, self._loss, self._bn, thorough=True))

        tape = Tape(service.engine, record, self._at, settle)
        if not images.is_cuda:
            _ = tape._record
        return tape

    @full_precision()
    @torch.no_grad()
    def routed_outputs(self, images: Tensor, routing: Tensor) -> Tensor:
        """The network's outputs under routings of its forward pass, ``y <- join(a skip(y) + c residual(y))`` a block.

        (1, 1) everywhere is the network itself; (1, 0) deletes a block (Veit et al. 2016, section 4.1), which in BN
        mode ``batch`` changes the statistics of those behind it. A branch with the coefficient 0 is left out. Of a
        highway block (1, 0) leaves the skip as the gate lets it through, of a VGG layer zeros: `pathnet.lesion`
        deletes those as they are meant to be.

        Args:
            images: as for a recording.
            routing: floating-point [P, n, 2], the (a, c) of every block, from input to output.

        Returns:
            [P, B, classes], or what else the head gives in place of the classes.

        Raises:
            ValueError: an argument is out of its range, or no engine serves the job.
        """
        check_routing(routing, self._net.n)
        images = self._own(images)
        # The output's shape is the head's, so that no routings at all need one to tell it.
        wanted = routing if len(routing) else routing.new_ones(1, self._net.n, 2)
        with self._lock:
            y0, service = self._enter(images)
            walked = routed_forward(service.engine, service.prepared, y0, wanted)
            outputs = torch.cat([self._head(y_n) for _, y_n in walked])
        if not torch.isfinite(images).all():
            raise ValueError(NOT_FINITE)
        return outputs[: len(routing)]

    @full_precision()
    def engine_for(self, images: Tensor) -> str:
        """The name of the engine that serves such images (or tokens).

        Raises:
            ValueError: the images do not fit the network, or no engine serves the job.
        """
        with self._lock:
            return self._enter(self._own(images))[1].engine.name

    def _own(self, images: Tensor) -> Tensor:
        """A copy of the images, in the walk's type; tokens stay what they are."""
        _check_images(self._net, images)
        dtype = self._dtype if images.is_floating_point() else images.dtype
        return images.detach().to(dtype, copy=True).contiguous()

    def _enter(self, images: Tensor) -> tuple[Tensor, _Service]:
        """``y_0``, and the engine that takes it from there."""
        y0 = _stem(self._net, images)
        if self._service is None or not self._service.suits(y0):
            shape = tuple(y0.shape[1:])
            engine = choose(self._engine, self._net, self._bn, self._precision, shape, y0.device)
            prepared = engine.prepare(self._net, self._bn, self._precision, shape)
            self._service = _Service(engine, prepared, shape, y0.device)
        return y0, self._service

    def _head(self, y_n: Tensor) -> Tensor:
        """The outputs [p, B, ...] for ``y_n`` [p, B, ...]."""
        if self._bn == "batch":
            return torch.stack([self._net.head(own) for own in y_n])
        return torch.as_tensor(self._net.head(y_n.flatten(0, 1)).unflatten(0, y_n.shape[:2]))


def record(
    net: ResidualNet,
    images: Tensor,
    target: Tensor,
    bn: BatchNormMode = "running",
    engine: str = "auto",
    precision: Precision = "float32",
    at: At = "y0",
    loss: Loss = cross_entropy,
) -> Tape:
    """Runs the network forward once and keeps what the walks back along its paths need.

    The network is left as it was, running statistics included, and later changes of it do not reach the tape.
    For many batches of one network there is `Recorder`, which copies it only once.

    Args:
        images: floating-point [B, C, H, W], normalised, on the network's device; or what else the network takes.
        target: what ``loss`` compares the output with; int64 [B] class labels, or [B, T], for the default loss.
        bn, engine, precision, at, loss: see `Recorder`.

    Raises:
        ValueError: an argument is out of its range, or no engine serves the job.
    """
    return Recorder(net, bn, engine, precision, at, loss)(images, target)


@torch.no_grad()
def _stem(net: ResidualNet, images: Tensor) -> Tensor:
    try:
        y0 = torch.as_tensor(net.stem(images.clone()))
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:  # The latter of tokens that are not in the vocabulary.
        what = "shape" if images.is_floating_point() else "tokens of shape"
        reason = str(error).splitlines()[0]
        raise ValueError(f"images: the network refuses the {what} {list(images.shape)} ({reason})") from None
    if y0.shape[:1] != images.shape[:1]:
        raise ValueError(f"images: expected the batch first, got {list(images.shape)} (y_0 is {list(y0.shape)})")
    return y0


def _check_images(net: ResidualNet, images: Tensor) -> None:
    """All but the values; see `Look`."""
    if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64, torch.int64, torch.int32):
        got = images.dtype if isinstance(images, Tensor) else described(images)
        raise ValueError(
            f"images: expected a float32 or float64 tensor (normalised images), or int64 or int32 (tokens), got {got}"
        )
    device = next((parameter.device for parameter in net.parameters()), None)
    check_tensor("images", images, device=device)
    # A convolution would take an image without a batch too.
    convolves = images.is_floating_point() and any(isinstance(own, nn.Conv2d) for own in net.stem.modules())
    if images.ndim == 0 or len(images) == 0 or (convolves and images.ndim != 4):
        shape = "[B, C, H, W]" if convolves else "[B, ...]"
        raise ValueError(f"images: expected shape {shape} with B >= 1, got {list(images.shape)}")
