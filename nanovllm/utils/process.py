"""The end of a process, interrupts of one, and the cores that several share."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
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


def call_at_exit(function: Callable[[], object]) -> Callable[[], object]:
    """Has a function called when this process ends. Returns one that takes that back.

    A process that `multiprocessing` has started ends its daemons before it calls anything of `atexit`, if it does that
    at all.
    """
    if multiprocessing.parent_process() is None:
        atexit.register(function)
        return lambda: atexit.unregister(function)
    return multiprocessing.util.Finalize(None, function, exitpriority=1).cancel


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


def num_threads_of(num_processes: int) -> int:
    """Threads for each of so many processes that compute on this host's cores.

    Threads of OpenMP spin while they wait for each other: on two cores, two processes with two threads each took fifty
    times as long as with one each.
    """
    return max(len(os.sched_getaffinity(0)) // num_processes, 1)


_Handler = Callable[[int, FrameType | None], object]
_deferred: list[tuple[int, FrameType | None]] | None = None
"""The interrupts that the outermost block of the main thread has deferred; None outside of one."""


class without_interrupts:  # noqa: N801 - a function to its users, made anew for each step
    """Defers Ctrl-C to the end of the outermost block, where half of it done would leave processes apart."""

    __slots__ = ("_before",)

    def __init__(self) -> None:
        self._before: _Handler | None = None

    def __enter__(self) -> None:
        global _deferred
        if _deferred is not None or threading.get_ident() != threading.main_thread().ident:
            return  # an outer block defers it, or no interrupt is raised in this thread
        before = signal.getsignal(signal.SIGINT)
        if callable(before):
            heard: list[tuple[int, FrameType | None]] = []
            self._before, _deferred = before, heard
            signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))

    def __exit__(self, *_: object) -> None:
        global _deferred
        before = self._before
        if before is not None:
            heard, _deferred = _deferred, None
            signal.signal(signal.SIGINT, before)
            self._before = None
            if heard:
                before(*heard[0])

    def __del__(self) -> None:
        """Ends the block where another signal's handler has raised before its end."""
        self.__exit__()
