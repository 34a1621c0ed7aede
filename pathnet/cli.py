"""The command ``pathnet``. Results go to stdout, progress and failures to stderr."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_type_hints

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

import pathnet
from pathnet import engines, models, native, results, training
from pathnet.experiments import path_gradients
from pathnet.experiments.path_gradients import PathGradients
from pathnet.experiments.run import title
from pathnet.experiments.summary import findings, summarise
from pathnet.figures import figure_6, table_6
from pathnet.progress import reporter
from pathnet.training import Recipe

__all__ = ["app", "main"]

CHECKOUT = Path(pathnet.__file__).resolve().parent.parent
DEMO_DEPTH, DEMO_WIDTH = 38, 8
DEMO_RECIPE = Recipe(epochs=25, batch_size=32, weight_decay=1e-3, warmup_steps=44)
DEMO_PLAN = PathGradients(batches=100)

Command = Callable[..., None]
DataFlag = Annotated[str, typer.Option(help="digits, synthetic, or a folder: CIFAR-10 or folders of classes.")]
RunFlag = Annotated[Path, typer.Option(help="The run's folder; an existing run goes on.")]
DeviceFlag = Annotated[str, typer.Option(help="cpu, cuda or auto: cuda where there is one, else cpu.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]


class _OneLineFailures(TyperGroup):
    """Bad input and interrupts end in one line on stderr; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            _fail(str(error), 1)
        except KeyboardInterrupt as interrupt:
            _fail(f"interrupted; {interrupt}" if interrupt.args else "interrupted", 130)


app = typer.Typer(cls=_OneLineFailures, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _fail(message: str, status: int) -> NoReturn:
    print(f"pathnet: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(status)


def main() -> None:
    """The entry point. A termination is an interrupt, so that it too leaves everything measured on disk."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.showwarning = _warn
    warnings.simplefilter("once", RuntimeWarning)
    app(prog_name="pathnet")


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"pathnet: warning: {message}", file=sys.stderr)


def _version(asked: bool) -> None:
    if asked:
        print(f"pathnet {pathnet.__version__}")
        raise typer.Exit


@app.callback()
def _pathnet(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Measures gradients along single paths of residual networks."""


def _settings(kind: type[Any]) -> Callable[[Command], Command]:
    """Gives a command one flag for each field of a dataclass, in place of its argument ``settings``.

    The dataclass is the only list of the flags: their help is its docstring's Attributes section.
    """
    section = (inspect.getdoc(kind) or "").partition("Attributes:")[2]
    entries = re.findall(r"^ +(\w+): (.+(?:\n {5,}.+)*)", section.replace("``", ""), re.M)
    helps = {name: " ".join(f"{text[0].upper()}{text[1:]}".split()) for name, text in entries}
    hints = get_type_hints(kind)

    def decorate(command: Command) -> Command:
        flags = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[hints[field.name], typer.Option(help=helps.get(field.name))],
            )
            for field in fields(kind)
        ]

        @functools.wraps(command)
        def with_flags(**given: Any) -> None:
            command(settings=kind(**{field.name: given.pop(field.name) for field in fields(kind)}), **given)

        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "settings"]
        with_flags.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        return with_flags

    return decorate


@app.command()
@_settings(Recipe)
def train(
    *,
    data: DataFlag,
    out: Annotated[Path, typer.Option(help="The safetensors file to write; its checkpoint lies beside it.")],
    model: Annotated[
        Literal["preact_resnet", "preact_resnet_imagenet", "vgg", "highway"], typer.Option(help="The network.")
    ] = "preact_resnet",
    depth: Annotated[
        int | None, typer.Option(help="Layers with weights: 6n + 2, bottleneck 9n + 2.", show_default="56")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Channels of the first stage.", show_default="the model's")
    ] = None,
    shortcut: Annotated[
        Literal["projection", "pad"] | None,
        typer.Option(help="The skip of blocks that change shape.", show_default="projection"),
    ] = None,
    block: Annotated[
        Literal["basic", "bottleneck"] | None, typer.Option(help="The kind of block.", show_default="basic")
    ] = None,
    survival: Annotated[
        float | None, typer.Option(help="Stochastic depth: the last module's.", show_default="1, none")
    ] = None,
    gate_bias: Annotated[
        float | None, typer.Option(help="Of a highway network's gates at first.", show_default="-1")
    ] = None,
    stages: Annotated[int | None, typer.Option(help="Of a VGG, between poolings.", show_default="4")] = None,
    device: DeviceFlag = "auto",
    as_json: Json = False,
    settings: Recipe,
) -> None:
    """Train a residual network, a VGG or a highway network; an interrupted training goes on from its checkpoint."""
    place = _device(device)
    images = pathnet.data.load(data)
    own: dict[str, Any] = {"depth": depth, "width": width, "shortcut": shortcut, "block": block}
    own |= {"survival": survival, "gate_bias": gate_bias, "stages": stages}
    given = {name: value for name, value in own.items() if value is not None}
    if model == "preact_resnet":
        given.setdefault("depth", 56)
    given["num_classes"] = len(images.classes)
    if model != "preact_resnet_imagenet":
        given["in_channels"] = images.image_shape[0]
    torch.manual_seed(settings.seed)
    net = models.build({"model": model, **given})
    history = _train(net.to(place), images, settings, out)
    if as_json:
        _print_json({"epochs": [asdict(epoch) for epoch in history]}, [out])
    else:
        _print_training(history, out)


