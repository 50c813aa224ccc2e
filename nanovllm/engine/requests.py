"""Checks prompts and parameters and makes requests of them. No request that passes can fail because of them later."""

from __future__ import annotations

import operator
import time
from collections import abc
from dataclasses import dataclass
from functools import cached_property

import xxhash
from transformers import PreTrainedTokenizerBase

from nanovllm.engine.sequence import Sequence
from nanovllm.engine.text.request_text import NoText, RequestText, StreamedText, Vocabulary, WholeText
from nanovllm.engine.text.token_bound import TokenBound
from nanovllm.engine.text.tokenizer import check_text
from nanovllm.errors import RequestError, short_repr
from nanovllm.sampling_params import MAX_N, SamplingParams

Prompt = str | abc.Sequence[int]

CHARACTERS_PER_TOKEN = 8
"""A text with more characters per token that fits is checked before it is tokenized: most texts have four or five, and
tokenizing one that is far too long would take seconds and gigabytes."""


@dataclass(frozen=True)
class RequestIntake:
    """Checks and makes the requests of one engine.

    Attributes:
        tokenizer: the checkpoint's, None if it has none.
        vocab_size: token ids are 0 to vocab_size - 1.
        max_model_len: maximum number of tokens of prompt and output.
        pool_tokens: tokens that the smaller of the KV pools holds.
        eos_ids: the checkpoint's end-of-sequence tokens.
        seed: the engine's; requests without a seed derive theirs from it.
    """

    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    max_model_len: int
    pool_tokens: int
    eos_ids: frozenset[int]
    seed: int

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        assert self.tokenizer is not None, "without a tokenizer there is no text"
        return Vocabulary(self.tokenizer)

    @cached_property
    def _token_bound(self) -> TokenBound:
        assert self.tokenizer is not None, "without a tokenizer there is no text"
        return TokenBound(self.tokenizer)

    def checked_params(self, params: object, max_n: int = MAX_N) -> SamplingParams:
        """The parameters of a request, the defaults for None; `n` may be `max_n` at most.

        Raises:
            RequestError: `params` is of another type, or does not fit this checkpoint.
        """
        if params is None:
            return SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params={short_repr(params)} is not a SamplingParams; pass one, or None for the defaults"
            )
        if params.n > max_n:
            raise RequestError(f"n={params.n}: a stream, or a request of `add_request`, has one answer; add {params.n}")
        for token_id in params.stop_token_ids or ():
            if token_id >= self.vocab_size:
                raise RequestError(
                    f"stop_token_ids has {short_repr(token_id)}; the vocabulary has {self.vocab_size} tokens"
                )
        for token_id, _ in params.biases:
            if token_id >= self.vocab_size:
                raise RequestError(f"logit_bias has token id {token_id}; the vocabulary has {self.vocab_size} tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.vocab_size:
                raise RequestError(f"{name}={getattr(params, name)} is above the vocabulary's {self.vocab_size} tokens")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, which this checkpoint lacks; use stop_token_ids")
        if params.stop and params.skip_special_tokens:
            self._vocabulary.special_names(tuple(params.stop))
        if params.min_tokens and len(self._stop_token_ids(params)) >= self.vocab_size:
            raise RequestError("every token is a stop token, so min_tokens cannot be met; lower it to 0")
        return params

    def checked_prompt(self, prompt: object, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt that can be served.

        Raises:
            RequestError: the prompt is empty, too long, or neither text nor token ids of this vocabulary.
        """
        if isinstance(prompt, str):
            token_ids = self._tokenized(prompt, add_special_tokens) if prompt else []
        elif isinstance(prompt, (list, tuple)):
            # Without a Python loop over the tokens: in a flood of prompts it would delay decode steps.
            are_plain = set(map(type, prompt)) <= {int}
            token_ids = list(prompt) if are_plain else [_integer(token) for token in prompt]
        else:
            raise RequestError(f"a prompt of type {type(prompt).__name__} is neither text nor a list of token ids")
        if not token_ids:
            raise RequestError("the prompt is empty; it needs at least one token")
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"the prompt has token id {short_repr(token)}; the vocabulary has ids 0 to {self.vocab_size - 1}"
                )
        if len(token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; with max_model_len={self.max_model_len} at most "
                f"{self.max_model_len - 1} leave room for an answer"
            )
        if len(token_ids) > self.pool_tokens:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; the KV pool holds {self.pool_tokens}; "
                "raise num_kvcache_blocks or gpu_memory_utilization"
            )
        return token_ids

    def _tokenized(self, text: str, add_special_tokens: bool) -> list[int]:
        most = min(self.max_model_len - 1, self.pool_tokens)
        is_long = self.tokenizer is not None and len(text) > CHARACTERS_PER_TOKEN * most
        if is_long and self._token_bound.exceeds(text, most):
            raise RequestError(
                f"the prompt has {len(text)} characters, which are more than {most} tokens (none is longer than "
                f"{self._token_bound.longest} characters); with max_model_len={self.max_model_len} and a KV pool of "
                f"{self.pool_tokens} tokens at most {most} fit"
            )
        return list(check_text(self.tokenizer, text).encode(text, add_special_tokens=add_special_tokens))

    def make(
        self, request_id: int, token_ids: list[int], params: SamplingParams, *, streamed: bool
    ) -> tuple[Sequence, RequestText]:
        """A request of a checked prompt and parameters, and its text, decoded as it comes if `streamed`."""
        seq = Sequence(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            seed=params.seed if params.seed is not None else derived_seed(self.seed, request_id),
            arrival_s=time.perf_counter(),
            max_num_tokens=min(len(token_ids) + params.max_tokens, self.max_model_len),
            is_streamed=streamed or bool(params.stop),
            stop_token_ids=self._stop_token_ids(params),
        )
        if self.tokenizer is None:
            return seq, NoText()
        if streamed or params.stop:
            return seq, StreamedText(
                self._vocabulary,
                tuple(params.stop or ()),
                skip_special_tokens=params.skip_special_tokens,
                include_stop=params.include_stop_str_in_output,
            )
        return seq, WholeText(self.tokenizer, skip_special_tokens=params.skip_special_tokens)

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        own = frozenset(params.stop_token_ids or ())
        return own if params.ignore_eos else own | self.eos_ids


def derived_seed(engine_seed: int, request_id: int) -> int:
    """The seed of a request that has none of its own."""
    return xxhash.xxh64(request_id.to_bytes(8, "little"), seed=engine_seed).intdigest() >> 1


def _integer(token: object) -> int:
    try:
        number = operator.index(token)  # type: ignore[arg-type] # whether it has one is the question
    except TypeError:
        number = None
    if number is None or isinstance(token, bool):
        raise RequestError(f"the prompt has {short_repr(token)}, which is not a token id (an integer)")
    return number
