"""`python -m nanovllm serve` in a process of its own: its start, its CPU seconds, its metrics, its end."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm.errors import NanoVLLMError

STOP_TIMEOUT_S = 60.0
METRIC = re.compile(r"(?m)^nanovllm_(\w+?)(?:\{(.*)\})? (\S+)$")


class ServerFailedError(NanoVLLMError):
    """The server did not start, or did not answer; the message has what it wrote."""


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Arguments of `LLM` as options of the command; those that are None are left out."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


def cpu_s_of(pid: int) -> float:
    """Seconds that all threads of a process have run, in user code and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may have spaces and brackets
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class ServerProcess:
    """A server at a free port of 127.0.0.1; waits until it is ready. Leaving its `with` kills it if it still runs.

    Args:
        model: folder of a checkpoint.
        options: arguments of `LLM`.
        more: options of the server's own.
        program: what Python runs; this package, unless something is to stand in for a part of it.

    Attributes:
        port: where it listens.
        start_to_ready_s: from the start of the process to its line.

    Raises:
        ServerFailedError: it ended before it was ready.
    """

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        more: Sequence[str],
        *,
        program: Sequence[str] = ("-m", "nanovllm"),
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        command = [sys.executable, *program, "serve", model, "--port", "0", *as_flags(options), *more]
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        self.start_to_ready_s = time.perf_counter() - started
        found = re.search(r" at http://127\.0\.0\.1:(\d+)$", line.rstrip())
        if found is None:
            self._process.kill()
            self._process.wait()
            raise ServerFailedError(f"the server did not start:\n{self.log}")
        self.port = int(found[1])
        pid = self._process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self._pids = {"server": pid, "engine": int(child)}

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None, "it is a pipe"
        self._process.stdout.close()
        self._log.close()

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU so far, of the `server`'s process and the `engine`'s."""
        return {name: cpu_s_of(pid) for name, pid in self._pids.items()}

    def metrics(self) -> dict[str, dict[str, float]]:
        """What /metrics has: values by labels, by name without `nanovllm_`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STOP_TIMEOUT_S)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != 200:
            raise ServerFailedError(f"/metrics has status {response.status}: {text}")
        found: dict[str, dict[str, float]] = {}
        for name, labels, value in METRIC.findall(text):
            found.setdefault(name, {})[labels] = float(value)
        return found

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit status, when it has ended.

        Raises:
            ServerFailedError: it has not, after STOP_TIMEOUT_S.
        """
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise ServerFailedError(f"the server has not ended within {STOP_TIMEOUT_S:g} s:\n{self.log}") from error
