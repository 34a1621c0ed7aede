"""Standard streams: results to stdout, failures to stderr, also if a stream is closed or full."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from pathnet.printable import printable

__all__ = ["fail", "is_first_to_say", "prepare_streams", "say", "standard_output", "tell", "warn", "write"]


def prepare_streams() -> None:
    """Let every standard stream take any text; a closed one swallows it.

    The number of a closed stream would otherwise fall to the next file that is opened, and what is printed would end
    up in that file.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(*lines: object) -> None:
    """Write lines to stdout."""
    write("".join(f"{printable(line)}\n" for line in lines))


def write(text: str) -> None:
    """Write text to stdout as it is."""
    with standard_output():
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def standard_output() -> Iterator[None]:
    """Turn a failure to write to stdout into a failure of the command.

    Raises:
        ValueError: stdout takes no more, as on a full disk.
        SystemExit: the reader of a pipe has ended.
    """
    try:
        yield
    except OSError as error:
        # What is left in the buffer would fail again as the interpreter ends, in words of the interpreter's.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        raise ValueError(f"stdout: expected to write the results to it, got: {error.strerror}") from None


def tell(line: str) -> None:
    """Write a line to stderr, if there is one. Of several processes under torchrun, the first to say it does."""
    if is_first_to_say(line):
        with suppress(OSError):
            print(printable(line), file=sys.stderr, flush=True)


def is_first_to_say(line: str) -> bool:
    """Return whether no other process under torchrun has said something; of them all, one is to say it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or "torch" not in sys.modules:
        return True
    from pathnet.workers import torchrun

    with suppress(OSError):  # torchrun has ended
        return torchrun().first_to(f"say {hashlib.sha256(line.encode(errors='backslashreplace')).hexdigest()}")
    return True


def fail(message: str, status: int) -> NoReturn:
    """End the process with one line on stderr."""
    tell(f"pathnet: {' '.join(message.split())}")
    raise SystemExit(status)


def warn(message: Warning | str, *_: object, **__: object) -> None:
    """Write a warning as one line to stderr; takes the place of `warnings.showwarning`."""
    tell(f"pathnet: warning: {' '.join(str(message).split())}")
