"""Decides which of many cards prefills a request and which decodes it. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping

from nanovllm.engine.scheduling.card import MAX_FAILURES_IN_A_ROW, Card
from nanovllm.engine.scheduling.circuit_breaker import CircuitBreaker
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.scheduling.placement import (
    MOST_EXCESS_PROMPTS,
    SMALL_ROOM,
    OtherPrompts,
    Placement,
    Places,
    may_hold,
    num_before,
)
from nanovllm.engine.scheduling.step_time import StepSize
from nanovllm.engine.sequence import Sequence


class ClusterPlacement(Placement):
    """Many cards, of which some prefill and the others decode. Any card can do both.

    A request is prefilled where the fewest prompt tokens are to be computed before it and for it: tokens already in a
    card's prefix cache cost nothing, so that equal beginnings go to one card until others have less to do. It decodes
    on the card with the least context, its own counted where that card lacks it.

    A request that has failed once is prefilled where it decodes, on a card that it has not failed on. So is every one
    while no card that prefills is there; while none that decodes is there, those that prefill do that, too. A card on
    which one step after the other fails is left out for a while, as if it were not there; so is one that prefills if
    handoffs from it fail.

    Args:
        prefill_cards, decode_cards: at least one of each.
    """

    def __init__(self, prefill_cards: list[Card], decode_cards: list[Card]) -> None:
        super().__init__(prefill_cards[0], decode_cards[0])
        self.prefill_cards = prefill_cards
        self.decode_cards = decode_cards
        self._prefills = frozenset(prefill_cards)
        self.cards = list(dict.fromkeys((*decode_cards, *prefill_cards)))
        self._handoffs_from = {card: CircuitBreaker(MAX_FAILURES_IN_A_ROW) for card in self.cards}
        self._looked_up: tuple[Sequence, int, dict[Card, int]] | None = None
        """The request last looked up in the prefix caches, its length, and how many of its tokens each card lacks."""

    def decodes(self, card: Card) -> bool:
        return True

    def may_prefill(self, card: Card, seq: Sequence) -> bool:
        if seq.failures > 0 or card in self._prefills:
            return True
        now_s = time.monotonic()
        return not any(_is_usable(one, seq, now_s) and self._may_hand_over(one, now_s) for one in self.prefill_cards)

    def places_of(self, seq: Sequence, sizes: Mapping[Card, StepSize], others: OtherPrompts) -> Places:
        lacking, now_s = self._tokens_lacking(seq), time.monotonic()
        decode_cards = (
            _usable(self.decode_cards, seq, now_s)
            or _usable(self.prefill_cards, seq, now_s)
            or _able(self.cards, seq)
            or self.decode_cards
        )

        def decode_cost(card: Card) -> tuple[bool, bool, int]:
            return card is seq.failed_on, _is_full(card, seq), sizes[card].context + lacking[card]

        decode = min(decode_cards, key=decode_cost)
        prefill_cards = [card for card in _usable(self.prefill_cards, seq, now_s) if self._may_hand_over(card, now_s)]
        if seq.failures or not prefill_cards:
            return Places(decode, decode)

        def prefill_cost(card: Card) -> tuple[bool, float]:
            return _is_full(card, seq), num_before(card, others) + lacking[card]

        return Places(min(prefill_cards, key=prefill_cost), decode)

    def _may_hand_over(self, card: Card, now_s: float) -> bool:
        """Whether handoffs from a card work, as far as is known, or one may try."""
        return self._handoffs_from[card].allows_trial(now_s)

    def prefill_began(self, lease: Lease) -> None:
        breakers, now_s = [lease.prefill.card.breaker], time.monotonic()
        if lease.crosses:
            breakers += [lease.decode.card.breaker, self._handoffs_from[lease.prefill.card]]
        for breaker in breakers:
            if breaker.is_open:
                breaker.begin_trial(now_s)

    def prefill_worked(self, lease: Lease) -> None:
        if lease.crosses:
            lease.prefill.card.breaker.worked()
            self._handoffs_from[lease.prefill.card].worked()

    def prefill_failed(self, lease: Lease) -> None:
        if lease.crosses:
            self._handoffs_from[lease.prefill.card].failed(time.monotonic())

    def step_worked(self, card: Card) -> None:
        card.breaker.worked()

    def step_failed(self, card: Card) -> None:
        card.breaker.failed(time.monotonic())

    @property
    def pools(self) -> dict[str, Card]:
        return {card.name: card for card in self.cards}

    @property
    def is_degraded(self) -> bool:
        return any(card.breaker.is_open or self._handoffs_from[card].is_open or not card.is_up for card in self.cards)

    @property
    def words_for_degraded(self) -> tuple[str, str]:
        left_out = [str(card) for card in self.cards if card.breaker.is_open or not card.is_up]
        without_handoffs = [str(card) for card, breaker in self._handoffs_from.items() if breaker.is_open]
        words = []
        if left_out:
            words.append(f"{', '.join(left_out)} left out for a while, the other cards do the work")
        if without_handoffs:
            words.append(f"no KV is handed over from {', '.join(without_handoffs)} for a while")
        return "card left out" if left_out else "handoffs stopped", "; ".join(words)

    @property
    def words_for_recovered(self) -> str:
        return "all cards work again"

    def _tokens_lacking(self, seq: Sequence) -> dict[Card, int]:
        """Tokens of the request that each card's prefix cache lacks.

        Looked up once for the request that waits first: for each step anew it would take too long.
        """
        if self._looked_up is None or self._looked_up[:2] != (seq, seq.num_tokens):
            most = min(seq.num_tokens - 1, seq.num_reported_tokens)
            lacking = {
                card: seq.num_tokens - len(card.block_manager.match_prefix(seq, most)) * card.block_manager.block_size
                for card in self.cards
            }
            self._looked_up = seq, seq.num_tokens, lacking
        return self._looked_up[2]


class ElasticClusterPlacement(ClusterPlacement):
    """Many cards that all prefill and decode. No prompt is shared between them.

    A request is prefilled where the fewest prompt tokens are to be computed before it and for it, for the room that the
    card's steps have beside its decode rows; what is in a card's prefix cache costs nothing, as with fixed roles. It
    decodes there, too, so that no KV has to cross, unless that card has no time for it beside its rows, or more context
    than another by more than MOST_EXCESS_PROMPTS of its prompts: then it decodes on the one with the least context,
    among those with blocks and time for it.

    A request that has failed once, and every one of a card whose handoffs fail, is prefilled where it decodes. A card
    on which one step after the other fails is left out for a while.

    Args:
        cards: all of them.
    """

    bounds_steps = True

    def __init__(self, cards: list[Card]) -> None:
        super().__init__(cards, cards)
        self.decode_card = cards[-1]

    def may_prefill(self, card: Card, seq: Sequence) -> bool:
        return True

    def places_of(self, seq: Sequence, sizes: Mapping[Card, StepSize], others: OtherPrompts) -> Places:
        lacking, now_s = self._tokens_lacking(seq), time.monotonic()
        cards = _usable(self.cards, seq, now_s) or _able(self.cards, seq) or self.cards

        def prefill_cost(card: Card) -> tuple[bool, bool, float, int]:
            num_tokens = num_before(card, others) + lacking[card]
            room = max(others.room(card), SMALL_ROOM)
            return card is seq.failed_on, _is_full(card, seq), num_tokens / room, sizes[card].context

        def decode_cost(card: Card) -> tuple[bool, bool, bool, int]:
            context = sizes[card].context + lacking[card]
            return card is seq.failed_on, _is_full(card, seq), not others.has_time(card), context

        prefill, decode = min(cards, key=prefill_cost), min(cards, key=decode_cost)
        has_time = others.has_time(prefill)
        excess = sizes[prefill].context - sizes[decode].context
        if has_time and excess <= MOST_EXCESS_PROMPTS * seq.num_tokens:
            return Places(prefill, prefill)
        if seq.failures or not self._may_hand_over(prefill, now_s):
            return Places(prefill, prefill) if has_time else Places(decode, decode)
        return Places(prefill, decode)


def _is_full(card: Card, seq: Sequence) -> bool:
    """Whether a card may lack blocks for the request and one to grow into; what others hold of its prompt counts, too,
    since what nobody holds of it takes up free ones."""
    pool = card.block_manager
    return pool.blocks_for(seq.num_tokens) + 1 > pool.num_free_blocks


def _able(cards: list[Card], seq: Sequence) -> list[Card]:
    return [card for card in cards if card.is_up and may_hold(card, seq)]


def _is_usable(card: Card, seq: Sequence, now_s: float) -> bool:
    return card.is_up and may_hold(card, seq) and card.breaker.allows_trial(now_s)


def _usable(cards: list[Card], seq: Sequence, now_s: float) -> list[Card]:
    """Those that are there, may hold the request, and run steps, as far as is known."""
    return [card for card in cards if _is_usable(card, seq, now_s)]
