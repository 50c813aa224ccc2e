"""Answers in the form of OpenAI's API, whole and in chunks. Knows nothing of HTTP or engines."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from nanovllm.entrypoints.server.chat_text import ChatText, ToolCall
from nanovllm.outputs import RequestOutput, TokenLogprobs

LEAST_LOGPROB = -9999.0
"""OpenAI's word for a probability of nothing; JSON has no infinity."""


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


@dataclass
class Choice:
    """What has come of one of a body's requests so far.

    Attributes:
        text: without that of the prompt.
        logprobs: one entry for each token, if they are asked for.
    """

    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, output: RequestOutput) -> None:
        self.text += output.text
        self.num_tokens += len(output.new_token_ids)
        self.logprobs += output.new_logprobs or []
        self.finish_reason = output.finish_reason


class Answers(ABC):
    """What the answers to one body have in common.

    Args:
        name: of the answer, its `id`.
        model: its name.
        names: of tokens.
        wants_logprobs: whether there are log-probabilities.
        echoes: for each choice, the text that it begins with.
    """

    whole_object = ""
    chunk_object = ""
    _nothing: ClassVar[dict[str, Any]] = {}
    """A chunk's part for the text, where there is none."""

    def __init__(
        self, name: str, model: str, names: TokenNames, *, wants_logprobs: bool, echoes: Sequence[str] = ()
    ) -> None:
        self._names = names
        self._wants_logprobs = wants_logprobs
        self._echoes = dict(enumerate(echoes))
        self._offsets: dict[int, int] = {}
        self._head: dict[str, Any] = {"id": name, "object": "", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], num_prompt_tokens: int) -> dict[str, Any]:
        """The answer as one."""
        listed = [
            {
                "index": index,
                **self._said(index, choice.text),
                "logprobs": self._logprobs(index, choice.logprobs) if self._wants_logprobs else None,
                "finish_reason": self._finish_reason(index, choice.finish_reason),
            }
            for index, choice in enumerate(choices)
        ]
        usage = usage_of(num_prompt_tokens, sum(choice.num_tokens for choice in choices))
        return {**self._head, "object": self.whole_object, "choices": listed, "usage": usage}

    def chunk(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """A part of choice `index`; None if there is nothing to tell."""
        has_logprobs = self._wants_logprobs and output.new_token_ids
        if not (output.text or output.finished or has_logprobs):
            return None
        said = self._said_next(index, output.text, is_last=output.finished)
        if said is None and not (output.finished or has_logprobs):
            return None
        choice = {
            "index": index,
            **(said or self._nothing),
            "logprobs": self._logprobs(index, output.new_logprobs or ()) if self._wants_logprobs else None,
            "finish_reason": self._finish_reason(index, output.finish_reason),
        }
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

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

    def _finish_reason(self, index: int, reason: str | None) -> str | None:
        return reason

    @abstractmethod
    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """How a choice, or a chunk, has its log-probabilities."""


class Completion(Answers):
    """Answers of /v1/completions."""

    whole_object = chunk_object = "text_completion"
    _nothing: ClassVar[dict[str, Any]] = {"text": ""}

    def _said(self, index: int, text: str) -> dict[str, Any]:
        return {"text": self._echoes.pop(index, "") + text}

    def _said_next(self, index: int, text: str, *, is_last: bool) -> dict[str, Any] | None:
        return self._said(index, text)

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

    def __init__(
        self, name: str, model: str, names: TokenNames, make_text: Callable[[], ChatText], *, wants_logprobs: bool
    ) -> None:
        super().__init__(name, model, names, wants_logprobs=wants_logprobs)
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
