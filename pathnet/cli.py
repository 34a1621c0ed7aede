"""The command ``pathnet``. Results go to stdout, progress and failures to stderr."""

from __future__ import annotations

import gc
import importlib
import io
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import pathnet
from pathnet import EffectiveDepth, engines, interrupts, models, native, places, report, results, training
from pathnet import effective_depth as depths
from pathnet import study as studies
from pathnet.checks import check_number
from pathnet.experiments import EXPERIMENTS, Experiment, claims, path_gradients
from pathnet.experiments.comparison import compare
from pathnet.experiments.findings import findings_of
from pathnet.experiments.path_gradients import PathGradients
from pathnet.experiments.run import Claim, Networks, title
from pathnet.experiments.summary import findings
from pathnet.figures import draw, figure_depth, table_6, table_exact, table_signed
from pathnet.flags import Command, over_a_preset, settings_of
from pathnet.printable import printable
from pathnet.progress import reporter
from pathnet.study import Study
from pathnet.training import Recipe

__all__ = ["app", "main"]

BUILT_IN = ("digits", "synthetic")
CHECKOUT = Path(pathnet.__file__).resolve().parent.parent
DEMO_DEPTH, DEMO_WIDTH = 38, 8
DEMO_RECIPE = Recipe(epochs=25, batch_size=32, weight_decay=1e-3, warmup_steps=44)
DEMO_PLAN = PathGradients(batches=100)
SMALL_IMAGE = 256
DEPTH_IMAGES = 32
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""UsageError of Click, which newer Typers carry with them and older ones import."""


def _data_set(data: str) -> str:
    if data not in BUILT_IN:
        expected = f"{', '.join(BUILT_IN)} or an existing folder"
        places.check_existing_folder("data", Path(data), expected)
    return data


def _study_to_write(folder: Path | None) -> Path | None:
    if folder is not None:
        places.check_folder_to_write("folder", folder)
        places.check_utf_8("folder", folder)
    return folder


def _folder_to_write(param: typer.CallbackParam, folder: Path | None) -> Path | None:
    if folder is not None:
        places.check_folder_to_write(str(param.name), folder)
    return folder


def _weights_to_write(out: Path) -> Path:
    places.check_file_to_write("out", out)
    places.check_utf_8("out", out)
    return out


def _depths_to_write(out: Path | None) -> Path | None:
    if out is not None:
        check = places.check_file_to_write if out.suffix == ".csv" else places.check_folder_to_write
        check("effective_depth", out)
    return out


def _weights_to_read(file: Path | None) -> Path | None:
    if file is not None:
        places.check_file_to_read("weights", file, "a safetensors file of pathnet's")
    return file


def _run_to_draw(run: Path | None) -> Path | None:
    if run is not None:
        places.check_existing_folder("run", run, "the folder of a run")
        places.check_folder_to_write("run", run)
    return run


DataFlag = Annotated[
    str,
    typer.Option(help="digits, synthetic, or a folder: CIFAR-10 or folders of classes.", callback=_data_set),
]
SkipFlag = Annotated[
    bool,
    typer.Option("--skip-broken", help="Leave out images of a folder that cannot be read; runs keep their names."),
]
RunFlag = Annotated[Path, typer.Option(help="The run's folder; an existing run goes on.", callback=_folder_to_write)]
DeviceFlag = Annotated[str, typer.Option(help="cpu, cuda or auto: cuda where there is one, else cpu.")]
StudyFlag = Annotated[
    Path | None,
    typer.Option(
        help="The study's folder; what is in it goes on.", show_default="runs/PRESET", callback=_study_to_write
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]


class _OneLineFailures(TyperGroup):
    """Bad input and interrupts end in one line on stderr; anything else is a bug and keeps its traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except (ValueError, OSError) as error:
            _fail(str(error), 1)

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _printable_usage():
            return super().make_context(*args, **options)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        for before, word in zip(args, args[1:], strict=False):
            flag, equals, value = word.partition("=")
            flag = flag if equals and flag.startswith("--") else before
            if value == "" and (word == "" or flag != before):
                raise ValueError(f"{flag.removeprefix('--').replace('-', '_')}: expected a value, got ''")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with interrupts.raised(), _printable_usage():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            # As the interpreter ends it looks for garbage among all that torch holds, which takes seconds.
            gc.freeze()
            _fail(f"interrupted; {interrupt}" if interrupt.args else "interrupted", interrupts.STATUS)


