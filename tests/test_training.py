from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import processes
from helpers.cases import shaken
from scipy import stats
from torch import Tensor, nn

from pathnet import EffectiveDepth, data, models, training
from pathnet.effective_depth import read
from pathnet.models import ResidualNet
from pathnet.models.weights import read_tensors, write_tensors
from pathnet.streams import stream
from pathnet.training import Recipe, drawn_modules, evaluate, train, training_batch

SMALL = Recipe(epochs=2, batch_size=32, learning_rate=0.05, warmup_steps=3)


def fresh() -> models.ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(8, 4, in_channels=3)


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_interrupted_training_resumes_bit_exactly(
    images: data.Data, tmp_path: Path, stop: int, bfloat16: bool
) -> None:
    recipe = dataclasses.replace(SMALL, bfloat16=bfloat16)
    straight = fresh()
    history = train(straight, images, recipe)

    def interrupt(done: int, steps: int, note: str) -> None:
        if done == stop:
            raise Interrupt

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupt):
        train(fresh(), images, recipe, path, interrupt)
    resumed = models.preact_resnet(8, 4)
    again = train(resumed, images, recipe, path)
    assert models.fingerprint(resumed) == models.fingerprint(straight)
    assert [(e.epoch, e.train_loss, e.test_accuracy) for e in again] == [
        (e.epoch, e.train_loss, e.test_accuracy) for e in history
    ]
    assert models.fingerprint(models.load(path)) == models.fingerprint(straight)


def test_it_learns_and_says_how_well(images: data.Data) -> None:
    net = fresh()
    history = train(net, images, dataclasses.replace(SMALL, epochs=20, augment=False))
    assert history[-1].test_accuracy > 0.9 > history[0].test_accuracy
    assert evaluate(net, images) == history[-1].test_accuracy and not net.training


