"""Settings that several commands share, and the devices and folders that they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch

from pathnet.commands.places import check_existing_folder, check_folder_to_write, check_utf_8
from pathnet.progress import reporter
from pathnet.settings import Checked, Flag, Help, Panel
from pathnet.study import DataSet, Reporter
from pathnet.training import Progress
from pathnet.workers import ALONE, Workers

__all__ = [
    "Device",
    "ExistingData",
    "Json",
    "RunFolder",
    "check_data",
    "check_folder_for_weights",
    "device_of",
    "one_thread",
    "reporter_of",
]

BUILT_IN = ("digits", "synthetic")


def check_data(name: str, data: str) -> None:
    """Raise ValueError unless ``data`` is a built-in data set or an existing folder."""
    if data not in BUILT_IN:
        check_existing_folder(name, Path(data), f"{', '.join(BUILT_IN)} or an existing folder")


def check_folder_for_weights(name: str, folder: Path) -> None:
    """Raise ValueError unless weights can be written into the folder, which need not exist."""
    check_folder_to_write(name, folder)
    check_utf_8(name, folder)


ExistingData = Annotated[DataSet, Checked(check_data)]
RunFolder = Annotated[
    Path, Help("Folder of the run; an existing run resumes."), Flag(value="FOLDER"), Checked(check_folder_to_write)
]
Device = Annotated[
    str, Help("cpu, cuda, or auto: cuda where there is a GPU, else cpu."), Flag(value="DEVICE"), Panel("General")
]
Json = Annotated[bool, Help("Print one JSON object on stdout, and nothing else."), Flag("--json"), Panel("General")]


def device_of(name: str, workers: Workers = ALONE) -> torch.device:
    """Return the device of a name: ``auto`` is the GPU where there is one; of several processes, each has one.

    Raises:
        ValueError: there is no such device here, or there are fewer GPUs than processes.
    """
    device = _device_of(name)
    if device.type == "cpu" or workers.count == 1:
        return device
    if (gpus := torch.cuda.device_count()) < workers.local_count:
        raise ValueError(
            f"device: expected a GPU for each of {workers.local_count} processes on this machine, got {gpus}; "
            f"take --nproc-per-node {gpus}"
        )
    device = torch.device("cuda", workers.local_rank)
    torch.cuda.set_device(device)
    return device


def reporter_of(workers: Workers) -> Reporter:
    """Return what shows progress: in the first process alone, which shows that of all."""
    return reporter if workers.leads else _silent


@contextmanager
def _silent(label: str) -> Iterator[Progress]:
    yield lambda done, total, note: None


def _device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name not in usable:
        why = "" if len(usable) > 1 else " (torch can use no GPU here)"
        raise ValueError(f"device: expected auto, {' or '.join(usable)}{why}, got {name!r}")
    return torch.device(name)


@contextmanager
def one_thread(small: bool) -> Iterator[None]:
    """Compute on one thread if images are small: several would spend more time waiting than working."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
