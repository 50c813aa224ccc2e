"""`LLM`: prompts in, answers out, on top of the engine's `add_request` and `step`."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from nanovllm.engine.callers import Call, Inbox
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.output_rows import OutputRows, single_outputs
from nanovllm.engine.requests import Prompt
from nanovllm.engine.text.chat import ChatTemplate
from nanovllm.errors import EngineBusyError, RequestError, short_repr
from nanovllm.outputs import RequestOutput, TokenLogprobs
from nanovllm.sampling_params import MAX_INTEGER, SamplingParams

logger = logging.getLogger(__name__)


@dataclass
class _Answer:
    """What has come of one request so far."""

    prompt_token_ids: list[int]
    wants_logprobs: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: RequestOutput | None = None

    def add(self, output: RequestOutput) -> None:
        self.text += output.text
        self.token_ids += output.new_token_ids
        self.logprobs += output.new_logprobs or []
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.last = output

    def as_dict(self) -> dict[str, Any]:
        assert self.last is not None, "an answer is given out when it is complete"
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.last.finish_reason,
            "prompt_token_ids": self.prompt_token_ids,
            "ttft_s": self.last.ttft_s,
            "latency_s": self.last.latency_s,
            "logprobs": self.logprobs if self.wants_logprobs else None,
            "prompt_logprobs": self.prompt_logprobs,
            "error": self.last.error,
        }


class LLM(LLMEngine):
    """A model that answers prompts; see `LLMEngine` for its arguments and `EngineConfig` for the options."""

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Answers every prompt.

        Args:
            prompts: a text, or a list of texts and lists of token ids.
            sampling_params: one for all prompts, or one for each.
            use_tqdm: show progress, with prefill and decode tokens per second.

        Returns:
            For each prompt, in order, a dict of `text`, `token_ids` (the stop token, if one ended it, included),
            `finish_reason` (`stop`, `length`, `abort` or `error`), `prompt_token_ids`, `ttft_s` and `latency_s`
            (seconds from arrival to first token and to the end), `logprobs` (a `TokenLogprobs` per token, or None),
            `prompt_logprobs` (one per prompt token, the first of which is None; or None, as for a request that ended
            before its first token) and `error` (the exception of a failed request, or None). With `n` above 1 that is
            the first answer, and `outputs` lists all of them as such dicts.

        Raises:
            RequestError: a prompt or parameter is refused, by its index, before anything runs.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        requests = self._checked_requests(prompts, sampling_params, "prompt", add_special_tokens=True)
        return self._answer(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> list[dict[str, Any]]:
        """Answers conversations through the checkpoint's chat template.

        Content is a text, None where the template allows it, or a list of parts `{"type": "text", "text": ...}`; a
        template that takes texts alone gets the parts joined by line ends. What else is in a message (`name`,
        `tool_calls`, `tool_call_id`, ...) reaches the template as it is. The name of a special token in a content, such
        as `<|im_end|>`, becomes that token; take it out of texts that you do not trust.

        Args:
            messages: a list of dicts with `role` and `content`, or a list of such lists.
            sampling_params: as for `generate`.
            use_tqdm: as for `generate`.
            tools: JSON schemas of the tools that the model may call, or functions with types and docstring, of which
                transformers makes schemas.
            chat_template_kwargs: more variables for the template, such as `{"enable_thinking": False}`.
            add_generation_prompt: end the prompt with the beginning of an assistant's message; by default, unless
                `continue_final_message`.
            continue_final_message: leave the last message open, for the model to go on with.

        Returns:
            As `generate`, one dict for each conversation; `text` is what the model added.

        Raises:
            RequestError: there is no chat template, it refuses the messages or takes no tools, a message leaves no
                trace in the prompt, an argument is of the wrong type, or as `generate`.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        template = ChatTemplate(
            self.tokenizer,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        is_one = isinstance(messages, (list, tuple)) and bool(messages) and isinstance(messages[0], dict)
        conversations = [messages] if is_one else messages
        if not isinstance(conversations, (list, tuple)):
            raise RequestError(f"messages={short_repr(messages)} is not a list of messages or a list of such lists")
        prompts = []
        for index, conversation in enumerate(conversations):
            try:
                prompts.append(template.render(conversation))
            except RequestError as error:
                raise RequestError(f"conversation {index}: {error}") from error
        requests = self._checked_requests(prompts, sampling_params, "conversation", add_special_tokens=False)
        return self._answer(requests, use_tqdm)

    def generate_stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yields the outputs of one request as they come. Closing the iterator early aborts the request.

        Raises:
            RequestError: the prompt or a parameter is refused.
            EngineClosedError: the engine was closed.
        """
        self._check_open()
        inbox = Inbox()
        stream = _Stream(self, inbox)  # before there is a request, so that none is without one
        token_ids = self._intake.checked_prompt(prompt)
        self._submit(token_ids, self._intake.checked_params(sampling_params, max_n=1), inbox, streamed=True)
        return stream

    def _checked_requests(
        self, prompts: Any, sampling_params: Any, what: str, *, add_special_tokens: bool
    ) -> list[tuple[list[int], SamplingParams]]:
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise RequestError(f"prompts of type {type(prompts).__name__}: pass a text or a list of prompts")
        if isinstance(sampling_params, (list, tuple)):
            if len(sampling_params) != len(prompts):
                raise RequestError(
                    f"{len(prompts)} prompts and {len(sampling_params)} sampling_params; pass one, or one for each"
                )
        else:
            sampling_params = [sampling_params] * len(prompts)
        requests = []
        for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            try:
                token_ids = self._intake.checked_prompt(prompt, add_special_tokens=add_special_tokens)
                requests.append((token_ids, self._intake.checked_params(params)))
            except RequestError as error:
                raise RequestError(f"{what} {index}: {error}") from error
        return requests

    def _answer(self, requests: list[tuple[list[int], SamplingParams]], use_tqdm: bool) -> list[dict[str, Any]]:
        answers: dict[int, _Answer] = {}
        call = Call()
        inbox = Inbox(call)
        each = [(token_ids, one) for token_ids, params in requests for one in one_by_one(params)]
        progress = _Progress(len(each)) if use_tqdm else None
        try:
            with call.on_stack:
                for token_ids, params in each:
                    new = self._new_request(token_ids, params, inbox, streamed=False)
                    answers[new.seq.request_id] = _Answer(token_ids, params.logprobs is not None)
                    self._mailbox.arrived.append(new)
                self._run(call, inbox, answers, progress)
        finally:
            self._abandon(inbox)
            if progress is not None:
                progress.close()
        dicts = (answer.as_dict() for answer in answers.values())
        return [_of_all_answers(list(itertools.islice(dicts, params.n))) for _, params in requests]

    def _run(self, call: Call, inbox: Inbox, answers: dict[int, _Answer], progress: _Progress | None) -> None:
        started = time.perf_counter()
        before = replace(self.counters)
        num_open = len(answers)
        while num_open:
            taken: list[RequestOutput | OutputRows] = []
            self._await_output(call, inbox)
            inbox.take_all(taken)
            outputs = single_outputs(taken)
            for output in outputs:
                answers[output.request_id].add(output)
            num_ended = sum(output.finished for output in outputs)
            num_open -= num_ended
            if num_ended and progress is not None:
                seconds = time.perf_counter() - started
                progress.update(
                    num_ended,
                    f"prefill {(self.counters.prefill_tokens - before.prefill_tokens) / seconds:.0f} tok/s, "
                    f"decode {(self.counters.decode_tokens - before.decode_tokens) / seconds:.0f} tok/s",
                )


def one_by_one(params: SamplingParams) -> list[SamplingParams]:
    """The parameters of each of the `n` answers; with a seed the next ones have the next seeds."""
    if params.n == 1:
        return [params]
    seeds = [None if params.seed is None else (params.seed + index) & MAX_INTEGER for index in range(params.n)]
    return [replace(params, n=1, seed=seed) for seed in seeds]


def _of_all_answers(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return answers[0] if len(answers) == 1 else {**answers[0], "outputs": answers}


class _Progress:
    """A progress bar. Whatever becomes of it, answers go on, and so do other threads' bars.

    An interrupt may leave a bar's lock held; by default tqdm has one for all bars of a process.
    """

    def __init__(self, total: int) -> None:
        bar_class: Any = type("OwnBar", (tqdm,), {"_instances": weakref.WeakSet(), "monitor_interval": 0})
        bar_class.set_lock(threading.RLock())
        self._bar: tqdm[Any] | None = None
        self._try(lambda: setattr(self, "_bar", bar_class(total=total, desc="Generating", dynamic_ncols=True)))

    def update(self, num_ended: int, postfix: str) -> None:
        bar = self._bar
        if bar is not None:
            self._try(lambda: bar.set_postfix_str(postfix, refresh=False))
            self._try(lambda: bar.update(num_ended))

    def close(self) -> None:
        if self._bar is not None:
            self._try(self._bar.close)

    def _try(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except Exception as error:  # noqa: BLE001 - of the stream that it writes to: closed, broken or none at all
            logger.warning("the progress bar is gone: %s: %s", type(error).__name__, error)
            self._bar = None


class _Stream(Iterator[RequestOutput]):
    """The outputs of one request. Aborts it when closed or dropped, even before the first `next`."""

    def __init__(self, llm: LLM, inbox: Inbox) -> None:
        self._llm = llm
        self._inbox = inbox

    def __next__(self) -> RequestOutput:
        call = Call()
        try:
            with call.on_stack:
                output = None
                while output is None and not self._inbox.is_closed:
                    self._llm._await_output(call, self._inbox)
                    output = self._inbox.pop()  # None if another thread was faster
            if output is None:
                raise StopIteration
            if output.finished:
                self.close()
            return output
        except EngineBusyError:
            raise  # whoever broke in, the thread below goes on
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Aborts the request if it is still running; no more outputs come."""
        if not self._inbox.is_closed:
            self._llm._abandon(self._inbox)

    def __del__(self) -> None:
        self.close()
