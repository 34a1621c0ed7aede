"""The adapter of the documentation logs to wandb in its offline mode, which asks nothing of the network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers.pages import blocks_of

pytest.importorskip("wandb")

PAGE = ROOT / "docs" / "tutorials" / "training-loop.md"
BEGIN = """
import pathnet
data = pathnet.data.synthetic(images=100, shape=(1, 4, 4))
net = pathnet.models.preact_resnet(8, 1, in_channels=1)
recipe = pathnet.training.Recipe(epochs=2, batch_size=4, warmup_steps=0)
probe = data.random_batch(4, seed=1, batch=0)
"""
"""What comes before the adapter on its page, but smaller."""
BLOCK = 32768
"""Bytes of a block of the file, which has the format of LevelDB's logs after 7 bytes."""


def block() -> str:
    (code,) = (block.code for block in blocks_of(PAGE.read_text()) if block.remark == ("not run", "needs wandb"))
    return code


def records(content: bytes) -> Iterator[bytes]:
    offset, record = 7, b""
    while offset < len(content):
        if BLOCK - offset % BLOCK < 7:
            offset += BLOCK - offset % BLOCK
            continue
        length, kind = int.from_bytes(content[offset + 4 : offset + 6], "little"), content[offset + 6]
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def logged(file: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Return the rows of a run, and its metrics with those that they are drawn over."""
    from wandb.proto import wandb_internal_pb2

    rows, metrics = [], []
    for content in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif record.WhichOneof("record_type") == "metric":
            metrics.append((record.metric.glob_name or record.metric.name, record.metric.step_metric))
    return rows, metrics


def test_the_adapter_of_the_page_logs_losses_and_depths_offline(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    end = "\nimport json\nprint(json.dumps([vars(epoch) for epoch in history]))\n"
    script.write_text(BEGIN + block().replace("every=10", "every=15, share=float('inf')") + end)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        folders = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
        proxies = {name: address for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        environment |= {**folders, **proxies, "WANDB_BASE_URL": address, "HOME": str(tmp_path)}
        ran = subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", script],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
        with pytest.raises(TimeoutError):  # nobody called
            server.accept()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows, metrics = logged(file)
    assert ("*", "step") in metrics
    steps: dict[str, list[int]] = {}
    values: dict[tuple[str, int], float] = {}
    for row in rows:
        (tag,) = (name for name in row if name != "step" and not name.startswith("_"))
        steps.setdefault(tag, []).append(row["step"])
        values[tag, row["step"]] = row[tag]
    assert steps["training/loss"] == steps["training/learning rate"] == [10, 20, 30, 40, 50]
    assert steps["effective depth/depth"] == [0, 15, 30, 45]
    history = json.loads(ran.stdout.splitlines()[-1])
    assert [values["epoch/test accuracy", 25 * (epoch["epoch"] + 1)] for epoch in history] == [
        epoch["test_accuracy"] for epoch in history
    ]
    assert [row["_step"] for row in rows] == list(range(len(rows))), "wandb's own steps grow, and no row is lost"
    assert len(rows) == 10 + 4 + 4 * 6
