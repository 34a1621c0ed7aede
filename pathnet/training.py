"""Training that resumes bit-exactly: one recipe, one loop, one checkpoint file.

Stochastic depth and effective training (section 5 of the paper) draw for each batch the residual modules that take
part. The others are computed neither forward nor back. What is drawn is a function of seed and step alone, so that
all processes of a distributed training leave out the same modules.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pathnet.checks import MOST_INTEGER, check_callable, check_integer, check_number, check_path, described
from pathnet.data import Data
from pathnet.data.images import check_data_set
from pathnet.files import locked, remove_leftovers, telling
from pathnet.models.residual_net import ResidualNet, check_net
from pathnet.models.weights import check_stored, fill, odd_values, read_tensors, write_tensors
from pathnet.settings import Above, AtLeast, AtMost, Flag, Help, check_settings
from pathnet.streams import stream

__all__ = ["Epoch", "Recipe", "check_recipe", "drawn_modules", "evaluate", "train", "training_batch"]

EVALUATION_BATCH = 256
VECTOR = 8
"""float32 numbers in a vector of AVX2."""
CHECKPOINT_SECONDS = 120.0

Undrawn = Literal["none", "zero"]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """Settings of a training: SGD with Nesterov momentum, by the recipe of He et al. (2016) as the paper uses it."""

    epochs: Annotated[int, Help("Passes over the training split."), AtLeast(1)] = 200
    batch_size: Annotated[
        int, Help("Images in a step; the last, smaller batch of an epoch is dropped."), AtLeast(1)
    ] = 128
    learning_rate: Annotated[
        float,
        Help("Learning rate; divided by 10 after half of all steps, and again after three quarters."),
        AtLeast(0),
        Flag("--lr"),
    ] = 0.1
    momentum: Annotated[float, Help("Nesterov momentum."), Above(0), AtMost(1)] = 0.9
    weight_decay: Annotated[float, Help("Weight decay of every parameter."), AtLeast(0)] = 1e-4
    warmup_steps: Annotated[
        int, Help("First steps, at the warm-up learning rate, which very deep networks need."), AtLeast(0)
    ] = 400
    warmup_learning_rate: Annotated[
        float, Help("Learning rate of the warm-up steps."), AtLeast(0), Flag("--warmup-lr")
    ] = 0.01
    augment: Annotated[
        bool, Help("Augment with random crops and flips, as the data set defines them."), Flag(negatable=True)
    ] = True
    bfloat16: Annotated[
        bool,
        Help("Autocast forward and backward pass to bfloat16; weights and statistics stay float32."),
        Flag(negatable=True),
    ] = False
    modules: Annotated[
        int,
        Help(
            "Number of residual modules drawn for each batch (effective training). 0: all of them, or those that the "
            "network's survival probabilities draw (stochastic depth)."
        ),
        AtLeast(0),
    ] = 0
    undrawn: Annotated[
        Undrawn,
        Help(
            "Gradient of a module that is not drawn: none leaves the module as it is in that step, zero lets weight "
            "decay and momentum move it."
        ),
        Flag(value="GRAD"),
    ] = "none"
    seed: Annotated[
        int, Help("Seed of the order of images, their augmentation, and the drawn modules."), AtLeast(0)
    ] = 0

    def __post_init__(self) -> None:
        # Numbers are kept as Python's own: recipes are compared with those in files.
        check_settings(self)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (from 0) of ``steps``."""
        step, steps = check_integer("step", step, 0), check_integer("steps", steps, 1)
        if step < self.warmup_steps:
            return self.warmup_learning_rate
        return self.learning_rate * 0.1 ** sum(step >= drop * steps for drop in (0.5, 0.75))


@dataclass(frozen=True)
class Epoch:
    """What one pass over the data came to; ``test_accuracy`` in [0, 1]."""

    epoch: int
    train_loss: float
    test_accuracy: float
    seconds: float


