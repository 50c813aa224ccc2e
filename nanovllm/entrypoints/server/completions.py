"""Opens the requests of one body, and answers as a whole or by server-sent events, for as long as the client is there.

Knows nothing of OpenAI's forms, which are in `answers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.engine.requests import Prompt
from nanovllm.entrypoints.async_llm import AsyncLLM
from nanovllm.entrypoints.output_stream import Bell, OutputStream
from nanovllm.entrypoints.server.answers import Answers, Choice
from nanovllm.entrypoints.server.cut import Cut
from nanovllm.entrypoints.server.gate import Gate
from nanovllm.entrypoints.server.problems import json_response, problem_of
from nanovllm.llm import one_by_one
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

Result = TypeVar("Result")

CLIENT_HAS_LEFT = 499
"""The status of an answer that nobody reads."""

DATA, END_OF_EVENT = b"data: ", b"\n\n"
DONE = b"data: [DONE]\n\n"

SERVER_SEND = "nanovllm.send"
"""Where `with_server_send` puts the server's own `send`."""


class Requests:
    """The requests of one body, from the gate to the last of them. `close` whatever happens.

    Args:
        gate: lets them in.
        num_prompts: of the body.
        n: requests for each of them.
        gives_tokens: whether clients are told of tokens; one that wants its prompt alone is not.

    Attributes:
        streams: those of the first prompt, then those of the next, in the order of the answer's choices.
        bell: rings when `take` has something to give.

    Raises:
        Problem: the gate lets none in.
    """

    def __init__(self, gate: Gate, num_prompts: int, n: int, *, gives_tokens: bool = True) -> None:
        gate.enter(num_prompts * n)
        self._gate = gate
        self._count = num_prompts * n
        self._n = n
        self._gives_tokens = gives_tokens
        self.streams: list[OutputStream] = []
        self.bell = Bell()
        self._open: list[tuple[int, OutputStream]] = []

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(stream.num_prompt_tokens for stream in self.streams[:: self._n])

    async def open(
        self, llm: AsyncLLM, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool
    ) -> list[int]:
        """Queues the requests of the next prompt; gives its token ids.

        Raises:
            RequestError: prompt or parameters are refused.
        """
        token_ids = await llm.tokenize(prompt, add_special_tokens=add_special_tokens)
        self.open_tokenized(llm, token_ids, params)
        return token_ids

    def open_tokenized(self, llm: AsyncLLM, token_ids: list[int], params: SamplingParams) -> None:
        """Queues the requests of the next prompt, of which the AsyncLLM has given the token ids.

        Raises:
            RequestError: parameters are refused.
        """
        for each in one_by_one(params):
            self.add(llm.open_tokenized(token_ids, each, self.bell))

    def add(self, stream: OutputStream) -> None:
        """Takes a request that is queued, whose bell is this one's, as the next one."""
        self._open.append((len(self.streams), stream))
        self.streams.append(stream)

    @property
    def are_over(self) -> bool:
        """Whether the last outputs of all were taken."""
        return not self._open

    def take(self) -> Iterator[tuple[int, RequestOutput]]:
        """What has come, one output for each request that has any, with its place among `streams`.

        Raises:
            Problem: a request has failed.
            EngineClosedError: the engine was closed.
        """
        have_ended = False
        for index, stream in self._open:
            output = stream.take()
            if output is None:
                continue
            if output.finished:
                have_ended = True
                if output.finish_reason == "error":
                    raise problem_of(output.error)
            yield index, output if self._gives_tokens else self._without_tokens(output)
        if have_ended:
            self._open = [(index, stream) for index, stream in self._open if not stream.is_over]

    def _without_tokens(self, output: RequestOutput) -> RequestOutput:
        reason = "length" if output.finish_reason == "stop" else output.finish_reason
        return replace(output, new_token_ids=[], text="", new_logprobs=None, finish_reason=reason)

    def close(self) -> None:
        """Aborts what still runs. A second call does nothing."""
        for stream in self.streams:
            stream.close()
        self._gate.leave(self._count)
        self._count = 0


def with_server_send(app: ASGIApp) -> ASGIApp:
    """An application whose scopes have the server's own `send`, for EventStream.

    Starlette wraps `send` three times to see the beginning of a response, which costs three calls for each token.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        scope[SERVER_SEND] = send
        await app(scope, receive, send)

    return wrapped


class Events:
    """The answers as server-sent events, in the order in which they come. An error is the last event.

    Attributes:
        are_over: whether the last event was taken.
    """

    def __init__(self, requests: Requests, answers: Answers) -> None:
        self._requests = requests
        self._answers = answers
        self._num_tokens = 0
        self.are_over = False

    def take(self) -> bytes:
        """All events that have come since the last ones; nothing, if only text that is held back has come."""
        requests, chunk_json = self._requests, self._answers.chunk_json
        found: list[bytes] = []
        try:
            for index, output in requests.take():
                self._num_tokens += len(output.new_token_ids)
                chunk = chunk_json(index, output)
                if chunk is not None:
                    found += (DATA, chunk, END_OF_EVENT)
            if requests.are_over:
                self._end(found)
        except Exception as error:  # noqa: BLE001 - the status has been sent, so that an event has to tell of it
            self.are_over = True
            found.append(event_of(problem_of(error).as_dict()))
        return b"".join(found)

    def _end(self, found: list[bytes]) -> None:
        self.are_over = True
        if self._answers.includes_usage:
            found.append(event_of(self._answers.last_chunk(self._requests.num_prompt_tokens, self._num_tokens)))
        found.append(DONE)


class EventStream(Response):
    """Server-sent events; the requests behind them end with it, also if the client leaves before the first event.

    A chunk of HTTP has all that has come when it is sent. While a client does not read, sending waits, and what comes
    meanwhile waits in the streams.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, requests: Requests) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache"})
        self._events = events
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_left(receive, self._send_all(send, scope[SERVER_SEND]))
        finally:
            self._requests.close()

    async def _send_all(self, send: Send, send_part: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        events, bell = self._events, self._requests.bell
        while not events.are_over:
            await bell.wait()
            data = events.take()
            if data:
                await send_part({"type": "http.response.body", "body": data, "more_body": not events.are_over})


async def answer_whole(request: Request, requests: Requests, answers: Answers) -> Response:
    """Waits for all answers; ends the requests if the client leaves."""
    try:
        choices = await unless_left(request.receive, _whole(requests))
        if choices is None:
            return Response(status_code=CLIENT_HAS_LEFT)
        return json_response(answers.whole(choices, requests.num_prompt_tokens))
    finally:
        requests.close()


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What comes of `work`, or None, with `work` cancelled, if the client leaves before. Its body has been read."""
    # The work is the one that has a task of its own: it wakes for each token, through fewer frames there.
    task = asyncio.ensure_future(work)
    try:
        with Cut() as cut:
            task.add_done_callback(cut.strike)
            await receive()
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _whole(requests: Requests) -> list[Choice]:
    choices = [Choice() for _ in requests.streams]
    while not requests.are_over:
        await requests.bell.wait()
        for index, output in requests.take():
            choices[index].add(output)
    return choices


def event_of(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return DATA + msgspec.json.encode(content) + END_OF_EVENT
