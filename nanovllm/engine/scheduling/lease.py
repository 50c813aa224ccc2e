"""The KV blocks that a request holds, card by card. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.engine.scheduling.card import Card


@dataclass(eq=False)
class Allocation:
    """Blocks of one card's pool that a request holds, in token order."""

    card: Card
    blocks: list[int]


@dataclass(eq=False)
class Lease:
    """What a request holds from before its prefill until it ends or is preempted: an allocation on each card.

    A lease outlives its request's interest in it while work in flight touches the blocks.
    """

    prefill: Allocation
    """Where its prompt is computed. The same object as `decode` on one card, and as soon as its KV has crossed."""
    decode: Allocation
    """Where it decodes: its prompt's blocks and, if there was one to be had, one to grow into."""
    num_handed_off_blocks: int = 0
    """Leading blocks of `decode` whose KV was there before the lease, or was sent there since."""
    in_flight: int = 0
    """Steps and copies in flight that touch the blocks; while above 0, none is freed."""
    ended: bool = False
    """Whether its request has given it up."""
    stuck: bool = False
    """Whether a copy that does not end touches the blocks, so that nobody should wait for them."""

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """One for each card that holds blocks of it."""
        return (self.decode,) if self.prefill is self.decode else (self.prefill, self.decode)

    @property
    def crosses(self) -> bool:
        """Whether its prompt's KV is computed on another card than the one that decodes it."""
        return self.prefill is not self.decode
