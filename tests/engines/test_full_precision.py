"""Full precision, whatever PyTorch's switches say, and the switches restored afterwards.

Each case runs in a separate process: a switch cannot always be restored.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.backends import cudnn, mkldnn

import pathnet
from pathnet import full_precision as full_precision_module
from pathnet.full_precision import full_precision

matmul = torch.backends.cuda.matmul
OPERATORS: dict[str, Any] = {
    "cudnn.conv": cudnn.conv,  # type: ignore[attr-defined]
    "cudnn.rnn": cudnn.rnn,
    "cuda.matmul": matmul,
    "mkldnn.conv": mkldnn.conv,  # type: ignore[attr-defined]
    "mkldnn.rnn": mkldnn.rnn,  # type: ignore[attr-defined]
    "mkldnn.matmul": mkldnn.matmul,  # type: ignore[attr-defined]
}
NEWER: dict[str, Any] = {"process": torch.backends, "cudnn": cudnn, **OPERATORS}
PRECISIONS = ["none", "ieee", "tf32"]

SETTINGS = {
    **{
        f"{name} {value}": (switch, "fp32_precision", value) for name, switch in NEWER.items() for value in PRECISIONS
    },
    "mkldnn.conv bf16": (mkldnn.conv, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    "mkldnn.matmul bf16": (mkldnn.matmul, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    **{f"cudnn allow {value}": (cudnn, "allow_tf32", value) for value in (True, False)},
    **{f"matmul allow {value}": (matmul, "allow_tf32", value) for value in (True, False)},
    **{f"older {value}": (torch, "float32_matmul_precision", value) for value in ("highest", "high", "medium")},
}
"""Settings of a program: an object, its attribute, and the value."""

CASES = [
    *([name] for name in SETTINGS),
    # TF32 by the process's switch, which `allow_tf32 = False` leaves as it is.
    ["process tf32", "cudnn allow False"],
    ["cudnn.conv ieee", "older high"],
    *(random.Random(seed).choices(list(SETTINGS), k=2 + seed % 5) for seed in range(60)),
]


def use(case: list[str]) -> None:
    for name in case:
        where, attribute, value = SETTINGS[name]
        torch.set_float32_matmul_precision(value) if where is torch else setattr(where, attribute, value)


def read(of: Callable[[], Any]) -> Any:
    """Return a switch's value; ``refused`` where PyTorch refuses to read it."""
    try:
        return of()
    except RuntimeError:
        return "refused"


def state() -> dict[str, Any]:
    return {
        **{name: switch.fp32_precision for name, switch in NEWER.items()},
        "cudnn allow": read(lambda: cudnn.allow_tf32),
        "matmul allow": read(lambda: matmul.allow_tf32),
        "older": read(torch.get_float32_matmul_precision),
    }


def future() -> list[dict[str, Any]]:
    """Return all switches while their parents change, which shows whether each inherits as before."""
    states = []
    for parent in (cudnn, torch.backends):
        for precision in PRECISIONS[::-1]:
            parent.fp32_precision = precision  # type: ignore[attr-defined]
            states.append(state())
    return states


def judge(case: list[str]) -> None:
    use(case)
    before = state()
    for _ in range(2):
        with full_precision():
            inside = state()
            assert all(inside[name] == "ieee" for name in OPERATORS)
            assert inside["older"] == "highest" or before["older"] == "refused"
            assert inside["cudnn allow"] is False or before["cudnn allow"] == "refused"
            torch.conv2d(torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3))
            with full_precision():
                assert state() == inside
            assert state() == inside
        assert state() == before


def in_process(work: Callable[[], object]) -> str:
    """Return the text of the work's result in a fork, or of the error that ended it."""
    readable, writable = os.pipe()
    if os.fork() == 0:
        try:
            text = repr(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        with open(writable, "w") as file:
            file.write(text)
        os._exit(0)
    os.close(writable)
    with open(readable) as file:
        text = file.read()
    os.wait()
    return text


def unused_and_used(case: list[str]) -> tuple[str, str]:
    """Return `future` in a process that never entered `full_precision`, and in one that did."""

    def used() -> list[dict[str, Any]]:
        use(case)
        with full_precision():
            pass
        return future()

    def unused() -> list[dict[str, Any]]:
        use(case)
        if read(lambda: cudnn.allow_tf32) is True:
            # PyTorch's own contexts do this as they end, and it cannot be avoided.
            cudnn.allow_tf32 = True
        return future()

    return in_process(unused), in_process(used)


def interrupted_at(line: int) -> bool:
    """Enter and leave as a signal handler would, before one of the lines that entering and leaving run.

    Returns:
        Whether there are so many lines.
    """
    use(["cuda.matmul tf32", "cudnn allow True"])
    before, lines = state(), 0

    def handler(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != full_precision_module.__file__:
            return None
        lines += event == "line"
        if event == "line" and lines == line:
            with full_precision():
                assert all(switch.fp32_precision == "ieee" for switch in OPERATORS.values())
        return handler

    sys.settrace(handler)
    with full_precision():
        sys.settrace(None)
        assert all(switch.fp32_precision == "ieee" for switch in OPERATORS.values())
        sys.settrace(handler)
    sys.settrace(None)
    assert state() == before, (before, state())
    return lines >= line


def main() -> None:
    line = 1
    while (result := in_process(partial(interrupted_at, line))) == "True":
        line += 1
    assert result == "False" and line > 50, f"line {line}: {result}"
    for case in CASES:
        result = in_process(lambda case=case: judge(case))  # type: ignore[misc]
        assert result == "None", f"{case}: {result}"
        unused, used = unused_and_used(case)
        assert unused == used, f"{case}: {unused} became {used}"
    print(len(CASES))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_all_operators_are_exact_inside_and_all_switches_are_as_before_behind() -> None:
    """Run in an interpreter without threads, since a fork does not copy them."""
    environment = {**os.environ, "PYTHONPATH": str(Path(pathnet.__file__).parent.parent)}
    command = [sys.executable, __file__]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stdout == f"{len(CASES)}\n", ended.stderr[-2000:]


def test_what_one_thread_leaves_stays_exact_for_those_inside() -> None:
    before, entered, leave = state(), threading.Event(), threading.Event()

    def stay() -> None:
        with full_precision():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with full_precision():
        thread.start()
        assert entered.wait(10)
    try:
        assert all(switch.fp32_precision == "ieee" for switch in OPERATORS.values())
    finally:
        leave.set()
        thread.join()
    assert state() == before


if __name__ == "__main__":
    main()
