"""Bits do not depend on the number of threads, and so not on that of processes that share the cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import pathnet
from pathnet import lesion, models, scaling
from pathnet.experiments import PathGradients, Plan, lesion_single, path_gradients
from pathnet.models import ResidualNet

THREADS = (1, 2, 4)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def nets() -> dict[str, ResidualNet]:
    torch.manual_seed(0)
    narrow = models.preact_resnet(14, 16, num_classes=4)
    return {"narrow": narrow, "bottleneck": models.preact_resnet(11, 16, num_classes=4, block="bottleneck")}


@pytest.mark.parametrize("engine", ["cpu", "autograd", "reference"])
@pytest.mark.parametrize(("kind", "bn"), [("narrow", "running"), ("bottleneck", "batch")])
def test_a_run_is_the_same_bytes_for_any_number_of_threads(
    nets: dict[str, ResidualNet], kind: str, engine: str, bn: Literal["batch", "running"], tmp_path: Path
) -> None:
    if pathnet.engines.available()[engine] is not None:
        pytest.skip("the engine is not built")
    data = pathnet.data.synthetic(images=32, classes=4, shape=(3, 16, 16))
    measured = dict[int, Any]()
    for threads in THREADS:
        torch.set_num_threads(threads)
        folder = tmp_path / str(threads)
        for method in ("sampled", "exact"):
            plan = PathGradients(method=method, batches=1, batch_size=12, engine=engine, bn=bn)  # type: ignore[arg-type]
            path_gradients.measure(nets[kind], data, plan, folder)
        measured[threads] = {file.name: file.read_bytes() for file in (folder / "measurements").iterdir()}
    assert measured[1] == measured[2] == measured[4] and len(measured[1]) == 2


def test_lesions_are_computed_on_one_thread(
    nets: dict[str, ResidualNet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, errors = list[int](), lesion.errors

    def noting(*arguments: Any) -> lesion.Errors:
        threads.append(torch.get_num_threads())
        return errors(*arguments)

    monkeypatch.setattr(lesion, "errors", noting)
    torch.set_num_threads(3)
    data = pathnet.data.synthetic(images=32, classes=4, shape=(3, 8, 8))
    lesion_single.measure({"residual": [nets["narrow"]]}, data, Plan(), tmp_path)
    assert threads == [1] and torch.get_num_threads() == 3


@pytest.mark.parametrize("length", [0, 1, 4096, 4097, 100_000, 3_000_001])
def test_a_long_sum_is_the_same_bits_for_any_number_of_threads(length: int) -> None:
    values = torch.rand(1, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    totals = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        totals.append(scaling.total(values))
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])
    torch.testing.assert_close(totals[0], values.sum(-1), rtol=1e-14, atol=0)
