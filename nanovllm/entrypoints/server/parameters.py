"""What the body of a completion asks for. A parameter that is not served is refused by name; none is dropped.

Knows nothing of HTTP or engines.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from typing import Any

from nanovllm.engine.requests import Prompt
from nanovllm.entrypoints.server.chat_text import with_parsed_arguments
from nanovllm.entrypoints.server.problems import Problem
from nanovllm.errors import RequestError, short_repr
from nanovllm.sampling_params import SamplingParams

SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "n", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens"),
    "include_stop_str_in_output",
)
"""Parameters that are those of `SamplingParams`, by the same names."""

WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Words of the client's own about the request, which change no answer."""

NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Parameters that other servers know and this one does not, each with the values that ask for nothing."""

NOT_SERVED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {**NOT_SERVED, "suffix": ("",)}

NOT_SERVED_IN_CHATS: dict[str, tuple[Any, ...]] = {
    **NOT_SERVED,
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "add_special_tokens": (False,),
}

STREAM_OPTIONS = ("include_usage", "include_obfuscation")
IN_BOTH = (
    *("model", "max_tokens", "stream", "stream_options", "logprobs", "prompt_logprobs", "logit_bias"),
    *(*SAMPLING, *WITHOUT_EFFECT),
)
IN_COMPLETIONS = (*IN_BOTH, "prompt", "echo", "add_special_tokens")
TEMPLATE_OPTIONS = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")
IN_CHATS = (*IN_BOTH, "messages", "tools", "max_completion_tokens", "top_logprobs", *TEMPLATE_OPTIONS)

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's; a chat's answer is as long as the model's context allows."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a body asks for, whatever the endpoint.

    Attributes:
        model: the name that it gives the model, None for whichever there is.
        params: of each of its requests, with `n` answers to each prompt.
        prompt_logprobs: its parameter of this name; those of `params` serve `echo`, too.
        streams: whether the answer comes as server-sent events.
        includes_usage: whether these end with the numbers of tokens.
    """

    model: str | None
    params: SamplingParams
    prompt_logprobs: int | None
    streams: bool
    includes_usage: bool


@dataclass(frozen=True, kw_only=True)
class CompletionAsked(Asked):
    """A body of /v1/completions.

    Attributes:
        prompts: one request for each.
        echoes: whether the answer begins with the prompt, its text and any log-probabilities.
        is_echo_alone: whether it ends there: `max_tokens=0`.
        add_special_tokens: those that the tokenizer puts around a text.
    """

    prompts: list[Prompt]
    echoes: bool
    is_echo_alone: bool
    add_special_tokens: bool


@dataclass(frozen=True, kw_only=True)
class ChatAsked(Asked):
    """A body of /v1/chat/completions.

    Attributes:
        messages: the conversation, as chat templates take it.
        may_call: whether the model was given tools.
        template_options: keywords of `LLM.chat`, the tools among them.
    """

    messages: Any
    may_call: bool
    template_options: dict[str, Any] = field(default_factory=dict)


def completion_of(body: dict[str, Any]) -> CompletionAsked:
    """The body of a completion.

    Raises:
        Problem: a parameter is unknown, not served or of the wrong type.
        RequestError: a value is out of range.
    """
    given = _known(body, IN_COMPLETIONS, NOT_SERVED_IN_COMPLETIONS)
    echoes, max_tokens = _flag(given, "echo"), given.get("max_tokens", DEFAULT_COMPLETION_TOKENS)
    is_echo_alone = echoes and type(max_tokens) is int and max_tokens == 0
    # A request has at least one token; the answer leaves it out.
    params = _params(given, 1 if is_echo_alone else max_tokens, given.get("logprobs"))
    in_both = _in_both(given, params)
    if echoes and params.logprobs is not None:
        params = replace(params, prompt_logprobs=max(params.logprobs, params.prompt_logprobs or 0))
    return CompletionAsked(
        **in_both,
        params=params,
        prompts=_prompts(given.get("prompt")),
        echoes=echoes,
        is_echo_alone=is_echo_alone,
        add_special_tokens=_flag(given, "add_special_tokens", default=True),
    )


