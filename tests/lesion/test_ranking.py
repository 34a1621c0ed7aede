"""`pathnet.lesion.rank` against networks built without the blocks, finite differences and linear networks."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import shaken
from helpers.lesioned import labelled_by, rebuilt
from scipy import stats
from torch import Tensor, nn

from pathnet import data, lesion, models, training
from pathnet.models import Block, ResidualNet
from pathnet.recording import cross_entropy

NETS = {
    "residual": lambda: models.preact_resnet(14, 4),
    "stochastic depth": lambda: models.preact_resnet(14, 4, survival=0.4),
    "padded": lambda: models.preact_resnet(14, 4, shortcut="pad"),
    "vgg": lambda: models.vgg(8, 5, stages=3),
    "highway": lambda: models.highway(14, 4),
}


def network(kind: str) -> ResidualNet:
    torch.manual_seed(0)
    return shaken(NETS[kind]()).double().eval()


def by_batch_statistics(net: ResidualNet) -> ResidualNet:
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return net


def batches(sizes: tuple[int, ...] = (3, 5)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 3, 12, 12, dtype=torch.float64, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for size in sizes
    ]


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("kind", NETS)
def test_increases_are_those_of_networks_built_without_the_block(kind: str, bn: Any) -> None:
    net, pairs = network(kind), batches((3, 5, 4, 1, 2, 3, 1, 2, 1, 2))
    before = models.fingerprint(net)
    ranking = lesion.rank(net, pairs, bn=bn)
    exact = net if bn == "running" else by_batch_statistics(net)
    rows, wrong = [], []
    with torch.no_grad():
        for images, labels in pairs:
            outputs = [rebuilt(exact, range(6), {i}, images) for i in range(6)]
            whole = rebuilt(exact, range(6), (), images)
            rows.append([(F.cross_entropy(each, labels) - F.cross_entropy(whole, labels)).item() for each in outputs])
            missed = (whole.argmax(1) != labels).sum()
            wrong.append([((each.argmax(1) != labels).sum() - missed).item() for each in outputs])
    increases, sizes = np.array(rows), np.array([len(labels) for _, labels in pairs])
    mean = np.average(increases, axis=0, weights=sizes)
    assert ranking.loss == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert ranking.error == pytest.approx(np.sum(wrong, 0) / 24, abs=1e-12)
    se = np.sqrt(10 / 9 * ((sizes[:, None] * (increases - mean)) ** 2).sum(0)) / 24
    assert ranking.standard_errors["loss"] == pytest.approx(se, rel=1e-8)
    assert ranking.batches == 10 and len(set(ranking.loss.tolist())) == 6
    assert ranking.order().tolist() == sorted(range(6), key=lambda i: mean[i])
    assert ranking.order("first_order").tolist() == sorted(range(6), key=lambda i: ranking.first_order[i])
    assert models.fingerprint(net) == before and not net.training


class Partly(Block):
    """``y + eps (lesioned - y)`` of another block."""

    def __init__(self, block: Block, eps: float) -> None:
        super().__init__()
        self.block, self.eps = block, eps

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y + self.eps * (self.block.lesioned(x) - y)


@pytest.mark.parametrize("bn", ["running", "batch"])
@pytest.mark.parametrize("kind", NETS)
def test_first_order_estimates_are_slopes_towards_deletion(kind: str, bn: Any) -> None:
    net, pairs = network(kind), batches((4,))
    ranking = lesion.rank(net, pairs, bn=bn)
    exact = net if bn == "running" else by_batch_statistics(net)
    (images, labels), step = pairs[0], 1e-8
    with torch.no_grad():
        for i in range(6):
            blocks, values = list(exact.blocks), []
            for eps in (step, -step):
                blocks[i] = Partly(exact.blocks[i], eps)
                values.append(F.cross_entropy(ResidualNet(exact.stem, blocks, exact.head)(images), labels).item())
            assert ranking.first_order[i] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-5)
    assert len(ranking.standard_errors) == 4 and all(
        np.isnan(errors).all() for errors in ranking.standard_errors.values()
    )
    if bn == "running":
        alone = [lesion.rank(net, [(image[None], label[None])]) for image, label in zip(*pairs[0], strict=True)]
        assert ranking.first_order == pytest.approx(np.mean([one.first_order for one in alone], 0), abs=1e-12)
        sizes = np.mean([np.abs(one.first_order) for one in alone], 0)
        assert ranking.taylor == pytest.approx(sizes, rel=1e-9)
        assert (sizes > np.abs(ranking.first_order)).any()


class Linear(Block):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def residual(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Words(nn.Module):
    """A stem of token numbers [B, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)


