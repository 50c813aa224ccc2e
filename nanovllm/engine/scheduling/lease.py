"""The KV blocks that a request holds, card by card. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.shared_prompt import SharedPrompt


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
    """Where the prompt is computed. The same object as `decode` on one card, and after the handoff. Of a shared prompt,
    the blocks on the other card than that where the request decodes."""
    decode: Allocation
    """Where the request decodes: its prompt's blocks, and one to grow into if there was one."""
    num_handed_off_tokens: int = 0
    """Number of leading tokens whose KV was cached on the card of `decode`, or has been sent there. Of a shared prompt,
    the number of those whose KV both cards have, or that a chunk pushes from one to the other."""
    shared: SharedPrompt | None = None
    """How far a prompt is that both cards compute; None for other prompts."""
    in_flight: int = 0
    """Number of steps and copies in flight that touch the blocks; no block is freed while it is above 0."""
    ended: bool = False
    """Whether the request has ended or was preempted."""
    stuck: bool = False
    """Whether a copy that does not end touches the blocks, so that no request should wait for them."""

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """One allocation for each card."""
        return (self.decode,) if self.prefill is self.decode else (self.prefill, self.decode)

    def allocation_on(self, card: Card) -> Allocation:
        """The blocks on one of its cards."""
        return self.decode if self.decode.card is card else self.prefill

    def card_beside(self, card: Card) -> Card:
        """The other one of its two cards."""
        return self.prefill.card if self.decode.card is card else self.decode.card

    def may_compute_on(self, card: Card) -> bool:
        """Whether the next chunk of the prompt may run on the card."""
        return self.prefill.card is card if self.shared is None else self.shared.may_take(card)

    def holds_on(self, card: Card) -> bool:
        """Whether it holds blocks of the card's pool."""
        return self.decode.card is card or self.prefill.card is card

    @property
    def crosses(self) -> bool:
        """Whether the KV of the prompt is still to be handed off to another card."""
        return self.prefill is not self.decode