def test_the_steps_are_those_of_sgd_with_nesterov_momentum(images: data.Data) -> None:
    """One epoch against the update rule written out (Sutskever et al. 2013, in PyTorch's form)."""
    recipe = dataclasses.replace(SMALL, epochs=1, augment=False, weight_decay=1e-2, momentum=0.8)
    trained, net = fresh(), fresh().train()
    train(trained, images, recipe)
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    order = stream(recipe.seed, "epoch", 0).permutation(128)
    for step in range(4):
        indices = torch.from_numpy(order[32 * step : 32 * step + 32])
        batch = images.normalise(images.train.take(indices)).contiguous(memory_format=torch.channels_last)
        net.to(memory_format=torch.channels_last)
        loss = torch.nn.functional.cross_entropy(net(batch), images.train.labels[indices])
        rate = [0.01, 0.01, 0.01, 0.05 * 0.1**2][step]
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            for p, v, g in zip(net.parameters(), velocity, gradients, strict=True):
                g = g + 1e-2 * p
                v.mul_(0.8).add_(g)
                p.sub_(rate * (g + 0.8 * v))
    for ours, theirs in zip(trained.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_warms_up_and_drops_twice() -> None:
    recipe = Recipe(warmup_steps=400)
    assert [recipe.rate(step, 64000) for step in (0, 399, 400, 31999)] == [0.01, 0.01, 0.1, 0.1]
    assert recipe.rate(32000, 64000) == pytest.approx(0.01)
    assert recipe.rate(48000, 64000) == pytest.approx(0.001)


def test_a_checkpoint_of_something_else_is_refused(images: data.Data, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(fresh(), images, SMALL, path)
    with pytest.raises(ValueError, match="checkpoint: .* is of another model"):
        train(models.preact_resnet(14, 4), images, SMALL, path)
    with pytest.raises(ValueError, match="checkpoint: .* is of another recipe"):
        train(fresh(), images, dataclasses.replace(SMALL, seed=1), path)
    with pytest.raises(ValueError, match="checkpoint: .* is of another data"):
        train(fresh(), data.synthetic(images=128, shape=(3, 8, 8), seed=1), SMALL, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="weights: .* is not a readable"):
        train(fresh(), images, SMALL, path)


@pytest.mark.parametrize(
    "change",
    [
        *(
            {name: value}
            for name in ("epochs", "batch_size", "modules", "seed")
            for value in (math.nan, 1.5, True, "1")
        ),
        *(
            {name: value}
            for name in ("learning_rate", "warmup_learning_rate", "momentum", "weight_decay")
            for value in (math.nan, -0.1, math.inf, None)
        ),
        *({"warmup_steps": value} for value in (math.nan, -1, 0.5)),
        *({name: value} for name in ("augment", "bfloat16") for value in (1, "no", None)),
    ],
    ids=str,
)
def test_a_recipe_of_what_is_no_number_is_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Recipe(**change)


def test_a_recipe_holds_pythons_own_numbers() -> None:
    recipe = Recipe(epochs=np.int64(3), learning_rate=torch.tensor(0.5), modules=torch.tensor(2))  # type: ignore[arg-type]
    assert json.loads(json.dumps(dataclasses.asdict(recipe)))["epochs"] == 3
    assert recipe == Recipe(epochs=3, learning_rate=0.5, modules=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_no_accuracy(images: data.Data, value: float) -> None:
    net = fresh().train()
    net.head.linear.bias.data[0] = value
    with pytest.raises(ValueError, match="net: expected finite outputs, got NaN or infinity on test batch 0"):
        evaluate(net, images)
    assert net.training


@pytest.mark.parametrize("wrong", [None, [], "digits", torch.ones(2), torch.utils.data.DataLoader([1])])  # type: ignore[arg-type]
def test_what_is_no_network_data_set_or_recipe_is_named(images: data.Data, wrong: Any) -> None:
    for call in (
        lambda net, data, recipe: train(net, data, recipe),
        lambda net, data, _: evaluate(net, data),
        lambda net, _, recipe: drawn_modules(net, recipe, 0),
        lambda _, data, recipe: training_batch(data, recipe, 0),
    ):
        right = {"net": fresh(), "data": images, "recipe": SMALL}
        for name in right:
            arguments = right | {name: wrong}
            if call.__code__.co_varnames[list(right).index(name)] != "_":
                with pytest.raises(ValueError, match=f"{name}: expected a pathnet"):
                    call(*arguments.values())


def test_bad_recipes_are_named(images: data.Data) -> None:
    with pytest.raises(ValueError, match="recipe: batch_size 256 exceeds the 128 training images"):
        train(fresh(), images, dataclasses.replace(SMALL, batch_size=256))
    with pytest.raises(ValueError, match="epochs: expected an integer"):
        Recipe(epochs=0)
    with pytest.raises(ValueError, match=r"seed: expected an integer from 0 to 2\^63 - 1, got 18446744073709551616"):
        Recipe(seed=1 << 64)
    with pytest.raises(ValueError, match="recipe: the loss is"):
        train(fresh(), images, dataclasses.replace(SMALL, learning_rate=1e20, warmup_steps=0))
    with pytest.raises(ValueError, match="modules: expected an integer of at least 0, got -1"):
        Recipe(modules=-1)
    with pytest.raises(ValueError, match="undrawn: expected 'none' or 'zero', got 'nothing'"):
        Recipe(undrawn="nothing")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"modules: expected at most 3 \(the network's\), got 4"):
        train(fresh(), images, dataclasses.replace(SMALL, modules=4))
    with pytest.raises(ValueError, match="modules: expected 0 for a network with stochastic depth, got 2"):
        train(models.preact_resnet(8, 4, survival=0.5), images, dataclasses.replace(SMALL, modules=2))
    with pytest.raises(ValueError, match=r"drawn: expected 3 values \(one a block\), got 2"):
        fresh()(torch.zeros(1, 3, 8, 8), [True, False])
    for survival in (0, 1.5, math.nan):
        with pytest.raises(
            ValueError, match=f"survival: expected a finite number above 0 and at most 1, got {survival}"
        ):
            models.preact_resnet(8, 4, survival=survival)


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_an_interrupted_step_leaves_no_trace(images: data.Data, tmp_path: Path, back: bool) -> None:
    """Interrupted on its way, where the first BNs have their new statistics already; in the third step."""
    straight, path = fresh(), tmp_path / "checkpoint.safetensors"
    train(straight, images, SMALL)
    calls = iter(range(3))

    def interrupt(*_: object) -> None:
        if next(calls) == 2:
            raise Interrupt

    interrupted = fresh()
    last: Any = interrupted.blocks[1]
    (last.register_full_backward_hook if back else last.register_forward_hook)(interrupt)
    with pytest.raises(Interrupt):
        train(interrupted, images, SMALL, path)
    assert read_tensors(path)[1]["progress"]["step"] == 2
    resumed = models.preact_resnet(8, 4)
    train(resumed, images, SMALL, path)
    assert models.fingerprint(resumed) == models.fingerprint(straight)


def test_an_interrupted_test_is_made_up_for(
    images: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, path = fresh(), tmp_path / "checkpoint.safetensors"
    history = train(straight, images, SMALL)

    def interrupt(*_: object) -> float:
        raise Interrupt

    for epochs in range(2):
        net = fresh()
        with monkeypatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr(training, "evaluate", interrupt)
            train(net, images, SMALL, path)
        assert read_tensors(path)[1]["progress"]["step"] == 4 and epochs < 2
    again = train(fresh(), images, SMALL, path)
    assert [dataclasses.replace(epoch, seconds=0) for epoch in again] == [
        dataclasses.replace(epoch, seconds=0) for epoch in history
    ]


def test_a_test_that_fails_leaves_the_network_in_its_mode(images: data.Data) -> None:
    net = fresh().train()
    net.head = nn.Identity()
    net.stem = nn.Conv2d(1, 4, 3)
    with pytest.raises(RuntimeError):
        evaluate(net, images)
    assert net.training


def test_a_checkpoint_from_before_a_setting_goes_on(images: data.Data, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(fresh(), images, SMALL, path)
    tensors, metadata = read_tensors(path)
    for setting in ("modules", "undrawn"):
        del metadata["recipe"][setting]
    write_tensors(path, tensors, metadata)
    assert len(train(fresh(), images, SMALL, path)) == 2
    with pytest.raises(ValueError, match="checkpoint: .* is of another recipe"):
        train(fresh(), images, dataclasses.replace(SMALL, modules=2), path)


# Modules that are not drawn


def zeroed(net: ResidualNet, x: Tensor, drawn: Sequence[bool]) -> Tensor:
    """The network with every module computed, and those not drawn multiplied by zero."""
    y = net.stem(x)
    for block, own in zip(net.blocks, drawn, strict=True):
        first = F.relu(block.bns[0](y))
        residual = block.convs[0](first)
        for bn, conv in zip(block.bns[1:], block.convs[1:], strict=True):
            residual = conv(F.relu(bn(residual)))
        skip = y if block.projection is None else block.projection(first)
        if block.pad:
            skip = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1]))
        y = skip + float(own) * residual
    return net.head(y)


def left_out(net: ResidualNet, drawn: Sequence[bool]) -> set[str]:
    """The parameters that only modules not drawn have: a projection reads what its block's first BN gives."""
    names = set()
    for i, (block, own) in enumerate(zip(net.blocks, drawn, strict=True)):
        for name, _ in block.named_parameters():
            shared = block.projection is not None and name.startswith(("projection", "bns.0"))
            if not own and not shared:
                names.add(f"blocks.{i}.{name}")
    return names


DRAWS = [(True, False, True, False, True, False), (False, True, False, True, False, True), (False,) * 6, (True,) * 6]


@pytest.mark.parametrize("drawn", DRAWS, ids=lambda drawn: "".join("01"[own] for own in drawn))
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_gradients_are_those_of_modules_multiplied_by_zero(shortcut: Any, drawn: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(14, 4, shortcut=shortcut)).double().train()
    other = copy.deepcopy(net)
    batch, labels = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (5,))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    output, expected = net(batch, drawn), zeroed(other, batch, drawn)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    F.cross_entropy(output, labels).backward()
    F.cross_entropy(expected, labels).backward()
    unused, theirs = left_out(net, drawn), dict(other.named_parameters())
    assert len(unused) >= 4 * drawn.count(False) - 1
    for name, parameter in net.named_parameters():
        if name in unused:
            assert parameter.grad is None and not theirs[name].grad.any(), name
        else:
            assert parameter.grad is not None and parameter.grad.any(), name
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-12, atol=1e-14)
    for name, buffer in net.named_buffers():
        module = name.rpartition(".")[0]
        if f"{module}.weight" in unused:
            assert torch.equal(buffer, before[name]), name
        else:
            torch.testing.assert_close(buffer, other.get_buffer(name), rtol=1e-13, atol=0)
            assert not torch.equal(buffer, before[name])


