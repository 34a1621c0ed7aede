"""A user's script: the public API in the types that its documentation promises.

mypy (strict) and pyright check the ``assert_type`` lines, in a checkout and against an installed wheel; the tests run
the script, so what it asserts of shapes holds as well.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportUnknownMemberType=false

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

import pathnet
from pathnet.data import Batches, Data
from pathnet.effective_depth import Depth
from pathnet.lesion import Errors, Lesion, Ranking
from pathnet.models import Block, PreactBlock, ResidualNet
from pathnet.results import Run
from pathnet.training import Epoch, Progress, Recipe


class Scaled(nn.Module):
    """A residual block of somebody's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Perceptron(Block):
    """A block written for pathnet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def residual(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def paths(net: ResidualNet, images: Tensor, labels: Tensor) -> None:
    tape = pathnet.record(net, images, labels, bn="batch", engine="cpu", precision="float32", at="y0")
    assert_type(tape, pathnet.Tape)
    assert_type(tape.n, int)
    assert_type(tape.loss, float)
    assert_type(tape.output, Tensor)
    b = pathnet.paths.sample(tape.n, length=2, count=5, seed=1)
    assert_type(b, Tensor)
    assert_type(tape.path_gradient_norms(b, per_sample=True), Tensor)
    assert_type(tape.path_gradients(b), Tensor)
    scaled = tape.path_gradients(b, scaled=True)
    assert_type(scaled, pathnet.ScaledGradient)
    assert_type(scaled.mantissa, Tensor)
    mantissa, exponent = scaled
    assert mantissa.shape[:2] == (5, len(images)) and exponent.dtype == torch.int32
    assert_type(tape.routed_gradients(pathnet.paths.routing(b)), Tensor)
    assert_type(tape.gradient_by_length(), Tensor)
    assert_type(tape.gradient_by_length(scaled=True), pathnet.ScaledGradient)
    lengths = tape.compare_lengths()
    assert_type(lengths, pathnet.LengthSums)
    assert_type(lengths.explained, Tensor)
    judgement = pathnet.signed.judge(tape.squared_norms_by_length(3), lengths.norm**2)
    assert_type(judgement.trusted, NDArray[np.bool_])
    every = tape.path_gradients(pathnet.paths.enumerate_all(tape.n)).sum(0)
    torch.testing.assert_close(every, tape.gradient(), rtol=1e-3, atol=1e-6)


def recorders(net: ResidualNet, images: Tensor, labels: Tensor) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, label_smoothing=0.1)

    recorder = pathnet.Recorder(net, precision="float64", at=1, loss=loss)
    assert_type(recorder, pathnet.Recorder)
    assert_type(recorder(images, labels), pathnet.Tape)
    assert_type(recorder.engine_for(images), str)
    assert_type(recorder.routed_outputs(images, torch.ones(2, net.n, 2)), Tensor)
    assert_type(pathnet.engines.available(), dict[str, str | None])
    for block in net:
        assert_type(block, Block)
    assert_type(pathnet.routed(net, images, [[1, 1]] * net.n), Tensor)
    assert_type(pathnet.routed_gradient(net, images, labels, torch.ones(net.n, 2)), Tensor)
    first = net.blocks[0]
    assert isinstance(first, PreactBlock)
    assert_type(pathnet.nn.fused_residual(first, net.stem(images), c=0.5), Tensor)
    fused = pathnet.nn.fuse(net, engine="cpu")
    assert_type(fused, pathnet.nn.FusedNet)
    assert_type(fused.engines, tuple[str, ...])
    assert_type(fused.unfused, dict[int, str])


def other_models() -> None:
    model = nn.Sequential(nn.Linear(3, 8), Scaled(8), Scaled(8), nn.Linear(8, 2))
    adapted = pathnet.adapt(model, torch.randn(4, 3))
    assert_type(adapted, pathnet.AdaptedNet)
    assert_type(adapted.n, int)
    by_hand = ResidualNet(nn.Linear(3, 8), [Perceptron(8), Perceptron(8)], nn.Linear(8, 2))
    for net in (adapted, by_hand):
        tape = pathnet.record(net, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        assert tape.path_gradient_norms(pathnet.paths.one_of_each_length(net.n)).shape == (net.n,)


def lesions(net: ResidualNet, data: Data) -> None:
    deleted: ResidualNet = pathnet.lesion.delete(net, [1])
    assert_type(deleted.n, int)
    with pathnet.progress.reporter("lesions") as progress:
        assert_type(progress, Progress)
        errors = pathnet.lesion.errors(net, data, [Lesion(), Lesion((1,))], bn="running", progress=progress)
    assert_type(errors, Errors)
    assert_type(errors.rate, NDArray[np.float64])
    ranking = pathnet.lesion.rank(net, data)
    assert_type(ranking, Ranking)
    assert_type(ranking.order("taylor"), NDArray[np.int64])
    loader = [data.random_batch(8, seed=0, batch=batch) for batch in range(2)]
    assert_type(pathnet.training.evaluate(net, Batches(loader)), float)


def training(data: Data, folder: Path) -> None:
    config = pathnet.models.resnet(depth=8, width=4).config
    assert_type(config, dict[str, Any] | None)
    net = pathnet.models.build(config or {})
    assert_type(net, ResidualNet)
    callback = pathnet.EffectiveDepth(data.random_batch(8, seed=0, batch=0), folder / "depth.csv", every=1)
    recipe = Recipe(epochs=1, batch_size=16, warmup_steps=1)
    history = pathnet.training.train(net, data, recipe, folder / "checkpoint.safetensors", callback=callback)
    assert_type(history, list[Epoch])
    assert_type(history[-1].test_accuracy, float)
    assert_type(pathnet.effective_depth.read(folder / "depth.csv"), list[Depth])
    batches = [data.random_batch(4, seed=0, batch=batch) for batch in range(2)]
    run = pathnet.measure(net.eval(), batches, pathnet.experiments.PathGradients(batches=2), folder / "run")
    assert_type(run, Run)
    assert_type(pathnet.figures.figure_6(run), Figure)
    assert_type(pathnet.figures.figure_6({"length": [1, 2], "norm": [0.2, 0.1]}, "mine"), Figure)
    assert_type(pathnet.figures.figure_7({"blocks": 3, "deleted": 1}, path_stem=folder / "figure-7"), list[Path])
    pathnet.models.save(net, folder / "net.safetensors")
    assert_type(pathnet.models.load(folder / "net.safetensors"), ResidualNet)


def wrong_arguments(net: ResidualNet, images: Tensor) -> list[Any]:
    """Return calls that type checkers refuse, each of which would be an unused remark if they did not."""
    return [
        lambda: pathnet.record(net, images, bn="running statistics"),  # type: ignore[arg-type]
        lambda: pathnet.paths.sample(net.n, length="2", count=1),  # type: ignore[arg-type]
        lambda: pathnet.lesion.errors(net, images, [1]),  # type: ignore[list-item]
    ]


def main() -> None:
    torch.manual_seed(0)
    data = pathnet.data.synthetic(images=32, shape=(3, 8, 8))
    assert_type(data, Data)
    net = pathnet.models.preact_resnet(depth=8, width=4).eval()
    images, labels = data.random_batch(4, seed=0, batch=0)
    assert_type(images, Tensor)
    paths(net, images, labels)
    recorders(net, images, labels)
    other_models()
    lesions(net, data)
    with tempfile.TemporaryDirectory() as folder:
        training(data, Path(folder))
    for call in wrong_arguments(net, images):
        try:
            call()
        except (TypeError, ValueError) as error:
            print(error)


if __name__ == "__main__":
    main()