def language_model(dtype: torch.dtype = torch.float64) -> ResidualNet:
    torch.manual_seed(0)
    return ResidualNet(Words(), [Linear(6) for _ in range(4)], nn.Linear(6, 11)).to(dtype)


def next_token(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def test_the_estimate_is_exact_on_a_linear_network() -> None:
    net, tokens = language_model(), torch.randint(0, 11, (10, 5, 7), generator=torch.Generator().manual_seed(0))
    ranking = lesion.rank(net, [(text, torch.zeros(1)) for text in tokens], lambda output, _: output[..., 2].mean())
    assert ranking.first_order == pytest.approx(ranking.loss, rel=1e-10)
    assert ranking.standard_errors["first_order"] == pytest.approx(ranking.standard_errors["loss"], rel=1e-9)
    assert ranking.agreement("first_order") == 1 and np.isnan(ranking.error).all() and np.isnan(ranking.whole_error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_and_targets_of_which_some_do_not_count(dtype: torch.dtype) -> None:
    net, generator = language_model(dtype), torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, 11, (2, 4, 6), generator=generator) for _ in range(2))
    targets[:, 0, :3] = -100
    targets[1, 1:] = -100
    ranking = lesion.rank(net, zip(tokens, targets, strict=True), next_token)
    exact = copy.deepcopy(net).double()
    wrong, losses = np.zeros(5), np.zeros(5)
    with torch.no_grad():
        for text, target in zip(tokens, targets, strict=True):
            for deleted in range(5):
                y = exact.stem(text)
                for i, block in enumerate(exact.blocks):
                    y = y if deleted == i + 1 else y + block.layer(y)
                output = exact.head(y)
                losses[deleted] += next_token(output, target).item() / 2
                wrong[deleted] += ((output.argmax(-1) != target) & (target >= 0)).sum().item()
    known = int((targets >= 0).sum())
    assert ranking.loss == pytest.approx(losses[1:] - losses[0], rel=1e-4, abs=1e-6)
    assert ranking.error == pytest.approx((wrong[1:] - wrong[0]) / known, abs=1e-12)
    assert ranking.whole_loss == pytest.approx(losses[0], rel=1e-5)
    assert ranking.whole_error == pytest.approx(wrong[0] / known)
    assert next(net.parameters()).dtype == dtype