def updated(
    net: ResidualNet,
    velocity: dict[str, Tensor],
    gradients: dict[str, Tensor],
    untouched: set[str],
    rate: float,
    decay: float,
) -> None:
    """One step of SGD with Nesterov momentum 0.9 as it is written, for all parameters but the untouched ones."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name not in untouched:
                g = gradients[name] + decay * p
                velocity[name] = 0.9 * velocity[name] + g if name in velocity else g
                p.sub_(rate * (g + 0.9 * velocity[name]))


@pytest.mark.parametrize("undrawn", ["none", "zero"])
def test_decay_and_momentum_meet_modules_that_are_not_drawn_or_pass_them(images: data.Data, undrawn: Any) -> None:
    recipe = Recipe(1, 16, 0.05, weight_decay=1e-2, warmup_steps=2, augment=False, modules=1, undrawn=undrawn)
    trained, net = fresh(), fresh().to(memory_format=torch.channels_last).train()
    moved: list[set[str]] = []
    weights = {name: p.detach().clone() for name, p in trained.named_parameters()}

    def watch(done: int, steps: int, note: str) -> None:
        now = {name: p.detach().clone() for name, p in trained.named_parameters()}
        moved.append({name for name in now if not torch.equal(now[name], weights[name])})
        weights.update(now)

    train(trained, images, recipe, progress=watch)
    velocity: dict[str, Tensor] = {}
    seen = set()
    for step in range(8):
        drawn = drawn_modules(net, recipe, step)
        assert drawn is not None
        seen.add(drawn)
        batch, labels = training_batch(images, recipe, step)
        net.zero_grad()
        F.cross_entropy(zeroed(net, batch, drawn), labels).backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        untouched = left_out(net, drawn) if undrawn == "none" else set()
        updated(net, velocity, gradients, untouched, recipe.rate(step, 8), 1e-2)
        assert not untouched & moved[step]
        assert {name for name in weights if name.endswith("weight")} <= moved[step] | untouched
    assert len(seen) == 3
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p, net.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_modules_that_are_not_drawn_do_not_run(images: data.Data) -> None:
    recipe = dataclasses.replace(SMALL, epochs=1, batch_size=16, modules=1)
    net, step = fresh(), 0
    ran: list[set[int]] = [set() for _ in range(8)]

    def count(done: int, steps: int, note: str) -> None:
        nonlocal step
        step = done

    def ran_in(block: int) -> Callable[..., None]:
        return lambda *_: ran[step].add(block) if net.training else None

    for i, block in enumerate(net.blocks):
        for module in (*block.convs, block.bns[1]):
            module.register_forward_hook(ran_in(i))
    train(net, images, recipe, progress=count)
    for step_, own in enumerate(ran):
        drawn = drawn_modules(net, recipe, step_)
        assert drawn is not None and own == {i for i in range(3) if drawn[i]} and len(own) == 1
    for i, block in enumerate(net.blocks):
        steps = sum(i in own for own in ran)
        assert block.bns[1].num_batches_tracked == steps
        assert block.bns[0].num_batches_tracked == (steps if block.projection is None else 8)


# What is drawn


def draws(net: ResidualNet, recipe: Recipe, steps: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[steps, n]"""
    return np.array([drawn_modules(net, recipe, step) for step in range(steps)])


