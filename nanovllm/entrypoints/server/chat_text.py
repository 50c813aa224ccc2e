"""The text of a chat's answer as what it means: reasoning in `<think>`, content, calls of tools in Hermes form.

Takes the text as it comes. Knows nothing of tokens or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants called; `arguments` is a JSON object, as text."""

    name: str
    arguments: str


@dataclass
class Said:
    """What a part of the text says."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class ChatText:
    """Splits one answer. What it is given together says the same as what it is given bit by bit.

    Whitespace around reasoning and calls is dropped. A call that is not closed, or is no JSON object with a `name` and
    `arguments`, stays in the content as it is.

    Args:
        finds_reasoning: whether the model thinks aloud at the beginning.
        in_reasoning: whether the prompt has begun that already.
        finds_calls: whether it was given tools.

    Attributes:
        is_plain: whether all text that comes is content, as it is.
    """

    def __init__(self, *, finds_reasoning: bool, in_reasoning: bool, finds_calls: bool) -> None:
        self._finds_calls = finds_calls
        self.is_plain = not (finds_reasoning or finds_calls)
        first = self._reasoning if in_reasoning else self._begin if finds_reasoning else self._content
        self._step: Callable[[Said, bool], bool] = first
        self._text = ""
        self._space = ""
        """What is between the content and a call, in case it turns out to be none."""
        self._drops_space = in_reasoning

    def add(self, text: str, *, is_last: bool) -> Said:
        """Takes the next part of the text, and gives what it says as far as no later part can change that."""
        if self.is_plain:
            return Said(content=text)
        self._text += text
        said = Said()
        while self._step(said, is_last):
            pass
        return said

    # Each step goes as far as it can, and says whether another one goes on.

    def _begin(self, said: Said, is_last: bool) -> bool:
        begun = self._text.lstrip()
        if begun.startswith(THINK):
            self._go_on(begun[len(THINK) :], self._reasoning)
            return True
        if THINK.startswith(begun) and not is_last:
            return False
        self._step = self._content
        return True

    def _reasoning(self, said: Said, is_last: bool) -> bool:
        before, found = self._before(END_THINK, is_last)
        said.reasoning += before.rstrip() if found or is_last else before
        if found:
            self._go_on(self._text, self._content)
        return found

    def _content(self, said: Said, is_last: bool) -> bool:
        if not self._finds_calls:
            self._drop_space()
            said.content += self._text
            self._text = ""
            return False
        before, found = self._before(CALL, is_last)
        said.content += before.rstrip() if found else before
        if found:
            self._space, self._step = before[len(before.rstrip()) :], self._call
        return found

    def _call(self, said: Said, is_last: bool) -> bool:
        inside, end, rest = self._text.partition(END_CALL)
        if not end and not is_last:
            return False
        call = _call_of(inside) if end else None
        if call is None:
            said.content += self._space + CALL + inside + end
            self._text, self._step = rest, self._content
        else:
            said.calls.append(call)
            self._go_on(rest, self._content)
        return True

    def _go_on(self, text: str, step: Callable[[Said, bool], bool]) -> None:
        self._text, self._step, self._drops_space = text, step, True

    def _drop_space(self) -> None:
        if self._drops_space:
            self._text = self._text.lstrip()
            self._drops_space = not self._text

    def _before(self, tag: str, is_last: bool) -> tuple[str, bool]:
        """Takes what is before a tag, and the tag; or, without one, what cannot be the whitespace or the tag's."""
        self._drop_space()
        before, found, rest = self._text.partition(tag)
        if found:
            self._text = rest
            return before, True
        end = len(self._text)
        if not is_last:
            end -= next((size for size in range(len(tag) - 1, 0, -1) if self._text.endswith(tag[:size])), 0)
            end = len(self._text[:end].rstrip())
        before, self._text = self._text[:end], self._text[end:]
        return before, False


def _call_of(text: str) -> ToolCall | None:
    try:
        call = msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return ToolCall(call["name"], msgspec.json.encode(arguments).decode()) if isinstance(arguments, dict) else None


def with_parsed_arguments(messages: Any) -> Any:
    """Messages with the arguments of calls as objects, as chat templates expect them; OpenAI's form has texts.

    What is malformed is left as it is, for the template's checks to refuse.
    """
    if not isinstance(messages, list):
        return messages
    have_calls = [isinstance(message, dict) and message.get("tool_calls") for message in messages]
    return [_parsed(message) if has else message for message, has in zip(messages, have_calls, strict=True)]


def _parsed(message: dict[str, Any]) -> dict[str, Any]:
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"].encode() or b"{}")
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
