"""Answers in the form of OpenAI's API, whole and in chunks. Knows nothing of HTTP or engines."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import msgspec
from transformers import PreTrainedTokenizerBase

from nanovllm.entrypoints.server.chat_text import ChatText, ToolCall
from nanovllm.outputs import RequestOutput, TokenLogprobs

LEAST_LOGPROB = -9999.0
"""OpenAI's word for a probability of nothing; JSON has no infinity."""

SOME_TEXT = "\0"
"""Stands for a text in a chunk, after which nothing else is like it."""

_to_json = msgspec.json.Encoder().encode


class TokenNames:
    """The text of single tokens, for log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=100_000)(self._of)

    def _of(self, token_id: int) -> str:
        """Its text, or `token_id:<id>` where that is no whole text of its own."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        text: str = self._tokenizer.backend_tokenizer.decode([token_id], skip_special_tokens=False)
        return f"token_id:{token_id}" if not text or "\N{REPLACEMENT CHARACTER}" in text else text


@dataclass(frozen=True)
class Echo:
    """The prompt that a choice begins with.

    Attributes:
        text: its text.
        first_token_id: its first token, which has no log-probability.
        num_logprobs: most probable tokens to list beside each of its tokens; None for no log-probabilities at all.
    """

    text: str
    first_token_id: int
    num_logprobs: int | None


@dataclass
class Choice:
    """What has come of one of a body's requests so far.

    Attributes:
        text: without that of the prompt.
        logprobs: one entry for each token, if they are asked for.
        prompt_logprobs: as in `RequestOutput`.
    """

    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None

    def add(self, output: RequestOutput) -> None:
        self.text += output.text
        self.num_tokens += len(output.new_token_ids)
        self.logprobs += output.new_logprobs or []
        self.finish_reason = output.finish_reason
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs


@dataclass(frozen=True)
class AnswerSettings:
    """What the answers to any body go by.

    Attributes:
        name: of the answer, its `id`.
        model: its name.
        names: of tokens.
        wants_logprobs: whether there are log-probabilities.
        num_prompt_logprobs: most probable tokens to list for each prompt token as vLLM's `prompt_logprobs`, beside that
            token; None for no such list.
        includes_usage: whether a stream ends with the numbers of tokens; then every other chunk has `usage`, null.
    """

    name: str
    model: str
    names: TokenNames
    wants_logprobs: bool = False
    num_prompt_logprobs: int | None = None
    includes_usage: bool = False