def test_as_many_modules_as_asked_are_drawn_and_all_sets_of_them_alike() -> None:
    net, steps = models.preact_resnet(14, 2), 4000
    for count in range(1, 7):
        assert (draws(net, Recipe(modules=count), 50).sum(1) == count).all()
    assert drawn_modules(net, Recipe(), 0) is None and drawn_modules(net, Recipe(modules=6), 9) == (True,) * 6
    sets, times = np.unique(draws(net, Recipe(modules=3), steps), axis=0, return_counts=True)
    assert len(sets) == math.comb(6, 3) and stats.chisquare(times).pvalue > 1e-3


def test_what_is_drawn_follows_from_seed_and_step_alone() -> None:
    for net, recipe in (
        (models.preact_resnet(38, 2), Recipe(modules=9, seed=5)),
        (models.preact_resnet(38, 2, survival=0.3), Recipe(seed=5)),
    ):
        forwards = draws(net, recipe, 20)
        other = dataclasses.replace(recipe, epochs=1, batch_size=1, learning_rate=1.0, undrawn="zero")
        backwards = [drawn_modules(copy.deepcopy(net), other, step) for step in reversed(range(20))]
        assert (forwards == np.array(backwards)[::-1]).all()
        assert len(np.unique(forwards, axis=0)) == 20
        assert not (draws(net, dataclasses.replace(recipe, seed=6), 20) == forwards).all(1).any()


