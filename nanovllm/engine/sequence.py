"""The state of one request: its tokens, the lease of its KV blocks, its progress. No torch, no devices."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

import xxhash

from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.scheduling.timeline import Timeline
from nanovllm.outputs import FinishReason, RequestOutput, TokenLogprobs
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    """Waits in the queue and holds no blocks."""
    PREFILLING = auto()
    """Holds a lease and prefill blocks; some of its tokens are not yet computed."""
    HANDING_OFF = auto()
    """Prefill has ended; its KV is on the way to the decode pool."""
    DECODING = auto()
    """Its KV is in the decode pool."""
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine. `token_ids` holds prompt and output."""

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    arrival_s: float
    max_num_tokens: int
    """Number of prompt and output tokens at which the request ends by length."""
    stop_token_ids: frozenset[int] = frozenset()
    """All tokens that end this request: its own and, unless ignored, the checkpoint's."""
    is_streamed: bool = True
    """Whether its tokens are checked and emitted as they come, not only at its end."""

    status: SequenceStatus = SequenceStatus.WAITING
    token_ids: list[int] = field(init=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Those of the prompt from its second token on, as far as they are asked for and have come."""
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    lease: Lease | None = None
    num_prefilled_tokens: int = 0
    """Tokens whose KV is in the prefill pool, or will be once the steps in flight have ended."""
    failures: int = 0
    failed_on: Card | None = None
    """Where a step with this request alone has failed, the last time."""
    num_lost_cards: int = 0
    """Cards that were lost while a step with this request was in flight there."""

    num_emitted_tokens: int = field(init=False)
    """Tokens that callers know: the prompt and what was emitted."""
    output: RequestOutput | None = None
    """The output that is being emitted, None otherwise."""
    timeline: Timeline = field(init=False)
    token_time_index: int | None = None
    """Index into `TokenTimes`; None before the first token."""
    first_token_s: float | None = None
    finished_s: float | None = None

    in_graph_position: int = field(init=False)
    """Position of the token fed from which on sampling needs only temperature, seed and output index, as in graphs."""
    _block_hashes: list[int] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.timeline = Timeline(self.arrival_s)
        self.token_ids = list(self.prompt_token_ids)
        self.num_emitted_tokens = len(self.token_ids)
        params = self.params
        needs_more = params.needs_filter or params.needs_counts or bool(params.biases) or params.logprobs is not None
        # A request ends by length before a larger min_tokens matters.
        first_index = self.max_num_tokens if needs_more else min(params.min_tokens, self.max_num_tokens)
        self.in_graph_position = self.num_prompt_tokens - 1 + first_index

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_tokens_to_prefill(self) -> int:
        """Tokens whose KV is neither cached nor part of a chunk that was formed, while the request is prefilled."""
        return self.num_tokens - self.num_prefilled_tokens

    @property
    def num_reported_tokens(self) -> int:
        """Tokens at the beginning whose logits nobody asks for any more: a hit in the prefix cache may cover these."""
        is_complete = self.params.prompt_logprobs is None or len(self.prompt_logprobs) == self.num_prompt_tokens - 1
        return self.num_tokens if is_complete else len(self.prompt_logprobs)

    @property
    def last_fed_position(self) -> int:
        """Position of the last token fed to the model: the one sampled after it ends the request by length."""
        return self.max_num_tokens - 2

    def num_tokens_ahead(self, num_steps: int) -> int:
        """Tokens of its context so many decode steps from now; as at its end if it would have ended."""
        return min(self.num_tokens + num_steps, self.last_fed_position + 1)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def text_token_ids(self) -> list[int]:
        """The output without the stop token that ended it, if one did and the text is not to have it."""
        tokens = self.output_token_ids
        ended_by_token = self.finish_reason == "stop" and tokens[-1] in self.stop_token_ids
        return tokens[:-1] if ended_by_token and not self.params.include_stop_str_in_output else tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def block_hash(self, index: int, block_size: int) -> int:
        """64-bit hash of full block `index` and all tokens before it."""
        while len(self._block_hashes) <= index:
            start = len(self._block_hashes) * block_size
            parent = self._block_hashes[-1] if self._block_hashes else 0
            self._block_hashes.append(hash_block(parent, self.token_ids[start : start + block_size]))
        return self._block_hashes[index]


def hash_block(parent: int, token_ids: list[int]) -> int:
    """64-bit xxhash of a block's tokens, chained to the hash of the blocks before it (0 for none)."""
    digest = xxhash.xxh64(array("q", token_ids).tobytes(), seed=parent)
    return digest.intdigest()
