"""Every public function and constructor, with a valid value for each of its parameters."""

from __future__ import annotations

import copy
import math
from functools import cache

import numpy as np
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

import pathnet
from helpers.calling import Call, call_of
from helpers.valid_arguments import (
    Writer,
    deep_nets,
    folder_of_images,
    gated_net,
    image_files,
    measured_run,
    one_routing,
    parts_of,
    recorded_depths,
    recorder_by,
    saved_weights,
    silent_reporter,
    small_data,
    small_job,
    small_net,
    small_ranking,
    tape_by,
    two_images,
    two_labels,
    two_paths,
    written_run,
)
from pathnet import (
    data,
    effective_depth,
    engines,
    lesion,
    models,
    nn,
    paper,
    paths,
    progress,
    report,
    results,
    signed,
    study,
    training,
    workers,
)
from pathnet.experiments import path_gradients
from pathnet.experiments.plans import Plan
from pathnet.lesion import Lesion
from pathnet.lesion.networks import block_shapes
from pathnet.models import ResidualNet
from pathnet.training.sampling import drawn_modules, training_batch

BLOCK = {"kernels": (3, 3), "widths": (4, 4), "stride": 2, "shortcut": "pad"}
SIZES = {"kernels": ("widths",)}
PLAN = Plan(draws=1, deletions=1, swaps=1, batches=1, exact_batches=0, modules=1, gate_batches=1)


def recipe() -> training.Recipe:
    return training.Recipe(epochs=1, batch_size=8)


@cache
def calls() -> dict[str, Call]:
    """Return all calls by name, always in one order."""
    return {**library_calls(), **experiment_calls(), **tape_calls()}