def test_probabilities_of_survival_fall_linearly_and_are_kept_to() -> None:
    net, steps = models.preact_resnet(20, 2, survival=0.2), 4000
    expected = [1 - i / 9 * (1 - 0.2) for i in range(1, 10)]
    assert [block.survival for block in net.blocks] == pytest.approx(expected)
    found = draws(net, Recipe(), steps)
    for own, probability in zip(found.T, expected, strict=True):
        assert stats.binomtest(int(own.sum()), steps, probability).pvalue > 1e-3
    # Independently: how many are drawn varies as a sum of independent draws does.
    variance = sum(p * (1 - p) for p in expected)
    assert found.sum(1).var() == pytest.approx(variance, rel=0.1)
    assert np.abs(np.corrcoef(found[:, 1:].T) - np.eye(8)).max() < 4.5 / math.sqrt(steps)


def test_evaluation_multiplies_modules_by_their_probability() -> None:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(14, 4, survival=0.3)).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def expected() -> Tensor:
        y = net.stem(images)
        for i, block in enumerate(net.blocks):
            first = F.relu(block.bns[0](y))
            residual = block.convs[1](F.relu(block.bns[1](block.convs[0](first))))
            skip = y if block.projection is None else block.projection(first)
            y = skip + (1 - (i + 1) / 6 * 0.7 if not net.training else 1) * residual
        return net.head(y)

    for mode in (False, True):
        net.train(mode)
        torch.testing.assert_close(net(images), expected(), rtol=1e-12, atol=1e-12)


# Resumed, shared out, compiled


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize(
    ("survival", "settings"),
    [(1.0, {"modules": 1}), (1.0, {"modules": 2, "undrawn": "zero"}), (0.3, {}), (0.3, {"undrawn": "zero"})],
    ids=["modules", "modules, zero", "survival", "survival, zero"],
)
def test_training_that_draws_modules_resumes_bit_exactly(
    images: data.Data, tmp_path: Path, stop: int, survival: float, settings: dict[str, Any]
) -> None:
    recipe, path = dataclasses.replace(SMALL, **settings), tmp_path / "checkpoint.safetensors"

    def made(seed: int) -> ResidualNet:
        torch.manual_seed(seed)
        return models.preact_resnet(8, 4, survival=survival)

    straight, resumed = made(0), made(1)
    train(straight, images, recipe)

    def interrupt(done: int, steps: int, note: str) -> None:
        if done == stop:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(made(0), images, recipe, path, interrupt)
    train(resumed, images, recipe, path)
    assert models.fingerprint(resumed) == models.fingerprint(straight)
    assert models.load(path).config == straight.config


def test_a_module_that_was_never_drawn_has_no_momentum(images: data.Data, tmp_path: Path) -> None:
    recipe, path = dataclasses.replace(SMALL, modules=1), tmp_path / "checkpoint.safetensors"

    def interrupt(*_: object) -> None:
        raise Interrupt

    net = fresh()
    with pytest.raises(Interrupt):
        train(net, images, recipe, path, interrupt)
    drawn = drawn_modules(net, recipe, 0)
    assert drawn is not None
    kept = {name.removeprefix("momentum/") for name in read_tensors(path)[0] if name.startswith("momentum/")}
    assert kept == {name for name, _ in net.named_parameters()} - left_out(net, drawn)


SHARED = Recipe(1, 32, 0.05, weight_decay=1e-2, warmup_steps=2, seed=3)
SHARED_KINDS: dict[str, tuple[float, Recipe]] = {
    "all": (1.0, SHARED),
    "modules": (1.0, dataclasses.replace(SHARED, modules=1)),
    "survival": (0.4, SHARED),
    "zero": (0.4, dataclasses.replace(SHARED, undrawn="zero")),
}


def shared_net(survival: float) -> ResidualNet:
    torch.manual_seed(0)
    return models.preact_resnet(8, 4, survival=survival)


def shared_images() -> data.Data:
    return data.synthetic(images=128, shape=(3, 8, 8))


def one_of_two(rank: int, out: Path) -> None:
    """A process that trains together with another, and writes what came of it."""
    with processes.together(rank, out):
        images = shared_images()
        for kind, (survival, recipe) in SHARED_KINDS.items():
            net = shared_net(survival)
            # Processes begin with the weights of the first.
            if rank == 1:
                nn.init.zeros_(net.head.linear.weight)
            path = out / f"{kind}.safetensors"
            few = images.random_batch(4, 0, 0)
            callback = EffectiveDepth(few, out / f"{kind}.csv", every=1, share=math.inf) if kind == "all" else None
            history = train(net, images, recipe, path, callback=callback)
            models.save(net, out / f"{kind}-{rank}.safetensors")
            (out / f"{kind}-{rank}.json").write_text(json.dumps([dataclasses.asdict(epoch) for epoch in history]))

        def said(net: ResidualNet, recipe: Recipe, path: Path | None = None) -> str:
            try:
                train(net, images, recipe, path)
            except ValueError as error:
                return str(error)
            return ""

        odd = said(shared_net(1), dataclasses.replace(SHARED, batch_size=33))
        broken = shared_net(1)
        if rank == 1:
            broken.head.register_forward_hook(lambda module, given, output: output * math.nan)
        unseen = out / ("all.safetensors" if rank == 0 else "unseen.safetensors")
        words = [odd, said(broken, SHARED), said(shared_net(1), SHARED_KINDS["all"][1], unseen)]
        (out / f"words-{rank}.json").write_text(json.dumps(words))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    processes.run(one_of_two, folder)
    return folder


