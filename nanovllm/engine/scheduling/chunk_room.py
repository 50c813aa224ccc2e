"""Which prompts a mixed step takes, and how much of each: by its token budget and its time. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from nanovllm.engine.scheduling.decode_batch import DecodeRows
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
        rows: its decode rows.
        budget: maximum number of prompt tokens.
        limit_s: maximum predicted seconds of the step; None for no limit.
    """

    def __init__(self, step_time: StepTimeModel, rows: DecodeRows, budget: int, limit_s: float | None) -> None:
        self._step_time = step_time
        self._size = StepSize(len(rows), rows.num_tokens)
        self._limit_s = limit_s
        self._budget = budget
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
        most = self._tokens_for(oldest, at_least=LEAST_TOKENS)
        if most < oldest.num_tokens_to_prefill:
            left_to_others, num_long = most // 2, 0
            for seq in candidates:
                if seq.num_tokens_to_prefill * SHORTER > oldest.num_tokens_to_prefill:
                    num_long += 1
                else:
                    num_tokens = min(self._tokens_for(seq), left_to_others)
                    left_to_others -= num_tokens or left_to_others  # none fits, nor will another
                    yield seq, num_tokens
                if not left_to_others or num_long > MOST_PASSED_BY or self._num_chunks == MAX_CHUNKS - 1:
                    break
            yield oldest, self._tokens_for(oldest, at_least=LEAST_TOKENS)
            return
        yield oldest, most
        for seq in candidates:
            yield seq, self._tokens_for(seq)
            if seq.num_tokens_to_prefill:
                return

    def take(self, chunk: PrefillChunk) -> None:
        """Takes the room for a chunk."""
        self._size = self._size.with_chunk(chunk.start, chunk.num_tokens)
        self._budget -= chunk.num_tokens
        self._num_chunks += 1

    def reason_for_no_more(self, seq: Sequence, num_tokens: int) -> str | None:
        """Why a request gets no more than this many tokens; None if it has no more."""
        if num_tokens == seq.num_tokens_to_prefill:
            return None
        if num_tokens == self._most(seq):
            return "the step is full"
        if self._limit_s is None or num_tokens < self._tokens_for(seq):
            return "half of the step is the oldest prompt's"
        return f"itl_target_ms={self._limit_s * 1e3:g}"

    def _tokens_for(self, seq: Sequence, *, at_least: int = 0) -> int:
        """How many of a request's remaining prompt tokens the step takes; `at_least` of them whatever its time."""
        most = self._most(seq)
        if self._limit_s is None or not most:
            return most
        fitting = self._step_time.tokens_that_fit(self._limit_s, self._size, seq.num_prefilled_tokens, most)
        return max(fitting, min(most, at_least))

    def _most(self, seq: Sequence) -> int:
        if self._num_chunks == MAX_CHUNKS:
            return 0
        if seq.num_tokens_to_prefill <= self._budget:
            return seq.num_tokens_to_prefill
        # Where the chunk ends is free: the step ends with a full tile, unless that takes half of the chunk.
        beyond = (self._size.num_tokens + self._budget) % GEMM_TILE_TOKENS
        return self._budget - beyond if beyond < self._budget // 2 else self._budget