class Answers(ABC):
    """What the answers to one body have in common."""

    whole_object = ""
    chunk_object = ""
    _nothing: ClassVar[dict[str, Any]] = {}
    """A chunk's part for the text, where there is none."""
    _lists_prompt_by_choice = False
    """Whether each choice has its `prompt_logprobs`, or the answer as a whole."""

    def __init__(self, settings: AnswerSettings) -> None:
        self._names = settings.names
        self._wants_logprobs = settings.wants_logprobs
        self._num_prompt_logprobs = settings.num_prompt_logprobs
        self.includes_usage = settings.includes_usage
        self._around: dict[int, tuple[bytes, bytes]] = {}
        """What is before and after the text, by choice, in the JSON of a chunk that tells of nothing but text."""
        self._head: dict[str, Any] = {
            "id": settings.name,
            "object": "",
            "created": int(time.time()),
            "model": settings.model,
        }

    def whole(self, choices: Sequence[Choice], num_prompt_tokens: int) -> dict[str, Any]:
        """The answer as one."""
        listed = [
            {
                "index": index,
                **self._said(index, choice.text),
                "logprobs": self._all_logprobs(index, choice.prompt_logprobs, choice.logprobs),
                "finish_reason": self._finish_reason(index, choice.finish_reason),
                **(self._of_prompt(choice) if self._lists_prompt_by_choice else {}),
            }
            for index, choice in enumerate(choices)
        ]
        usage = usage_of(num_prompt_tokens, sum(choice.num_tokens for choice in choices))
        of_prompt = {} if self._lists_prompt_by_choice else self._of_prompt(choices[0])
        return {**self._head, "object": self.whole_object, "choices": listed, "usage": usage, **of_prompt}

    def chunk(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """A part of choice `index`; None if there is nothing to tell."""
        has_logprobs = self._wants_logprobs and output.new_token_ids
        if not (output.text or output.finished or has_logprobs):
            return None
        said = self._said_next(index, output.text, is_last=output.finished)
        if said is None and not (output.finished or has_logprobs):
            return None
        return self._chunk(
            {
                "index": index,
                **(said or self._nothing),
                "logprobs": self._all_logprobs(index, output.prompt_logprobs, output.new_logprobs or ()),
                "finish_reason": self._finish_reason(index, output.finish_reason),
            }
        )

    def chunk_json(self, index: int, output: RequestOutput) -> bytes | None:
        """The same as JSON. Most chunks tell of nothing but text, and only that is turned into JSON then."""
        around = self._around.get(index)
        if around is None or output.finished:
            chunk = self.chunk(index, output)
            if not (output.finished or self._wants_logprobs) and self._is_plain(index):
                self._around[index] = self._make_around(index)
            return None if chunk is None else _to_json(chunk)
        if not output.text:
            return None
        return b"%b%b%b" % (around[0], _to_json(output.text), around[1])

    def _make_around(self, index: int) -> tuple[bytes, bytes]:
        choice = {"index": index, **self._plain(SOME_TEXT), "logprobs": None, "finish_reason": None}
        before, _, after = _to_json(self._chunk(choice)).rpartition(_to_json(SOME_TEXT))
        return before, after

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": [choice]}
        return {**chunk, "usage": None} if self.includes_usage else chunk

    def last_chunk(self, num_prompt_tokens: int, num_tokens: int) -> dict[str, Any]:
        """The chunk after all choices, with the numbers of tokens."""
        usage = usage_of(num_prompt_tokens, num_tokens)
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": usage}

    @abstractmethod
    def _said(self, index: int, text: str) -> dict[str, Any]:
        """How a choice has its whole text."""

    @abstractmethod
    def _said_next(self, index: int, text: str, *, is_last: bool) -> dict[str, Any] | None:
        """How a chunk has the next part of it; None if it says nothing yet."""

    @abstractmethod
    def _is_plain(self, index: int) -> bool:
        """Whether all texts that come of a choice, but for the last one, are told as they are."""

    @abstractmethod
    def _plain(self, text: str) -> dict[str, Any]:
        """How a chunk has such a text."""

    def _finish_reason(self, index: int, reason: str | None) -> str | None:
        return reason

    def _all_logprobs(
        self, index: int, in_prompt: Sequence[TokenLogprobs | None] | None, entries: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        """The log-probabilities of a choice, or a chunk; None if they are not asked for."""
        return self._logprobs(index, entries) if self._wants_logprobs else None

    @abstractmethod
    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """How a choice, or a chunk, has those of its tokens."""

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        """The list `prompt_logprobs`, as vLLM has it, if it is asked for."""
        count = self._num_prompt_logprobs
        if count is None:
            return {}
        entries = choice.prompt_logprobs
        listed = None if entries is None else [entry and self._by_token(entry.first(count)) for entry in entries]
        return {"prompt_logprobs": listed}

    def _by_token(self, entry: TokenLogprobs) -> dict[str, Any]:
        """A prompt token and the most probable ones by their ids; `rank` is null where it is not known."""
        ranks = {token_id: rank for rank, token_id in enumerate(entry.top, start=1)}
        return {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": ranks.get(token_id),
                "decoded_token": self._names.of(token_id),
            }
            for token_id, logprob in {entry.token_id: entry.logprob, **entry.top}.items()
        }


class Completion(Answers):
    """Answers of /v1/completions; `echoes` are the prompts that the choices begin with, if they do."""

    whole_object = chunk_object = "text_completion"
    _nothing: ClassVar[dict[str, Any]] = {"text": ""}
    _lists_prompt_by_choice = True

    def __init__(self, settings: AnswerSettings, echoes: Sequence[Echo] = ()) -> None:
        super().__init__(settings)
        self._echoes = echoes
        self._echoed: set[int] = set()
        self._offsets: dict[int, int] = {}

    def _said(self, index: int, text: str) -> dict[str, Any]:
        if self._echoes and index not in self._echoed:
            self._echoed.add(index)
            text = self._echoes[index].text + text
        return {"text": text}

    def _said_next(self, index: int, text: str, *, is_last: bool) -> dict[str, Any] | None:
        return self._said(index, text)

    def _is_plain(self, index: int) -> bool:
        return not self._echoes or index in self._echoed

    def _plain(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _all_logprobs(
        self, index: int, in_prompt: Sequence[TokenLogprobs | None] | None, entries: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if not (self._echoes and self._wants_logprobs and in_prompt):
            return super()._all_logprobs(index, in_prompt, entries)
        echo = self._echoes[index]
        first = self._names.of(echo.first_token_id)
        self._offsets[index] = len(first)
        echoed = [entry.first(echo.num_logprobs or 0) for entry in in_prompt if entry is not None]
        listed = self._logprobs(index, [*echoed, *entries])
        of_first = {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
        return {name: [of_first[name], *others] for name, others in listed.items()}

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        tokens = [self._names.of(entry.token_id) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                {self._names.of(token_id): _finite(logprob) for token_id, logprob in entry.top.items()}
                for entry in entries
            ],
            "text_offset": offsets,
        }


class Chat(Answers):
    """Answers of /v1/chat/completions; `make_text` makes what splits the text of one choice."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    _nothing: ClassVar[dict[str, Any]] = {"delta": {"content": ""}}

    def __init__(self, settings: AnswerSettings, make_text: Callable[[], ChatText]) -> None:
        super().__init__(settings)
        self._make_text = make_text
        self._texts: dict[int, ChatText] = {}
        self._num_calls: dict[int, int] = {}

    def _said(self, index: int, text: str) -> dict[str, Any]:
        said = self._make_text().add(text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": said.content or (None if said.calls else "")}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [_call(call) for call in said.calls]
            self._num_calls[index] = len(said.calls)
        return {"message": message}

    def _said_next(self, index: int, text: str, *, is_last: bool) -> dict[str, Any] | None:
        begins = index not in self._texts
        if begins:
            self._texts[index] = self._make_text()
        said = self._texts[index].add(text, is_last=is_last)
        if not (said or begins):
            return None
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if begins else {}
        if said.content:
            delta["content"] = said.content
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.calls:
            first = self._num_calls.get(index, 0)
            delta["tool_calls"] = [{"index": place, **_call(call)} for place, call in enumerate(said.calls, first)]
            self._num_calls[index] = first + len(said.calls)
        return {"delta": delta}

    def _is_plain(self, index: int) -> bool:
        text = self._texts.get(index)
        return text is not None and text.is_plain

    def _plain(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _finish_reason(self, index: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._num_calls.get(index) else reason

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        content = [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top.items()],
            }
            for entry in entries
        ]
        return {"content": content}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        name = self._names.of(token_id)
        has_text = name != f"token_id:{token_id}"
        return {"token": name, "logprob": _finite(logprob), "bytes": list(name.encode()) if has_text else None}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def usage_of(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
