"""`adapt` on third-party models, compared with path gradients by definition in the models' own code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.model_cases import BY_NAME, MODEL_CASES, ModelCase, outcome, path_gradient, sites, without
from helpers.oracles import relative_error
from helpers.tolerances import EXACT_WALK
from torch import Tensor, nn

import pathnet
from pathnet import lesion
from pathnet.experiments import path_gradients
from pathnet.lesion import Lesion
from pathnet.training import Recipe, train

ALL = pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: case.name)
_adapted: dict[str, tuple[nn.Module, pathnet.AdaptedNet]] = {}


def adapted(case: ModelCase) -> tuple[nn.Module, pathnet.AdaptedNet]:
    """Return the model of a case and its adapted network, cached since no test changes them."""
    if case.name not in _adapted:
        model, (x, _) = case.model(), case.batch()
        _adapted[case.name] = model, pathnet.adapt(model, x, output=case.output)
    return _adapted[case.name]


@pytest.fixture(autouse=True)
def _switches_are_reset() -> Iterator[None]:
    yield
    for model, _ in _adapted.values():
        assert all(not block.switches for block, _ in sites(model))


@ALL
def test_every_path_equals_the_loop_in_the_models_own_code(case: ModelCase) -> None:
    model, net = adapted(case)
    assert net.n == len(sites(model)) <= 6
    assert net.traced_by == ("torch.export" if case.name == "control flow" else "torch.fx")
    tape = pathnet.record(net, *case.batch(), precision="float64", at=case.at)  # type: ignore[arg-type]
    codes = pathnet.paths.enumerate_all(net.n)
    grads = tape.path_gradients(codes)
    expected = torch.stack([path_gradient(case, model, code.tolist()) for code in codes])
    for grad, truth in zip(grads, expected, strict=True):
        assert relative_error(grad, truth) < EXACT_WALK
    assert relative_error(grads.sum(0), tape.gradient()) < EXACT_WALK
    by_length = torch.stack([expected[codes.sum(1) == k].sum(0) for k in range(net.n + 1)])
    assert relative_error(tape.gradient_by_length(), by_length) < EXACT_WALK
    assert expected.flatten(1).norm(dim=1).min() > 0


@ALL
def test_a_deleted_block_is_one_whose_residual_module_returns_zero(case: ModelCase) -> None:
    model, net = adapted(case)
    x, _ = case.batch()
    with torch.no_grad():
        ordinary = outcome(case, model, x)
        torch.testing.assert_close(net(x.clone()), ordinary)
        for i in range(net.n):
            expected = without(case, model, [i], x)
            torch.testing.assert_close(lesion.delete(net, [i])(x.clone()), expected)
            assert relative_error(expected, ordinary) > 1e-6
        drawn = [i % 2 == 0 for i in range(net.n)]
        expected = without(case, model, range(1, net.n, 2), x)
        torch.testing.assert_close(net(x.clone(), drawn), expected)
        routing = torch.ones(1, net.n, 2, dtype=torch.float64)
        routing[0, 1::2, 1] = 0
        recorder = pathnet.Recorder(net, precision="float64")
        torch.testing.assert_close(recorder.routed_outputs(x, routing)[0], expected)


@pytest.mark.parametrize("case", [case for case in MODEL_CASES if case.batch_norm], ids=lambda case: case.name)
def test_path_gradients_with_batch_statistics(case: ModelCase) -> None:
    model, net = adapted(case)
    assert not net.frozen_statistics
    statistics = copy.deepcopy(model.state_dict())
    tape = pathnet.record(net, *case.batch(), bn="batch", precision="float64", engine="reference")
    by_batch = copy.deepcopy(model)
    for module in by_batch.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    codes = pathnet.paths.enumerate_all(net.n)[::3]
    for code, grad in zip(codes, tape.path_gradients(codes), strict=True):
        assert relative_error(grad, path_gradient(case, by_batch, code.tolist())) < EXACT_WALK
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in model.state_dict().items())


@ALL
def test_the_model_is_unchanged(case: ModelCase) -> None:
    model = case.model().train()
    modules, parameters = list(model.modules()), list(model.parameters())
    for module in modules[1::3]:
        module.training = False
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[0].grad = torch.ones_like(parameters[0])
    names = [set(vars(module)) | set(dict(module.named_children())) for module in modules]
    modes, required = [module.training for module in modules], [parameter.requires_grad for parameter in parameters]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    net = pathnet.adapt(model, case.batch()[0], output=case.output)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.modules()) == modules
    assert all(after is before for after, before in zip(model.parameters(), parameters, strict=True))
    assert [module.training for module in modules] == modes
    assert [parameter.requires_grad for parameter in parameters] == required
    assert [set(vars(module)) | set(dict(module.named_children())) for module in modules] == names
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in parameters[1:]) and bool((parameters[0].grad == 1).all())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    assert net.training and set(net.parameters()) == set(parameters)


@ALL
def test_training_the_adapted_network_trains_the_model(case: ModelCase) -> None:
    model, (x, target) = case.model(1), case.batch()
    net = pathnet.adapt(model, x, output=case.output)
    torch.manual_seed(3)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    drawn = [i != 1 for i in range(net.n)]
    before = copy.deepcopy(model.state_dict())
    loss = F.cross_entropy(net(x.clone(), drawn).flatten(0, -2), target.flatten())
    loss.backward()
    module = set(net.blocks[1].residual_branch.parameters())
    only = module - {p for i, block in enumerate(net.blocks) if i != 1 for p in block.parameters()}
    assert only and all(parameter.grad is None for parameter in only)
    optimizer.step()
    net.eval()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and (not case.batch_norm or any("running" in name for name in changed))
    with torch.no_grad():
        torch.testing.assert_close(net(x.clone()), outcome(case, model, x))


@ALL
def test_copies_other_precisions_and_saved_states(case: ModelCase) -> None:
    _, net = adapted(case)
    x, _ = case.batch()
    with torch.no_grad():
        expected = net(x.clone())
        single = copy.deepcopy(net).float()
        small = x.float() if x.is_floating_point() else x
        assert relative_error(single(small.clone()), expected) < 1e-3
        other = pathnet.adapt(case.model(7), x, output=case.output)
        assert relative_error(other(x.clone()), expected) > 1e-3
        other.load_state_dict(net.state_dict())
        torch.testing.assert_close(other(x.clone()), expected)
    assert pathnet.models.fingerprint(other) == pathnet.models.fingerprint(net)
    assert next(net.parameters()).dtype == torch.float64 and not net.training


@ALL
def test_batches_of_other_sizes(case: ModelCase) -> None:
    model, net = adapted(case)
    x = torch.cat([case.batch(1)[0], case.batch(2)[0]])
    with torch.no_grad():
        for inputs in (x, x[:1], x[1:4]):
            torch.testing.assert_close(net(inputs.clone()), outcome(case, model, inputs))


def network_and_data(name: str) -> tuple[pathnet.AdaptedNet, pathnet.data.Data]:
    data = pathnet.data.synthetic(32, classes=5, shape=(3, 9, 9))
    return pathnet.adapt(BY_NAME[name].model().float()), data


@pytest.mark.filterwarnings("ignore:.*'autograd' was chosen")
@pytest.mark.parametrize("name", ["basic", "scaled"])
def test_lesions_and_training_accept_adapted_networks(name: str) -> None:
    net, data = network_and_data(name)
    images, labels = next(data.test_batches(len(data.test)))
    errors = lesion.errors(net, data, [Lesion(), Lesion((1,)), Lesion((0, 2))])
    with torch.no_grad():
        expected = [int((lesion.delete(net, gone)(images).argmax(1) != labels).sum()) for gone in ((), (1,), (0, 2))]
    assert errors.wrong.tolist() == expected
    before = pathnet.models.fingerprint(net)
    history = train(net, data, Recipe(epochs=2, batch_size=16, modules=2, augment=False))
    assert len(history) == 2 and pathnet.models.fingerprint(net) != before


def test_experiments_measure_adapted_networks(tmp_path: Path) -> None:
    net, data = network_and_data("pre-activation")
    plan = path_gradients.PathGradients(batches=2, batch_size=4)
    run = path_gradients.measure(net, data, plan, tmp_path)
    again = path_gradients.measure(net, data, plan, tmp_path)
    assert len(run.measurements()) == len(again.measurements()) == 2 * net.n
    images, labels = data.random_batch(4, 0, 0)
    measured = run.measurements()
    expected = pathnet.record(net, images, labels).path_gradient_norms(torch.tensor(measured.path[: net.n]))
    torch.testing.assert_close(torch.tensor(measured.norm[: net.n]), expected, rtol=1e-4, atol=0)


def test_blocks_of_equal_shapes_can_be_swapped() -> None:
    model, net = adapted(BY_NAME["basic"])
    x, _ = BY_NAME["basic"].batch()
    with torch.no_grad():
        swapped = lesion.reorder(net, [0, 1, 3, 2])(x.clone())
        blocks = list(model.layer1)
        model.layer1[2], model.layer1[3] = blocks[3], blocks[2]
        try:
            expected = model(x.clone())
        finally:
            model.layer1[2], model.layer1[3] = blocks[2], blocks[3]
    torch.testing.assert_close(swapped, expected)
    assert relative_error(swapped, net(x.clone()).detach()) > 1e-6


@pytest.mark.parametrize("at", ["image", "stem_weight"])
def test_gradients_at_the_image_and_at_the_stem_weight(at: str) -> None:
    case = BY_NAME["basic"]
    model, net = adapted(case)
    x, target = case.batch()
    tape = pathnet.record(net, x, target, at=at, precision="float64")
    x.requires_grad_()
    place: Tensor = x if at == "image" else model.conv1.weight
    (expected,) = torch.autograd.grad(F.cross_entropy(model(x * 1), target), place)
    assert relative_error(tape.gradient(), expected) < EXACT_WALK
    assert net.stem_weight() is model.conv1.weight