@app.command()
@_settings(PathGradients)
def gradients(
    *,
    data: DataFlag,
    run: RunFlag,
    weights: Annotated[Path | None, typer.Option(help="The network.", show_default="the run's own weights")] = None,
    device: DeviceFlag = "auto",
    as_json: Json = False,
    settings: PathGradients,
) -> None:
    """Measure the gradient along single paths and draw Figure 6; an interrupted run goes on."""
    net = models.load(weights or results.weights_of(run)).to(_device(device))
    _show(_measure(net, pathnet.data.load(data), settings, run), as_json)


@app.command()
def figures(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: Json = False,
) -> None:
    """Draw the figures of a run again from what it measured."""
    _show(results.read(run), as_json)


@app.command()
def demo(run: RunFlag = Path("runs/demo"), device: DeviceFlag = "auto", as_json: Json = False) -> None:
    """Train a small network on digits, measure its path gradients, draw Figure 6: within three minutes."""
    place = _device(device)
    digits = pathnet.data.digits()
    torch.manual_seed(DEMO_RECIPE.seed)
    net = models.preact_resnet(DEMO_DEPTH, DEMO_WIDTH, len(digits.classes), in_channels=digits.image_shape[0])
    net, weights = net.to(place), results.weights_of(run)
    with _one_thread():
        history = _train(net, digits, DEMO_RECIPE, weights)
        if not as_json:
            _print_training(history, weights)
        measured = _measure(net, digits, DEMO_PLAN, run)
    _show(measured, as_json, test_accuracy=history[-1].test_accuracy)


@app.command()
def bench(
    small: Annotated[bool, typer.Option("--small", help="The rehearsal: seconds, no numbers of meaning.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the results go.", show_default="benchmarks/results/cpu")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the cpu engine beside plain PyTorch, everyone's results checked before: minutes, in a checkout only."""
    benchmarks = _benchmarks(CHECKOUT)
    sizes = benchmarks("cases").SMALL if small else benchmarks("cases").FULL
    with reporter("benchmarks") as progress:
        run = benchmarks("run").measure(sizes, out, progress)
    if as_json:
        _print_json(run.results, [run.file])
    else:
        benchmarks("report").show(run.results, _console())
        print(run.file)
    if run.wrong:
        raise ValueError(f"benchmarks: {run.wrong}")


def _benchmarks(checkout: Path) -> Callable[[str], Any]:
    """Imports the modules of the processor's benchmarks, which lie beside the package in a checkout."""
    if not (checkout / "benchmarks" / "cpu" / "run.py").exists():
        raise ValueError(f"bench: expected a checkout of pathnet, found no benchmarks in {checkout}")
    if not native.LOADED:
        raise ValueError(f"bench: the cpu engine is not built ({native.WHY_NOT})")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return lambda name: importlib.import_module(f"benchmarks.cpu.{name}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, built and usable here, and why other things are not."""
    facts: dict[str, Any] = {
        "pathnet": pathnet.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "native library": native.WHY_NOT or "built",
        **_build_facts(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
        **{f"engine {name}": reason or "usable" for name, reason in engines.available().items()},
    }
    if as_json:
        _print_json(facts, [])
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(name, fact if isinstance(fact, str) else ", ".join(fact))
    _print_table(table)


def _build_facts() -> dict[str, Any]:
    try:
        facts = native.build_facts() if native.LOADED else {}
    except RuntimeError as error:
        facts = {"build": str(error)}
    return {name.replace("_", " "): fact for name, fact in facts.items() if fact}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name not in usable:
        raise ValueError(f"device: expected auto, {', '.join(usable)}, got {name!r}")
    return torch.device(name)


def _train(net: models.ResidualNet, images: pathnet.data.Data, recipe: Recipe, out: Path) -> list[training.Epoch]:
    checkpoint = out.with_name(f"{out.stem}.checkpoint.safetensors")
    if out.exists() and not checkpoint.exists():
        raise ValueError(f"out: {out} exists, and has no checkpoint to go on from; expected a new file")
    with _keeping(f"the training is kept in {checkpoint}"), reporter("training") as progress:
        history = training.train(net, images, recipe, checkpoint, progress)
    models.save(net, out)
    return history


def _measure(net: models.ResidualNet, images: pathnet.data.Data, plan: PathGradients, folder: Path) -> results.Run:
    with _keeping(f"what was measured is kept in {folder}"), reporter("path gradients") as progress:
        return path_gradients.measure(net, images, plan, folder, progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For images of 64 pixels: on a busy machine, threads would wait for each other far longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _keeping(what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{what}; the same command goes on from there") from None


def _print_training(history: list[training.Epoch], out: Path) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("epoch", "training loss", "test accuracy", "seconds"):
        table.add_column(heading, justify="right")
    for epoch in history:
        row = epoch.epoch + 1, f"{epoch.train_loss:.4f}", f"{epoch.test_accuracy:.2%}", f"{epoch.seconds:.1f}"
        table.add_row(*map(str, row))
    _print_table(table)
    print(f"test accuracy {history[-1].test_accuracy:.2%}", out, sep="\n")


def _show(run: results.Run, as_json: bool, **more: Any) -> None:
    """Table, findings and figure of a run, and where they lie."""
    summary = summarise(run.measurements(), run.n)
    heading = title(run.identity)
    written = figure_6(summary, heading, run.figure_stem("figure-6"))
    if as_json:
        _print_json({**more, "run": str(run.folder), **summary.as_json()}, written)
        return
    _print_table(table_6(summary, heading))
    print(*findings(summary), run.folder, *written, sep="\n")


def _print_json(facts: dict[str, Any], written: list[Path]) -> None:
    print(json.dumps({**facts, "written": list(map(str, written))}, allow_nan=False))


def _print_table(table: Table) -> None:
    _console().print(table)


def _console() -> Console:
    # A pipe has no width, and rich would take 80 columns and cut.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)
