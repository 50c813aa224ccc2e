"""Starts the processes of http_streams.py, divides a load among them, and puts together what they saw."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLIENT = Path(__file__).with_name("http_streams.py")
LEAD_S = 0.1
"""Between the moment when all clients are ready and that at which they begin."""


@dataclass(frozen=True)
class Running:
    """A load that clients are at."""

    processes: list[subprocess.Popen[str]]
    begin_at: float
    """The moment of `time.time()` from which their times count."""


@dataclass(frozen=True)
class Told:
    """What came of a load: all clients' answers in the order in which they were due, and how busy the clients were."""

    answers: list[dict[str, Any]]
    cpu_s: float
    busy_share: float
    """The busiest one's."""


class Clients:
    """Processes that have a part of a load each, and begin at the same moment. Made anew for each load.

    Args:
        port: the server's, on 127.0.0.1.
        num_processes: to divide loads among.
    """

    def __init__(self, port: int, num_processes: int) -> None:
        self._port = port
        self._num_processes = num_processes

    def begin(self, jobs: Mapping[str, Sequence[Any]], duration_s: float = 0.0) -> Running:
        """Starts a load: `timed` or `streams`, as http_streams.py reads them."""
        processes = []
        for index in range(self._num_processes):
            part = {name: job[index :: self._num_processes] for name, job in jobs.items()}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen([sys.executable, str(CLIENT)], **pipes))
            _write(processes[-1], json.dumps({"port": self._port, "duration_s": duration_s, **part}))
        for process in processes:
            _read(process)
        begin_at = time.time() + LEAD_S
        for process in processes:
            _write(process, repr(begin_at))
        return Running(processes, begin_at)

    def finish(self, running: Running) -> Told:
        """Waits until a load has ended. The first number of a `place` is that in the job before it was divided."""
        results = [json.loads(_read(process)) for process in running.processes]
        for index, (process, result) in enumerate(zip(running.processes, results, strict=True)):
            process.communicate()
            for answer in result["answers"]:
                answer["place"][0] = answer["place"][0] * self._num_processes + index
        answers = sorted((answer for result in results for answer in result["answers"]), key=lambda each: each["due_s"])
        busy_share = max(result["cpu_s"] / result["seconds"] for result in results)
        return Told(answers, sum(result["cpu_s"] for result in results), busy_share)


def _write(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None, "it is a pipe"
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None, "it is a pipe"
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a client's process has ended too early; what it wrote is above")
    return line