def library_calls() -> dict[str, Call]:
    net, pair = small_net, lambda: (two_images(), two_labels())
    fresh = {"net": lambda: copy.deepcopy(small_net())}
    out = lambda: "out.safetensors"  # noqa: E731
    one, two = (1.0, 3.0, 3.0, 1.0), (2.0, 3.0, 4.0, 1.0)
    return {
        "adapt": call_of(
            pathnet.adapt,
            {"blocks": ("stem",)},
            model=lambda: torch.nn.Sequential(*parts_of(small_net())),
            example=two_images,
        ),
        "record": call_of(pathnet.record, {"images": ("target",)}, net=net, images=two_images, target=two_labels),
        "routed": call_of(pathnet.routed, net=net, x=two_images, routing=one_routing, backward=one_routing),
        "routed_gradient": call_of(
            pathnet.routed_gradient,
            {"x": ("target",)},
            net=net,
            x=two_images,
            target=two_labels,
            backward=one_routing,
        ),
        "Recorder": call_of(pathnet.Recorder, net=net),
        "EffectiveDepth": call_of(
            pathnet.EffectiveDepth, {"batch": ("images", "target")}, batch=pair, out=lambda: "depth.csv", net=net
        ),
        "EffectiveDepth.__call__": call_of(
            pathnet.EffectiveDepth(pair(), Writer(), every=1, share=math.inf).__call__, step=1, net=net
        ),
        "effective_depth.read": call_of(effective_depth.read, {"path": ("out",)}, path=recorded_depths),
        "reporter": call_of(progress.reporter, label="training"),
        "Workers": call_of(workers.Workers, rank=0, count=2, local_count=1, store=lambda: HashStore()),
        "Workers.agree": call_of(workers.ALONE.agree, decide=lambda: lambda: 1),
        "Workers.share_out": call_of(workers.ALONE.share_out, count=2),
        "Workers.gather": call_of(workers.ALONE.gather, value="part"),
        "Workers.first_to": call_of(workers.ALONE.first_to, what="greet"),
        "torchrun": call_of(workers.torchrun),
        "Recipe": call_of(training.Recipe),
        "Recipe.rate": call_of(training.Recipe().rate, step=1, steps=10),
        "evaluate": call_of(training.evaluate, net=net, data=small_data),
        "train": call_of(
            training.train, {"checkpoint": ("weights",)}, **fresh, data=small_data, recipe=recipe, checkpoint=None
        ),
        "drawn_modules": call_of(drawn_modules, net=net, recipe=lambda: training.Recipe(modules=2), step=0),
        "training_batch": call_of(training_batch, data=small_data, recipe=recipe, step=0),
        "evaluate batches": call_of(
            training.evaluate, {"data": ("images", "target")}, net=net, data=lambda: [pair(), pair()]
        ),
        "errors batches": call_of(
            lesion.errors,
            {"data": ("images", "target"), "lesions": ("deleted", "order", "scale"), "progress": ()},
            net=net,
            data=lambda: [pair(), pair()],
            lesions=lambda: [Lesion(), Lesion((0,))],
        ),
        "recalibrated batches": call_of(lesion.recalibrated, net=net, data=lambda: [pair(), pair()], batches=1),
        "Batches": call_of(data.Batches, test=lambda: [pair()], train=lambda: [pair()], name="some"),
        "delete": call_of(lesion.delete, net=net, blocks=[1]),
        "reorder": call_of(lesion.reorder, net=net, order=[0, 2, 1]),
        "Lesion": call_of(Lesion, deleted=(1,), order=(0, 2, 1)),
        "errors": call_of(
            lesion.errors,
            {"lesions": ("deleted", "order", "scale"), "progress": ()},
            net=net,
            data=small_data,
            lesions=lambda: [Lesion(), Lesion((0,))],
        ),
        "rank": call_of(lesion.rank, net=net, data=small_data),
        "rank batches": call_of(lesion.rank, {"data": ("target",)}, net=net, data=lambda: [pair()]),
        "recalibrated": call_of(lesion.recalibrated, net=net, data=small_data, batches=1),
        "block_shapes": call_of(block_shapes, net=net, images=two_images),
        "Ranking.order": call_of(small_ranking().order),
        "Ranking.agreement": call_of(small_ranking().agreement),
        "fused_residual": call_of(
            nn.fused_residual, block=lambda: next(iter(small_net())), x=lambda: torch.ones(2, 2, 4, 4)
        ),
        "fuse": call_of(nn.fuse, net=net),
        "available": call_of(engines.available),
        "Job": call_of(
            engines.Job,
            net=net,
            bn="running",
            precision="float32",
            y0_shape=(2, 4, 4),
            device=lambda: torch.device("cpu"),
        ),
        "choose": call_of(engines.choose, name="auto", job=small_job),
        "refusals": call_of(engines.refusals, job=small_job),
        "preact_resnet": call_of(models.preact_resnet, depth=8, width=2),
        "preact_resnet_imagenet": call_of(models.preact_resnet_imagenet, depth=50, width=1),
        "resnet": call_of(models.resnet, depth=8, width=2),
        "highway": call_of(models.highway, depth=8, width=2),
        "vgg": call_of(models.vgg, {"stages": ("depth",)}, depth=7, width=2),
        "ResidualNet": call_of(
            ResidualNet,
            stem=lambda: small_net().stem,
            blocks=lambda: list(small_net()),
            head=lambda: small_net().head,
        ),
        "PreactBlock": call_of(models.PreactBlock, SIZES, in_channels=2, **BLOCK),
        "PostactBlock": call_of(models.PostactBlock, SIZES, in_channels=2, **BLOCK),
        "HighwayBlock": call_of(models.HighwayBlock, in_channels=2, out_channels=4, stride=2, shortcut="pad"),
        "VggLayer": call_of(models.VggLayer, channels=2, pool=True),
        "build": call_of(models.build, {"config": ()}, config=lambda: dict(small_net().config or {})),
        "fingerprint": call_of(models.fingerprint, net=net),
        "save": call_of(models.save, {"path": ("weights",)}, net=net, path=out),
        "load": call_of(models.load, {"path": ("weights",)}, path=saved_weights),
        "sample": call_of(
            paths.sample, {"n": ("length", "modules")}, n=4, length=2, count=3, modules=lambda: [1, 2, 1, 2]
        ),
        "one_of_each_length": call_of(paths.one_of_each_length, n=4),
        "enumerate_all": call_of(paths.enumerate_all, {"n": ("modules",)}, n=4, modules=2),
        "routing": call_of(paths.routing, paths=two_paths),
        "signs": call_of(paths.signs, n=4, count=3),
        "length_distribution": call_of(paths.length_distribution, n=4),
        "remaining_fraction": call_of(paths.remaining_fraction, {"n": ("deleted",)}, n=4, deleted=2),
        "judge": call_of(
            signed.judge,
            {"squared_norms": ("sums", "batch")},
            squared_norms=lambda: torch.tensor([one, two]),
            sums=lambda: torch.tensor(one),
            batch=lambda: np.array([0, 1]),
        ),
        "aligned_variances": call_of(signed.aligned_variances, n=4),
        "tail_index": call_of(signed.tail_index, values=lambda: np.arange(40.0)),
        "Plan": call_of(Plan),
        "PathGradients": call_of(path_gradients.PathGradients),
        "Study": call_of(study.Study, data="digits", recipe=recipe, plan=lambda: Plan()),
        "data.load": call_of(data.load, {"name": ("data",)}, name="digits"),
        "digits": call_of(data.digits),
        "synthetic": call_of(data.synthetic, {"shape": ("images",)}, images=8, classes=2, shape=(1, 4, 4)),
        "cifar10": call_of(
            data.cifar10, dict.fromkeys(("folder", "skip_broken"), ("data",)), folder="no/such/folder"
        ),
        "class_folders": call_of(data.class_folders, {"folder": ("data",)}, folder=folder_of_images),
        "InMemory": call_of(
            data.InMemory,
            {"images": ("labels",)},
            images=lambda: torch.ones(4, 3, 4, 4, dtype=torch.uint8),
            labels=lambda: torch.arange(4),
        ),
        "InMemory.take": call_of(small_data().train.take, indices=lambda: torch.tensor([1, 0])),
        "OnDisk": call_of(
            data.OnDisk, {"files": ("labels",)}, files=image_files, labels=lambda: torch.tensor([0]), side=4
        ),
        "OnDisk.take": call_of(
            data.OnDisk(image_files(), torch.tensor([0]), 4).take, indices=lambda: torch.tensor([0])
        ),
        "Data": call_of(
            data.Data,
            name="some",
            train=lambda: small_data().train,
            test=lambda: small_data().test,
            classes=tuple("abcd"),
        ),
    }


