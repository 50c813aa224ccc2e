"""Conversations as prompts, through the checkpoint's chat template. Knows nothing of tokens."""

from __future__ import annotations

import logging
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanovllm.errors import RequestError, short_repr

logger = logging.getLogger(__name__)

ARGUMENTS_OF_CHAT = frozenset({"tools", "add_generation_prompt", "continue_final_message"})

NOT_FOR_TEMPLATES = frozenset(
    {"self", "conversation", "conversations", "messages", "chat_template", "tokenize", "padding", "truncation"}
    | {"max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)
"""Names that `apply_chat_template` takes for itself, so that no template sees them."""

MARKER = "zqtrace{}zq"
"""Stands for the content of a message, to see whether it arrives; nothing that templates do to texts changes it."""


class ChatTemplate:
    """The chat template of a checkpoint and what is passed to it beside the messages; see `LLM.chat`.

    Raises:
        RequestError: there is no template, or an argument is of the wrong type or not one that it can use.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        tools: Any = None,
        chat_template_kwargs: Any = None,
        add_generation_prompt: Any = None,
        continue_final_message: Any = False,
    ) -> None:
        if tokenizer is None or not tokenizer.chat_template:
            raise RequestError("this checkpoint has no chat template; use generate() with a prompt of your own")
        self._tokenizer = tokenizer
        self._options = {
            **_checked_kwargs(chat_template_kwargs),
            **_checked_ending(add_generation_prompt, continue_final_message),
            "tools": _checked_tools(tools),
        }
        try:
            source = str(tokenizer.get_chat_template(None, self._options["tools"]))
        except ValueError as error:
            raise RequestError(f"none of the chat templates can be used: {error}") from error
        if self._options["tools"] and not re.search(r"\btools\b", source):
            raise RequestError("the chat template takes no tools; describe them in a message, or leave them out")
        for name in chat_template_kwargs or ():
            if not re.search(rf"\b{re.escape(name)}\b", source):
                logger.warning("chat_template_kwargs has %r, which the chat template does not use", name)

    def render(self, messages: Any) -> str:
        """A conversation as a prompt.

        Raises:
            RequestError: the messages are malformed, do not fit the template, or one leaves no trace in the prompt.
        """
        as_given = _checked_messages(messages)
        as_text = [_joined(message) for message in as_given]
        marked = [_marked(message, index) for index, message in enumerate(as_text)]
        traces = self._try(marked)
        takes_parts = traces is not None and as_given != as_text and self._takes_parts(as_given, marked, traces)
        prompt = self._apply(as_given if takes_parts else as_text)
        if traces is not None:
            _check_traces(marked, traces.lower())
        return prompt

    def _takes_parts(self, messages: list[dict[str, Any]], marked: list[dict[str, Any]], traces: str) -> bool:
        """Whether a list of parts renders as its text does, for every message that has one."""
        in_parts = [
            {**mark, "content": [_part(mark["content"])]} if isinstance(message["content"], list) else mark
            for message, mark in zip(messages, marked, strict=True)
        ]
        return self._try(in_parts) == traces

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._apply(messages)
        except RequestError:
            return None

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **self._options))
        except Exception as error:  # whatever the template raises, the conversation does not fit it
            reason = str(error) if len(str(error)) <= 500 else f"{str(error)[:500]}..."
            raise RequestError(f"the chat template refuses these messages: {reason}") from error


def _checked_kwargs(kwargs: Any) -> dict[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise RequestError(f"chat_template_kwargs={short_repr(kwargs)} is not a dict with names for keys")
    for name in kwargs:
        if name in ARGUMENTS_OF_CHAT:
            raise RequestError(f"chat_template_kwargs has {name!r}, which is an argument of chat(); pass it there")
        if name in NOT_FOR_TEMPLATES:
            raise RequestError(f"chat_template_kwargs has {name!r}, which is not the template's; leave it out")
    return kwargs


def _checked_tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) or callable(tool) for tool in tools):
        raise RequestError(f"tools={short_repr(tools)} is not a list of JSON schemas (dicts) or documented functions")
    return list(tools) or None


def _checked_ending(add_generation_prompt: Any, continue_final_message: Any) -> dict[str, bool]:
    if not isinstance(continue_final_message, bool):
        raise RequestError(f"continue_final_message={short_repr(continue_final_message)} is not a bool")
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    if not isinstance(add_generation_prompt, bool):
        raise RequestError(f"add_generation_prompt={short_repr(add_generation_prompt)} is not a bool or None")
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "add_generation_prompt=True begins a message and continue_final_message=True goes on with the last one; "
            "choose one"
        )
    return {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages, their parts as dicts."""
    well_formed = isinstance(messages, (list, tuple)) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and ("content" in message or message.get("tool_calls"))
        for message in messages
    )
    if not well_formed or not messages:
        raise RequestError(
            f"messages={short_repr(messages)} is not a non-empty list of dicts with 'role' and 'content'"
        )
    return [{**message, "content": _checked_content(index, message)} for index, message in enumerate(messages)]


def _checked_content(index: int, message: dict[str, Any]) -> str | list[dict[str, Any]] | None:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RequestError(
            f"{_named(index, message)}: content={short_repr(content)} is not a text, a list of parts or None"
        )
    parts = [_part(part) if isinstance(part, str) else part for part in content]
    for number, part in enumerate(parts):
        where = f"{_named(index, message)}: part {number}"
        if not isinstance(part, dict) or "type" not in part:
            raise RequestError(f"{where} is {short_repr(part)}; pass a dict with 'type' and 'text'")
        if part["type"] != "text":
            raise RequestError(
                f"{where} is of type {short_repr(part['type'])}; only parts of type 'text' can be served"
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where} has text={short_repr(part.get('text'))}, which is not a text")
    return parts


def _check_traces(marked: list[dict[str, Any]], rendered: str) -> None:
    for index, message in enumerate(marked):
        content = message["content"]
        # Some templates leave out what was said beside a call of a tool, which is trace enough.
        if content and content.strip() and content not in rendered and not message.get("tool_calls"):
            raise RequestError(
                f"{_named(index, message)} leaves no trace in the prompt: the chat template does not know that role, "
                "or not there; use one that it does"
            )


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _marked(message: dict[str, Any], index: int) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": MARKER.format(index)} if content and content.strip() else message


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _named(index: int, message: dict[str, Any]) -> str:
    return f"message {index} (role {short_repr(message['role'])})"