def chat_of(body: dict[str, Any], max_model_len: int) -> ChatAsked:
    """The body of a chat; `max_model_len` are the tokens of an answer that says nothing of its length.

    Raises:
        Problem, RequestError: as `completion_of`.
    """
    given = _known(body, IN_CHATS, NOT_SERVED_IN_CHATS)
    if "messages" not in given:
        raise Problem(400, "messages is missing", param="messages")
    limits = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
    logprobs = given.get("top_logprobs", 0)
    if not _flag(given, "logprobs"):
        if logprobs != 0:
            raise Problem(400, "top_logprobs needs logprobs=true; add it or leave both out", param="top_logprobs")
        logprobs = None
    tools = _tools(given)
    options = {name: given[name] for name in TEMPLATE_OPTIONS if name in given}
    params = _params(given, limits[0] if limits else max_model_len, logprobs)
    return ChatAsked(
        **_in_both(given, params),
        params=params,
        messages=with_parsed_arguments(given["messages"]),
        may_call=bool(tools),
        template_options={**options, "tools": tools} if tools else options,
    )


def _tools(given: dict[str, Any]) -> list[Any]:
    """The functions that the model may call; none with `tool_choice="none"`."""
    tools = given.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Problem(400, f"tools={short_repr(tools)} is not a list of objects", param="tools")
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or function.get("strict"):
            message = f"tools has {short_repr(tool)}; functions alone are served, without strict=true"
            raise Problem(400, message, param="tools")
    return [] if given.get("tool_choice") == "none" else tools


def _known(body: dict[str, Any], known: tuple[str, ...], not_served: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What a body gives, without nulls: these ask for the default."""
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in not_served:
            _check_neutral(name, value, not_served[name])
        elif name not in known:
            near = difflib.get_close_matches(name, (*known, *not_served), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise Problem(400, f"unknown parameter {short_repr(name)}; {hint}", param=name)
    return given


def _check_neutral(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in accepted):
        hint = f", or pass {' or '.join(map(repr, accepted))}" if accepted else ""
        raise Problem(400, f"{name}={short_repr(value)} is not served; leave it out{hint}", param=name)


def _in_both(given: dict[str, Any], params: SamplingParams) -> dict[str, Any]:
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        raise Problem(400, f"model={short_repr(model)} is not a text", param="model")
    streams, options = _flag(given, "stream"), given.get("stream_options", {})
    if not isinstance(options, dict):
        raise Problem(400, f"stream_options={short_repr(options)} is not an object", param="stream_options")
    if options and not streams:
        raise Problem(400, "stream_options needs stream=true", param="stream_options")
    for name, value in options.items():
        if name not in STREAM_OPTIONS or (name == "include_obfuscation" and value):
            raise Problem(400, f"stream_options has {name}={short_repr(value)}, which is not served; leave it out")
    if streams and params.prompt_logprobs is not None:
        message = "prompt_logprobs is not served with stream=true; leave one of them out"
        raise Problem(400, message, param="prompt_logprobs")
    return {
        "model": model,
        "prompt_logprobs": params.prompt_logprobs,
        "streams": streams,
        "includes_usage": _flag(options, "include_usage"),
    }


def _params(given: dict[str, Any], max_tokens: Any, logprobs: Any) -> SamplingParams:
    named = {name: given[name] for name in SAMPLING if name in given}
    return SamplingParams(
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=given.get("prompt_logprobs"),
        logit_bias=_biases(given),
        **named,
    )


def _biases(given: dict[str, Any]) -> dict[int, Any]:
    """`logit_bias` with token ids as integers: the names of a JSON object are texts."""
    biases = given.get("logit_bias", {})
    if not isinstance(biases, dict) or not all(name.isdecimal() and len(name) < 10 for name in biases):
        message = f"logit_bias={short_repr(biases)} is not an object with token ids for names"
        raise Problem(400, message, param="logit_bias")
    return {int(name): bias for name, bias in biases.items()}


def _flag(given: dict[str, Any], name: str, *, default: bool = False) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise Problem(400, f"{name}={short_repr(value)} is not true or false", param=name)
    return value


def _prompts(prompt: Any) -> list[Prompt]:
    """A text, a list of texts, a list of token ids, or a list of such lists, as a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Problem(400, f"prompt={short_repr(prompt)} is not a text, token ids, or a list of them", param="prompt")
    kinds = set(map(type, prompt))  # without a Python loop over the tokens, which would hold streams up
    if kinds <= {str, list}:
        return prompt
    if kinds & {str, list}:
        raise RequestError("prompt mixes texts or lists with token ids; pass texts, token ids, or lists of those")
    return [prompt]
