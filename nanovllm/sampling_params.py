"""What a request asks of sampling and stopping. A leaf: knows nothing about engines or tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from nanovllm.errors import RequestError, short_repr

MAX_INTEGER = 2**63 - 1
MAX_LOGPROBS = 20
MAX_N = 1024
MAX_LOGIT_BIAS = 100.0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Args:
        temperature: 0 takes the most probable token (greedy); otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probabilities reach this sum, in (0, 1].
        min_p: drop tokens less probable than this share of the most probable one, in [0, 1].
        seed: seed of the request's random numbers: it gives the same tokens in any batch and mode. None derives one
            from the engine's `seed` and the request id.
        max_tokens: maximum number of tokens to generate, at least 1.
        min_tokens: tokens to generate before any end-of-sequence token, stop token or stop string counts.
        stop: a string, or several, that end the request; the text ends before the first one found. Special tokens that
            a stop string names, alone or amid text, are those tokens as the model writes them.
        stop_token_ids: token ids that end the request, in addition to the checkpoint's own.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: leave the stop string, or the text of the stop token, that ends the request in the
            text.
        ignore_eos: do not end on the checkpoint's end-of-sequence tokens.
        presence_penalty: taken from the logits of all tokens that the output has, -2 to 2.
        frequency_penalty: taken from the logits of a token for each time that the output has it, -2 to 2.
        repetition_penalty: divides the positive logits of all tokens that prompt or output have, and multiplies the
            negative ones; above 0, and 1 for none. It comes before the other penalties, and all before biases.
        logit_bias: what to add to the logits of some token ids, -100 to 100 each, before temperature and filters: a
            mapping, or pairs, as which it is kept.
        n: answers to each prompt of `generate` and `chat`, each with random numbers of its own.
        logprobs: None, or the number of most probable tokens (0 to 20) to report beside the chosen one.
            Log-probabilities are those of the model, before penalties, biases, temperature and filters.
        prompt_logprobs: the same of each prompt token but the first, which nothing predicts. All of the prompt is
            computed then, even if the prefix cache has it; with `n` above 1, for each answer.

    Raises:
        RequestError: a value is of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 64
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, math.inf, "0 (greedy) or more")
        self._set_integer("top_k", -1, None, "0 or -1 (all tokens) or a positive integer")
        _check_number("top_p", self.top_p, 0.0, 1.0, "above 0 and at most 1", open_low=True)
        _check_number("min_p", self.min_p, 0.0, 1.0, "between 0 and 1")
        self._set_integer("max_tokens", 1, None, "a positive integer")
        self._set_integer("min_tokens", 0, None, "0 or a positive integer")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; raise the one or lower the other"
            )
        if self.seed is not None:
            self._set_integer("seed", 0, MAX_INTEGER, f"None or an integer from 0 to {MAX_INTEGER}")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2.0, 2.0, "between -2 and 2")
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "above 0", open_low=True)
        self._set_integer("n", 1, MAX_N, f"1 to {MAX_N}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set_integer(name, 0, MAX_LOGPROBS, f"None or 0 to {MAX_LOGPROBS}")
        for name in ("skip_special_tokens", "include_stop_str_in_output", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={short_repr(getattr(self, name))} is not a bool; pass True or False")
        object.__setattr__(self, "stop", _checked_stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_stop_token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _checked_logit_bias(self.logit_bias))

    def _set_integer(self, name: str, low: int, high: int | None, allowed: str) -> None:
        """Checks an integer field, of any integer type, and keeps it as an int."""
        value = getattr(self, name)
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool):
            raise RequestError(f"{name}={short_repr(value)} is not an integer; it must be {allowed}")
        if number < low or (high is not None and number > high):
            raise RequestError(f"{name}={short_repr(value)} is out of range; it must be {allowed}")
        object.__setattr__(self, name, number)

    @property
    def float32_temperature(self) -> float:
        """The temperature kept where logits divided by it are finite in float32; 0 stays 0."""
        return self.temperature and min(max(self.temperature, 1e-6), 1e30)

    @property
    def needs_counts(self) -> bool:
        """Whether sampling depends on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs of token id and what is added."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_filter(self) -> bool:
        """Whether top_k, top_p or min_p narrows the choice, which takes a sort."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


def _check_number(name: str, value: object, low: float, high: float, allowed: str, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name}={short_repr(value)} is not a number; it must be {allowed}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    below = number <= low if open_low else number < low
    if not math.isfinite(number) or below or number > high:
        raise RequestError(f"{name}={short_repr(value)} is out of range; it must be {allowed}")


def _checked_logit_bias(given: object) -> tuple[tuple[int, float], ...]:
    pairs = () if given is None else tuple(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise RequestError(f"logit_bias={short_repr(given)} is not a mapping of token ids to numbers")
    for token_id, bias in pairs:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise RequestError(f"logit_bias has {short_repr(token_id)}, which is no token id (an integer, 0 or more)")
        allowed = f"between -{MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g}"
        _check_number(f"logit_bias of token {token_id}", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, allowed)
    biases = dict(pairs)
    return tuple((int(token_id), float(bias)) for token_id, bias in biases.items())


def _checked_stop_strings(stop: object) -> tuple[str, ...]:
    strings = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(text, str) and text for text in strings):
        raise RequestError(f"stop={short_repr(stop)} is not a non-empty string or a list of them")
    for text in strings:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"stop={short_repr(text)} is not valid Unicode ({error}), so no text has it") from error
    return tuple(strings)


def _checked_stop_token_ids(token_ids: object) -> tuple[int, ...]:
    listed = () if token_ids is None else token_ids
    if not isinstance(listed, (list, tuple)) or not all(
        isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in listed
    ):
        raise RequestError(f"stop_token_ids={short_repr(token_ids)} is not a list of token ids (integers, 0 or more)")
    return tuple(listed)
