"""Every public function and constructor, one argument at a time of a wrong kind or range: it returns, or refuses the
argument by its name.

``PATHNET_FUZZ=5000`` runs another, independent round of so many calls, seeded by ``PATHNET_FUZZ_SEED``; ``-s`` shows
what they came to.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import random
import re
import resource
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import shaken
from helpers.wrong_values import CHANGES, TENSORS, VALUES, wrong
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import pathnet
from pathnet import (
    data,
    effective_depth,
    engines,
    lesion,
    models,
    nn,
    paper,
    paths,
    report,
    results,
    signed,
    study,
    training,
)
from pathnet.experiments import path_gradients
from pathnet.experiments.plans import Plan
from pathnet.experiments.run import Networks
from pathnet.lesion import Lesion
from pathnet.lesion.networks import block_shapes
from pathnet.models import ResidualNet
from pathnet.training.sampling import drawn_modules, training_batch

# What PyTorch says of the tensors that are wrong on purpose.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begin}:UserWarning")
    for begin in ("The PyTorch API of nested tensors", "Sparse CSR tensor support", "torch.quantize_per_tensor")
]

EXAMPLES = 2000
SECONDS = 20
GIGABYTES = 1.0

SUBMODULES = (data, effective_depth, engines, lesion, models, nn, paths, training, signed)
METHODS = {
    pathnet.Recorder: ("__call__", "routed_outputs", "engine_for"),
    pathnet.Tape: (
        *("path_gradient_norms", "path_gradients", "routed_gradients", "gradient_by_length"),
        "squared_norms_by_length",
    ),
    pathnet.EffectiveDepth: ("__call__",),
    training.Recipe: ("rate",),
    lesion.Ranking: ("order", "agreement"),
    data.InMemory: ("take",),
    data.OnDisk: ("take",),
}
RESULTS = {
    *(pathnet.AdaptedNet, pathnet.LengthSums, pathnet.Tape, effective_depth.Depth, lesion.Errors, lesion.Ranking),
    *(training.Epoch, signed.Judgement, models.FusedForm, models.PostActivationForm, models.Unit, models.Block),
    *(data.Images, engines.Engine),
}
"""What the library itself makes, or what is only an interface: nobody calls their constructors with values."""


@cache
def _net() -> ResidualNet:
    torch.manual_seed(0)
    return shaken(models.preact_resnet(8, 2, num_classes=4)).eval()


@cache
def _gated() -> ResidualNet:
    torch.manual_seed(0)
    return shaken(models.highway(8, 2, num_classes=4)).eval()


@cache
def _data() -> data.Data:
    return data.synthetic(16, 4, (3, 4, 4))


def _images() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def _labels() -> Tensor:
    return torch.tensor([0, 3])


def _routing() -> Tensor:
    return torch.tensor([[1.0, 1.0], [0.5, 2.0], [1.0, 0.0]])


def _paths() -> Tensor:
    return torch.tensor([[1, 0, 1], [0, 1, 1]])


@cache
def _saved() -> Path:
    path = Path("saved.safetensors").absolute()
    models.save(_net(), path)
    return path


@cache
def _depths() -> Path:
    path = Path("depths.csv").absolute()
    callback = pathnet.EffectiveDepth((_images(), _labels()), path, _net(), every=1, share=math.inf)
    callback(0)
    return path


def _recorder(engine: str) -> pathnet.Recorder:
    return pathnet.Recorder(_net(), engine=engine)


@cache
def _tape(engine: str, at: str = "y0") -> pathnet.Tape:
    return pathnet.record(_net(), _images(), _labels(), engine=engine, at=at)  # type: ignore[arg-type]


@cache
def _folder() -> Path:
    """Images in the layout of ImageNet."""
    folder = Path("classes").absolute()
    for split in ("train", "test"):
        (folder / split / "some").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / split / "some" / "image.png")
    return folder


@cache
def _run() -> results.Run:
    plan = path_gradients.PathGradients(batches=1, batch_size=2, engine="reference")
    return path_gradients.measure(_net(), _data(), plan, "run")


def _written(
    folder: str | Path, identity: Mapping[str, Any], asked: Mapping[str, int], attempt: Mapping[str, Any]
) -> results.Run:
    with results.writing(folder, identity, asked, attempt) as run:
        return run


def _nets() -> Networks:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(14, 2, num_classes=4)).eval()
    return {"residual": [net], "stochastic depth": [net], "effective": [net]}


@contextmanager
def _reporter(_: str) -> Iterator[training.Progress]:
    yield lambda *_: None


def _image_files() -> list[Path]:
    return [_folder() / "train" / "some" / "image.png"]


@dataclass(frozen=True)
class Call:
    """A public callable, and how it is called as it is meant to be.

    Attributes:
        function: what is called.
        valid: for every parameter, what makes a right value.
        parts: what an error may name in place of a parameter: a field or a part of it.
    """

    function: Callable[..., Any]
    valid: Mapping[str, Callable[[], Any]]
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def _of(function: Callable[..., Any], parts: Mapping[str, Sequence[str]] | None = None, **valid: Any) -> Call:
    """With the defaults for all that is not given. A value that is a lambda of nothing makes one."""
    made = {name: value if _is_maker(value) else (lambda value=value: value) for name, value in valid.items()}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in made and parameter.default is not parameter.empty:
            made[name] = lambda value=parameter.default: value
    return Call(function, made, parts or {})


def _is_maker(value: Any) -> bool:
    return inspect.isfunction(getattr(value, "__wrapped__", value)) and not inspect.signature(value).parameters


BLOCK = {"kernels": (3, 3), "widths": (4, 4), "stride": 2, "shortcut": "pad"}
SIZES = {"kernels": ("widths",)}


def _job() -> engines.Job:
    return engines.Job(_net(), "running", "float32", (2, 4, 4), torch.device("cpu"))


@cache
def calls() -> dict[str, Call]:
    net, pair = _net, lambda: (_images(), _labels())
    fresh = {"net": lambda: copy.deepcopy(_net())}
    out = lambda: "out.safetensors"  # noqa: E731
    recipe = lambda: training.Recipe(epochs=1, batch_size=8)  # noqa: E731
    one, two = (1.0, 3.0, 3.0, 1.0), (2.0, 3.0, 4.0, 1.0)
    named = {
        "adapt": _of(
            pathnet.adapt,
            {"blocks": ("stem",)},
            model=lambda: torch.nn.Sequential(*_parts_of(_net())),
            example=_images,
        ),
        "record": _of(pathnet.record, {"images": ("target",)}, net=net, images=_images, target=_labels),
        "routed": _of(pathnet.routed, net=net, x=_images, routing=_routing, backward=_routing),
        "routed_gradient": _of(
            pathnet.routed_gradient, {"x": ("target",)}, net=net, x=_images, target=_labels, backward=_routing
        ),
        "Recorder": _of(pathnet.Recorder, net=net),
        "EffectiveDepth": _of(
            pathnet.EffectiveDepth, {"batch": ("images", "target")}, batch=pair, out=lambda: "depth.csv", net=net
        ),
        "EffectiveDepth.__call__": _of(
            pathnet.EffectiveDepth(pair(), _Writer(), every=1, share=math.inf).__call__, step=1, net=net
        ),
        "effective_depth.read": _of(effective_depth.read, {"path": ("out",)}, path=_depths),
        "Recipe": _of(training.Recipe),
        "Recipe.rate": _of(training.Recipe().rate, step=1, steps=10),
        "evaluate": _of(training.evaluate, net=net, data=_data),
        "train": _of(
            training.train, {"checkpoint": ("weights",)}, **fresh, data=_data, recipe=recipe, checkpoint=None
        ),
        "drawn_modules": _of(drawn_modules, net=net, recipe=lambda: training.Recipe(modules=2), step=0),
        "training_batch": _of(training_batch, data=_data, recipe=recipe, step=0),
        "delete": _of(lesion.delete, net=net, blocks=[1]),
        "reorder": _of(lesion.reorder, net=net, order=[0, 2, 1]),
        "Lesion": _of(Lesion, deleted=(1,), order=(0, 2, 1)),
        "errors": _of(
            lesion.errors,
            {"lesions": ("deleted", "order", "scale"), "progress": ()},
            net=net,
            data=_data,
            lesions=lambda: [Lesion(), Lesion((0,))],
        ),
        "rank": _of(lesion.rank, net=net, data=_data),
        "rank batches": _of(lesion.rank, {"data": ("target",)}, net=net, data=lambda: [pair()]),
        "recalibrated": _of(lesion.recalibrated, net=net, data=_data, batches=1),
        "block_shapes": _of(block_shapes, net=net, images=_images),
        "Ranking.order": _of(_ranking().order),
        "Ranking.agreement": _of(_ranking().agreement),
        "fused_residual": _of(nn.fused_residual, block=lambda: next(iter(_net())), x=lambda: torch.ones(2, 2, 4, 4)),
        "available": _of(engines.available),
        "Job": _of(
            engines.Job,
            net=net,
            bn="running",
            precision="float32",
            y0_shape=(2, 4, 4),
            device=lambda: torch.device("cpu"),
        ),
        "choose": _of(engines.choose, name="auto", job=_job),
        "refusals": _of(engines.refusals, job=_job),
        "preact_resnet": _of(models.preact_resnet, depth=8, width=2),
        "preact_resnet_imagenet": _of(models.preact_resnet_imagenet, depth=50, width=1),
        "resnet": _of(models.resnet, depth=8, width=2),
        "highway": _of(models.highway, depth=8, width=2),
        "vgg": _of(models.vgg, {"stages": ("depth",)}, depth=7, width=2),
        "ResidualNet": _of(
            ResidualNet, stem=lambda: _net().stem, blocks=lambda: list(_net()), head=lambda: _net().head
        ),
        "PreactBlock": _of(models.PreactBlock, SIZES, in_channels=2, **BLOCK),
        "PostactBlock": _of(models.PostactBlock, SIZES, in_channels=2, **BLOCK),
        "HighwayBlock": _of(models.HighwayBlock, in_channels=2, out_channels=4, stride=2, shortcut="pad"),
        "VggLayer": _of(models.VggLayer, channels=2, pool=True),
        "build": _of(models.build, {"config": ()}, config=lambda: dict(_net().config or {})),
        "fingerprint": _of(models.fingerprint, net=net),
        "save": _of(models.save, {"path": ("weights",)}, net=net, path=out),
        "load": _of(models.load, {"path": ("weights",)}, path=_saved),
        "sample": _of(paths.sample, {"n": ("length",)}, n=4, length=2, count=3),
        "one_of_each_length": _of(paths.one_of_each_length, n=4),
        "enumerate_all": _of(paths.enumerate_all, n=4),
        "routing": _of(paths.routing, paths=_paths),
        "signs": _of(paths.signs, n=4, count=3),
        "length_distribution": _of(paths.length_distribution, n=4),
        "remaining_fraction": _of(paths.remaining_fraction, {"n": ("deleted",)}, n=4, deleted=2),
        "judge": _of(
            signed.judge,
            {"squared_norms": ("sums", "batch")},
            squared_norms=lambda: torch.tensor([one, two]),
            sums=lambda: torch.tensor(one),
            batch=lambda: np.array([0, 1]),
        ),
        "aligned_variances": _of(signed.aligned_variances, n=4),
        "tail_index": _of(signed.tail_index, values=lambda: np.arange(40.0)),
        "Plan": _of(Plan),
        "PathGradients": _of(path_gradients.PathGradients),
        "Study": _of(study.Study, data="digits", recipe=recipe, plan=lambda: Plan()),
        "data.load": _of(data.load, {"name": ("data",)}, name="digits"),
        "digits": _of(data.digits),
        "synthetic": _of(data.synthetic, {"shape": ("images",)}, images=8, classes=2, shape=(1, 4, 4)),
        "cifar10": _of(data.cifar10, dict.fromkeys(("folder", "skip_broken"), ("data",)), folder="no/such/folder"),
        "class_folders": _of(data.class_folders, {"folder": ("data",)}, folder=_folder),
        "InMemory": _of(
            data.InMemory,
            {"images": ("labels",)},
            images=lambda: torch.ones(4, 3, 4, 4, dtype=torch.uint8),
            labels=lambda: torch.arange(4),
        ),
        "InMemory.take": _of(_data().train.take, indices=lambda: torch.tensor([1, 0])),
        "OnDisk": _of(
            data.OnDisk, {"files": ("labels",)}, files=_image_files, labels=lambda: torch.tensor([0]), side=4
        ),
        "OnDisk.take": _of(data.OnDisk(_image_files(), torch.tensor([0]), 4).take, indices=lambda: torch.tensor([0])),
        "Data": _of(
            data.Data, name="some", train=lambda: _data().train, test=lambda: _data().test, classes=tuple("abcd")
        ),
    }
    plan = Plan(draws=1, deletions=1, swaps=1, batches=1, exact_batches=0, modules=1, gate_batches=1)
    for name, experiment in paper.EXPERIMENTS.items():
        nets = (lambda: {"highway": [_gated()]}) if name == "highway" else _nets
        named[f"{name} measure"] = _of(
            experiment.load().measure,
            {"nets": ("networks", "net", "run"), "folder": ("run",)},
            nets=nets,
            data=_data,
            plan=plan,
            folder=f"measured {name}",
            progress=None,
        )
    tiny = study.Study(data="synthetic", depth=8, width=2, recipe=recipe(), plan=plan)
    named |= {
        "path_gradients.measure": _of(
            path_gradients.measure,
            {"folder": ("run",)},
            net=net,
            data=_data,
            plan=path_gradients.PathGradients(batches=1, batch_size=2, engine="reference"),
            folder="run",
        ),
        "results.read": _of(results.read, {"folder": ("run",)}, folder=lambda: _run().folder),
        "results.writing": _of(
            _written,
            {"folder": ("run",)},
            folder="written",
            identity={"experiment": "some"},
            asked={"batches": 2},
            attempt={"started": "now"},
        ),
        "claims": _of(paper.claims, run=_run),
        "draw": _of(paper.draw, run=_run),
        "report.write": _of(report.write, {"runs": ("run",)}, runs=lambda: [_run()], heading="all", file="all.html"),
        "study.trained": _of(
            study.trained,
            {"folder": ("checkpoint",)},
            study=tiny,
            data=_data,
            kinds=lambda: ["residual"],
            folder="study",
            device=torch.device("cpu"),
            reporter=lambda: _reporter,
        ),
        "study.measured": _of(
            study.measured,
            {"nets": ("networks", "net", "run"), "folder": ("run",)},
            name="lesion-single",
            nets=lambda: {"residual": [_net()]},
            data=_data,
            plan=plan,
            folder="study",
            reporter=lambda: _reporter,
        ),
    }
    for engine in ("reference", "cpu"):
        if engines.available()[engine] is not None:
            continue
        recorder, tape = _recorder(engine), _tape(engine)
        named |= {
            f"{engine} Recorder.__call__": _of(
                recorder.__call__, {"images": ("target",)}, images=_images, target=_labels
            ),
            f"{engine} Recorder.routed_outputs": _of(
                recorder.routed_outputs, images=_images, routing=lambda: _routing()[None]
            ),
            f"{engine} Recorder.engine_for": _of(recorder.engine_for, images=_images),
            f"{engine} Tape.path_gradient_norms": _of(tape.path_gradient_norms, b=_paths),
            f"{engine} Tape.path_gradients": _of(tape.path_gradients, b=_paths),
            f"{engine} Tape.routed_gradients": _of(tape.routed_gradients, routing=lambda: _routing()[None]),
            f"{engine} Tape.gradient_by_length": _of(tape.gradient_by_length),
            f"{engine} Tape.squared_norms_by_length": _of(tape.squared_norms_by_length, draws=2),
        }
    for at in ("image", "stem_weight"):
        named[f"{at} Tape.path_gradient_norms"] = _of(_tape("reference", at).path_gradient_norms, b=_paths)
    return named


def _parts_of(net: ResidualNet) -> list[torch.nn.Module]:
    return [net.stem, *net, net.head]


class _Writer:
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        pass

    def flush(self) -> None:
        pass


@cache
def _ranking() -> lesion.Ranking:
    return lesion.rank(_net(), [(_images(), _labels())])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are taken for those of files end up nowhere."""
    monkeypatch.chdir(tmp_path_factory.mktemp("fuzz"))
    for each in (_saved, _depths, _folder, _run):
        each.cache_clear()
        each()


