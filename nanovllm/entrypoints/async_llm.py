"""`AsyncLLM`: prompts in, outputs as they come, in an asyncio program; the engine runs in a process of its own.

This process turns texts into tokens and back and finds stop strings; the engine's process knows tokens alone.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nanovllm.config import EngineConfig
from nanovllm.engine.requests import Prompt, RequestIntake
from nanovllm.engine.scheduling.timeline import Timeline
from nanovllm.engine.text.chat import ChatTemplate
from nanovllm.engine.text.tokenizer import load_tokenizer
from nanovllm.entrypoints.output_stream import Bell, OutputStream, closed
from nanovllm.errors import EngineProcessError, EngineTimeoutError, UnknownRequestError, short_repr
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.checkpoint import checkpoint_folder

try:
    from nanovllm.engine.distributed.engine_client import EngineClient
    from nanovllm.engine.distributed.messages import Abort, Add, Answer, Ask, Ready, Tokens
except ImportError as missing:
    raise ImportError(
        f"AsyncLLM and the server need more packages ({missing}): pip install nanovllm[serve]"
    ) from missing

if TYPE_CHECKING:
    from typing_extensions import Self

ANSWER_TIMEOUT_S = 10.0
"""How long `metrics` and `explain` wait for the engine's process."""

LONG_TEXT = 2_000
"""Characters from which on a text is tokenized in a thread, so that other streams go on."""


