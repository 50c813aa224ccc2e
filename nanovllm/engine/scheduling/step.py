"""One step: the work that is launched at once on a card. Formed by the scheduler, run by a runner. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.decode_batch import NO_DECODE_ROWS, DecodeRows
from nanovllm.engine.scheduling.lease import Allocation, Lease
from nanovllm.engine.scheduling.step_time import StepSize
from nanovllm.engine.sequence import Sequence

MAX_CHUNKS = 32
"""Maximum number of chunks in a step: the buffers have room for this many, and every step is padded to it."""

BlockPair = tuple[int, int]
"""A block of the pool where a chunk is computed, and the block of the other card's pool that its KV goes to."""
BlockPart = tuple[int, int, int, int]
"""A `BlockPair`, and the places in the block, from the first to before the last, of the tokens whose KV goes there."""


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of a request to run through the model; `is_last` samples a token after them.

    `handoff` lists the blocks whose KV is ready to cross to the other pool once this chunk has run, of the tokens of
    `handoff_tokens`.
    """

    seq: Sequence
    lease: Lease
    allocation: Allocation
    """The blocks of the lease on the card where the chunk runs."""
    start: int
    end: int
    is_last: bool
    handoff: tuple[BlockPair, ...]
    handoff_tokens: range = range(0)
    num_known_logprobs: int = 0
    """Prompt tokens of the request whose log-probabilities had been taken in when the chunk was formed."""
    number: int = 0
    """A shared prompt's chunk has a place among all such chunks, in the order of their launch, from 1 on; others 0."""
    waits_for: int = 0
    """Number of the last chunk before it that the other card computes; 0 if there is none."""

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def handoff_target(self) -> Card:
        """The card whose pool its blocks are handed to; of a shared prompt, the one that computes the other chunks."""
        return self.lease.card_beside(self.allocation.card)

    def handoff_parts(self, block_size: int) -> list[BlockPart]:
        """`handoff`, with the places of its tokens in blocks of this size."""
        tokens = self.handoff_tokens
        begins = range(tokens.start - tokens.start % block_size, tokens.stop, block_size)
        return [
            (source, target, max(tokens.start - begin, 0), min(tokens.stop - begin, block_size))
            for begin, (source, target) in zip(begins, self.handoff, strict=True)
        ]

    @property
    def logprob_positions(self) -> range:
        """Positions of the chunk after which the log-probability of the next prompt token is asked for."""
        if self.seq.params.prompt_logprobs is None:
            return range(0)
        return range(max(self.start, self.num_known_logprobs), min(self.end, self.seq.num_prompt_tokens - 1))


@dataclass(frozen=True, eq=False)
class Step:
    """Chunks of prompts, and a token for each request of a decode batch. Either part may be empty, not both."""

    card: Card
    chunks: list[PrefillChunk] = field(default_factory=list)
    decode: DecodeRows = NO_DECODE_ROWS

    @property
    def kind(self) -> Literal["prefill", "decode", "mixed"]:
        if not self.chunks:
            return "decode"
        return "mixed" if self.decode else "prefill"

    @cached_property
    def size(self) -> StepSize:
        """What the step's time goes by."""
        size = StepSize(len(self.decode), self.decode.num_tokens)
        for chunk in self.chunks:
            size = size.with_chunk(chunk.start, chunk.num_tokens)
        return size

    @property
    def num_requests(self) -> int:
        return len(self.chunks) + len(self.decode)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def shared_chunks(self) -> list[PrefillChunk]:
        """Chunks of prompts that two cards compute."""
        return [chunk for chunk in self.chunks if chunk.number]

    @property
    def number(self) -> int:
        """Number of its last shared chunk, 0 if it has none."""
        return max((chunk.number for chunk in self.chunks), default=0)

    @property
    def waits_for(self) -> int:
        """Number of the last of the other card's chunks that it waits for, layer by layer; 0 for none."""
        return max((chunk.waits_for for chunk in self.chunks), default=0)

    @property
    def seqs(self) -> list[Sequence]:
        """The requests of both parts."""
        return [chunk.seq for chunk in self.chunks] + self.decode.batch.seqs

    @property
    def leases(self) -> list[Lease]:
        """The leases that the requests had when the step was formed."""
        return [chunk.lease for chunk in self.chunks] + self.decode.batch.leases

    @property
    def sampling_chunks(self) -> list[PrefillChunk]:
        """The last chunks of prompts, after which a token is sampled."""
        return [chunk for chunk in self.chunks if chunk.is_last]

    @property
    def chunks_sample_in_graph(self) -> bool:
        """Whether sampling after the chunks needs no more than each request's temperature, seed and output index."""
        return all(chunk.end > chunk.seq.in_graph_position for chunk in self.sampling_chunks)

    def halves(self) -> tuple[Step, Step] | None:
        """Two smaller steps: the two parts if there are two, else the halves of the requests; None for one request."""
        if self.chunks and self.decode:
            return Step(self.card, self.chunks), Step(self.card, decode=self.decode)
        if self.num_requests < 2:
            return None
        if self.chunks:
            middle = len(self.chunks) // 2
            return Step(self.card, self.chunks[:middle]), Step(self.card, self.chunks[middle:])
        first, second = self.decode.halves()
        return Step(self.card, decode=first), Step(self.card, decode=second)
