"""One step: the work that a card is given at once. Decided by the scheduler, run by a runner. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.decode_batch import NO_DECODE_ROWS, DecodeRows
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.sequence import Sequence

MAX_CHUNKS = 32
"""Most chunks of prompts in a step: the device keeps room for this many, and pads every step to it."""

BlockPair = tuple[int, int]
"""A block of the pool that a prompt is prefilled into, and the block of the decode pool that its KV goes to."""


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of a request to run through the model; `is_last` samples a token after them.

    `handoff` lists the blocks whose KV is ready to cross to the decode pool once this chunk has run.
    """

    seq: Sequence
    lease: Lease
    start: int
    end: int
    is_last: bool
    handoff: tuple[BlockPair, ...]

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


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

    @property
    def num_requests(self) -> int:
        return len(self.chunks) + len(self.decode)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def seqs(self) -> list[Sequence]:
        """The requests of both parts."""
        return [chunk.seq for chunk in self.chunks] + self.decode.batch.seqs

    @property
    def leases(self) -> list[Lease]:
        """Those of the requests when the step was formed."""
        return [chunk.lease for chunk in self.chunks] + self.decode.batch.leases

    @property
    def sampling_chunks(self) -> list[PrefillChunk]:
        """Those after which a token is sampled: the last of each prompt."""
        return [chunk for chunk in self.chunks if chunk.is_last]

    @property
    def chunks_sample_in_graph(self) -> bool:
        """Whether sampling after the chunks takes no more than each request's temperature, seed and index."""
        return all(chunk.end > chunk.seq.in_graph_position for chunk in self.sampling_chunks)

    def halves(self) -> tuple[Step, Step] | None:
        """Two smaller steps: the two parts if there are two, else each half of the requests; None of one request."""
        if self.chunks and self.decode:
            return Step(self.card, self.chunks), Step(self.card, decode=self.decode)
        if self.num_requests < 2:
            return None
        if self.chunks:
            middle = len(self.chunks) // 2
            return Step(self.card, self.chunks[:middle]), Step(self.card, self.chunks[middle:])
        first, second = self.decode.halves()
        return Step(self.card, decode=first), Step(self.card, decode=second)