def drawn_modules(net: ResidualNet, recipe: Recipe, step: int) -> tuple[bool, ...] | None:
    """Which residual modules take part in step ``step`` (from 0); None where nothing is drawn.

    Either exactly ``recipe.modules``, uniformly, or each by its own probability of survival (Huang et al. 2016).

    Raises:
        ValueError: the recipe draws a number of modules of a network that has survival probabilities, or more
            modules than there are; or an argument is out of its range.
    """
    check_net(net)
    check_recipe(recipe)
    step = check_integer("step", step, 0)
    survival = [block.survival for block in net]
    stochastic = any(probability < 1 for probability in survival)
    if recipe.modules == 0:
        if not stochastic:
            return None
        uniform = stream(recipe.seed, "modules", step).random(net.n)
        return tuple(bool(u < probability) for u, probability in zip(uniform, survival, strict=True))
    if stochastic:
        raise ValueError(f"modules: expected 0 for a network with stochastic depth, got {recipe.modules}")
    if recipe.modules > net.n:
        raise ValueError(f"modules: expected at most {net.n} (the network's), got {recipe.modules}")
    chosen = set(stream(recipe.seed, "modules", step).choice(net.n, recipe.modules, replace=False).tolist())
    return tuple(i in chosen for i in range(net.n))


