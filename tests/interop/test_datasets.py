"""An exported run, read by the library of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pathnet
from pathnet import results
from pathnet.experiments import PathGradients, path_gradients

datasets = pytest.importorskip("datasets")


def test_datasets_reads_an_exported_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    data = pathnet.data.synthetic(images=64, classes=2, shape=(1, 8, 8))
    torch.manual_seed(0)
    net = pathnet.models.preact_resnet(depth=14, width=4, num_classes=2, in_channels=1)
    for method in ("sampled", "exact"):
        plan = PathGradients(batches=3, batch_size=8, method=method)
        run = path_gradients.measure(net, data, plan, tmp_path / "run")
    results.export(run, tmp_path / "export")

    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset(str(tmp_path / "export"), split="train", cache_dir=cache)
    measured = run.measurements()
    assert rows["norm"][:] == measured.norm.tolist() and rows["batch"][:] == measured.batch.tolist()
    assert rows["path"][:] == ["".join(map(str, path)) for path in measured.path.tolist()]
    sums = datasets.load_dataset(str(tmp_path / "export"), "exact_sums", split="train", cache_dir=cache)
    assert len(sums) == 3 * (net.n + 1)
