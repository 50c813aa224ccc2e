"""Opens the requests of one body, and answers as a whole or by server-sent events, for as long as the client is there.

Knows nothing of OpenAI's forms, which are in `answers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nanovllm.engine.requests import Prompt
from nanovllm.entrypoints.async_llm import AsyncLLM
from nanovllm.entrypoints.output_stream import OutputStream
from nanovllm.entrypoints.server.answers import Answers, Choice
from nanovllm.entrypoints.server.gate import Gate
from nanovllm.entrypoints.server.problems import json_response, problem_of
from nanovllm.llm import one_by_one
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

Result = TypeVar("Result")

CLIENT_HAS_LEFT = 499
"""The status of an answer that nobody reads."""


class Requests:
    """The requests of one body, from the gate to the last of them. `close` whatever happens.

    Args:
        gate: lets them in.
        num_prompts: of the body.
        n: requests for each of them.
        gives_tokens: whether clients are told of tokens; one that wants its prompt alone is not.

    Attributes:
        streams: those of the first prompt, then those of the next, in the order of the answer's choices.

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
        for each in one_by_one(params):
            self.streams.append(await llm.open(token_ids, each))
        return token_ids

    def told(self, output: RequestOutput) -> RequestOutput:
        """What clients are told of an output."""
        if self._gives_tokens:
            return output
        reason = "length" if output.finish_reason == "stop" else output.finish_reason
        return replace(output, new_token_ids=[], text="", new_logprobs=None, finish_reason=reason)

    def close(self) -> None:
        """Aborts what still runs. A second call does nothing."""
        for stream in self.streams:
            stream.close()
        self._gate.leave(self._count)
        self._count = 0


class EventStream(StreamingResponse):
    """Server-sent events; the requests behind them end with it, also if the client leaves before the first event."""

    def __init__(self, events: AsyncIterator[bytes], requests: Requests) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._requests.close()


async def answer_whole(request: Request, requests: Requests, answers: Answers) -> Response:
    """Waits for all answers; ends the requests if the client leaves."""
    try:
        all_choices = asyncio.gather(*(_whole(requests, stream) for stream in requests.streams))
        choices = await unless_left(request, all_choices)
        if choices is None:
            return Response(status_code=CLIENT_HAS_LEFT)
        return json_response(answers.whole(choices, requests.num_prompt_tokens))
    finally:
        requests.close()


async def events(requests: Requests, answers: Answers, *, includes_usage: bool) -> AsyncIterator[bytes]:
    """The answers as server-sent events, in the order in which they come. An error is the last event."""
    num_tokens = 0
    try:
        async for index, given in _merged(requests.streams):
            output = requests.told(given)
            num_tokens += len(output.new_token_ids)
            if output.finish_reason == "error":
                raise problem_of(output.error)
            chunk = answers.chunk(index, output)
            if chunk is not None:
                yield event_of({**chunk, "usage": None} if includes_usage else chunk)
        if includes_usage:
            yield event_of(answers.last_chunk(requests.num_prompt_tokens, num_tokens))
        yield b"data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001 - the status has been sent, so that an event has to tell of it
        yield event_of(problem_of(error).as_dict())


async def unless_left(request: Request, work: Coroutine[Any, Any, Result] | asyncio.Future[Result]) -> Result | None:
    """What comes of `work`, or None, with `work` cancelled, if the client leaves before. Its body has been read."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for each in (task, watch):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


async def _whole(requests: Requests, stream: OutputStream) -> Choice:
    choice = Choice()
    async for output in stream:
        if output.finish_reason == "error":
            raise problem_of(output.error)
        choice.add(requests.told(output))
    return choice


async def _merged(streams: Sequence[OutputStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """The outputs of all streams as they come, each with the place of its stream."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    tasks = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = tasks.pop(task)
                output = task.result()
                if not output.finished:
                    tasks[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, output
    finally:
        for task in tasks:
            if not task.cancel() and not task.cancelled():
                task.exception()  # it has ended; what the first one raised is told


def event_of(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