def test_data_is_taken_in_batches_and_agrees_with_the_errors() -> None:
    torch.manual_seed(0)
    net = shaken(models.preact_resnet(14, 4)).eval()
    images = labelled_by(net, data.synthetic(images=300, shape=(3, 12, 12)))
    ranking = lesion.rank(net, images)
    errors = lesion.errors(net, images, [lesion.Lesion((i,)) for i in range(6)])
    assert ranking.error == pytest.approx(errors.rate) and ranking.whole_error == 0
    assert ranking.batches == -(-len(images.test) // 32)
    few = lesion.rank(net, images, images=10)
    assert few.error == pytest.approx(
        lesion.errors(net, images, [lesion.Lesion((i,)) for i in range(6)], images=10).rate
    )


def test_after_seconds_of_training_on_digits_the_criterion_tells_which_blocks_matter() -> None:
    digits = data.digits()
    torch.manual_seed(0)
    net = models.preact_resnet(26, 8, in_channels=1)
    training.train(net, digits, training.Recipe(epochs=2, batch_size=32, warmup_steps=44, augment=False))
    ranking = lesion.rank(net, digits)
    assert ranking.whole_error < 0.5 and ranking.agreement() > 0.3
    assert ranking.agreement() == pytest.approx(stats.kendalltau(ranking.loss, ranking.taylor).statistic)
    assert (ranking.standard_errors["loss"] > 0).all() and (ranking.standard_errors["error"] > 0).any()


def test_what_is_the_same_for_all_blocks_agrees_with_nothing() -> None:
    same = np.ones(3)
    assert np.isnan(lesion.Ranking(same, same, np.arange(3.0), same, {}, 0.0, 0.0, 2).agreement("first_order"))


@pytest.mark.parametrize("seed", range(20))
def test_agreement_is_kendalls_tau_also_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loss, taylor = (rng.integers(0, most, 12) / 8 for most in (5, 100))
    agreement = lesion.Ranking(loss, loss, taylor, taylor, {}, 0.0, 0.0, 2).agreement()
    assert agreement == float(stats.kendalltau(taylor, loss).statistic)


def test_a_ranking_says_what_it_found() -> None:
    loss = np.array([0.5, -0.001, 0.25])
    assert repr(lesion.Ranking(loss, loss, loss, loss, {}, 2.3, 0.0, 1)) == (
        "Ranking(3 blocks, 1 batch, loss 2.3; "
        "increase of the loss by deleting block 1: -0.001, block 2: +0.25, block 0: +0.5)"
    )
    many = np.arange(54.0)
    assert repr(lesion.Ranking(many, many, many, many, {}, 2.3, 0.0, 12)) == (
        "Ranking(54 blocks, 12 batches, loss 2.3; increase of the loss by deleting block 0: +0, block 1: +1, "
        "block 2: +2, block 3: +3, block 4: +4, ..., block 53: +53)"
    )


def test_bad_arguments_are_named() -> None:
    net, pairs = network("residual"), batches()
    with pytest.raises(ValueError, match="data: expected at least one batch, got none"):
        lesion.rank(net, [])
    with pytest.raises(ValueError, match="images: expected 0 for batches that are no data set, got 5"):
        lesion.rank(net, pairs, images=5)
    with pytest.raises(ValueError, match="bn: expected"):
        lesion.rank(net, pairs, bn="recalibrated")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected one real number per batch"):
        lesion.rank(net, pairs, lambda output, target: output)
    with pytest.raises(ValueError, match="by: expected 'loss' or 'error' or 'first_order' or 'taylor', got 'size'"):
        lesion.rank(net, pairs).order("size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="net: its loss on batch 1 is nan"):
        losses = iter([cross_entropy] * 8 + [lambda output, target: output.sum() * torch.nan] * 7)
        lesion.rank(net, pairs, lambda output, target: next(losses)(output, target))
    assert dataclasses.is_dataclass(lesion.rank(net, pairs))


@pytest.mark.parametrize("function", [lesion.delete, lesion.reorder, lesion.rank])
def test_lesions_of_a_model_that_is_not_adapted_are_told(function: Any) -> None:
    with pytest.raises(ValueError, match="net: expected a pathnet ResidualNet, got a Linear"):
        function(nn.Linear(1, 1), [0])


@pytest.mark.parametrize("wrong", [None, 3, "digits", [1], [torch.ones(2)], torch.ones(2, 3), {"a": 1}])
def test_what_is_no_data_set_and_no_pairs_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match="data: expected"):
        lesion.rank(network("residual"), wrong)


class _NothingBeside(models.PreactBlock):
    """A block whose skip connection alone gives NaN."""

    def lesioned(self, x: Tensor) -> Tensor:
        return x * torch.nan


def test_a_block_without_which_the_loss_is_not_finite_is_told() -> None:
    net = network("residual")
    net.blocks[1].__class__ = _NothingBeside
    with pytest.raises(ValueError, match="net: its loss without block 1 on batch 0 is nan"):
        lesion.rank(net, batches())
