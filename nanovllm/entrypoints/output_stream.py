"""One request's tokens as they come from the engine's process, turned into text, stopped and given out.

What comes while nobody takes it is given out as one. Knows nothing of processes or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable

from nanovllm.engine.sequence import Sequence
from nanovllm.engine.text.request_text import NoText, RequestText
from nanovllm.errors import EngineClosedError
from nanovllm.outputs import FinishReason, RequestOutput, TokenLogprobs

logger = logging.getLogger(__name__)


class Bell:
    """Wakes a coroutine when something has come for it. One coroutine waits at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._has_rung = False

    def ring(self) -> None:
        """Ends the wait, or the next one if nobody waits."""
        self._has_rung = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Until it has rung since the last wait."""
        if not self._has_rung:
            self._waiter = asyncio.Future(loop=self._loop)
            await self._waiter
        self._has_rung = False


class OutputStream(AsyncIterator[RequestOutput]):
    """The outputs of one request; the last one is `finished`. Left early or cancelled, it aborts the request.

    Args:
        seq: what was asked for. Its tokens are not kept here.
        text: turns them into text.
        leave: is called when nothing more is wanted of the engine, before the engine has ended the request.
        bell: rings when there is something to take; several streams may share one.

    Attributes:
        request_id: as in the outputs, and for `abort` and `explain`.
        num_prompt_tokens: of the request.
        is_over: whether the last output was taken, or nobody wants it.
    """

    def __init__(self, seq: Sequence, text: RequestText, leave: Callable[[int], None], bell: Bell) -> None:
        self.request_id = seq.request_id
        self.num_prompt_tokens = seq.num_prompt_tokens
        self._stop_token_ids = seq.stop_token_ids
        self._min_tokens = seq.params.min_tokens
        self._wants_logprobs = seq.params.logprobs is not None
        self._arrival_s = seq.arrival_s
        self._text = text
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._bell = bell
        self._num_tokens = 0
        self._ttft_s: float | None = None
        self._reason: FinishReason | None = None
        self._error: Exception | None = None
        self._latency_s: float | None = None
        self.is_over = False
        self._failure: Exception | None = None
        """Raised in place of more outputs."""
        self._new_texts: list[str] = []
        self._new_token_ids: list[int] = []
        self._new_logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None

    # What comes from the engine

    def add(self, token_id: int) -> None:
        """Takes the next token; the request ends with it if a stop string is complete."""
        if self._reason is not None:
            return
        self._num_tokens += 1
        if self._ttft_s is None:
            self._ttft_s = time.perf_counter() - self._arrival_s
        self._new_token_ids.append(token_id)
        try:
            if token_id in self._stop_token_ids:
                delta = self._text.add_stop_token(token_id)
            else:
                delta = self._text.add([token_id], may_stop=self._num_tokens >= self._min_tokens)
        except Exception as error:  # noqa: BLE001 - whatever a tokenizer raises ends one request, not the client
            self._text_failed(error)
            return
        if delta:
            self._new_texts.append(delta)
        if self._text.stopped:
            self._leave(self.request_id)
            self.end("stop")
        else:
            self._bell.ring()

    def add_logprobs(self, logprobs: Iterable[TokenLogprobs]) -> None:
        """Takes those of the tokens that come next."""
        self._new_logprobs += logprobs

    def add_prompt_logprobs(self, logprobs: list[TokenLogprobs | None]) -> None:
        """Takes those of the prompt; the first token comes next."""
        self._prompt_logprobs = logprobs

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """No more tokens come."""
        if self._reason is not None:
            return
        self._reason, self._error = reason, error
        self._latency_s = time.perf_counter() - self._arrival_s
        try:
            self._new_texts.append(self._text.finish([]))
        except Exception as failure:  # noqa: BLE001 - as above
            logger.warning("the text of request %d failed (%s); giving up", self.request_id, failure)
            self._reason, self._error = "error", failure
        self._bell.ring()

    def fail(self, error: Exception) -> None:
        """Raises this error in place of the next output."""
        if not self.is_over:
            self._failure = error
            self._bell.ring()

    # What is taken

    async def __anext__(self) -> RequestOutput:
        """The next output: all that has come since the last one.

        Raises:
            EngineClosedError: the engine was closed.
        """
        try:
            while (output := self.take()) is None and not self.is_over:
                await self._bell.wait()
        except BaseException:
            self.close()
            raise
        if output is None:
            raise StopAsyncIteration
        return output

    def take(self) -> RequestOutput | None:
        """All that has come since the last output; None if that is nothing, or after the last output.

        Raises:
            EngineClosedError: the engine was closed.
        """
        if self._failure is not None:
            self.is_over = True
            raise self._failure
        token_ids, reason = self._new_token_ids, self._reason
        if self.is_over or not (token_ids or reason is not None):
            return None
        logprobs = None
        if self._wants_logprobs and token_ids:
            count = len(token_ids)
            logprobs, self._new_logprobs = self._new_logprobs[:count], self._new_logprobs[count:]
        texts, of_prompt = self._new_texts, self._prompt_logprobs
        self._new_token_ids, self._new_texts, self._prompt_logprobs = [], [], None
        self.is_over = is_last = reason is not None
        # By position: an output for every token of every stream.
        return RequestOutput(
            self.request_id,
            token_ids,
            "".join(texts),
            is_last,
            reason,
            self._error,
            logprobs,
            self._ttft_s,
            self._latency_s,
            of_prompt,
        )

    def close(self) -> None:
        """Aborts the request if it is still running; no more outputs come."""
        if self._reason is None and not self.is_over and self._failure is None:
            self._leave(self.request_id)
        self.is_over = True
        self._bell.ring()

    def __del__(self) -> None:
        # A collection of garbage may run in any thread.
        if not self.is_over and self._reason is None and self._failure is None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._leave, self.request_id)

    def _text_failed(self, error: Exception) -> None:
        logger.warning("the text of request %d failed (%s); giving up", self.request_id, error)
        self._text = NoText()
        self._leave(self.request_id)
        self.end("error", error)


def closed() -> EngineClosedError:
    return EngineClosedError("this engine was closed; make a new one")