@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_two_processes_train_by_the_mean_of_their_gradients(of_two: Path, kind: str) -> None:
    """Statistics are of a process's own half of the batch; those that are kept are the first's."""
    survival, recipe = SHARED_KINDS[kind]
    images, net = shared_images(), shared_net(survival).to(memory_format=torch.channels_last).train()
    velocity: dict[str, Tensor] = {}
    losses = []
    for step in range(4):
        batch, labels = training_batch(images, recipe, step)
        drawn = drawn_modules(net, recipe, step) or (True,) * 3
        halves = [copy.deepcopy(net), copy.deepcopy(net)]
        for half, part in zip(halves, (slice(0, 16), slice(16, 32)), strict=True):
            half.zero_grad()
            loss = F.cross_entropy(zeroed(half, batch[part], drawn), labels[part])
            loss.backward()
            losses.append(loss.item())
        gradients = {
            name: (p.grad + halves[1].get_parameter(name).grad) / 2
            for name, p in halves[0].named_parameters()
            if p.grad is not None
        }
        untouched = left_out(net, drawn) if recipe.undrawn == "none" else set()
        updated(net, velocity, gradients, untouched, recipe.rate(step, 4), 1e-2)
        for name, buffer in net.named_buffers():
            # Of modules that are not drawn `zeroed` updates them, training does not.
            if f"{name.rpartition('.')[0]}.weight" not in left_out(net, drawn):
                buffer.copy_(halves[0].get_buffer(name))
    first, second = (models.load(of_two / f"{kind}-{rank}.safetensors") for rank in range(2))
    assert models.fingerprint(first) == models.fingerprint(second)
    assert models.fingerprint(models.load(of_two / f"{kind}.safetensors")) == models.fingerprint(first)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    histories = [json.loads((of_two / f"{kind}-{rank}.json").read_text()) for rank in range(2)]
    for history in histories:
        assert history[0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert history[0]["test_accuracy"] == histories[0][0]["test_accuracy"]


def test_of_two_processes_the_first_measures_the_effective_depth(of_two: Path) -> None:
    assert [row.step for row in read(of_two / "all.csv")] == list(range(5))


def test_two_processes_fail_alike(of_two: Path) -> None:
    """Also where one alone has a reason: otherwise the other would wait for it."""
    for rank in range(2):
        odd, broken, unseen = json.loads((of_two / f"words-{rank}.json").read_text())
        assert odd == "recipe: expected a batch_size that 2 processes can share, got 33"
        assert broken.startswith("recipe: the loss is nan at step 0")
        assert unseen == "checkpoint: expected a file that all processes see, got some at step 0 and some at 4"


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_blocks_give_the_same_gradients_by_one_program_a_shape(compiling: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.manual_seed(0)
    plain = shaken(models.preact_resnet(14, 4)).double().train()
    net = copy.deepcopy(plain)
    programs = CompileCounterWithBackend("aot_eager")
    for block in net:
        block.compile(backend=programs)
    batch, labels = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (5,))
    for drawn in ((True,) * 6, *DRAWS, (False, False, True, True, True, False)):
        for own in (net, plain):
            own.zero_grad()
            F.cross_entropy(own(batch, drawn), labels).backward()
        # Two stages begin with a block that changes the shape.
        assert programs.frame_count == 5
        for name, p in net.named_parameters():
            expected = plain.get_parameter(name).grad
            assert (p.grad is None) == (expected is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)


def test_training_takes_compiled_blocks(compiling: None, images: data.Data) -> None:
    recipe, plain, net = dataclasses.replace(SMALL, epochs=1, modules=2), fresh(), fresh()
    for block in net:
        block.compile(backend="eager")
    train(plain, images, recipe)
    train(net, images, recipe)
    assert models.fingerprint(net) == models.fingerprint(plain)
