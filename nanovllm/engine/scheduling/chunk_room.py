"""Which prompts a mixed step takes, and how much of each: by its token budget and its time. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True)
class TimeLimit:
    """How long a step may take by its prediction, and what that is for `explain`."""

    seconds: float
    reason: str


@dataclass(frozen=True)
class Demand:
    """What a prompt asks of a step.

    Attributes:
        num_tokens: maximum number of its tokens.
        least: so many of them even if there is no time, where it is the oldest prompt.
        num_left: tokens that are left of it.
        multiple: what chunks that do not end the prompt are multiples of, if not 1. Those leave two tokens at least: a
            single token behind what another card has stored would not clear what follows it there.
        fewest: fewer tokens, if they do not end the prompt, are none.
        reason: why it does not ask for more, for `explain`; None if it will get more elsewhere, or has no more.
    """

    num_tokens: int
    least: int
    num_left: int
    multiple: int = 1
    fewest: int = 1
    reason: str | None = None

    def rounded(self, num_tokens: int) -> int:
        """The tokens of a chunk for which there is room for so many, at most `self.num_tokens`."""
        if num_tokens == self.num_left or self.multiple == 1:
            return num_tokens
        rounded = num_tokens // self.multiple * self.multiple
        rounded = rounded if self.num_left - rounded > 1 else rounded - self.multiple
        return rounded if rounded >= self.fewest else 0


class ChunkRoom:
    """Room for prompt tokens in a step that is being formed.

    Args:
        step_time: predicts the step's time.
        size: what the step has already.
        budget: maximum number of prompt tokens.
        limit: of the step's predicted time; None for no limit.
        demand_of: says what a request asks of the step.
    """

    def __init__(
        self,
        step_time: StepTimeModel,
        size: StepSize,
        budget: int,
        limit: TimeLimit | None,
        demand_of: Callable[[Sequence], Demand],
    ) -> None:
        self._step_time = step_time
        self._size = size
        self._budget = budget
        self._limit = limit
        self._demand_of = demand_of
        self._num_chunks = 0

    def share_out(self, candidates: Iterator[Sequence]) -> Iterator[tuple[Sequence, int, str | None]]:
        """The requests that get room in the step, or wait for some, oldest first, how many tokens each gets, and why
        not more (None if it has no more, or will get it elsewhere).

        The oldest prompt comes first. Where it fills this step and more, younger ones that are much shorter than what
        is left of it may have half of its room: else a long prompt would hold up every short one behind it.

        Args:
            candidates: requests with tokens left to prefill, oldest first. The caller gives each its chunk, by `take`,
                before it asks for the next.
        """
        oldest = next(candidates, None)
        if oldest is None:
            return
        demand = self._demand_of(oldest)
        most = self._tokens_for(oldest, demand, is_oldest=True)
        has_more = most < oldest.num_tokens_to_prefill
        if has_more and most and (most < demand.num_tokens or 2 * most >= self._budget):
            left_to_others, num_long, num_before = most // 2, 0, self._num_chunks
            for seq in candidates:
                if seq.num_tokens_to_prefill * SHORTER > oldest.num_tokens_to_prefill:
                    num_long += 1
                else:
                    their_demand = self._demand_of(seq)
                    fitting = self._tokens_for(seq, their_demand)
                    num_tokens = their_demand.rounded(min(fitting, left_to_others))
                    left_to_others -= num_tokens or left_to_others  # none fits, nor will another
                    yield seq, num_tokens, self._reason(their_demand, num_tokens, fitting)
                if not left_to_others or num_long > MOST_PASSED_BY or self._num_chunks == MAX_CHUNKS - 1:
                    break
            if self._num_chunks > num_before:
                most = self._tokens_for(oldest, demand, is_oldest=True)
            yield oldest, most, self._reason(demand, most, most)
            return
        yield oldest, most, self._reason(demand, most, most)
        for seq in candidates:
            demand = self._demand_of(seq)
            num_tokens = self._tokens_for(seq, demand)
            yield seq, num_tokens, self._reason(demand, num_tokens, num_tokens)
            if num_tokens < demand.num_tokens:
                return

    def take(self, chunk: PrefillChunk) -> None:
        """Takes the room for a chunk."""
        self._size = self._size.with_chunk(chunk.start, chunk.num_tokens)
        self._budget -= chunk.num_tokens
        self._num_chunks += 1

    def _reason(self, demand: Demand, num_tokens: int, fitting: int) -> str | None:
        """Why a request gets no more than this many tokens, of so many for which there is room and time."""
        if num_tokens == demand.num_tokens:
            return demand.reason
        if num_tokens == self._most(demand):
            return "the step is full"
        if self._limit is None or num_tokens < fitting:
            return "half of the step is the oldest prompt's"
        return self._limit.reason

    def _tokens_for(self, seq: Sequence, demand: Demand, *, is_oldest: bool = False) -> int:
        """How many of a request's prompt tokens the step takes."""
        most = self._most(demand)
        if self._limit is None or not most:
            return most
        fitting = self._step_time.tokens_that_fit(self._limit.seconds, self._size, seq.num_prefilled_tokens, most)
        return max(demand.rounded(fitting), min(most, demand.least if is_oldest else 0))

    def _most(self, demand: Demand) -> int:
        """How many of a request's prompt tokens the step's budget allows."""
        if self._num_chunks == MAX_CHUNKS:
            return 0
        if demand.num_tokens <= self._budget:
            return demand.num_tokens
        # Where the chunk ends is free: the step ends with a full tile, unless that takes half of the chunk.
        beyond = (self._size.num_tokens + self._budget) % GEMM_TILE_TOKENS
        return demand.rounded(self._budget - beyond if beyond < self._budget // 2 else self._budget)