def training_batch(data: Data, recipe: Recipe, step: int, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The images, float32 [B, C, H, W], and labels, int64 [B], of step ``step`` (from 0).

    Args:
        share: which of the batch's images.

    Raises:
        ValueError: an argument is not such a one, or a batch is larger than the training split.
    """
    check_data_set("data", data)
    check_recipe(recipe)
    step = check_integer("step", step, 0, MOST_INTEGER)
    if not isinstance(share, slice):
        raise ValueError(f"share: expected a slice, got {described(share)}")
    if recipe.batch_size > len(data.train):
        raise ValueError(
            f"recipe: batch_size {recipe.batch_size} exceeds the {len(data.train)} training images of {data.name}"
        )
    size, seed = recipe.batch_size, recipe.seed
    epoch, position = divmod(step, len(data.train) // size)
    order = _order(seed, epoch, len(data.train))
    indices = torch.from_numpy(order[position * size : (position + 1) * size])
    images = data.normalise(data.train.take(indices))
    if recipe.augment:
        images = data.augment(images, stream(seed, "augmentation", epoch, position))
    return images[share], data.train.labels[indices][share]


def _memory_format(net: ResidualNet) -> torch.memory_format:
    """Return channels_last where it pays: where the channels inside the blocks come in whole vectors."""
    convolutions = (module for block in net for module in block.modules() if isinstance(module, nn.Conv2d))
    whole = all(convolution.in_channels % VECTOR == 0 for convolution in convolutions)
    return torch.channels_last if whole else torch.contiguous_format


def _device(net: ResidualNet) -> torch.device:
    return next(net.parameters()).device


def check_recipe(value: object) -> None:
    """Raise ValueError unless ``value`` is a `Recipe`."""
    if not isinstance(value, Recipe):
        raise ValueError(f"recipe: expected a pathnet Recipe, got {described(value)}")


def evaluate(net: ResidualNet, data: Data) -> float:
    """The accuracy on the test split, in [0, 1]. The network's mode is left as it was.

    Raises:
        ValueError: an argument is not such a one, or an output is not finite.
    """
    check_net(net)
    check_data_set("data", data)
    training, device, right = net.training, _device(net), 0
    net.eval()
    try:
        with torch.no_grad():
            for number, (images, labels) in enumerate(data.test_batches(EVALUATION_BATCH)):
                output = net(images.to(device))
                facts = (output.argmax(1) == labels.to(device)).sum(), torch.isfinite(output).all()
                count, finite = torch.stack(facts).tolist()
                if not finite:
                    raise ValueError(f"net: expected finite outputs, got NaN or infinity on test batch {number}")
                right += count
    finally:
        net.train(training)
    return right / len(data.test)


def train(
    net: ResidualNet,
    data: Data,
    recipe: Recipe,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    callback: Callable[[int, ResidualNet], object] | None = None,
) -> list[Epoch]:
    """Trains ``net`` in place, on its device; one `Epoch` for every pass, earlier ones of the checkpoint included.

    Where ``checkpoint`` exists, training goes on from it, and ends with the same weights, bit for bit, as
    training that was never interrupted (on the same machine and number of threads). The file is written whole
    every two minutes, after every epoch, and on an interrupt, and is locked meanwhile: one training at a time has it.

    Where ``torch.distributed`` is initialised, its processes share out each batch (DistributedDataParallel); all
    are given the same arguments and see the same file, and the first writes the checkpoint. The blocks may be
    compiled beforehand (``for block in net: block.compile()``): compiling the whole network would make one program
    a set of modules. Three stages of blocks come to five programs in training and ten in evaluation, beyond
    ``torch._dynamo.config.recompile_limit`` as it is set by default: torch then warns, and runs some uncompiled.

    Args:
        progress: called with (steps done, steps in all, a note) after every step.
        callback: called in every process with (steps done, ``net``) before the first step and after every one, such
            as `pathnet.EffectiveDepth`.

    Raises:
        ValueError: the checkpoint is of another model, data set or recipe, or not seen by all processes; the recipe
            does not fit the network or the data; another training has the checkpoint; or the loss or a weight is
            not finite.
        OSError: the checkpoint cannot be written.
    """
    check_net(net)
    check_data_set("data", data)
    check_recipe(recipe)
    for name, function in (("progress", progress), ("callback", callback)):
        if function is not None:
            check_callable(name, function)
    path = check_path("checkpoint", checkpoint) if checkpoint is not None else None
    with _alone(path, next(net.parameters()).device):
        run = _Run(net, data, recipe, path)
        net.train()
        saved = time.monotonic()
        try:
            if run.untested:
                run.test()
            if callback is not None:
                callback(run.step, net)
            while run.step < run.steps:
                loss = run.advance()
                if run.untested:
                    run.test()
                if callback is not None:
                    callback(run.step, net)
                if progress is not None:
                    note = f"epoch {run.epoch + 1}/{recipe.epochs} loss {loss:.3f} {run.last()}"
                    progress(run.step, run.steps, note)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    run.save()
                    saved = time.monotonic()
        finally:
            run.save()
    net.eval()
    return run.history


def _processes() -> tuple[int, int]:
    """The number of this process, and how many train together."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


@contextmanager
def _alone(checkpoint: Path | None, device: torch.device) -> Iterator[None]:
    """Hold the checkpoint's lock in the first process; all are refused where it is.

    Raises:
        ValueError: another training holds it.
        OSError: there can be no lock.
    """
    (rank, processes), refusal = _processes(), None
    with ExitStack() as stack:
        if checkpoint is not None and rank == 0:
            lock = checkpoint.with_name(f".{checkpoint.name}.pathnet-lock")
            try:
                with telling(checkpoint, "checkpoint"):
                    checkpoint.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(lock, "checkpoint", f"training on {checkpoint}", keep=False))
                remove_leftovers(checkpoint.parent, re.escape(checkpoint.name))
            except (ValueError, OSError) as error:
                refusal = error
        if processes > 1:
            refused = torch.tensor([float(refusal is not None)], device=device)
            dist.all_reduce(refused)
            if refused.item() and refusal is None:
                refusal = ValueError(f"checkpoint: the first process was refused {checkpoint}")
        if refusal is not None:
            raise refusal
        yield


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    """The order of the training images in one epoch, kept for its steps: int64 [images]."""
    return stream(seed, "epoch", epoch).permutation(images)


