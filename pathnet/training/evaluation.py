"""Accuracy on the test split."""

from __future__ import annotations

import torch

from pathnet.data import Data
from pathnet.data.images import check_data_set
from pathnet.models.residual_net import ResidualNet, check_net

__all__ = ["evaluate"]

EVALUATION_BATCH = 256


def evaluate(net: ResidualNet, data: Data) -> float:
    """Return the accuracy on the test split, in [0, 1]. The network's mode stays unchanged.

    Raises:
        ValueError: an argument is of the wrong type, or an output is not finite.
    """
    check_net(net)
    check_data_set("data", data)
    training, device, right = net.training, next(net.parameters()).device, 0
    net.eval()
    try:
        with torch.no_grad():
            for number, (images, labels) in enumerate(data.test_batches(EVALUATION_BATCH)):
                output = net(images.to(device))
                facts = (output.argmax(1) == labels.to(device)).sum(), torch.isfinite(output).all()
                count, finite = torch.stack(facts).tolist()
                if not finite:
                    raise ValueError(f"net: expected finite outputs, got NaN or infinity on test batch {number}")
                right += count
    finally:
        net.train(training)
    return right / len(data.test)
