"""Cards' processes on this host: Python run anew, in a session of its own.

The contact reaches a process through its standard input, which also tells each of the two at once when the other is
gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections import abc

from nanovllm.errors import ClusterError
from nanovllm.utils.process import await_end, num_threads_of

CLOSE_TIMEOUT_S = 5.0


class LocalProcess:
    """A card's process on this host; a `CardProcess`.

    Args:
        card: the card's name.
        contact: what it needs to reach its controller.
        environment: variables that it is given beside those of this process, which come first.
        device_index: the device to use instead of the one that the controller names.
        ends_with_thread: whether the system kills it when the thread that starts it ends, even if it is stopped.

    Raises:
        ClusterError: it cannot be started.
    """

    def __init__(
        self,
        card: str,
        contact: bytes,
        environment: abc.Mapping[str, str],
        *,
        device_index: int | None = None,
        ends_with_thread: bool = False,
    ) -> None:
        self._card = card
        link, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    _command_line(f"device_index={device_index!r}, ends_with_parent={ends_with_thread!r}"),
                    stdin=theirs.fileno(),
                    start_new_session=True,
                    env={**environment, **os.environ},
                )
            except OSError as error:
                link.close()
                raise ClusterError(f"a process for {card} cannot be started: {error}") from error
        with contextlib.suppress(BrokenPipeError):  # it is gone already, as the next look says
            link.sendall(len(contact).to_bytes(4, "little") + contact)
        self._link = link
        self._end_of_link = select.poll()  # unlike `select.select`, it takes descriptors above 1023
        self._end_of_link.register(link, select.POLLIN)

    def has_ended(self) -> bool:
        return bool(self._end_of_link.poll(0))  # nothing is ever sent, so that this is its end

    def is_reaped(self) -> bool:
        return self._process.poll() is not None

    def was_killed(self) -> bool:
        status = self._process.poll()
        return status is not None and status < 0

    def how_it_ended(self) -> str:
        return how_it_ended(self._process.poll())

    def kill(self) -> None:
        self._process.kill()

    def hang_up(self) -> None:
        self._link.close()

    def close(self) -> None:
        self.hang_up()
        await_end(self._process, f"the process of {self._card}", CLOSE_TIMEOUT_S)

    def wait(self) -> int:
        """Waits for its end; the exit status."""
        return self._process.wait()


class LocalStarter:
    """Starts cards on this host; a `CardStarter`.

    Args:
        kind: `cpu` or `cuda`.
        num_cards: how many there will be; those of a CPU divide its cores.
    """

    address = "127.0.0.1"
    controller_timeout_s = 0.0

    def __init__(self, kind: str, num_cards: int) -> None:
        self.kind = kind
        self._environment = dict(ONE_HOST)
        if kind == "cpu":
            self._environment["OMP_NUM_THREADS"] = str(num_threads_of(num_cards))

    def name_of(self, index: int) -> str:
        return f"card {index}" if self.kind == "cpu" else f"card {index} ({self.kind}:{index})"

    def start(self, index: int, card: str, contact: bytes) -> LocalProcess:
        return LocalProcess(card, contact, self._environment)

    def close(self) -> None:
        """Nothing is reserved."""


ONE_HOST = {"UCX_NET_DEVICES": "lo"}
"""NIXL's transport, UCX, listens on this host alone: what it sends is not encrypted."""


def how_it_ended(status: int | None) -> str:
    """An exit status in words; None of a process that has not ended."""
    if status is None:
        return "its process has closed its end and has not ended; see its log"
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    return f"its process has ended {how}; its log, on standard error, may say why"


def _command_line(arguments: str) -> list[str]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from nanovllm.engine.distributed import card_process"
    return [sys.executable, "-c", f"{code}; card_process.main({arguments})"]
