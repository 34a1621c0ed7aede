"""A GPU is never far behind the program that launches chunks, and waits answer signals."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from pathnet import chunks
from pathnet.chunks import Pace, in_chunks


class Gpu:
    """Streams and events of a GPU that finishes a chunk at every ``patience``-th query."""

    def __init__(self, patience: int) -> None:
        self.patience, self.queries, self.recorded = patience, 0, 0

    def current_stream(self, device: torch.device) -> Gpu:
        assert device == torch.device("cuda", 1)
        return self

    def record_event(self) -> Gpu:
        self.recorded += 1
        return self

    def query(self) -> bool:
        self.queries += 1
        return self.queries % self.patience == 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(3)
    monkeypatch.setattr(torch.cuda, "current_stream", gpu.current_stream)
    monkeypatch.setattr(chunks, "POLL_SECONDS", 0.0)
    return gpu


def parts(count: int, pace: Pace) -> list[range]:
    return [range(count)[part] for part, _ in in_chunks(range(count), 1, lambda part: None, pace=pace)]


def test_chunks_on_a_gpu_are_of_bounded_work_and_each_waits_for_the_one_before(gpu: Gpu) -> None:
    pace = Pace(torch.device("cuda", 1), chunks.CHUNK_PASSES // 10)
    assert parts(35, pace) == [range(10), range(10, 20), range(20, 30), range(30, 35)]
    # Before the second chunk there is nothing to wait for; after the last, the fetch of the results waits.
    assert gpu.recorded == 3 and gpu.queries == 2 * gpu.patience


def test_a_single_chunk_waits_for_nothing(gpu: Gpu) -> None:
    assert parts(10, Pace(torch.device("cuda", 1), chunks.CHUNK_PASSES // 10)) == [range(10)]
    assert gpu.recorded == 0


def test_one_item_is_a_chunk_however_much_work_it_is(gpu: Gpu) -> None:
    assert parts(2, Pace(torch.device("cuda", 1), 100 * chunks.CHUNK_PASSES)) == [range(1), range(1, 2)]


def test_a_chunk_has_no_more_items_than_fit_and_than_are_taken_at_once() -> None:
    def sizes(room: int, most: int | None) -> list[int]:
        return [len(chunk) for _, chunk in in_chunks(range(10), 2, lambda chunk: chunk, room, most)]

    assert sizes(6, None) == [3, 3, 3, 1]
    assert sizes(6, 2) == [2] * 5 and sizes(6, 5) == [3, 3, 3, 1]
    assert sizes(1, None) == [1] * 10 and sizes(100, None) == [10]


def test_a_processor_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "current_stream", unwanted)
    assert parts(35, Pace(torch.device("cpu"), chunks.CHUNK_PASSES)) == [range(35)]


def test_an_interrupt_ends_the_wait_for_a_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.patience = 1 << 62
    monkeypatch.setattr(chunks, "POLL_SECONDS", 1e-3)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            parts(35, Pace(torch.device("cuda", 1), chunks.CHUNK_PASSES // 10))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