def experiment_calls() -> dict[str, Call]:
    named = {}
    for name, experiment in paper.EXPERIMENTS.items():
        nets = (lambda: {"highway": [gated_net()]}) if name == "highway" else deep_nets
        named[f"{name} measure"] = call_of(
            experiment.load().measure,
            {"nets": ("networks", "net", "run"), "folder": ("run",)},
            nets=nets,
            data=small_data,
            plan=PLAN,
            folder=f"measured {name}",
            progress=None,
        )
    tiny = study.Study(data="synthetic", depth=8, width=2, recipe=recipe(), plan=PLAN)
    named |= {
        "path_gradients.measure": call_of(
            path_gradients.measure,
            {"folder": ("run",)},
            net=small_net,
            data=small_data,
            plan=path_gradients.PathGradients(batches=1, batch_size=2, engine="reference"),
            folder="run",
        ),
        "results.compact": call_of(results.compact, {"folder": ("run",)}, folder=lambda: measured_run().folder),
        "results.export": call_of(results.export, run=measured_run, out="exported"),
        "results.read": call_of(results.read, {"folder": ("run",)}, folder=lambda: measured_run().folder),
        "results.writing": call_of(
            written_run,
            {"folder": ("run",)},
            folder="written",
            identity={"experiment": "some"},
            planned={"batches": 2},
            attempt={"started": "now"},
        ),
        "claims": call_of(paper.claims, run=measured_run),
        "draw": call_of(paper.draw, run=measured_run),
        "report.write": call_of(
            report.write, {"runs": ("run",)}, runs=lambda: [measured_run()], heading="all", file="all.html"
        ),
        "study.trained": call_of(
            study.trained,
            {"folder": ("checkpoint",)},
            study=tiny,
            data=small_data,
            kinds=lambda: ["residual"],
            folder="study",
            device=torch.device("cpu"),
            reporter=lambda: silent_reporter,
        ),
        "study.measured": call_of(
            study.measured,
            {"nets": ("networks", "net", "run"), "folder": ("run",)},
            name="lesion-single",
            nets=lambda: {"residual": [small_net()]},
            data=small_data,
            plan=PLAN,
            folder="study",
            reporter=lambda: silent_reporter,
        ),
    }
    return named


def tape_calls() -> dict[str, Call]:
    named: dict[str, Call] = {}
    for engine in ("reference", "cpu"):
        if engines.available()[engine] is not None:
            continue
        recorder, tape = recorder_by(engine), tape_by(engine)
        named |= {
            f"{engine} Recorder.__call__": call_of(
                recorder.__call__, {"images": ("target",)}, images=two_images, target=two_labels
            ),
            f"{engine} Recorder.routed_outputs": call_of(
                recorder.routed_outputs, images=two_images, routing=lambda: one_routing()[None]
            ),
            f"{engine} Recorder.engine_for": call_of(recorder.engine_for, images=two_images),
            f"{engine} Tape.path_gradient_norms": call_of(tape.path_gradient_norms, b=two_paths),
            f"{engine} Tape.path_gradients": call_of(tape.path_gradients, b=two_paths),
            f"{engine} Tape.routed_gradients": call_of(tape.routed_gradients, routing=lambda: one_routing()[None]),
            f"{engine} Tape.gradient_by_length": call_of(tape.gradient_by_length),
            f"{engine} Tape.squared_norms_by_length": call_of(tape.squared_norms_by_length, draws=2),
        }
    for at in ("image", "stem_weight", 0, "blocks.0.convs.0.weight"):
        named[f"{at} Tape.path_gradient_norms"] = call_of(tape_by("reference", at).path_gradient_norms, b=two_paths)
    return named
