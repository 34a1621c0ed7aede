from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import shaken
from helpers.lesioned import labelled_by, rebuilt, with_modules_times, wrong
from scipy.stats import binomtest
from torch import nn

from pathnet import data, lesion, models
from pathnet.lesion import Lesion
from pathnet.lesion.networks import BATCH, block_shapes
from pathnet.models import ResidualNet
from pathnet.training import evaluate

NETS = {
    "residual": lambda: models.preact_resnet(14, 4),
    "stochastic depth": lambda: models.preact_resnet(14, 4, survival=0.4),
    "padded": lambda: models.preact_resnet(14, 4, shortcut="pad"),
    "vgg": lambda: models.vgg(8, 5, stages=3),
    "highway": lambda: models.highway(14, 4),
}


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.synthetic(images=300, shape=(3, 12, 12))


def network(kind: str) -> ResidualNet:
    torch.manual_seed(0)
    return shaken(NETS[kind]()).eval()


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("kind", NETS)
def test_errors_are_those_of_networks_built_without_the_blocks(images: data.Data, kind: str, bn: str) -> None:
    net = network(kind)
    images = labelled_by(net, images)
    lesions = [(), (0,), (2,), (1, 4), (5,), (2, 3, 4)]
    measured = lesion.errors(net, images, [Lesion(blocks) for blocks in lesions], bn)  # type: ignore[arg-type]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and bn == "batch":
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    expected: list[list[bool]] = [[] for _ in lesions]
    with torch.no_grad():
        for batch, labels in images.test_batches(BATCH):
            for i, blocks in enumerate(lesions):
                answers = rebuilt(net, list(range(net.n)), set(blocks), batch).argmax(1)
                expected[i] += (answers != labels).tolist()
    assert measured.misclassified.tolist() == expected and measured.bn == bn and measured.images == len(images.test)
    assert measured.wrong.tolist() == list(map(sum, expected))
    assert len(set(measured.wrong.tolist())) > 2, "lesions that change nothing show nothing"


@pytest.mark.parametrize("kind", ["residual", "stochastic depth", "vgg", "highway"])
def test_orders_are_those_of_networks_built_in_them(images: data.Data, kind: str) -> None:
    net = network(kind)
    images = labelled_by(net, images)
    order = {"vgg": [0, 2, 1, 3, 4, 5]}.get(kind, [1, 0, 2, 3, 4, 5])
    whole = block_shapes(net, torch.zeros(1, 3, 12, 12))
    assert whole[order[0]][0] == whole[0][0]
    measured = lesion.errors(net, images, [Lesion(order=tuple(order)), Lesion((1,), tuple(order))])
    with torch.no_grad():
        batch, labels = next(images.test_batches(len(images.test)))
        expected = [wrong(rebuilt(net, order, gone, batch), labels) for gone in (set(), {order[1]})]
    assert measured.wrong.tolist() == expected and min(expected) > 0


def test_shapes_leave_the_mode_even_where_the_images_are_too_small() -> None:
    net = models.vgg(depth=6, width=2, stages=2).train()
    with pytest.raises(RuntimeError):
        block_shapes(net, torch.zeros(1, 3, 1, 1))
    assert all(module.training for module in net.modules())


SCALED = [Lesion(scale=0.9), Lesion((1,), scale=0.8), Lesion((0, 3), scale=1.5), Lesion((4,)), Lesion(scale=1.1)]


@pytest.mark.parametrize("kind", NETS)
def test_a_scale_multiplies_the_modules_that_are_kept(images: data.Data, kind: str) -> None:
    net = network(kind)
    images = labelled_by(net, images)
    order = tuple([0, 2, 1, 3, 4, 5] if kind == "vgg" else [1, 0, 2, 3, 4, 5])
    measured = lesion.errors(net, images, [*SCALED, Lesion(order=order, scale=0.5)])
    batch, labels = next(images.test_batches(len(images.test)))
    with torch.no_grad():
        outputs = [rebuilt(with_modules_times(net, each.scale), range(6), each.deleted, batch) for each in SCALED]
        outputs.append(rebuilt(with_modules_times(net, 0.5), order, (), batch))
    assert measured.wrong.tolist() == [wrong(output, labels) for output in outputs]
    assert len(set(measured.wrong.tolist())) > 2


