"""Which prompts a mixed step takes, and how much of each: by its token budget and its time. No torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from nanovllm.engine.scheduling.step import MAX_CHUNKS, PrefillChunk
from nanovllm.engine.scheduling.step_time import StepSize, StepTimeModel
from nanovllm.engine.sequence import Sequence

LEAST_TOKENS = 32
"""Tokens of the oldest prompt that a step takes even if it is as long as it may be without them: prompts must come to
an end."""

SHORTER = 4
"""How many times as long the rest of the oldest prompt is as one that shares its room."""
GEMM_TILE_TOKENS = 128
"""A GEMM's time grows in steps of so many tokens."""
MOST_PASSED_BY = 2
"""Long prompts behind the oldest that shorter ones pass by: each holds blocks from the moment that it is looked at."""


class ChunkRoom:
    """Room for prompt tokens in a step that is being formed.

    Args:
        step_time: predicts the step's time.
        size: what the step has already.
        budget: maximum number of prompt tokens.
        limit_s: maximum predicted seconds of the step; None for no limit.
        most_tokens: gives the maximum number of a request's remaining prompt tokens, however much room there is.
    """

    def __init__(
        self,
        step_time: StepTimeModel,
        size: StepSize,
        budget: int,
        limit_s: float | None,
        most_tokens: Callable[[Sequence], int],
    ) -> None:
        self._step_time = step_time
        self._size = size
        self._limit_s = limit_s
        # Of a shared prompt it takes a while to say.
        self._most_tokens = functools.cache(most_tokens)
        self.num_tokens_left = budget
        self._num_chunks = 0

    def share_out(self, candidates: Iterator[Sequence]) -> Iterator[tuple[Sequence, int]]:
        """The requests that get room in the step, or wait for some, oldest first, and how many tokens each gets.

        The oldest prompt comes first. Where it takes more than this step, younger ones that are much shorter than what
        is left of it may have half of its room: else a long prompt would hold up every short one behind it.

        Args:
            candidates: requests with tokens left to prefill, oldest first. The caller gives each its chunk, by `take`,
                before it asks for the next.
        """
        oldest = next(candidates, None)
        if oldest is None:
            return
        wanted = self._most_tokens(oldest)
        most = self._tokens_for(oldest, wanted, at_least=LEAST_TOKENS)
        if most < wanted:
            left_to_others, num_long = most // 2, 0
            for seq in candidates:
                if seq.num_tokens_to_prefill * SHORTER > oldest.num_tokens_to_prefill:
                    num_long += 1
                else:
                    num_tokens = min(self._tokens_for(seq, self._most_tokens(seq)), left_to_others)
                    left_to_others -= num_tokens or left_to_others  # none fits, nor will another
                    yield seq, num_tokens
                if not left_to_others or num_long > MOST_PASSED_BY or self._num_chunks == MAX_CHUNKS - 1:
                    break
            yield oldest, self._tokens_for(oldest, wanted, at_least=LEAST_TOKENS)
            return
        yield oldest, most
        for seq in candidates:
            wanted = self._most_tokens(seq)
            num_tokens = self._tokens_for(seq, wanted)
            yield seq, num_tokens
            if num_tokens < wanted:
                return

    def take(self, chunk: PrefillChunk) -> None:
        """Takes the room for a chunk."""
        self._size = self._size.with_chunk(chunk.start, chunk.num_tokens)
        self.num_tokens_left -= chunk.num_tokens
        self._num_chunks += 1

    def reason_for_no_more(self, seq: Sequence, num_tokens: int) -> str | None:
        """Why a request gets no more than this many tokens; None if it has no more."""
        if num_tokens == seq.num_tokens_to_prefill:
            return None
        wanted = self._most_tokens(seq)
        if not wanted:
            return "the other card's chunk comes first"
        if num_tokens == wanted:
            return None  # its card takes the next chunk
        if num_tokens == self._most(wanted):
            return "the step is full"
        if self._limit_s is None or num_tokens < self._tokens_for(seq, wanted):
            return "half of the step is the oldest prompt's"
        return f"itl_target_ms={self._limit_s * 1e3:g}"

    def _tokens_for(self, seq: Sequence, wanted: int, *, at_least: int = 0) -> int:
        """How many of `wanted` prompt tokens of a request the step takes; `at_least` of them whatever its time."""
        most = self._most(wanted)
        if self._limit_s is None or not most:
            return most
        fitting = self._step_time.tokens_that_fit(self._limit_s, self._size, seq.num_prefilled_tokens, most)
        return max(fitting, min(most, at_least))

    def _most(self, wanted: int) -> int:
        """How many of so many prompt tokens of a request the step's budget allows."""
        budget = self.num_tokens_left
        if self._num_chunks == MAX_CHUNKS:
            return 0
        if wanted <= budget:
            return wanted
        # Where the chunk ends is free: the step ends with a full tile, unless that takes half of the chunk.
        beyond = (self._size.num_tokens + budget) % GEMM_TILE_TOKENS
        return budget - beyond if beyond < budget // 2 else budget
