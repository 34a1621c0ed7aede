"""Studies: what the presets promise, how each kind of network is built and trained, and which are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pathnet import models, results, study, training
from pathnet.data import Data, synthetic
from pathnet.experiments.by_length import ExactSum
from pathnet.experiments.run import Networks, Plan
from pathnet.models import ResidualNet, VggLayer
from pathnet.paper import EXPERIMENTS
from pathnet.study import KINDS, PRESETS, Study
from pathnet.training import Progress, Recipe
from pathnet.training.sampling import drawn_modules

DATA = synthetic(images=48, classes=4, shape=(2, 8, 8))
TINY = Study(
    data="synthetic",
    seeds=2,
    depth=14,
    width=2,
    vgg_depth=6,
    vgg_width=3,
    vgg_stages=2,
    highway_depth=8,
    gate_bias=-2.0,
    survival=0.6,
    recipe=Recipe(epochs=2, batch_size=16, warmup_steps=1, seed=5),
    plan=Plan(
        modules=2, draws=1, deletions=2, swaps=1, batches=2, exact_batches=1, gate_batches=1, gate_batch_size=8
    ),
)
CPU = torch.device("cpu")
Steps = list[tuple[str, int, int]]


def reporter(steps: Steps, stop_at: int = 0) -> Any:
    """Notes what is reported; interrupts at a step."""

    @contextmanager
    def reported(label: str) -> Iterator[Progress]:
        def report(done: int, total: int, note: str) -> None:
            steps.append((label, done, total))
            if done == stop_at:
                raise KeyboardInterrupt

        yield report

    return reported


def trained(kinds: list[str], folder: Path, steps: Steps, own: Study = TINY, stop_at: int = 0) -> Networks:
    return study.trained(own, DATA, kinds, folder, CPU, reporter(steps, stop_at))


def untrained(kind: str, own: Study = TINY, data: Data = DATA) -> ResidualNet:
    return models.build(own.config(kind, data))


# Presets


def test_digits_is_for_two_cores_and_still_eighteen_blocks() -> None:
    own, digits = PRESETS["digits"], synthetic(images=16, shape=(1, 8, 8))
    assert own.data == "digits" and own.seeds >= 3 and own.plan.draws >= 20
    for kind in ("residual", "effective", "stochastic depth", "highway"):
        assert untrained(kind, own, digits).n >= 18
    assert 0.3 < own.plan.modules / 18 < 0.5, "as 23 of 54"


def test_cifar10_is_the_papers_own_scale() -> None:
    own = PRESETS["cifar10"]
    cifar = synthetic(images=4, shape=(3, 32, 32))
    residual = untrained("residual", own, cifar)
    assert own.depth == 110 and residual.n == 54 and own.plan.modules == 23 and own.seeds >= 3
    assert untrained("highway", own, cifar).n == 54
    survival = [block.survival for block in untrained("stochastic depth", own, cifar)]
    assert survival[-1] == 0.5 and survival == pytest.approx([1 - i / 108 for i in range(1, 55)])
    vgg = untrained("vgg", own, cifar)
    layers = [module for module in vgg.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 15 and all(type(block) is VggLayer for block in vgg)
    assert [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)] == [128] * 14
    assert own.plan.draws >= 100 and own.plan.deletions == 20 and own.plan.batches == 1000 and own.plan.images == 0
    assert own.recipe.batch_size == 128 and own.recipe.rate(10**6, 10**6) == pytest.approx(1e-3)


# Kinds


@pytest.mark.parametrize(
    ("kind", "n", "made"),
    [
        ("residual", 6, lambda: models.preact_resnet(14, 2, 4, in_channels=2)),
        ("effective", 6, lambda: models.preact_resnet(14, 2, 4, in_channels=2)),
        ("stochastic depth", 6, lambda: models.preact_resnet(14, 2, 4, in_channels=2, survival=0.6)),
        ("vgg", 4, lambda: models.vgg(6, 3, 4, 2, 2)),
        ("highway", 3, lambda: models.highway(8, 2, 4, 2, -2.0)),
    ],
)
def test_each_kind_is_built_and_trained_as_the_study_says(kind: str, n: int, made: Any) -> None:
    net = untrained(kind)
    assert net.n == n and net.config == made().config
    assert net(torch.zeros(2, 2, 8, 8)).shape == (2, 4)
    recipe = TINY.recipe_of(kind, 1)
    modules = 2 if kind == "effective" else 0
    assert recipe == dataclasses.replace(TINY.recipe, seed=6, modules=modules)
    drawn = drawn_modules(net, recipe, 0)
    assert (drawn is None) == (kind in ("residual", "vgg", "highway"))
    assert kind != "effective" or (drawn is not None and sum(drawn) == 2)


def test_the_kind_of_a_network_is_known_from_its_form() -> None:
    kinds = {kind: study.kind_of(untrained(kind)) for kind in KINDS}
    assert kinds == {kind: "residual" if kind == "effective" else kind for kind in KINDS}
    assert study.kind_of(models.preact_resnet_imagenet(50, 10, 1)) == "residual"
    assert study.kind_of(ResidualNet(nn.Identity(), [VggLayer(2, False)], nn.Identity())) == "residual"


def test_a_study_without_networks_is_refused() -> None:
    with pytest.raises(ValueError, match="seeds: expected an integer of at least 1, got 0"):
        dataclasses.replace(TINY, seeds=0)


# Training


def test_networks_are_trained_once_each_from_its_seed(tmp_path: Path) -> None:
    steps: Steps = []
    nets = trained(["residual", "effective"], tmp_path, steps)
    labels = [f"training {kind} {seed}/2" for kind in ("residual", "effective") for seed in (1, 2)]
    assert list(dict.fromkeys(label for label, _, _ in steps)) == labels
    assert {label: done for label, done, total in steps if total == 6} == dict.fromkeys(labels, 6)
    prints = [models.fingerprint(net) for own in nets.values() for net in own]
    assert len(set(prints)) == 4 and not any(net.training for own in nets.values() for net in own)
    torch.manual_seed(6)
    alone = untrained("residual")
    training.train(alone, DATA, TINY.recipe_of("residual", 1))
    assert models.fingerprint(alone) == models.fingerprint(nets["residual"][1])
    again: Steps = []
    kept = trained(["residual", "effective"], tmp_path, again)
    assert again == [] and [models.fingerprint(net) for own in kept.values() for net in own] == prints
    assert sorted(file.name for file in (tmp_path / "networks").iterdir()) == [
        f"{kind}-{seed}.safetensors" for kind in ("effective", "residual") for seed in (0, 1)
    ]


def test_an_interrupted_training_goes_on_to_the_same_network(tmp_path: Path) -> None:
    whole = trained(["stochastic depth"], tmp_path / "whole", [])
    steps: Steps = []
    with pytest.raises(KeyboardInterrupt):
        trained(["stochastic depth"], tmp_path / "cut", steps, stop_at=4)
    steps.clear()
    nets = trained(["stochastic depth"], tmp_path / "cut", steps)
    assert [done for _, done, _ in steps] == [5, 6, 1, 2, 3, 4, 5, 6]
    for one, other in zip(whole["stochastic depth"], nets["stochastic depth"], strict=True):
        assert models.fingerprint(one) == models.fingerprint(other)


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    own = dataclasses.replace(TINY, seeds=1)
    trained(["residual"], tmp_path, [], own)
    for change in ({"width": 3}, {"recipe": dataclasses.replace(TINY.recipe, epochs=3)}):
        with pytest.raises(ValueError, match="checkpoint: .*residual-0.safetensors is of another"):
            trained(["residual"], tmp_path, [], dataclasses.replace(own, **change))


# Measuring


@pytest.mark.parametrize(
    ("name", "kinds", "words"),
    [
        ("lesion-many", [], "lesion-many takes residual, got none"),
        ("lesion-single", ["highway"], "lesion-single takes residual and vgg, got none"),
        ("effective-training", ["residual"], "effective-training takes residual and effective, got residual"),
        (
            "lesion-stochastic-depth",
            ["stochastic depth"],
            "takes residual and stochastic depth, got stochastic depth",
        ),
        ("highway", ["residual", "vgg"], "highway takes highway, got none"),
    ],
)
def test_missing_kinds_are_named(tmp_path: Path, name: str, kinds: list[str], words: str) -> None:
    nets = {kind: [untrained(kind)] for kind in kinds}
    with pytest.raises(ValueError, match=f"networks: .*{words}"):
        study.measured(name, nets, DATA, TINY.plan, tmp_path, reporter([]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["residual", "vgg"])
def test_single_deletions_take_either_kind(tmp_path: Path, kind: str) -> None:
    nets = {kind: [untrained(kind).eval()], "highway": [untrained("highway").eval()]}
    (run,) = study.measured("lesion-single", nets, DATA, TINY.plan, tmp_path, reporter([]))
    assert list(run.identity["networks"]) == [kind] and run.folder == tmp_path / "lesion-single"


def test_a_finished_run_keeps_its_claims_and_the_recipes_of_its_networks(tmp_path: Path) -> None:
    nets = {"residual": [untrained("residual").eval()], "effective": [untrained("effective").eval()]}
    studied = dataclasses.replace(TINY, seeds=1)
    study.measured("effective-training", nets, DATA, TINY.plan, tmp_path, reporter([]), studied)
    run = results.read(tmp_path / "effective-training")
    found = run.facts["results"]
    assert found["claims"] == [vars(claim) for claim in EXPERIMENTS["effective-training"].load().claims(run)]
    assert {kind: recipe["modules"] for kind, recipe in found["recipes"].items()} == {"residual": 0, "effective": 2}
    (run,) = study.measured("lesion-many", nets, DATA, TINY.plan, tmp_path, reporter([]))
    assert set(run.facts["results"]) == {"claims"}


def test_every_network_has_its_own_run_of_path_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = {"residual": [untrained("residual").eval() for _ in range(2)]}
    steps: Steps = []
    runs = study.measured("path-gradients", nets, DATA, TINY.plan, tmp_path, reporter(steps))
    assert [run.folder for run in runs] == [tmp_path / "path-gradients", tmp_path / "path-gradients" / "seed-1"]
    assert len({run.identity["model"]["hash"] for run in runs}) == 2
    assert all(run.identity["batch_size"] == 48 and len(run.measurements()) == 2 * 6 for run in runs)
    assert all({row.batch for row in run.rows(ExactSum)} == {0} for run in runs)
    without = dataclasses.replace(TINY.plan, exact_batches=0)
    (run,) = study.measured(
        "path-gradients", {"residual": nets["residual"][:1]}, DATA, without, tmp_path / "none", reporter([])
    )
    assert not run.rows(ExactSum) and len(run.measurements()) == 2 * 6
    assert all("decay" in run.facts["results"] and "claims" in run.facts["results"] for run in runs)