@pytest.mark.parametrize("kind", ["residual", "stochastic depth", "vgg", "highway"])
def test_a_scaled_network_is_recalibrated_as_it_is(images: data.Data, kind: str) -> None:
    net = network(kind)
    images = labelled_by(net, images)
    lesions = [Lesion(scale=0.5), Lesion((1, 2), scale=0.5), Lesion((3,))]
    measured = lesion.errors(net, images, lesions, bn="recalibrated")
    batch, labels = next(images.test_batches(len(images.test)))
    expected = []
    with torch.no_grad():
        for each in lesions:
            scaled = with_modules_times(net, each.scale)
            norms = [module for module in scaled.modules() if isinstance(module, nn.BatchNorm2d)]
            for number in range(lesion.RECALIBRATION_BATCHES):
                for norm in norms:
                    norm.train().momentum = 1 / (number + 1)
                rebuilt(scaled, range(6), each.deleted, images.random_batch(BATCH, 0, number)[0])
            for norm in norms:
                norm.eval()
            expected.append(wrong(rebuilt(scaled, range(6), each.deleted, batch), labels))
    assert measured.wrong.tolist() == expected and measured.bn == "recalibrated"
    assert measured.wrong.tolist() != lesion.errors(net, images, lesions).wrong.tolist()


@pytest.mark.parametrize("kind", NETS)
def test_a_view_shares_the_weights_and_a_context_lesions_the_network_itself(images: data.Data, kind: str) -> None:
    net = network(kind)
    batch, _ = next(images.test_batches(8))
    with torch.no_grad():
        whole, without = net(batch), rebuilt(net, list(range(net.n)), {1, 2}, batch)
        view = lesion.delete(net, [1, 2])
        torch.testing.assert_close(view(batch), without)
        with view as lesioned:
            assert lesioned is net
            torch.testing.assert_close(net(batch), without)
            accuracy = evaluate(net, images)
        assert torch.equal(net(batch), whole) and accuracy == evaluate(view, images)
        assert {id(p) for p in view.parameters()} <= {id(p) for p in net.parameters()}
        next(iter(net.head.parameters())).mul_(2.0)
        torch.testing.assert_close(view(batch), rebuilt(net, list(range(net.n)), {1, 2}, batch))


def test_a_context_is_left_also_through_an_exception() -> None:
    net = network("residual")
    blocks = net.blocks
    with pytest.raises(KeyError), lesion.reorder(net, [1, 0, 2, 3, 4, 5]):
        assert net.blocks is not blocks
        raise KeyError
    assert net.blocks is blocks


def test_recalibrated_statistics_are_the_means_over_training_batches(images: data.Data) -> None:
    net = network("residual")
    images = labelled_by(net, images)
    before = models.fingerprint(net)
    ready = lesion.recalibrated(lesion.delete(net, [1]), images, batches=3, seed=5)
    sums = []
    with torch.no_grad():
        for batch in range(3):
            y = net.stem(images.random_batch(128, 5, batch)[0])
            sums.append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
    bn = ready.blocks[0].bns[0]
    for statistics, which in ((bn.running_mean, 0), (bn.running_var, 1)):
        torch.testing.assert_close(statistics, torch.stack([each[which] for each in sums]).mean(0))
    assert models.fingerprint(net) == before and not ready.training
    measured = lesion.errors(net, images, [Lesion((1,))], bn="recalibrated")
    batch, labels = next(images.test_batches(len(images.test)))
    with torch.no_grad():
        assert measured.wrong.tolist() == [wrong(lesion.recalibrated(lesion.delete(net, [1]), images)(batch), labels)]


def test_a_part_of_the_test_images_is_spread_over_the_split(images: data.Data) -> None:
    net = network("residual")
    measured = lesion.errors(net, images, [Lesion()], images=10)
    indices = torch.arange(10) * len(images.test) // 10
    with torch.no_grad():
        outputs = net(images.normalise(images.test.take(indices)))
    labels = images.test.labels[indices]
    assert measured.wrong.tolist() == [wrong(outputs, labels)] and measured.images == 10
    assert measured.misclassified.tolist() == [(outputs.argmax(1) != labels).tolist()]


