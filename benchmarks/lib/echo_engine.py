"""An engine's process that computes nothing: it answers each prompt with itself, over and over, a token a step.

Run as a script it is `python -m nanovllm` with such an engine behind `serve`; two arguments come before those: seconds
between steps, and how many steps it does, and tells of, at a time. It knows no metrics.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import zmq

from nanovllm.__main__ import main as nanovllm_main
from nanovllm.engine.distributed.engine_client import EngineClient
from nanovllm.engine.distributed.messages import (
    Abort,
    Add,
    Answer,
    Command,
    Ended,
    Ready,
    Report,
    Start,
    Tokens,
    decode_command,
    encode,
)
from nanovllm.entrypoints import async_llm

MAX_MODEL_LEN = 10_000_000


class EchoClient(EngineClient):
    """Starts this engine in place of a real one."""

    pace = ("0.01", "1")

    def _command_line(self) -> list[str]:
        path = [str(Path(__file__).parents[1]), *sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from lib import echo_engine; echo_engine.run_engine()"
        return [sys.executable, "-c", code, self._folder, *self.pace]


class EchoEngine:
    """The requests of one client, and what they are answered with."""

    def __init__(self) -> None:
        self._answers: dict[int, Iterator[int]] = {}
        self._num_left: dict[int, int] = {}

    def take_in(self, command: Command) -> Report | None:
        """Does what is asked for; the answer to a question."""
        if isinstance(command, Add):
            self._answers[command.request_id] = itertools.cycle(command.prompt_token_ids)
            self._num_left[command.request_id] = command.params.max_tokens
        elif isinstance(command, Abort):
            self._end(command.request_id)
        elif not isinstance(command, Start):
            return Answer(command.number, {})
        return None

    def step(self) -> Tokens:
        """The next token of each request."""
        token_ids = [next(answer) for answer in self._answers.values()]
        step = Tokens(list(self._answers), token_ids, [], {}, {})
        for request_id in step.request_ids:
            self._num_left[request_id] -= 1
            if not self._num_left[request_id]:
                step.ended.append(Ended(request_id, "length"))
                self._end(request_id)
        return step

    def _end(self, request_id: int) -> None:
        self._answers.pop(request_id, None)
        self._num_left.pop(request_id, None)


def run_engine() -> None:
    """The whole life of the process; its arguments are the folder of the sockets, and the pace."""
    folder, pace_s, at_once = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    commands, reports = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for each in (commands, reports):
        each.setsockopt(zmq.RCVHWM if each is commands else zmq.SNDHWM, 0)
    commands.bind(f"ipc://{folder}/commands")
    reports.connect(f"ipc://{folder}/reports")
    start = decode_command(commands.recv())
    assert isinstance(start, Start), "the first message starts the engine"
    vocab_size = json.loads((Path(start.model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    reports.send(encode(Ready(vocab_size, MAX_MODEL_LEN, MAX_MODEL_LEN, [], 0)))
    link = socket.socket(fileno=os.dup(0))
    poller = zmq.Poller()
    poller.register(commands, zmq.POLLIN)
    poller.register(link.fileno(), zmq.POLLIN)
    engine, due_s = EchoEngine(), time.perf_counter()
    while True:
        ready = dict(poller.poll(max(0, math.ceil((due_s - time.perf_counter()) * 1e3))))
        if link.fileno() in ready:
            os._exit(0)  # the client is gone
        if commands in ready and (answer := engine.take_in(decode_command(commands.recv()))) is not None:
            reports.send(encode(answer))
        if time.perf_counter() >= due_s:
            steps = [encode(engine.step()) for _ in range(at_once)]
            for step in steps:
                reports.send(step)
            due_s = max(due_s + pace_s * at_once, time.perf_counter())


if __name__ == "__main__":
    EchoClient.pace = (sys.argv.pop(1), sys.argv.pop(1))
    async_llm.EngineClient = EchoClient  # type: ignore[attr-defined] # what AsyncLLM starts
    sys.exit(nanovllm_main())
