"""A caller's own batches: the numbers of a data set with the same batches, and errors that name the element."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import shaken
from helpers.context_nets import CLASSES, scaled_inputs, scaled_net
from helpers.lesioned import labelled_by
from helpers.token_nets import language_model, sentences
from torch import Tensor
from torch.utils.data import DataLoader

from pathnet import lesion, models, training
from pathnet.data import Batches, Data, synthetic
from pathnet.data.batches import sent
from pathnet.lesion import Lesion
from pathnet.models import ResidualNet

Pairs = list[tuple[Any, Tensor]]
LESIONS = [Lesion(), Lesion((1,)), Lesion((0, 3))]
ORDERS = [*LESIONS, Lesion(order=(1, 0, 2, 3, 4, 5)), Lesion((2,), (1, 0, 2, 3, 4, 5))]


@pytest.fixture(scope="module")
def example() -> tuple[ResidualNet, Data]:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(14, 3)).eval()
    return net, labelled_by(net, synthetic(images=1200, shape=(3, 6, 6)))


def pairs(data: Data, size: int) -> Pairs:
    return list(data.test_batches(size))


def mapping(batch: list[tuple[Tensor, Tensor]]) -> UserDict[str, Any]:
    images, labels = zip(*batch, strict=True)
    return UserDict(labels=torch.stack(labels), images=torch.stack(images))


FORMS: dict[str, Callable[[Pairs], Any]] = {
    "list": lambda batches: batches,
    "lists": lambda batches: [list(pair) for pair in batches],
    "generator": lambda batches: (pair for pair in batches),
    "loader": lambda batches: DataLoader(
        [(image, int(label)) for images, labels in batches for image, label in zip(images, labels, strict=True)],  # type: ignore[arg-type]
        batch_size=len(batches[0][1]),
    ),
    "batches": Batches,
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_in_any_form_give_the_numbers_of_the_data_set(example: tuple[ResidualNet, Data], form: str) -> None:
    net, data = example
    make = FORMS[form]
    assert training.evaluate(net, make(pairs(data, 256))) == training.evaluate(net, data) == 1
    for bn in ("running", "batch"):
        expected = lesion.errors(net, data, LESIONS, bn)  # type: ignore[arg-type]
        measured = lesion.errors(net, make(pairs(data, 128)), LESIONS, bn)  # type: ignore[arg-type]
        assert measured.images == expected.images == len(data.test) and max(expected.wrong) > 0
        assert measured.wrong.tolist() == expected.wrong.tolist()
        ranking = lesion.rank(net, make(pairs(data, 32)), bn=bn)  # type: ignore[arg-type]
        np.testing.assert_array_equal(ranking.loss, lesion.rank(net, data, bn=bn).loss)  # type: ignore[arg-type]


def test_a_batch_may_be_a_mapping_with_labels() -> None:
    net, batches = scaled_net(), [scaled_inputs(3, seed) for seed in range(4)]
    named = [UserDict(x=x, scale=scale, labels=labels) for (x, scale), labels in batches]
    outputs = [net(inputs).argmax(1) for inputs, _ in batches]
    right = sum(int((output == labels).sum()) for output, (_, labels) in zip(outputs, batches, strict=True))
    assert 0 < right < 12 and training.evaluate(net, named) == training.evaluate(net, batches) == right / 12
    assert lesion.errors(net, named, [Lesion()]).wrong.tolist() == [12 - right]


def deleted_by_hand(net: ResidualNet, inputs: Any, deleted: int) -> Tensor:
    x, scale = inputs
    y = net.stem(x)
    for i, block in enumerate(net):
        y = scale * y if i == deleted else scale * y + scale * torch.tanh(block.linear(y))
    return net.head(y)


def test_lesions_and_rankings_read_the_context_of_a_batch() -> None:
    net, batches = scaled_net(), [scaled_inputs(5, seed) for seed in range(4)]
    labelled = [(inputs, net(inputs).argmax(1)) for inputs, _ in batches]
    lesions = [Lesion((i,)) for i in range(3)]
    expected = [sum(int((deleted_by_hand(net, x, i).argmax(1) != t).sum()) for x, t in labelled) for i in range(3)]
    assert max(expected) > 0
    assert lesion.errors(net, labelled, lesions).wrong.tolist() == expected
    order = (1, 0, 2)
    reordered = copy.deepcopy(net)
    reordered.blocks = torch.nn.ModuleList([reordered.blocks[i] for i in order])
    wrong = sum(int((reordered(x).argmax(1) != t).sum()) for x, t in labelled)
    assert lesion.errors(net, labelled, [Lesion(order=order)]).wrong.tolist() == [wrong]
    assert torch.equal(lesion.delete(net, [1])(batches[0][0]), deleted_by_hand(net, batches[0][0], 1))
    ranking = lesion.rank(net, labelled)
    losses = [
        np.mean([torch.nn.functional.cross_entropy(deleted_by_hand(net, x, i), t).item() for x, t in labelled])
        for i in (-1, 0, 1, 2)
    ]
    np.testing.assert_allclose(ranking.loss, np.array(losses[1:]) - losses[0], rtol=1e-4, atol=1e-6)


def test_positions_of_sequences_without_a_label_do_not_count() -> None:
    net, (tokens, labels) = language_model(2), sentences(4, 6)
    labels[0, :3] = -100
    counting = labels != -100
    mask = (net(tokens).argmax(-1) != labels)[counting]
    right = int((~mask).sum())
    assert training.evaluate(net, [(tokens, labels)]) == right / 21
    measured = lesion.errors(net, Batches([(tokens[:3], labels[:3]), (tokens[3:], labels[3:])]), [Lesion()])
    assert measured.images == 21 and measured.wrong.tolist() == [21 - right]
    assert measured.misclassified.tolist() == [mask.tolist()] and 0 < right < 21


def test_orders_take_batches_that_can_be_read_again(example: tuple[ResidualNet, Data]) -> None:
    net, data = example
    expected = lesion.errors(net, data, ORDERS)
    for form in ("list", "loader", "batches"):
        measured = lesion.errors(net, FORMS[form](pairs(data, 100)), ORDERS)
        assert measured.wrong.tolist() == expected.wrong.tolist() and measured.images == expected.images
    with pytest.raises(ValueError, match=r"^data: expected batches that can be read 3 times .* got a generator$"):
        lesion.errors(net, FORMS["generator"](pairs(data, 100)), ORDERS)
    images, labels = next(data.test_batches(60))
    both = list(zip(images, labels.tolist(), strict=True))
    shuffled = DataLoader(both, 20, shuffle=True, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="^data: expected the same batches in every pass, got other labels in element"
    ):
        lesion.errors(net, shuffled, ORDERS)


class Shrinking:
    """Yields one batch less each time."""

    def __init__(self, batches: Pairs) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        self.batches = self.batches[:-1]
        return iter(self.batches)


def test_a_pass_that_ends_early_is_told(example: tuple[ResidualNet, Data]) -> None:
    net, data = example
    with pytest.raises(ValueError, match="^data: expected the same batches in every pass, got 1 of 2$"):
        lesion.errors(net, Shrinking(pairs(data, 20)[:4]), ORDERS)


def test_statistics_are_recalibrated_on_training_batches(example: tuple[ResidualNet, Data]) -> None:
    net, data = example
    train = [data.random_batch(data.batch_size(128), 0, batch) for batch in range(8)]
    expected = lesion.recalibrated(net, data)
    for form in (FORMS["list"], FORMS["generator"]):
        buffers = zip(lesion.recalibrated(net, form(train)).buffers(), expected.buffers(), strict=True)
        assert all(torch.equal(measured, buffer) for measured, buffer in buffers)
    both = Batches(pairs(data, 128), train)
    assert torch.equal(lesion.recalibrated(net, both)(train[0][0]), expected(train[0][0]))
    recalibrated = lesion.errors(net, both, LESIONS, "recalibrated")
    assert recalibrated.wrong.tolist() == lesion.errors(net, data, LESIONS, "recalibrated").wrong.tolist()
    for alone in (pairs(data, 128), Batches(pairs(data, 128))):
        with pytest.raises(ValueError, match=r"^data: expected a data set, or .* training batches \(train=\)"):
            lesion.errors(net, alone, LESIONS, "recalibrated")


def test_progress_counts_images(example: tuple[ResidualNet, Data]) -> None:
    net, data = example
    seen: list[tuple[int, int]] = []
    lesion.errors(net, iter(pairs(data, 50)[:3]), LESIONS, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(150, 150), (300, 300), (450, 450)]
    lesion.errors(
        net, Batches(pairs(data, 50)[:2]), LESIONS, progress=lambda done, total, _: seen.append((done, total))
    )
    assert seen[3:] == [(150, 300), (300, 300)]


IMAGES, LABELS = torch.randn(3, 3, 6, 6), torch.tensor([0, 4, 9])
WRONG: dict[str, tuple[Any, str]] = {
    "a number": (7, r"expected \(inputs, labels\) pairs, or mappings with 'labels', got 7 in element 1"),
    "three": ((IMAGES, LABELS, 0), r"expected \(inputs, labels\) pairs, .* got a tuple of 3 in element 1"),
    "a mapping": ({"image": IMAGES}, r"expected \(inputs, labels\) pairs, .* got a mapping of image in element 1"),
    "a tensor": (IMAGES, r"expected \(inputs, labels\) pairs, .* got a tensor .* in element 1"),
    "NaN": ((IMAGES * torch.nan, LABELS), "expected finite inputs, got NaN or infinity in element 1"),
    "infinity": ((IMAGES / 0, LABELS), "expected finite inputs, got NaN or infinity in element 1"),
    "no image": ((IMAGES[:0], LABELS[:0]), r"expected at least one sample, got inputs \[0, 3, 6, 6\] in element 1"),
    "a sparse one": ((IMAGES.to_sparse(), LABELS), "expected dense inputs .* in element 1"),
    "floats": ((IMAGES, LABELS.float()), r"expected (int64|.*int64 tensor) .*torch.float32.*"),
    "few labels": ((IMAGES, LABELS[:2]), r"expected (labels for 3 samples .*|.* element 1 .*), got \[2\].*"),
    "a class too many": ((IMAGES, LABELS + 1), "expected labels 0 to 9 .* got 1 to 10 in element 1"),
    "a negative label": ((IMAGES, LABELS - 1), "expected labels 0 to 9 .* got -1 to 8 in element 1"),
    "another shape": ((IMAGES[:, :1], LABELS), r"expected .* element 1( \(.*\))?"),
    "text": (("images", LABELS), "expected .* element 1( .*)?"),
}
MEASURES: dict[str, Callable[[ResidualNet, Any], Any]] = {
    "evaluate": training.evaluate,
    "errors": lambda net, data: lesion.errors(net, data, LESIONS),
    "rank": lesion.rank,
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_an_element_is_told_by_its_position(
    example: tuple[ResidualNet, Data], measure: str, wrong: str
) -> None:
    element, message = WRONG[wrong]
    for batches in ([(IMAGES, LABELS), element], iter([(IMAGES, LABELS), element])):
        with pytest.raises(ValueError, match=f"^data: {message}$") as caught:
            MEASURES[measure](example[0], batches)
        assert "element 1" in str(caught.value)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("wrong", [None, 3, "digits", IMAGES, {"labels": LABELS}, object()])
def test_what_is_no_iterable_of_batches_is_told(example: tuple[ResidualNet, Data], measure: str, wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^data: expected a pathnet Data, or batches as \(inputs, labels\) pairs, got "
    ):
        MEASURES[measure](example[0], wrong)
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="^data: expected at least one batch, got none$"):
            MEASURES[measure](example[0], nothing)


def test_a_part_of_the_images_is_for_data_sets(example: tuple[ResidualNet, Data]) -> None:
    net, data = example
    message = "^images: expected 0 for batches that are no data set, got 5$"
    for batches in (pairs(data, 50), Batches(pairs(data, 50))):
        with pytest.raises(ValueError, match=message):
            lesion.errors(net, batches, LESIONS, images=5)
        with pytest.raises(ValueError, match=message):
            lesion.rank(net, batches, images=5)


def test_batches_tell_their_elements_and_their_content(example: tuple[ResidualNet, Data]) -> None:
    batches = pairs(example[1], 50)
    with pytest.raises(ValueError, match="^train: expected int64 class labels, .* in element 1$"):
        Batches(batches, [batches[0], (IMAGES, LABELS.float())])
    with pytest.raises(ValueError, match="^name: expected a string, got 3$"):
        Batches(batches, name=3)  # type: ignore[arg-type]
    first = Batches(iter(batches))
    assert first.fingerprint() == Batches([list(pair) for pair in batches]).fingerprint()
    changed = [*batches[:-1], (batches[-1][0] + 1e-3, batches[-1][1])]
    different = [Batches(batches[:-1]), Batches(changed), Batches(batches, batches), Batches(batches[::-1])]
    halves = Batches([(images.bfloat16(), labels) for images, labels in batches])
    assert len({each.fingerprint() for each in (first, *different, halves)}) == 6
    assert repr(first) == f"Batches('batches': {len(batches)} test batches)"
    assert repr(Batches(batches, batches[:1])).endswith("test batches, 1 training batch)")


def test_inputs_are_sent_whole() -> None:
    inputs = {"a": torch.ones(2), "b": (torch.zeros(1), [torch.ones(1), 3])}
    moved = sent(inputs, torch.device("meta"))
    assert moved["a"].is_meta and moved["b"][0].is_meta and moved["b"][1][0].is_meta and moved["b"][1][1] == 3
    assert CLASSES == 4