def test_intervals_are_wilsons() -> None:
    measured = lesion.Errors(np.arange(50) < [[0], [7], [50]], "running")
    assert measured.rate.tolist() == [0, 0.14, 1]
    z, n = 1.959963984540054, 50
    for rate, (low, high) in zip(measured.rate, measured.interval, strict=True):
        middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
        assert (low, high) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-12)
    assert measured.interval[1].tolist() == list(binomtest(7, 50).proportion_ci(method="wilson"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Lesion((6,)), r"deleted: expected different numbers from 0 to 5, got \[6\]"),
        (Lesion((1, 1)), r"deleted: expected different numbers"),
        (Lesion(order=(0, 1, 2)), r"order: expected every number from 0 to 5 once"),
        (
            Lesion(order=(0, 2, 1, 3, 4, 5)),
            r"order: block 1 takes \[4, 12, 12\], got \[8, 6, 6\] in place 2",
        ),
    ],
)
def test_lesions_that_do_not_fit_are_named(images: data.Data, bad: Lesion, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lesion.errors(network("residual"), images, [bad])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *(({"scale": scale}, r"scale: expected a finite number above 0") for scale in (0.0, -1.0, np.nan, np.inf)),
        *(({"deleted": (i,)}, r"deleted: expected an integer of at least 0") for i in (1.5, True, -1, "1", None)),
        *(({"order": order}, r"order: expected") for order in ((0, 1.0), "01", 3, {0: 1})),
    ],
)
def test_a_lesion_of_no_block_or_no_factor_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lesion(**bad)


@pytest.mark.parametrize("blocks", [[1.5], [True], ["1"], [None], 1, "1", torch.ones(1), torch.tensor([True])])
def test_what_is_no_number_of_a_block_deletes_nothing(blocks: Any) -> None:
    with pytest.raises(ValueError, match="blocks: expected (an integer|a list of integers) of at least 0, got"):
        lesion.delete(network("residual"), blocks)


def test_block_numbers_of_arrays_and_tensors_delete(images: data.Data) -> None:
    net = network("residual")
    batch, _ = next(images.test_batches(4))
    expected = lesion.delete(net, [1, 2])(batch)
    for blocks in (np.array([1, 2]), torch.tensor([1, 2]), {1, 2}, (i for i in (1, 2))):
        assert torch.equal(lesion.delete(net, blocks)(batch), expected)


@pytest.mark.parametrize("bn", ["running", "batch", "recalibrated"])
def test_outputs_that_are_not_finite_are_no_answers(images: data.Data, bn: lesion.BatchNormPolicy) -> None:
    net = network("residual")
    net.head.linear.bias.data[0] = np.nan
    with pytest.raises(ValueError, match=r"lesions: expected finite outputs, got NaN or infinity from lesion 0"):
        lesion.errors(net, images, [Lesion((1,)), Lesion()], bn)


@pytest.mark.parametrize("wrong", [None, [], "digits", object()])
def test_what_is_no_data_set_or_no_network_is_named(images: data.Data, wrong: Any) -> None:
    net = network("residual")
    for call in (lesion.errors, lesion.recalibrated):
        arguments = ([],) if call is lesion.errors else ()
        with pytest.raises(ValueError, match="^data: expected (a pathnet Data, or|at least one batch)"):
            call(net, wrong, *arguments)
        with pytest.raises(ValueError, match="net: expected a pathnet ResidualNet"):
            call(wrong, images, *arguments)


def test_bad_arguments_are_named(images: data.Data) -> None:
    net = network("residual")
    with pytest.raises(ValueError, match="bn: expected"):
        lesion.errors(net, images, [Lesion()], bn="frozen")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images: expected 0 \(all\) to"):
        lesion.errors(net, images, [Lesion()], images=10**6)
    with pytest.raises(ValueError, match=r"order: expected every number"):
        lesion.reorder(net, [])
    with pytest.raises(ValueError, match=r"blocks: expected an integer of at least 0, got -1"):
        lesion.delete(net, [-1])


def test_text_is_no_list_of_lesions(images: data.Data) -> None:
    with pytest.raises(ValueError, match=r"^lesions: expected a list of Lesions, got ''$"):
        lesion.errors(models.preact_resnet(8, 2, in_channels=images.image_shape[0]), images, "")  # type: ignore[arg-type]
