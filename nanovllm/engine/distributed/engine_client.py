"""The client's end of an engine's process: starts it, sends and receives, notices its end. Knows nothing of texts.

The two meet on ipc sockets in a folder that only this user may enter. A pair of connected sockets, one of which is the
process's standard input, tells each of them at once when the other is gone, even by SIGKILL.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any

import zmq

from nanovllm.engine.distributed.engine_process import CLOSE_TIMEOUT_S
from nanovllm.engine.distributed.messages import Command, NotReady, Ready, Report, Start, decode_report, encode
from nanovllm.errors import EngineProcessError
from nanovllm.utils.process import await_end

LAST_WORDS_S = 5.0
"""How long the process may take to end once its link has, and what it has said before may be on the way."""


class EngineClient:
    """An engine in a process of its own.

    The process is made by running Python anew, not by forking or by importing the program's main file: a program needs
    no `if __name__ == "__main__"` for it. It has a session of its own, so that Ctrl-C in a terminal is not its to
    hear.

    Args:
        model: as of `LLM`.
        options: as of `LLM`; plain values.

    Attributes:
        pid: of the process.

    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._folder = tempfile.mkdtemp(prefix="nanovllm-")  # nobody else may enter it
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._process: subprocess.Popen[bytes] | None = None
        self._link, theirs = socket.socketpair()
        try:
            with theirs:
                self._reports = self._socket(zmq.PULL, zmq.RCVHWM)
                self._reports.bind(f"ipc://{self._folder}/reports")
                self._commands = self._socket(zmq.PUSH, zmq.SNDHWM)
                self._commands.connect(f"ipc://{self._folder}/commands")
                self._process = subprocess.Popen(self._command_line(), stdin=theirs.fileno(), start_new_session=True)
            self.pid = self._process.pid
            self.send(Start(model, options, logging.getLogger("nanovllm").getEffectiveLevel()))
        except BaseException:
            self.close()
            raise

    def await_ready(self) -> Ready:
        """Waits until the engine is made, and says what it accepts. Closes everything if it cannot be made.

        Raises:
            ConfigError, ModelLoadError, ...: whatever `LLM(model, **options)` raises.
            EngineProcessError: the process ended before the engine was made.
        """
        try:
            return self._await_ready()
        except BaseException:
            self.close()
            raise

    def send(self, command: Command) -> None:
        """Sends without waiting."""
        self._commands.send(encode(command), zmq.NOBLOCK)

    def receive(self) -> list[Report]:
        """All that has come."""
        reports = []
        with contextlib.suppress(zmq.Again):
            while True:
                reports.append(decode_report(self._reports.recv(zmq.NOBLOCK)))
        return reports

    @property
    def reports_fd(self) -> int:
        """A file descriptor that becomes readable when something may have come; `receive` all then, and at first."""
        return int(self._reports.getsockopt(zmq.FD))

    @property
    def link_fd(self) -> int:
        """A file descriptor that becomes readable when the process is gone."""
        return self._link.fileno()

    def death(self) -> EngineProcessError:
        """How the process has ended, once `link_fd` is readable."""
        assert self._process is not None, "it was started"
        try:
            status = self._process.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return EngineProcessError("the engine's process has closed its end and does not end; see its log")
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        return EngineProcessError(f"the engine's process has ended {how}; its log, on standard error, may say why")

    def close(self) -> None:
        """Ends the process and waits for it, but not for ever. A second call does nothing."""
        self._link.close()
        if self._process is not None:
            await_end(self._process, "the engine's process", CLOSE_TIMEOUT_S + 5)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _command_line(self) -> list[str]:
        code = f"import sys; sys.path[:] = {sys.path!r}; from nanovllm.engine.distributed import engine_process"
        return [sys.executable, "-c", f"{code}; engine_process.main()", self._folder]

    def _socket(self, kind: int, limit: int) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.setsockopt(limit, 0)
        return made

    def _await_ready(self) -> Ready:
        poller = zmq.Poller()
        poller.register(self._reports, zmq.POLLIN)
        poller.register(self._link.fileno(), zmq.POLLIN)
        ready = dict(poller.poll())
        if self._reports not in ready and not self._reports.poll(int(LAST_WORDS_S * 1e3)):
            raise self.death()
        report = decode_report(self._reports.recv())
        if isinstance(report, NotReady):
            raise report.failure.as_error()
        assert isinstance(report, Ready), "an engine that is made says what it accepts"
        return report
