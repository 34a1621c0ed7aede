"""The state of a training, which a checkpoint stores, and one step of it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pathnet.checks import described
from pathnet.data import Data
from pathnet.models.residual_net import ResidualNet
from pathnet.models.weights import check_stored, fill, fingerprint, odd_values, read_tensors, write_tensors
from pathnet.training.distributed import rank_and_processes
from pathnet.training.engines import Engine, block_engine, recorded_engines
from pathnet.training.evaluation import evaluate
from pathnet.training.position import Epoch, Position, read_position
from pathnet.training.recipe import Recipe
from pathnet.training.sampling import drawn_modules, steps_an_epoch, training_batch

__all__ = ["TrainingState", "recorded_start"]


def recorded_start(metadata: Mapping[str, Any], checkpoint: Path) -> str:
    """Return the hash of the network that a training began with; empty in checkpoints of earlier versions.

    Raises:
        ValueError: the checkpoint holds something else in its place.
    """
    start = metadata.get("start", "")
    if not isinstance(start, str):
        raise ValueError(f"checkpoint: {checkpoint}: start: expected a string, got {described(start)}")
    return start


def _difference(expected: Any, recorded: Any) -> str:
    """Return in words how two values of a checkpoint's identity differ; of two objects, only where they do."""
    if not (isinstance(expected, dict) and isinstance(recorded, dict)):
        return f"expected {expected}, got {recorded}"
    names = [name for name in expected | recorded if expected.get(name) != recorded.get(name)]
    return ", ".join(f"{name}: expected {expected.get(name)!r}, got {recorded.get(name)!r}" for name in names)


