"""Accuracy on test batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pathnet.data import Batches, Data
from pathnet.data.batches import sent
from pathnet.data.passes import Answers, Passes, count_answers
from pathnet.models.residual_net import ResidualNet, check_net

__all__ = ["evaluate"]

EVALUATION_BATCH = 256


def evaluate(net: ResidualNet, data: Data | Batches | Iterable[Any]) -> float:
    """Return the accuracy on the test split, in [0, 1]. The network's mode stays unchanged.

    Args:
        net: the network.
        data: a data set, whose test split runs in batches of 256; or `pathnet.data.Batches`; or any iterable of
            batches, read once and used as they come (inputs normalised already): pairs of inputs and labels, or
            mappings with ``labels``. Labels are int64 [B]; or [B, T] for sequences, where -100 does not count.

    Raises:
        ValueError: an argument is of the wrong type, or an output is not finite. What is wrong with an element of an
            iterable is told by its position, from 0.

    Example:
        >>> import torch
        >>> import pathnet
        >>> data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
        >>> net = pathnet.models.preact_resnet(depth=8, width=8, num_classes=2, in_channels=1)
        >>> 0 <= pathnet.training.evaluate(net, data) <= 1
        True
        >>> images, labels = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
        >>> pathnet.training.evaluate(net, [(images, net.eval()(images).argmax(1))])  # any iterable of batches
        1.0
    """
    check_net(net)
    training, device, wrong, total = net.training, next(net.parameters()).device, 0, 0
    passes = Passes(data, EVALUATION_BATCH)
    net.eval()
    try:
        with torch.no_grad():
            for number, (inputs, labels) in enumerate(passes):
                with passes.element(number):
                    answers = Answers.of(count_answers(net(sent(inputs, device)), labels.to(device)))
                if not answers.finite:
                    raise ValueError(f"net: expected finite outputs, got NaN or infinity on test batch {number}")
                wrong, total = wrong + answers.wrong, total + answers.total
    finally:
        net.train(training)
    if not total:
        raise ValueError("data: expected at least one label that counts, got none")
    return (total - wrong) / total
