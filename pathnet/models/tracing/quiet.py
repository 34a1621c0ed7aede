"""A context in which torch's tracers are silent: why they fail stands in the error."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Drop this thread's messages to stderr, log records of torch, and warnings about its tracers.

    `torch.export` prints the graph up to the operation that fails.
    """
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.name.partition(".")[0] != "torch"

    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    if logging.lastResort is not None:
        handlers.add(logging.lastResort)
    for handler in handlers:
        handler.addFilter(passes)
    try:
        with redirect_stderr(_OfOtherThreads(sys.stderr, thread)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.")
            # From a context manager of Python, about weights that hooks compute.
            warnings.filterwarnings("ignore", message="The tensor attribute")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


class _OfOtherThreads:
    """A stream that drops what one thread writes.

    Args:
        stream: receives the rest; None for no stream.
    """

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        if self._stream is None or threading.get_ident() == self._thread:
            return len(text)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