def test_every_public_callable_is_fuzzed_in_all_its_parameters() -> None:
    public = {
        value
        for module in (pathnet, *SUBMODULES)
        for value in (getattr(module, name) for name in module.__all__ if not name.startswith("check_"))
        if callable(value) and not isinstance(value, type(os)) and value not in RESULTS
    }
    public |= {Plan, path_gradients.PathGradients, study.Study}
    covered = {getattr(call.function, "__func__", call.function) for call in calls().values()}
    methods = {getattr(owner, name) for owner, names in METHODS.items() for name in names}
    typing_forms = {value for value in public if getattr(value, "__origin__", None) is not None}
    aliases = {lesion.BatchNormPolicy}
    assert public - covered - typing_forms - aliases == set()
    assert methods - covered == set()
    for name, call in calls().items():
        parameters = inspect.signature(call.function).parameters
        assert set(parameters) == set(call.valid), name


def test_calls_as_they_are_meant_to_be_return() -> None:
    for name, call in calls().items():
        if name == "cifar10":  # its files are large
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.function(**{key: make() for key, make in call.valid.items()})


class Hung(BaseException):
    """Nothing of the library catches it."""


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hung(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(name: str, argument: str, value_name: str) -> str | None:
    """Return one of `FINE`, or what went wrong; None where there is no such wrong value of the argument."""
    call = calls()[name]
    arguments = {key: make() for key, make in call.valid.items()}
    try:
        value = arguments[argument] = wrong(value_name, arguments[argument])
    except (KeyError, RuntimeError, TypeError, IndexError):
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings(), _in_time():
            warnings.simplefilter("ignore")
            result = call.function(**arguments)
    except (ValueError, TypeError) as error:
        names = (argument, *call.parts.get(argument, ()))
        if any(re.match(rf"{re.escape(each)}\b", str(error)) for each in names):
            return "refused"
        if callable(value) and argument in FUNCTIONS:
            return "the caller's own error"
        return f"{type(error).__name__} that does not begin with {argument}: {str(error)[:200]}"
    except OSError as error:
        if isinstance(value, str | Path) and argument in FILES:
            return "no such file"
        return f"{type(error).__name__}: {str(error)[:200]}"
    except (Exception, Hung) as error:
        if callable(value) and argument in FUNCTIONS:
            return "the caller's own error"
        return f"{type(error).__name__}: {str(error)[:200]}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    if grown > GIGABYTES:
        return f"took {grown:.1f} GB"
    if "norm" in name and isinstance(result, Tensor) and not torch.isfinite(result).all():
        return "gave norms that are not finite"
    return "returned"


FUNCTIONS = ("loss", "progress", "callback", "reporter", "model", "stem", "head")
"""What the library calls, and what may then raise errors of its own."""
FILES = ("path", "folder", "checkpoint", "out", "file")
FINE = ("returned", "refused", "no such file", "the caller's own error")


@cache
def _wrong_values(name: str, argument: str) -> st.SearchStrategy[str]:
    """Names of wrong values, of each kind that the argument can have as often as of any other."""
    valid = calls()[name].valid[argument]()
    tensors = [each for each in VALUES if each in TENSORS]
    kinds = [[each for each in VALUES if each not in TENSORS], tensors]
    if isinstance(valid, Tensor):
        kinds.append(list(CHANGES))
    if isinstance(valid, list | tuple) and valid:
        last = [*VALUES, *(CHANGES if isinstance(valid[-1], Tensor) else ())]
        kinds.append([f"inside:{each}" for each in last])
    return st.one_of(*map(st.sampled_from, kinds))


def _cases() -> st.SearchStrategy[tuple[str, str, str]]:
    arguments = [(name, key) for name, call in calls().items() for key in call.valid]
    return st.sampled_from(arguments).flatmap(
        lambda own: st.tuples(st.just(own[0]), st.just(own[1]), _wrong_values(*own))
    )


def _round(examples: int, number: int | None = None) -> tuple[Counter[str], dict[str, str]]:
    """What so many calls came to: how often which, and the failures; the same ones each time without a number."""
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}

    @settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_cases())
    def one(case: tuple[str, str, str]) -> None:
        end = outcome(*case)
        if end is not None:
            counts[end if end in FINE else end.split(":")[0]] += 1
            if end not in FINE:
                failures[" | ".join(case)] = end

    (one if number is None else seed(number)(one))()
    return counts, failures


def _told(failures: Mapping[str, str]) -> str:
    return "\n".join(f"{case}: {end}" for case, end in sorted(failures.items()))


def test_wrong_arguments_are_refused_by_their_names() -> None:
    counts, failures = _round(EXAMPLES)
    assert not failures, _told(failures)
    assert counts.total() > 0.8 * EXAMPLES and counts["refused"] > counts["returned"] > 0


@pytest.mark.skipif("PATHNET_FUZZ" not in os.environ, reason="asked for by PATHNET_FUZZ, a number of calls")
def test_another_round_of_wrong_arguments_is_refused() -> None:
    number = int(os.environ.get("PATHNET_FUZZ_SEED", random.randrange(2**32)))
    counts, failures = _round(int(os.environ["PATHNET_FUZZ"]), number)
    print(f"seed {number}")
    for end, count in counts.most_common():
        print(f"{count:8} {end}")
    assert not failures, f"seed {number}\n{_told(failures)}"