class _Run:
    """The state that a checkpoint holds: weights, momentum, the step, what the epochs so far came to."""

    def __init__(self, net: ResidualNet, data: Data, recipe: Recipe, checkpoint: Path | None) -> None:
        self.net, self.data, self.recipe = net, data, recipe
        # Before the processes are tied together: they exchange gradients in the layout of the weights.
        self.memory_format = _memory_format(net)
        net.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.rank, self.processes = _processes()
        self.checkpoint = checkpoint if self.rank == 0 else None
        if recipe.batch_size % self.processes:
            raise ValueError(
                f"recipe: expected a batch_size that {self.processes} processes can share, got {recipe.batch_size}"
            )
        draws = drawn_modules(net, recipe, 0) is not None
        self.steps_an_epoch = len(data.train) // recipe.batch_size
        if self.steps_an_epoch == 0:
            raise ValueError(
                f"recipe: batch_size {recipe.batch_size} exceeds the {len(data.train)} training images of {data.name}"
            )
        self.steps = recipe.epochs * self.steps_an_epoch
        self.step = 0
        self.history: list[Epoch] = []
        self.loss_sum = 0.0
        self.seconds = 0.0
        self.whole = True
        statistics: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in net.buffers():
            statistics[buffer.dtype].append(buffer)
        self.statistics = [(own, [buffer.clone() for buffer in own]) for own in statistics.values()]
        self.optimizer = torch.optim.SGD(
            net.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=True,
        )
        self.identity = {"config": net.config, "recipe": asdict(recipe), "data": data.fingerprint()}
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        self.forward: nn.Module = net
        if self.processes > 1:
            self._check_start()
            device = _device(net)
            self.forward = nn.parallel.DistributedDataParallel(
                net, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=draws
            )

    @property
    def epoch(self) -> int:
        return max(0, self.step - 1) // self.steps_an_epoch

    @property
    def untested(self) -> bool:
        """Whether all steps of an epoch are taken, and its test is not made."""
        done, further = divmod(self.step, self.steps_an_epoch)
        return further == 0 and done > (self.history[-1].epoch + 1 if self.history else 0)

    def last(self) -> str:
        return f"test accuracy {self.history[-1].test_accuracy:.4f}" if self.history else ""

    def advance(self) -> float:
        """One step. Returns its loss; an interrupted one leaves no trace, so that it can be taken again."""
        begun = time.monotonic()
        self.whole = False
        for own, kept in self.statistics:
            torch._foreach_copy_(kept, own)
        try:
            loss = self._differentiate()
        except BaseException:
            for own, kept in self.statistics:
                torch._foreach_copy_(own, kept)
            self.whole = True
            raise
        self.optimizer.step()
        self.step += 1
        self.loss_sum += loss
        self.seconds += time.monotonic() - begun
        self.whole = True
        return loss

    def _differentiate(self) -> float:
        """The gradients of the next step's loss, and the loss."""
        device, each = _device(self.net), self.recipe.batch_size // self.processes
        share = slice(self.rank * each, (self.rank + 1) * each)
        images, labels = training_batch(self.data, self.recipe, self.step, share)
        images, labels = images.to(device, memory_format=self.memory_format), labels.to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
            output = self.forward(images, drawn_modules(self.net, self.recipe, self.step))
        loss = F.cross_entropy(output.float(), labels)
        whole = loss.detach().clone()
        if self.processes > 1:
            # So that all processes stop at a loss that is not finite in one of them.
            dist.all_reduce(whole)
            whole /= self.processes
        if not torch.isfinite(whole):
            raise ValueError(f"recipe: the loss is {whole.item()} at step {self.step}; try a lower learning_rate")
        loss.backward()  # type: ignore[no-untyped-call]
        if self.recipe.undrawn == "zero":
            for parameter in self.net.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return whole.item()

    def test(self) -> None:
        """Ends an epoch."""
        self._agree()
        accuracy = evaluate(self.net, self.data)
        self.history.append(Epoch(self.epoch, self.loss_sum / self.steps_an_epoch, accuracy, self.seconds))
        self.loss_sum = self.seconds = 0.0
        self.save()

    def _check_start(self) -> None:
        steps = torch.tensor([-self.step, self.step], device=_device(self.net))
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        least, most = -int(steps[0]), int(steps[1])
        if least != most:
            raise ValueError(
                f"checkpoint: expected a file that all processes see, got some at step {least} and some at {most}"
            )

    def _agree(self) -> None:
        """The first process's running statistics for all: each has kept them of its own share in the last step."""
        if self.processes > 1:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)

    def _momenta(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {
            f"momentum/{name}": state[parameter]["momentum_buffer"]
            for name, parameter in self.net.named_parameters()
            if "momentum_buffer" in state[parameter]
        }

    def save(self) -> None:
        if self.checkpoint is None or not self.whole:
            return
        progress: dict[str, Any] = {
            "step": self.step,
            "history": [asdict(epoch) for epoch in self.history],
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
        }
        tensors = {**self.net.state_dict(), **self._momenta()}
        kept = "all steps taken are lost"
        if self.checkpoint.exists():
            kept = f"{self.checkpoint} stays as it was before, and the same training goes on from it"
        for name, tensor in tensors.items():
            if problem := odd_values(name, tensor):
                problem = f"{name!r} at step {self.step}: {problem}"
                raise ValueError(f"recipe: {problem}; try a lower learning_rate; {kept}")
        write_tensors(self.checkpoint, tensors, {**self.identity, "progress": progress}, "checkpoint", kept)

    def _resume(self, checkpoint: Path) -> None:
        tensors, metadata = read_tensors(checkpoint)
        # What a file from before there was a setting does not say, is what was done then: the default.
        if isinstance(recipe := metadata.get("recipe"), dict):
            metadata["recipe"] = asdict(Recipe()) | recipe
        # The data's hash is of the kind that the file has; the next one written has the kind of now.
        identity = self.identity | {"data": self.data.fingerprint(like=metadata.get("data"))}
        for part, expected in identity.items():
            if metadata.get(part) != expected:
                raise ValueError(
                    f"checkpoint: {checkpoint} is of another {'model' if part == 'config' else part} "
                    f"(expected {expected}, got {metadata.get(part)})"
                )
        try:
            self._read_progress(metadata.get("progress"))
        except ValueError as error:
            raise ValueError(f"checkpoint: {checkpoint}: progress: {error}") from None
        momenta = {}
        for name, parameter in self.net.named_parameters():
            momentum = tensors.get(f"momentum/{name}")
            if momentum is not None:
                check_stored(f"momentum/{name}", momentum, parameter, checkpoint)
                momenta[parameter] = momentum.to(parameter.device, parameter.dtype)
        fill(self.net, tensors, checkpoint)
        for parameter, momentum in momenta.items():
            self.optimizer.state[parameter]["momentum_buffer"] = momentum

    def _read_progress(self, progress: Any) -> None:
        """Take over how far a checkpoint is.

        Raises:
            ValueError: it is at no step of this training, or its epochs are not those up to there.
        """
        if not isinstance(progress, dict):
            raise ValueError(f"expected an object, got {described(progress)}")
        step = check_integer("step", progress.get("step"), 0, self.steps)
        history = progress.get("history")
        if not isinstance(history, list):
            raise ValueError(f"history: expected a list of epochs, got {described(history)}")
        epochs = [_epoch(number, epoch) for number, epoch in enumerate(history)]
        whole = step // self.steps_an_epoch
        # The test of the last one may be wanting.
        least = whole - 1 if whole and step % self.steps_an_epoch == 0 else whole
        check_integer("history, how many epochs", len(epochs), least, whole)
        self.loss_sum = check_number("loss_sum", progress.get("loss_sum"), 0)
        self.seconds = check_number("seconds", progress.get("seconds"), 0)
        self.step, self.history = step, epochs


def _epoch(number: int, facts: Any) -> Epoch:
    """One epoch of a checkpoint's history."""
    names = {field.name for field in fields(Epoch)}
    if not isinstance(facts, dict) or facts.keys() != names:
        raise ValueError(f"history: expected epochs of {', '.join(sorted(names))}, got {described(facts)}")
    return Epoch(
        check_integer("history, epoch", facts["epoch"], number, number),
        check_number("history, train_loss", facts["train_loss"], 0),
        check_number("history, test_accuracy", facts["test_accuracy"], 0, 1),
        check_number("history, seconds", facts["seconds"], 0),
    )