@contextmanager
def _printable_usage() -> Iterator[None]:
    """Wrong usage is told with the words of the command line in it."""
    try:
        yield
    except USAGE_ERROR as error:
        raise USAGE_ERROR(printable(error.format_message(), kept="\n"), error.ctx) from None


app = typer.Typer(cls=_OneLineFailures, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _fail(message: str, status: int) -> NoReturn:
    _tell(f"pathnet: {' '.join(message.split())}")
    raise SystemExit(status)


def _tell(line: str) -> None:
    """Writes a line to stderr, where there is one."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


def main() -> None:
    """The entry point. A termination is an interrupt, so that it too leaves everything measured on disk."""
    interrupts.end_at_once()
    _prepare_streams()
    warnings.showwarning = _warn
    warnings.simplefilter("once", RuntimeWarning)
    app(prog_name="pathnet")


def _prepare_streams() -> None:
    """Makes every standard stream one that takes any text; a closed one swallows it.

    The number of a closed one would fall to the next file that is opened, and what is printed into that file.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    _tell(f"pathnet: warning: {' '.join(str(message).split())}")


def _version(asked: bool) -> None:
    if asked:
        _say(f"pathnet {pathnet.__version__}")
        raise typer.Exit


@app.callback()
def _pathnet(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Measures gradients along single paths of residual networks."""


@app.command()
@settings_of(Recipe)
def train(
    *,
    data: DataFlag,
    out: Annotated[
        Path,
        typer.Option(
            help="The safetensors file to write; its checkpoint lies beside it.", callback=_weights_to_write
        ),
    ],
    model: Annotated[
        Literal["preact_resnet", "preact_resnet_imagenet", "resnet", "vgg", "highway"],
        typer.Option(help="The network."),
    ] = "preact_resnet",
    skip_broken: SkipFlag = False,
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
    effective_depth: Annotated[
        Path | None,
        typer.Option(
            help="Measure the lengths of paths that the gradient comes by during training: into a file that ends in "
            ".csv, with a figure beside it, or into a folder for TensorBoard.",
            show_default="not measured",
            callback=_depths_to_write,
        ),
    ] = None,
    device: DeviceFlag = "auto",
    as_json: Json = False,
    settings: Recipe,
) -> None:
    """Train a residual network, a VGG or a highway network; an interrupted training goes on from its checkpoint.

    Started by torchrun, its processes share out each batch.
    """
    images = pathnet.data.load(data, skip_broken)
    own: dict[str, Any] = {"depth": depth, "width": width, "shortcut": shortcut, "block": block}
    own |= {"survival": survival, "gate_bias": gate_bias, "stages": stages}
    given = {name: value for name, value in own.items() if value is not None}
    if model in ("preact_resnet", "resnet"):
        given.setdefault("depth", 56)
    given["num_classes"] = len(images.classes)
    if model != "preact_resnet_imagenet":
        given["in_channels"] = images.image_shape[0]
    if gate_bias is not None:
        check_number("gate_bias", gate_bias)
    studies.check_size({"model": model, **given})
    torch.manual_seed(settings.seed)
    net = models.build({"model": model, **given})
    with _shared_out(_device(device)) as (place, first):
        history = _train(net.to(place), images, settings, out, first, effective_depth)
    if not first:
        return
    written = [out, *_drawn_depth(effective_depth, printable(out.stem))]
    if as_json:
        _print_json({"epochs": [asdict(epoch) for epoch in history]}, written)
    else:
        _print_training(history, *written)


@app.command()
@settings_of(PathGradients)
def gradients(
    *,
    data: DataFlag,
    run: RunFlag,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="The network; needed unless the run trained its own, as that of pathnet demo.",
            show_default="the run's own weights",
            callback=_weights_to_read,
        ),
    ] = None,
    skip_broken: SkipFlag = False,
    device: DeviceFlag = "auto",
    as_json: Json = False,
    settings: PathGradients,
) -> None:
    """Measure the gradient along single paths, or all of them, and draw Figure 6; an interrupted run goes on.

    What other methods measured by the same plan goes into the same folder, and into the same figure.
    """
    net = models.load(weights or _weights_of(run)).to(_device(device))
    _show(_measure(net, pathnet.data.load(data, skip_broken), settings, run), as_json)


@app.command()
@over_a_preset
def figures(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder, whose figures are drawn again.", callback=_run_to_draw)
    ] = None,
    *,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Train, measure and draw all of the paper, by a preset, and write report.html."),
    ] = False,
    folder: StudyFlag = None,
    device: DeviceFlag = "auto",
    as_json: Json = False,
    settings: tuple[str, Study],
) -> None:
    """Draw the figures of a run again from what it measured; with --all, do all of the paper."""
    if everything == (run is not None):
        raise typer.BadParameter("expected a run's folder, or --all, and not both")
    if run is not None:
        known = results.read(run)
        if as_json:
            _print_json(_came_to(known), draw(known))
        else:
            _print_run(known)
        return
    name, study = settings
    place = folder or Path("runs") / name
    runs: list[results.Run] = []
    with _study_on(study, place, device) as (images, networks):
        for experiment in EXPERIMENTS:
            runs += studies.measured(experiment, networks(experiment), images, study.plan, place, reporter, study)
    page = report.write(runs, f"All of the paper on {images.name}", place / "report.html")
    said = [claim for own in runs for claim in claims(own)]
    if as_json:
        _print_json({"claims": list(map(vars, said))}, [page])
    else:
        _print_claims(said)
        _say(f"{sum(claim.held for claim in said)} of {len(said)} claims held", place, page)


def _experiment_command(name: str, experiment: Experiment) -> Command:
    def command(
        *,
        weights: Annotated[
            list[str] | None,
            typer.Option(
                help="Networks to take in place of the preset's, as FILE or KIND=FILE; may be given several times.",
                show_default="trained by the preset",
            ),
        ] = None,
        folder: StudyFlag = None,
        device: DeviceFlag = "auto",
        as_json: Json = False,
        settings: tuple[str, Study],
    ) -> None:
        preset, study = settings
        place = folder or Path("runs") / preset
        with _study_on(study, place, device) as (images, networks):
            given = _given_networks(weights or [], experiment, _device(device))
            nets, by = (given, None) if given else (networks(name), study)
            runs = studies.measured(name, nets, images, study.plan, place, reporter, by)
        if as_json:
            _print_json({"runs": list(map(_came_to, runs))}, [file for run in runs for file in draw(run)])
            return
        for run in runs:
            _print_run(run)

    command.__doc__ = f"{experiment.about} ({experiment.paper})"
    return command


for _name, _experiment in EXPERIMENTS.items():
    app.command(_name, rich_help_panel="Experiments of the paper")(
        over_a_preset(_experiment_command(_name, _experiment))
    )


@contextmanager
def _study_on(
    study: Study, place: Path, device: str
) -> Iterator[tuple[pathnet.data.Data, Callable[[str], Networks]]]:
    """The data of a study, and what trains the networks of an experiment."""
    data, on, known = _data_set(study.data), _device(device), dict[str, Any]()
    images = pathnet.data.load(data, study.skip_broken)

    def networks(experiment: str) -> Networks:
        wanted = EXPERIMENTS[experiment].networks
        known.update(studies.trained(study, images, [k for k in wanted if k not in known], place, on, reporter))
        return {kind: known[kind] for kind in wanted}

    small = images.image_shape[1] * images.image_shape[2] <= SMALL_IMAGE
    with _keeping(f"what was trained and measured is kept in {place}"), _one_thread(small):
        yield images, networks


def _given_networks(weights: Sequence[str], experiment: Experiment, device: torch.device) -> Networks:
    """By kind, those of the files given."""
    found: dict[str, list[models.ResidualNet]] = {}
    for text in weights:
        named = "=" in text and not os.path.lexists(text)
        kind, _, file = text.partition("=") if named else ("", "", text)
        _weights_to_read(Path(file))
        net = models.load(file).to(device)
        kind = kind or studies.kind_of(net)
        if kind not in experiment.networks:
            among = f"networks among {', '.join(experiment.networks)}" if experiment.networks else "no networks"
            raise ValueError(f"weights: expected {among}, got {kind} in {text}")
        found.setdefault(kind, []).append(net)
    return found


@app.command()
def demo(run: RunFlag = Path("runs/demo"), device: DeviceFlag = "auto", as_json: Json = False) -> None:
    """Train a small network on digits, measure its path gradients, draw Figure 6: within three minutes."""
    places.check_utf_8("run", run)
    place = _device(device)
    digits = pathnet.data.digits()
    torch.manual_seed(DEMO_RECIPE.seed)
    net = models.preact_resnet(DEMO_DEPTH, DEMO_WIDTH, len(digits.classes), in_channels=digits.image_shape[0])
    net, weights = net.to(place), results.weights_of(run)
    with _one_thread(True):
        history = _train(net, digits, DEMO_RECIPE, weights)
        if not as_json:
            _print_training(history, weights)
        measured = _measure(net, digits, DEMO_PLAN, run)
    _show(measured, as_json, test_accuracy=history[-1].test_accuracy)


@app.command()
def bench(
    small: Annotated[bool, typer.Option("--small", help="The rehearsal: seconds, no numbers of meaning.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the results go.", show_default="benchmarks/results/cpu", callback=_folder_to_write),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="That it may take; what is cut for it stands in the results.")
    ] = 15.0,
    as_json: Json = False,
) -> None:
    """Time the cpu engine beside plain PyTorch, everyone's results checked before: in a checkout only."""
    check_number("minutes", minutes, above=0)
    benchmarks = _benchmarks(CHECKOUT)
    budget = benchmarks("budget").Budget(60 * minutes)
    sizes = benchmarks("cases").SMALL if small else benchmarks("cases").FULL
    with reporter("benchmarks") as progress:
        run = benchmarks("run").measure(sizes, out, progress, budget=budget)
    if as_json:
        _print_json(run.results, [run.file])
    else:
        with _stdout():
            benchmarks("report").show(run.results, _console())
        _say(run.file)
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
        table.add_row(name, escape(fact if isinstance(fact, str) else ", ".join(fact)))
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


@contextmanager
def _shared_out(place: torch.device) -> Iterator[tuple[torch.device, bool]]:
    """This process's device, and whether it is the first of those that torchrun started, or the only one."""
    if not dist.is_torchelastic_launched():
        yield place, True
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield place, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _train(
    net: models.ResidualNet,
    images: pathnet.data.Data,
    recipe: Recipe,
    out: Path,
    first: bool = True,
    depth: Path | None = None,
) -> list[training.Epoch]:
    """The training, which ends with the weights in ``out``; the first of several processes tells and writes."""
    checkpoint = out.with_name(f"{out.stem}.checkpoint.safetensors")
    places.check_file_to_write("out", checkpoint)
    if depth is not None and depth.resolve() in (out.resolve(), checkpoint.resolve()):
        raise ValueError(f"effective_depth: expected a file of its own, got {depth}, which --out writes")
    if out.exists() and not checkpoint.exists():
        raise ValueError(f"out: {out} exists, and has no checkpoint to go on from; expected a new file")
    if depth is not None and depth.exists() and not checkpoint.exists():
        raise ValueError(f"effective_depth: {depth} exists, and the training begins; expected a new file")
    callback = None
    if depth is not None:
        few = images.random_batch(min(DEPTH_IMAGES, len(images.train)), recipe.seed, 0)
        try:
            callback = EffectiveDepth(few, depth)
        except ValueError as error:
            raise ValueError(f"effective_depth: {str(error).removeprefix('out: ')}") from None
    with _keeping(f"the training is kept in {checkpoint}"), reporter("training") as progress:
        history = training.train(net, images, recipe, checkpoint, progress if first else None, callback)
    if first:
        models.save(net, out)
    return history


def _measure(net: models.ResidualNet, images: pathnet.data.Data, plan: PathGradients, folder: Path) -> results.Run:
    with _keeping(f"what was measured is kept in {folder}"), reporter("path gradients") as progress:
        return path_gradients.measure(net, images, plan, folder, progress)


@contextmanager
def _one_thread(small: bool) -> Iterator[None]:
    """For small images: on a busy machine, threads would wait for each other far longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
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


def _weights_of(run: Path) -> Path:
    """The weights of a run that trained its own network."""
    weights = results.weights_of(run)
    if not weights.exists():
        raise ValueError(f"weights: expected --weights FILE, since {run} holds no weights of its own, got none")
    return weights


def _drawn_depth(file: Path | None, name: str) -> list[Path]:
    """The file of the effective depths and its figure; nothing where none was asked for."""
    if file is None or file.suffix != ".csv":
        return [] if file is None else [file]
    rows = depths.read(file)
    known = any(math.isfinite(row.depth) for row in rows)
    return [file, *(figure_depth(rows, name, file.with_suffix("")) if known else [])]


def _print_training(history: list[training.Epoch], *written: Path) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("epoch", "training loss", "test accuracy", "seconds"):
        table.add_column(heading, justify="right")
    for epoch in history:
        row = epoch.epoch + 1, f"{epoch.train_loss:.4f}", f"{epoch.test_accuracy:.2%}", f"{epoch.seconds:.1f}"
        table.add_row(*map(str, row))
    _print_table(table)
    _say(f"test accuracy {history[-1].test_accuracy:.2%}", *written)


def _show(run: results.Run, as_json: bool, **more: Any) -> None:
    """Table, findings and figure of path gradients, and where they lie."""
    if as_json:
        _print_json({**more, **_came_to(run)}, draw(run))
    else:
        _print_gradients(run)
        _say(run.folder, *draw(run))


def _print_run(run: results.Run) -> None:
    """What a run of any experiment came to, and its figures."""
    written = draw(run)
    if run.experiment == path_gradients.NAME:
        _print_gradients(run)
    else:
        _say(title(run.identity))
    _print_claims(claims(run))
    _say(run.folder, *written)


def _came_to(run: results.Run) -> dict[str, Any]:
    summary = compare(run).as_json() if run.experiment == path_gradients.NAME else {}
    return {"run": str(run.folder), "claims": list(map(vars, claims(run))), **summary}


def _print_gradients(run: results.Run) -> None:
    result, heading = compare(run), title(run.identity)
    if result.sampled is not None:
        _print_table(table_6(result.sampled, heading))
        _say(*findings(result.sampled))
    if result.exact is not None:
        _print_table(table_exact(result, result.exact, f"{heading}: exact"))
    if result.signed is not None:
        _print_table(table_signed(result, result.signed, f"{heading}: signed"))
    for line in findings_of(result):
        _say(line)


def _print_claims(said: Sequence[Claim]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for heading in ("the paper", "measured here", ""):
        table.add_column(heading)
    for claim in said:
        verdict = "held" if claim.held else "did not hold"
        measured = f"{claim.measured}\n(holds where {claim.bound})"
        table.add_row(*map(escape, (f"{claim.paper} ({claim.where})", measured, verdict)))
    _print_table(table)


def _print_json(facts: dict[str, Any], written: list[Path]) -> None:
    _write(json.dumps(_encodable({**facts, "written": list(map(str, written))}), allow_nan=False) + "\n")


def _encodable(value: Any) -> Any:
    """The value, names that are not UTF-8 in it with escapes, as JSON has no string for them."""
    if isinstance(value, dict):
        return {_encodable(key): _encodable(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_encodable, value))
    if isinstance(value, str):
        return "".join(printable(one) if "\ud800" <= one <= "\udfff" else one for one in value)
    return value


def _print_table(table: Table) -> None:
    with _stdout():
        _console().print(table)
        sys.stdout.flush()


def _say(*lines: object) -> None:
    _write("".join(f"{printable(line)}\n" for line in lines))


def _write(text: str) -> None:
    with _stdout():
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def _stdout() -> Iterator[None]:
    """Results are written, at once.

    Raises:
        ValueError: it takes no more, as a full disk.
    """
    try:
        yield
    except OSError as error:
        # What is left in the buffer would fail once more as the interpreter ends, in words of its own.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None  # whoever reads has enough
        raise ValueError(f"stdout: expected to write the results to it, got: {error.strerror}") from None


class _Console(Console):
    """Text as it is, but for what a terminal would obey."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, kept="\n"), **options)


def _console() -> Console:
    # A pipe has no width, and rich would take 80 columns and cut.
    return _Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)