class TrainingState:
    """Weights, momentum, running statistics and position of a training."""

    def __init__(
        self, net: ResidualNet, data: Data, recipe: Recipe, checkpoint: Path | None, engine: Engine = "auto"
    ) -> None:
        self.net, self.data, self.recipe = net, data, recipe
        self.device = next(net.parameters()).device
        self.engine = block_engine(net, engine, checkpoint)
        self.engines: list[str] = []
        # Set before DistributedDataParallel wraps the network: gradients are exchanged in the layout of the weights.
        self.memory_format = self.engine.lay_out()
        self.rank, self.processes = rank_and_processes()
        self.checkpoint = checkpoint if self.rank == 0 else None
        if recipe.batch_size % self.processes:
            raise ValueError(
                f"recipe: expected a batch_size that {self.processes} processes can share, got {recipe.batch_size}"
            )
        draws = drawn_modules(net, recipe, 0) is not None
        self.steps_an_epoch = steps_an_epoch(data, recipe)
        self.steps = recipe.epochs * self.steps_an_epoch
        self.position = Position()
        self._kept = 0
        # False within a step, when some weights may be those of before it and others those of after it.
        self.consistent = True
        buffers: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in net.buffers():
            buffers[buffer.dtype].append(buffer)
        self.statistics = [(live, [buffer.clone() for buffer in live]) for live in buffers.values()]
        # The fused form would save a hundredth of a step. But it rounds differently, so checkpoints from before would
        # end with other bits; and it takes no parameters of which only some have a momentum yet.
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
        else:
            self.start = fingerprint(net)
        self.forward: nn.Module = self.engine.net
        if self.processes > 1:
            self._check_start()
            devices = [self.device] if self.device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(
                self.engine.net, device_ids=devices, find_unused_parameters=draws
            )

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.position.step

    @property
    def kept(self) -> int:
        """Number of steps that no resumed training repeats: those that the checkpoint holds, or all without one."""
        return self.step if self.checkpoint is None else self._kept

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0, of the last step taken."""
        return max(0, self.step - 1) // self.steps_an_epoch

    @property
    def untested(self) -> bool:
        """True between the last step of an epoch and its test."""
        ended, further = divmod(self.step, self.steps_an_epoch)
        history = self.position.history
        return further == 0 and ended > (history[-1].epoch + 1 if history else 0)

    def last_accuracy(self) -> str:
        """Return the accuracy of the last test for a progress note, or an empty string."""
        history = self.position.history
        return f"test accuracy {history[-1].test_accuracy:.4f}" if history else ""

    def advance(self) -> float:
        """Take one step and return its loss; an interrupted step changes nothing and can be taken again."""
        begun = time.monotonic()
        self.consistent = False
        for live, saved in self.statistics:
            torch._foreach_copy_(saved, live)
        try:
            loss = self._backward()
        except BaseException:
            for live, saved in self.statistics:
                torch._foreach_copy_(live, saved)
            self.consistent = True
            raise
        self.optimizer.step()
        self.position.step += 1
        if self.engines[-1:] != [self.engine.name]:
            self.engines.append(self.engine.name)
        self.position.loss_sum += loss
        self.position.seconds += time.monotonic() - begun
        self.consistent = True
        return loss

    def _backward(self) -> float:
        """Compute the gradients of the next step's loss, and return the loss."""
        size = self.recipe.batch_size // self.processes
        share = slice(self.rank * size, (self.rank + 1) * size)
        images, labels = training_batch(self.data, self.recipe, self.step, share)
        images, labels = images.to(self.device, memory_format=self.memory_format), labels.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
            output = self.forward(images, drawn_modules(self.net, self.recipe, self.step))
        loss = F.cross_entropy(output.float(), labels, label_smoothing=self.recipe.label_smoothing)
        mean_loss = loss.detach().clone()
        if self.processes > 1:
            # All processes stop if the loss is not finite in one of them.
            dist.all_reduce(mean_loss)
            mean_loss /= self.processes
        if not torch.isfinite(mean_loss):
            raise ValueError(f"recipe: the loss is {mean_loss.item()} at step {self.step}; try a lower learning_rate")
        loss.backward()  # type: ignore[no-untyped-call]
        if self.recipe.undrawn == "zero":
            for parameter in self.net.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return mean_loss.item()

    def test(self) -> None:
        """Test the network at the end of an epoch, and write the checkpoint."""
        self._share_statistics()
        accuracy = evaluate(self.engine.net, self.data)
        position = self.position
        position.history.append(
            Epoch(self.epoch, position.loss_sum / self.steps_an_epoch, accuracy, position.seconds)
        )
        position.loss_sum = position.seconds = 0.0
        self.save()

    def _check_start(self) -> None:
        """Raise ValueError unless all processes begin at the same step."""
        steps = torch.tensor([-self.step, self.step], device=self.device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        least, most = -int(steps[0]), int(steps[1])
        if least != most:
            raise ValueError(
                f"checkpoint: expected a file that all processes see, got some at step {least} and some at {most}"
            )

    def _share_statistics(self) -> None:
        """Give all processes the running statistics of the first, since each has updated them by its own images."""
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
        """Write the checkpoint, unless there is none or a step is half done.

        Raises:
            ValueError: a weight or a momentum is not finite; the checkpoint then stays as it was.
            OSError: the checkpoint cannot be written.
        """
        if self.checkpoint is None or not self.consistent:
            return
        tensors = {**self.net.state_dict(), **self._momenta()}
        consequence = "all steps taken are lost"
        if self.checkpoint.exists():
            consequence = f"{self.checkpoint} stays as it was before, and the same training resumes from it"
        for name, tensor in tensors.items():
            if problem := odd_values(name, tensor):
                problem = f"{name!r} at step {self.step}: {problem}"
                raise ValueError(f"recipe: {problem}; try a lower learning_rate; {consequence}")
        metadata = {
            **self.identity,
            "start": self.start,
            "engines": self.engines,
            "progress": asdict(self.position),
        }
        write_tensors(self.checkpoint, tensors, metadata, "checkpoint", consequence)
        self._kept = self.step

    def _resume(self, checkpoint: Path) -> None:
        """Take over the state that a checkpoint stores.

        Raises:
            ValueError: the checkpoint is of another training, or malformed.
        """
        tensors, metadata = read_tensors(checkpoint)
        # Files from before a setting existed were trained by its default.
        if isinstance(recipe := metadata.get("recipe"), dict):
            metadata["recipe"] = asdict(Recipe()) | recipe
        # Compare hashes of the file's version; the next checkpoint has one of the current version.
        identity = self.identity | {"data": self.data.fingerprint(like=metadata.get("data"))}
        for part, expected in identity.items():
            if metadata.get(part) != expected:
                raise ValueError(
                    f"checkpoint: {checkpoint} is of another {'model' if part == 'config' else part} "
                    f"({_difference(expected, metadata.get(part))}); give another file, or move that one away"
                )
        try:
            self.position = read_position(metadata.get("progress"), self.recipe.epochs, self.steps_an_epoch)
        except ValueError as error:
            raise ValueError(f"checkpoint: {checkpoint}: progress: {error}") from None
        momenta = {}
        for name, parameter in self.net.named_parameters():
            momentum = tensors.get(f"momentum/{name}")
            if momentum is not None:
                check_stored(f"momentum/{name}", momentum, parameter, checkpoint)
                momenta[parameter] = torch.empty_like(parameter).copy_(momentum)
        self.engines = [*recorded_engines(metadata, checkpoint)]
        self.start = recorded_start(metadata, checkpoint)
        fill(self.net, tensors, checkpoint)
        for parameter, momentum in momenta.items():
            self.optimizer.state[parameter]["momentum_buffer"] = momentum
