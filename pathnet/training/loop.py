"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pathnet.checks import check_callable, check_path
from pathnet.data import Data
from pathnet.data.fitting import check_fits
from pathnet.data.images import check_data_set
from pathnet.models.residual_net import ResidualNet, check_net
from pathnet.training.distributed import hold_checkpoint
from pathnet.training.engines import Engine
from pathnet.training.log import TrainingLog
from pathnet.training.position import Epoch
from pathnet.training.recipe import Recipe, check_recipe
from pathnet.training.state import TrainingState
from pathnet.writers import Writer, check_writer

__all__ = ["Progress", "train"]

CHECKPOINT_SECONDS = 120.0

Progress = Callable[[int, int, str], None]
"""Function that shows progress: called with (units done, units in total, a note)."""


def train(
    net: ResidualNet,
    data: Data,
    recipe: Recipe,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    callback: Callable[[int, ResidualNet], object] | None = None,
    engine: Engine = "auto",
    log: Writer | None = None,
) -> list[Epoch]:
    """Train ``net`` in place, on its device, and return the results of all epochs, resumed ones included.

    If ``checkpoint`` exists, training resumes from it and ends with the same weights, bit for bit, as training that
    was never interrupted (on the same machine, number of threads and engine). The file is replaced as a whole every
    two minutes, after every epoch, and on an interrupt. It is locked meanwhile, so only one training uses it.

    Residual blocks run through the fused kernels of `pathnet.nn.fuse` where the engine serves them, and as they are
    elsewhere. An engine changes rounding, not the mathematics, so it is no setting of the recipe. The checkpoint
    names the engines of its steps: ``auto`` goes on with the last of them, hence with the same bits; the name of
    another engine makes training go on by that one, with other rounding.

    If ``torch.distributed`` is initialised, its processes split each batch (DistributedDataParallel). All of them
    must get the same arguments and see the same file, which the first process writes. The blocks may be compiled
    beforehand (``for block in net: block.compile()``), and then run as compiled, not fused; compiling the network as
    a whole would make one program for each set of drawn modules. Three stages of blocks make five programs in
    training and ten in evaluation, more than the default of ``torch._dynamo.config.recompile_limit``: torch then
    warns, and runs some blocks uncompiled.

    Args:
        net: the network.
        data: the data set.
        recipe: the settings of the training.
        checkpoint: path of the file to keep the state in; None for no file.
        progress: called with (steps done, steps in total, a note) after every step.
        callback: called in every process with (steps done, ``net``) before the first step and after every step, such
            as `pathnet.EffectiveDepth`.
        engine: the engine of the fused kernels: ``cpu`` or ``triton``; ``none`` for PyTorch's operators; or ``auto``
            for the checkpoint's, or the one that serves the network's device.
        log: a writer such as TensorBoard's: anything with a method ``add_scalar``. It gets ``training/loss`` and
            ``training/learning rate`` every 10 steps, and ``epoch/training loss`` (the mean) and
            ``epoch/test accuracy`` at the last step of each epoch. With a checkpoint it gets them when the checkpoint
            holds their steps: so no step is logged twice, even if the training is killed and resumes. Only the first
            process logs, and a writer that fails costs a warning.

    Raises:
        ValueError: the checkpoint is of another model, data set or recipe, or some processes do not see it; network,
            data and recipe do not fit one another; the engine can run none of the blocks; another training uses the
            checkpoint; or the loss or a weight is not finite.
        OSError: the checkpoint cannot be written.

    Example:
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=8, width=8, num_classes=2, in_channels=1)
        >>> recipe = pathnet.training.Recipe(epochs=2, batch_size=32, warmup_steps=0)
        >>> history = pathnet.training.train(net, data, recipe, checkpoint="net.safetensors")
        >>> history
        [Epoch(epoch=0, ...
        >>> trained = pathnet.models.load("net.safetensors")
        >>> pathnet.models.fingerprint(trained) == pathnet.models.fingerprint(net)
        True
    """
    check_net(net)
    check_data_set("data", data)
    check_fits(net, data)
    check_recipe(recipe)
    for name, function in (("progress", progress), ("callback", callback)):
        if function is not None:
            check_callable(name, function)
    if log is not None:
        check_writer("log", log)
    path = check_path("checkpoint", checkpoint) if checkpoint is not None else None
    with hold_checkpoint(path, next(net.parameters()).device):
        state = TrainingState(net, data, recipe, path, engine)
        logged = TrainingLog(log if state.rank == 0 else None)
        net.train()
        saved = time.monotonic()
        try:
            if state.untested:
                state.test()
                logged.epoch(state.step, state.position.history[-1])
            if callback is not None:
                callback(state.step, net)
            while state.step < state.steps:
                loss = state.advance()
                logged.step(state.step, loss, recipe.rate(state.step - 1, state.steps))
                if state.untested:
                    state.test()
                    logged.epoch(state.step, state.position.history[-1])
                if callback is not None:
                    callback(state.step, net)
                if progress is not None:
                    note = f"epoch {state.epoch + 1}/{recipe.epochs} loss {loss:.3f} {state.last_accuracy()}"
                    progress(state.step, state.steps, note)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    state.save()
                    saved = time.monotonic()
                logged.release(state.kept)
        finally:
            state.save()
            logged.release(state.kept)
    net.eval()
    return state.position.history
