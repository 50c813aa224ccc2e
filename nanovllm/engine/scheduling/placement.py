"""Decides which card prefills a request and which decodes it. No torch."""

from __future__ import annotations

import time

from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.sequence import Sequence


class Placement:
    """Fixed roles: one card prefills and another decodes, or one card does both.

    The decode card prefills what failed once on the prefill card, what has outgrown that card's pool, and everything
    while that card's circuit breaker is open.

    Attributes:
        prefill_card, decode_card: the same object if there is one device.
        cards: all of them, in the order in which they are given work.
    """

    def __init__(self, prefill_card: Card, decode_card: Card) -> None:
        self.prefill_card = prefill_card
        self.decode_card = decode_card
        self.cards = list(dict.fromkeys((decode_card, prefill_card)))

    def decodes(self, card: Card) -> bool:
        """Whether requests decode on the card."""
        return card is self.decode_card

    def decode_card_of(self, seq: Sequence) -> Card:
        """Where a request that gets its lease now will decode."""
        return self.decode_card

    def prefill_card_of(self, seq: Sequence) -> Card:
        """Where a request that gets its lease now will be prefilled."""
        card, now = self.prefill_card, time.monotonic()
        is_left_out = card.breaker.is_open and not card.breaker.allows_trial(now)
        has_outgrown = card.block_manager.blocks_for(seq.num_tokens) > card.block_manager.num_blocks
        return self.decode_card if seq.failures or has_outgrown or is_left_out else card

    def prefill_began(self, lease: Lease) -> None:
        """A request got its lease. If its prefill card is left out, this request is the trial."""
        if lease.crosses and lease.prefill.card.breaker.is_open:
            lease.prefill.card.breaker.begin_trial(time.monotonic())

    def prefill_worked(self, lease: Lease) -> None:
        """A request was prefilled, and its KV has arrived where it decodes."""
        if lease.crosses:
            lease.prefill.card.breaker.worked()

    def prefill_failed(self, lease: Lease) -> None:
        """The prefill of a request, or the handoff of its KV, failed."""
        if lease.crosses:
            lease.prefill.card.breaker.failed(time.monotonic())
