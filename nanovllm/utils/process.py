"""The end of a process, and interrupts of one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


def end_process(status: int) -> NoReturn:
    """Ends this process at once, when all that has to be closed is.

    The interpreter's own end takes 0.1 s with what torch and transformers have loaded, and longer where it frees piece
    by piece what is on a GPU, which the driver takes back anyway.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Defers Ctrl-C to the end of the block, where half of it done would leave processes apart."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # no interrupt is raised in this thread
        return
    heard: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            before(*heard[0])
