"""The end of a process, and interrupts of one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)

KILLED_TIMEOUT_S = 5.0
"""Seconds for a process to end that was killed: one that a driver holds up may take for ever."""


def end_process(status: int) -> NoReturn:
    """Ends this process at once, when all that has to be closed is.

    The interpreter's own end takes 0.1 s with what torch and transformers have loaded, and longer where it frees piece
    by piece what is on a GPU, which the driver takes back anyway.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def await_end(process: subprocess.Popen[bytes], what: str, timeout_s: float) -> None:
    """Waits for a process that was told to end, kills it if it has not in time, and logs if it is there even then.

    Needs no thread: none can be started when the interpreter ends.
    """
    try:
        process.wait(timeout_s)
        return
    except subprocess.TimeoutExpired:
        logger.warning("%s has not ended within %.0f s, and is killed", what, timeout_s)
        process.kill()
    try:
        process.wait(KILLED_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        logger.error("%s (process %d) was killed and does not end; end it by hand", what, process.pid)


_is_deferring = False


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Defers Ctrl-C to the end of the outermost block, where half of it done would leave processes apart."""
    global _is_deferring
    if _is_deferring or threading.current_thread() is not threading.main_thread():
        yield  # an outer block defers it, or no interrupt is raised in this thread
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    _is_deferring = True
    try:
        yield
    finally:
        _is_deferring = False
        signal.signal(signal.SIGINT, before)
        if heard:
            before(*heard[0])
