"""`Recorder` and `record`: forward passes of one network, each kept on a tape."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pathnet.checks import check_callable, one_of
from pathnet.engines import Job, check_engine
from pathnet.entering import Service, check_values, copied_inputs, served, stem_output
from pathnet.full_precision import Autocast, full_precision
from pathnet.models.context import Context
from pathnet.models.residual_net import ResidualNet, check_net
from pathnet.places import locate, tail
from pathnet.recording import (
    SMALLEST,
    BatchNormMode,
    Loss,
    OutputGradient,
    Precision,
    ValueCheck,
    check_labels,
    cross_entropy,
    model_loss,
    output_gradient,
    snapshot,
)
from pathnet.routing import check_routing
from pathnet.tape import Tape
from pathnet.walks import Record, routed_forward

__all__ = ["Recorder", "record"]


Method = TypeVar("Method", bound=Callable[..., Any])


def _in_precision(method: Method) -> Method:
    """Let a method of a recorder compute in full precision, or for ``network`` as its caller would."""

    @wraps(method)
    def computed(self: Recorder, *arguments: Any, **options: Any) -> Any:
        as_called = torch.inference_mode(False)
        with as_called if self._precision == "network" else full_precision():
            return method(self, *arguments, **options)

    return computed  # type: ignore[return-value]


class Recorder:
    """Recorder of forward passes through one network, copied once, and prepared once per image size and device.

    The network stays unchanged, running statistics included, and later changes of it reach neither the recorder nor
    its tapes. The forward pass is float32-accurate in every precision; ``precision`` is that of the backward passes.
    The engine is chosen on the first batch, and again for images of another size or on another device. A recorder can
    be pickled where its network and its loss can; the engine then prepares the network again.

    Between blocks gradients are mantissas with powers of two, so their norms may be anywhere between 1e-300 and
    1e300. A single residual module may shrink a gradient by 1e-60, or let it grow by 1e30. Factors of a batch
    normalisation below 1e-18 times the largest of its layer lose precision; in sums by length the two branches of a
    block may differ by 1e48. Activations are float32: below 1e-45 they are 0, and their ReLUs pass no gradient.

    Args:
        net: a network of `pathnet.models`, a `pathnet.models.ResidualNet` of other blocks, or what `pathnet.adapt`
            returns.
        bn: ``running``, batch normalisation by running statistics, samples independent; or ``batch``, by the
            statistics of the batch, through which the gradient then also flows.
        engine: a name among `pathnet.engines.available`, or ``auto``: the fastest that serves.
        precision: ``float32``, ``bfloat16`` (fastest) or ``float64`` (engine ``autograd``), whatever the types of the
            network's weights; or ``network``, in which forward and backward pass run in those types, and under the
            autocast that is active when the recorder is called (engine ``autograd``).
        at: the place of the gradients: the input of the first block (``y0``; in a language model, the embedded
            tokens), the ``image``, the first convolution's weight (``stem_weight``; "the first layer" of the paper's
            Figure 6), the input of a block by its number (from 0), or a parameter of the stem or of one block, by its
            name in ``net.named_parameters()`` or in the adapted model. Paths then run through the blocks from that
            one on, see `Tape`.
        loss: a differentiable function of (output, target) with one finite number as its value, by default the mean
            cross-entropy in nats. A float64 loss may use that type's whole range. ``model`` is the output itself, of
            a model that computes its loss from targets among its inputs: ``adapt(model, batch, output="loss")``.

    Raises:
        ValueError: an argument is out of its range, the network has no such place, or no path leads to it.

    Example:
        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1)
        >>> images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        >>> recorder = pathnet.Recorder(net, at="stem_weight")
        >>> recorder
        Recorder(6 blocks, bn='running', engine='auto', precision='float32', at='stem_weight')
        >>> for batch in (slice(0, 2), slice(2, 4)):
        ...     tape = recorder(images[batch], labels[batch])
        ...     print(round(tape.loss, 3), tape.gradient().shape)
        2.438 torch.Size([8, 1, 3, 3])
        2.256 torch.Size([8, 1, 3, 3])

        The examples of the methods go on from here.
    """

    @full_precision()
    def __init__(
        self,
        net: ResidualNet,
        bn: BatchNormMode = "running",
        engine: str = "auto",
        precision: Precision = "float32",
        at: str | int = "y0",
        loss: Loss | Literal["model"] = cross_entropy,
    ) -> None:
        if isinstance(loss, str) and loss == "model":
            loss = model_loss
        check_net(net)
        one_of("bn", bn, BatchNormMode)
        one_of("precision", precision, Precision)
        place = locate(net, at)
        check_engine("engine", engine)
        check_callable("loss", loss)
        self._bn, self._engine, self._precision, self._loss = bn, engine, precision, loss
        types = {"float64": torch.float64, "network": None}
        self._dtype = types.get(precision, torch.float32)
        self._net = snapshot(net, bn, self._dtype, place.block)
        self._place = place.within(self._net)
        self._tail = tail(self._net, self._place)
        self._service: Service | None = None
        # Threads share the network's copy and its service, and an engine may hook into its modules for a while.
        self._lock = Lock()

    def __repr__(self) -> str:
        settings = f"bn={self._bn!r}, engine={self._engine!r}, precision={self._precision!r}, at={self._place.at!r}"
        return f"Recorder({self._net.n} blocks, {settings})"

    def __copy__(self) -> Recorder:
        # Its network and settings never change, and a second recorder would run the same modules without its lock.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The engine prepares the network again where it is unpickled: on another machine another engine may serve.
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_service")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _service=None, _lock=Lock())

    @_in_precision
    def __call__(self, images: Any, target: Any = None) -> Tape:
        """Run the network forward on one batch, and keep what the backward passes along its paths need.

        Args:
            images: floating-point [B, C, H, W], normalised, on the network's device; or another input of the network
                with the batch first, such as tokens, int64 or int32 [B, T], which stay integers; for an adapted
                network whatever its example was, such as a tuple or a mapping.
            target: the loss's second argument; none for the model's own loss. For the default loss class labels,
                int64 [B]; or [B, T] for an output [B, T, classes], where a position with -100 is left out.

        Returns:
            The recorded batch, with its measurements.

        Raises:
            ValueError: an argument is out of its range, or no engine serves the job. On a GPU the tape raises the
                error of a wrong value among the images or labels, and of a loss that is not finite, see `Tape`.

        Example:
            >>> tape = recorder(images, labels)
            >>> tape.output.shape
            torch.Size([4, 10])
        """
        tensors, images, context = copied_inputs(self._net, images, self._dtype)
        if self._place.at == "image" and not images.is_floating_point():
            raise ValueError(
                f'at: expected a place after the tokens, which have no gradient (at="y0"), got {self._place.at!r}'
            )
        labels = None
        # A copy, also since autograd rejects tensors made in inference mode.
        target = target.clone() if isinstance(target, Tensor) else target
        if self._loss is cross_entropy:
            labels = target = check_labels(target, images.device)
        with self._lock:
            net = self._tail.bound(context)
            y0, service = self._enter(self._tail, net, images)
            y_n, walk = service.prepared.bound(context).record(y0)
            gradient = output_gradient(net, y_n, target, self._loss, self._bn)
        autocast = Autocast.active(images.device.type)
        values = ValueCheck(tensors, labels, gradient.output, gradient.loss, gradient.least)

        def recorded(gradient: OutputGradient) -> Record:
            result = gradient.output, gradient.loss, gradient.start
            return Record(net, images, y0.shape, service.engine, walk, *result, context, autocast)

        record = recorded(gradient)

        def settle() -> Record:
            _, least = values.result()
            if least >= SMALLEST:
                return record
            with self._lock, full_precision(), autocast.entered():
                return recorded(output_gradient(net, y_n, target, self._loss, self._bn, thorough=True))

        tape = Tape(record, self._place, settle)
        if not images.is_cuda:
            _ = tape._record
        return tape

    @_in_precision
    @torch.no_grad()
    def routed_outputs(self, images: Any, routing: Tensor) -> Tensor:
        """Return the outputs under routings of the forward pass: ``y <- join(a skip(y) + c residual(y))`` per block.

        Ones everywhere give the network itself; (1, 0) deletes a block (Veit et al. 2016, section 4.1),
        which in BN mode ``batch`` changes the statistics of later blocks. A branch with the coefficient 0 is left
        out. In a highway block (1, 0) keeps the gated skip connection, and in a VGG layer it gives zeros:
        `pathnet.lesion` deletes those blocks as the paper does.

        Args:
            images: the batch, as for a recording.
            routing: floating-point [P, n, 2], the (a, c) of every block, from input to output; or [P, n, 1 + m] with
                a coefficient for each of up to m residual modules in parallel.

        Returns:
            [P, B, classes], or whatever the head returns in place of the classes.

        Raises:
            ValueError: an argument is out of its range, or no engine serves the job.

        Example:
            The network itself, then the network without its last block:

            >>> routing = torch.ones(2, 6, 2)
            >>> routing[1, 5, 1] = 0
            >>> outputs = recorder.routed_outputs(images, routing)
            >>> outputs.shape
            torch.Size([2, 4, 10])
            >>> torch.allclose(outputs[0], net.eval()(images), atol=1e-5)
            True
            >>> (outputs[1] - outputs[0]).norm()
            tensor(0.2988)
        """
        check_routing(routing, self._net.n, 1 + max(self._net.residual_modules))
        tensors, images, context = copied_inputs(self._net, images, self._dtype)
        # The head decides the output's shape, so an empty routing needs one pass as well.
        passes = routing if len(routing) else routing.new_ones(1, self._net.n, 2)
        with self._lock:
            y0, service = self._enter(self._net, self._net.bound(context), images)
            chunks = routed_forward(service.prepared.bound(context), y0, passes)
            outputs = torch.cat([self._heads(y_n, context) for _, y_n in chunks])
        check_values(tensors)
        return outputs[: len(routing)]

    @_in_precision
    def engine_for(self, images: Any) -> str:
        """Return the name of the engine that serves such images (or tokens), see `pathnet.engines.available`.

        Args:
            images: a batch, as for a recording; only its shape, type and device matter.

        Raises:
            ValueError: the images do not fit the network, or no engine serves the job.

        Example:
            >>> pathnet.Recorder(net, precision="float64").engine_for(torch.randn(4, 1, 8, 8))
            'autograd'
        """
        _, images, context = copied_inputs(self._net, images, self._dtype)
        with self._lock:
            return self._enter(self._tail, self._tail.bound(context), images)[1].engine

    def _enter(self, net: ResidualNet, bound: ResidualNet, images: Tensor) -> tuple[Tensor, Service]:
        """Return ``y_0`` of a network ``net`` with its context, and the service for inputs of its shape."""
        y0 = stem_output(bound, images)
        if self._service is None or not self._service.suits(net, y0):
            job = Job(net, self._bn, self._precision, tuple(y0.shape[1:]), y0.device)
            self._service = served(job, self._engine)
        return y0, self._service

    def _heads(self, y_n: Tensor, context: Context) -> Tensor:
        """Return the outputs [p, B, ...] for ``y_n`` [p, B, ...]."""
        if self._bn == "batch" or not self._net.batch_first_output or self._net.decides_by_batch:
            head = self._net.bound(context).head
            return torch.stack([head(y.clone()) for y in y_n])
        head = self._net.bound(context.repeated(len(y_n))).head
        return torch.as_tensor(head(y_n.flatten(0, 1)).unflatten(0, y_n.shape[:2]))


def record(
    net: ResidualNet,
    images: Any,
    target: Any = None,
    bn: BatchNormMode = "running",
    engine: str = "auto",
    precision: Precision = "float32",
    at: str | int = "y0",
    loss: Loss | Literal["model"] = cross_entropy,
) -> Tape:
    """Run the network forward once, and keep what the backward passes along its paths need.

    The network stays unchanged, running statistics included, and later changes of it do not reach the tape. For many
    batches of one network, a `Recorder` copies it only once.

    Args:
        net: the network, see `Recorder`.
        images: floating-point [B, C, H, W], normalised, on the network's device; or other inputs of the network, a
            tensor, a tuple or a mapping, as in the example that it was adapted with.
        target: the loss's second argument; none for the model's own loss; for the default loss class labels, int64
            [B] or [B, T].
        bn: ``running`` or ``batch``, the statistics of batch normalisation, see `Recorder`.
        engine: a name among `pathnet.engines.available`, or ``auto``.
        precision: ``float32``, ``bfloat16``, ``float64`` or ``network``, see `Recorder`.
        at: the place of the gradients: ``y0``, ``image``, ``stem_weight``, the number of a block, or the name of a
            parameter, see `Recorder`.
        loss: a differentiable function of (output, target), or ``model``, see `Recorder`.

    Returns:
        The recorded batch, with its measurements.

    Raises:
        ValueError: an argument is out of its range, or no engine serves the job.

    Example:
        >>> import torch
        >>> import pathnet
        >>> _ = torch.manual_seed(0)
        >>> net = pathnet.models.preact_resnet(depth=14, width=8, in_channels=1)
        >>> images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        >>> tape = pathnet.record(net, images, labels, at="blocks.2.convs.0.weight")
        >>> tape.n, tape.gradient().shape
        (4, torch.Size([16, 8, 3, 3]))
    """
    return Recorder(net, bn, engine, precision, at, loss)(images, target)
