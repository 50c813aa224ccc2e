"""A process of clients that stream completions and note when events come, for serve_load.py. Knows no engine.

Imports the standard library alone, so that it starts at once and is small. It reads a job from standard input, a line
of JSON; writes `ready`; reads the `time.time()` at which to begin; and writes what came, a line of JSON:

- the job is `port`, and either `timed`, pairs of a moment (s) and a body, or `streams`, lists of bodies that are sent
  over and over, one after another, for `duration_s`;
- what came is `cpu_s`, `seconds`, and `answers`: for each request its `place` in the job, `due_s`, `times_s` of its
  events with text, `num_tokens` as the server counts them, `ended_s`, `outcome` and the server's `message`.

Each request has a connection of its own. All times are in seconds since the beginning.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

ANSWERED, REFUSED, TOLD, CUT = "answered", "refused", "told", "cut"
"""Outcomes: the whole answer came; a status other than 200; an event with an error; the connection ended before."""

Clock = Callable[[], float]


def call_of(body: str) -> bytes:
    """A request as it is sent."""
    content = body.encode()
    lines = ("POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Connection: close")
    head = "\r\n".join((*lines, "Content-Type: application/json", f"Content-Length: {len(content)}", "", ""))
    return head.encode() + content


class Answer(asyncio.Protocol):
    """One connection: sends a request and takes in its events.

    Args:
        call: what is sent.
        clock: what the moments are read from.
    """

    def __init__(self, call: bytes, clock: Clock) -> None:
        self.times_s: list[float] = []
        self.num_tokens = 0
        self.ended_s = 0.0
        self.outcome = CUT
        self.message = "the connection ended before the answer"
        self.over = asyncio.get_running_loop().create_future()
        self._call, self._clock = call, clock
        self._status = 0
        self._raw = b""
        """What came and is not yet a whole chunk."""
        self._body = b""
        """What is not yet a whole event; of a refusal, all of it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a connection of TCP"
        transport.write(self._call)

    def data_received(self, data: bytes) -> None:
        now_s = self._clock()
        self._raw += data
        if not self._status:
            head, found, self._raw = self._raw.partition(b"\r\n\r\n")
            if not found:
                self._raw = head
                return
            self._status = int(head.split(None, 2)[1])
            assert self._status != 200 or b"chunked" in head.lower(), "a stream of unknown length comes in chunks"
        if self._status != 200:
            self._body, self._raw = self._body + self._raw, b""
            return
        self._take_chunks()
        *events, self._body = self._body.split(b"\n\n")
        for event in events:
            self._take(event.removeprefix(b"data: "), now_s)

    def connection_lost(self, error: Exception | None) -> None:
        if self._status not in (0, 200):
            self.outcome, self.message = REFUSED, f"status {self._status}: {self._body.decode(errors='replace')}"
        self._end()

    def _take_chunks(self) -> None:
        while True:
            size, found, rest = self._raw.partition(b"\r\n")
            if not found or len(rest) < int(size, 16) + 2:
                return
            end = int(size, 16)
            self._body, self._raw = self._body + rest[:end], rest[end + 2 :]

    def _take(self, event: bytes, now_s: float) -> None:
        if event == b"[DONE]":
            self.outcome, self.message = ANSWERED, ""
            self._end()
            return
        content = json.loads(event)
        if "error" in content:
            self.outcome, self.message = TOLD, str(content["error"]["message"])
            self._end()
        elif not content["choices"]:
            self.num_tokens = content["usage"]["completion_tokens"]
        elif content["choices"][0]["text"] or not self.times_s:  # of no text at all, the last event is all there is
            self.times_s.append(now_s)

    def _end(self) -> None:
        if not self.over.done():
            self.ended_s = self._clock()
            self.over.set_result(None)


class Clients:
    """All requests of a job, from `begin_at`."""

    def __init__(self, job: dict[str, Any], begin_at: float) -> None:
        self._job = job
        self._origin_s = time.perf_counter() + begin_at - time.time()
        self.answers: list[dict[str, Any]] = []

    def clock(self) -> float:
        return time.perf_counter() - self._origin_s

    async def run(self) -> None:
        await asyncio.sleep(-self.clock())
        timed = [self._at(place, due_s, body) for place, (due_s, body) in enumerate(self._job.get("timed", ()))]
        streams = [self._stream(place, bodies) for place, bodies in enumerate(self._job.get("streams", ()))]
        await asyncio.gather(*timed, *streams)

    async def _at(self, place: int, due_s: float, body: str) -> None:
        call = call_of(body)
        await asyncio.sleep(due_s - self.clock())
        await self._ask([place], due_s, call)

    async def _stream(self, place: int, bodies: list[str]) -> None:
        """Ends with the first request that is not answered."""
        calls = [call_of(body) for body in bodies]
        for turn in itertools.cycle(range(len(calls))):
            due_s = self.clock()
            if due_s >= self._job["duration_s"] or await self._ask([place, turn], due_s, calls[turn]) != ANSWERED:
                return

    async def _ask(self, place: list[int], due_s: float, call: bytes) -> str:
        answer = Answer(call, self.clock)
        try:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_connection(lambda: answer, "127.0.0.1", self._job["port"])
        except OSError as error:
            answer.outcome, answer.message, answer.ended_s = REFUSED, str(error), self.clock()
        else:
            await answer.over
            transport.close()
        names = ("times_s", "num_tokens", "ended_s", "outcome", "message")
        kept = {name: getattr(answer, name) for name in names}
        self.answers.append({"place": place, "due_s": due_s, **kept})
        return answer.outcome


def main() -> None:
    job = json.loads(sys.stdin.readline())
    gc.freeze()
    print("ready", flush=True)
    clients = Clients(job, float(sys.stdin.readline()))
    cpu_before_s = time.process_time()
    asyncio.run(clients.run())
    result = {"cpu_s": time.process_time() - cpu_before_s, "seconds": clients.clock(), "answers": clients.answers}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