class AsyncLLM:
    """A model that answers prompts in an asyncio program. Making one waits until its engine serves, as `LLM` does.

    It belongs to the event loop that first uses it, and every method is called there.

    Args:
        model: folder of a Hugging Face checkpoint, or its name on the hub.
        **options: see `EngineConfig`.

    Raises:
        EngineProcessError: the engine's process ended before it served.
        ImportError: the packages of the extra `serve` are missing.
        ConfigError, ModelLoadError, ...: as `LLM`.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        path = os.fspath(model)
        self.config = EngineConfig.from_options(path, options)
        folder = checkpoint_folder(path, self.config.revision)
        if self.config.trace is not None:
            options["trace"] = os.fspath(self.config.trace)
        self._streams: dict[int, weakref.ref[OutputStream]] = {}
        """Requests that have not ended; one whose stream nobody has any more is aborted."""
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._num_requests = 0
        self._death: EngineProcessError | None = None
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine = EngineClient(path, options)
        try:
            self.tokenizer = load_tokenizer(folder)  # while the engine is made
        except BaseException:
            self._engine.close()
            raise
        self._intake = self._intake_of(self._engine.await_ready())

    @property
    def num_open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request, prompt and output."""
        return self._intake.max_model_len

    @property
    def engine_pid(self) -> int:
        """The process that has the engine."""
        return self._engine.pid

    @property
    def death(self) -> EngineProcessError | None:
        """Why the engine's process is gone; None while it is there."""
        return self._death

    # Requests

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yields the outputs of one request as they come. Left early or cancelled, the request is aborted.

        An output has all that has come since the one before. A request that fails ends with `finish_reason="error"`
        and its exception; so does every request if the engine's process ends.

        Raises:
            RequestError: the prompt or a parameter is refused.
            EngineProcessError: the engine's process is gone.
            EngineClosedError: the engine was closed.
        """
        stream = await self.open(prompt, sampling_params)
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def chat(
        self, messages: Any, sampling_params: SamplingParams | None = None, **template_options: Any
    ) -> AsyncIterator[RequestOutput]:
        """Yields the answer to one conversation, as `generate`; `template_options` are the keywords of `LLM.chat`.

        Raises:
            RequestError: as `LLM.chat`.
            EngineProcessError, EngineClosedError: as `generate`.
        """
        _, token_ids = await self.tokenize_chat(messages, **template_options)
        stream = self.open_tokenized(token_ids, sampling_params, Bell())
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def open(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = True,
        bell: Bell | None = None,
    ) -> OutputStream:
        """Queues a request and gives its outputs; what `generate` raises is raised before that.

        Args:
            prompt: a text or token ids.
            sampling_params: the defaults if None.
            add_special_tokens: those that the tokenizer puts around a text.
            bell: rings when there is something to take, for whoever waits for several requests at a time.
        """
        self._check_open()
        params = self._intake.checked_params(sampling_params, max_n=1)
        token_ids = await self.tokenize(prompt, add_special_tokens=add_special_tokens)
        return self._submit(token_ids, params, bell or Bell())

    def open_tokenized(self, token_ids: list[int], sampling_params: SamplingParams | None, bell: Bell) -> OutputStream:
        """Queues a request as `open`, of token ids that `tokenize` or `tokenize_chat` gave; they are not checked again.

        Raises:
            RequestError: a parameter is refused.
            EngineProcessError, EngineClosedError: as `generate`.
        """
        self._check_open()
        return self._submit(token_ids, self._intake.checked_params(sampling_params, max_n=1), bell)

    def _submit(self, token_ids: list[int], params: SamplingParams, bell: Bell) -> OutputStream:
        self._attach()
        request_id = self._num_requests
        seq, text = self._intake.make(request_id, token_ids, params, streamed=True)
        self._engine.send(Add(request_id, token_ids, self._without_text(params)))
        self._num_requests += 1
        stream = OutputStream(seq, text, self._leave, bell)
        self._streams[request_id] = weakref.ref(stream)
        return stream

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt.

        Raises:
            RequestError: it cannot be served.
        """
        if isinstance(prompt, str) and len(prompt) >= LONG_TEXT:
            return await asyncio.to_thread(self._intake.checked_prompt, prompt, add_special_tokens=add_special_tokens)
        return self._intake.checked_prompt(prompt, add_special_tokens=add_special_tokens)

    async def render(self, messages: Any, **template_options: Any) -> str:
        """A conversation as a prompt; `template_options` are the keywords of `LLM.chat`.

        Raises:
            RequestError: as `LLM.chat`.
        """
        return await asyncio.to_thread(self._rendered, messages, template_options)  # a template may take its time

    async def tokenize_chat(self, messages: Any, **template_options: Any) -> tuple[str, list[int]]:
        """A conversation as a prompt, as `render`, and the token ids of that, as `tokenize`; both in one thread.

        Raises:
            RequestError: as `LLM.chat`.
        """

        def work() -> tuple[str, list[int]]:
            prompt = self._rendered(messages, template_options)
            return prompt, self._intake.checked_prompt(prompt, add_special_tokens=False)

        return await asyncio.to_thread(work)

    def _rendered(self, messages: Any, template_options: dict[str, Any]) -> str:
        return ChatTemplate(self.tokenizer, **template_options).render(messages)

    def abort(self, request_id: int) -> None:
        """Ends a request where it is; its last output has `finish_reason="abort"`.

        Raises:
            UnknownRequestError: no unfinished request has this id.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        if request_id not in self._streams:
            raise UnknownRequestError(f"request {short_repr(request_id)} is not known or has ended")
        self._engine.send(Abort(request_id))

    # Questions

    async def metrics(self) -> dict[str, Any]:
        """What `LLM.metrics` says; pairs are lists.

        Raises:
            EngineTimeoutError: no answer within ANSWER_TIMEOUT_S.
            EngineProcessError: the engine's process is gone.
            EngineClosedError: the engine was closed.
        """
        found = await self._answer(None)
        assert isinstance(found, dict), "metrics are a dict"
        return found

    async def explain(self, request_id: int) -> Timeline:
        """What a request waits or has waited for, as `LLM.explain`.

        Raises:
            UnknownRequestError: no request has this id, or it ended long ago.
            EngineTimeoutError, EngineProcessError, EngineClosedError: as `metrics`.
        """
        marks = await self._answer(request_id)
        return Timeline(0.0, [(start_s, what) for what, start_s in marks])

    # The end

    async def close(self) -> None:
        """Ends all requests with EngineClosedError and the engine's process. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for stream in self._taken_out():
            stream.fail(closed())
        self._fail_questions(closed())
        self._detach()
        await asyncio.to_thread(self._engine.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

    # The engine's process

    def _intake_of(self, ready: Ready) -> RequestIntake:
        return RequestIntake(
            tokenizer=self.tokenizer,
            vocab_size=ready.vocab_size,
            max_model_len=ready.max_model_len,
            pool_tokens=ready.pool_tokens,
            eos_ids=frozenset(ready.eos_ids),
            seed=ready.seed,
        )

    def _without_text(self, params: SamplingParams) -> SamplingParams:
        """The parameters for the engine: without stop strings, and with numbers no larger than they can matter."""
        most = self._intake.max_model_len
        wanted: dict[str, Any] = {
            "stop": (),
            "max_tokens": min(params.max_tokens, most),
            "min_tokens": min(params.min_tokens, most),
            "top_k": min(params.top_k, self._intake.vocab_size),
        }
        changed = {name: value for name, value in wanted.items() if value != getattr(params, name)}
        return replace(params, **changed) if changed else params  # most have nothing to change, and are checked

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed()
        if self._death is not None:
            raise EngineProcessError(f"{self._death}; make a new AsyncLLM") from self._death

    def _attach(self) -> None:
        """Has the running event loop listen to the engine's process."""
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("this AsyncLLM belongs to another event loop, which still runs; use one for each loop")
        for request_id in list(self._streams):  # of a loop that is gone
            self._leave(request_id)
        self._loop = loop
        loop.add_reader(self._engine.reports_fd, self._receive)
        loop.add_reader(self._engine.link_fd, self._process_ended)
        self._receive()

    def _detach(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._engine.reports_fd)
            self._loop.remove_reader(self._engine.link_fd)
        self._loop = None

    def _receive(self) -> None:
        """Takes in all that has come; streams wake after it, so that several steps come out as one."""
        for report in self._engine.receive():
            if isinstance(report, Tokens):
                self._take_tokens(report)
            else:
                assert isinstance(report, Answer), "a process that serves sends tokens and answers"
                self._take_answer(report)

    def _take_tokens(self, report: Tokens) -> None:
        for request_id, logprobs in report.logprobs.items():
            if (stream := self._stream(request_id)) is not None:
                stream.add_logprobs(logprobs)
        for request_id, of_prompt in report.prompt_logprobs.items():
            if (stream := self._stream(request_id)) is not None:
                stream.add_prompt_logprobs(of_prompt)
        for request_id, token_id in zip(report.request_ids, report.token_ids, strict=True):
            if (stream := self._stream(request_id)) is not None:
                stream.add(token_id)
        for ended in report.ended:
            stream = self._stream(ended.request_id)
            self._streams.pop(ended.request_id, None)
            if stream is not None:
                stream.end(ended.reason, None if ended.failure is None else ended.failure.as_error())

    def _stream(self, request_id: int) -> OutputStream | None:
        """The outputs of a request; None if they have been left."""
        reference = self._streams.get(request_id)
        return None if reference is None else reference()

    def _taken_out(self) -> list[OutputStream]:
        """All streams, which get nothing more from the engine."""
        references, self._streams = self._streams, {}
        return [stream for reference in references.values() if (stream := reference()) is not None]

    def _take_answer(self, answer: Answer) -> None:
        question = self._questions.pop(answer.number, None)
        if question is None or question.done():
            return  # it came too late
        if answer.failure is None:
            question.set_result(answer.found)
        else:
            question.set_exception(answer.failure.as_error())

    async def _answer(self, request_id: int | None) -> Any:
        self._attach()
        number = next(self._numbers)
        question = self._questions[number] = asyncio.get_running_loop().create_future()
        self._engine.send(Ask(number, request_id))
        try:
            return await asyncio.wait_for(question, ANSWER_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise EngineTimeoutError(
                f"the engine's process has not answered within {ANSWER_TIMEOUT_S} s; its log may say why"
            ) from error
        finally:
            self._questions.pop(number, None)

    def _leave(self, request_id: int) -> None:
        """Wants nothing more of a request."""
        if self._streams.pop(request_id, None) is not None and self._death is None and not self._is_closed:
            self._engine.send(Abort(request_id))

    def _process_ended(self) -> None:
        self._receive()  # what it said before
        self._detach()
        self._death = self._engine.death()
        for stream in self._taken_out():
            stream.end("error", self._death)
        self._fail_questions(self._death)

    def _fail_questions(self, error: Exception) -> None:
        for question in self._questions.values():
            if not question.done():
                question.set_exception(error)
