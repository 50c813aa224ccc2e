"""Decides which card prefills a request and which decodes it. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.scheduling.step_time import StepSize
from nanovllm.engine.sequence import Sequence

LEAST_SHARED_TOKENS = 512
"""Prompts that have fewer tokens to compute run on one card: two halves of 512 take 0.8 of the time of one card, and
shorter ones gain less."""

LEAST_SHARED_WHEN_GATHERED = 2048
"""The same while the requests that decode are gathered on one card: the other one computes a shorter prompt as soon
alone, and is left without decode rows for the next."""

GATHERED_SHARE = 0.5
"""Requests gather on one card while a decode step of all of them takes no more of `itl_target_ms` than this: the first
gap of one that joins them is nearly two such steps, where it would be one if the request decoded where its last chunk
runs. With a first gap beyond the target, a single hitch of the card would be one long gap too many."""

MOST_TOKENS_LEFT = 4096
"""With more prompt tokens of others left to compute, requests do not gather: both cards have prompts enough, and where
these are computed beside all decode rows, a first gap is two long steps."""

COST_BESIDE_GATHERED = 2.0
"""A short prompt is computed on the card where requests gather only if the other one would need more than so many times
as long: beside their rows it makes the gaps of all of them longer."""

LEAST_ROOM = 0.18
"""A prompt is not shared if one of the cards has less of a step's time for prompts than this: chunks are cut to the
shorter time."""

SMALL_ROOM = 0.05
"""Less room counts as this much: a step takes a few tokens of a prompt in any case."""

MOST_EXCESS_PROMPTS = 2
"""A request may decode on a card that has more context than another one with it, by at most so many of its prompts:
the gap behind its first token is shorter there, and decode steps hardly longer."""

MOST_OTHER_PROMPTS = 2
"""A prompt is shared beside at most so many others that are not computed to the end. With more, both cards have enough
to do."""


@dataclass(frozen=True)
class OtherPrompts:
    """The prompts beside one that is to be placed.

    Attributes:
        number: requests that wait, or whose prompts are not computed to the end.
        tokens_left: prompt tokens that each card is to compute; half of those of a shared prompt. 0 where not given.
        has_time: whether a card's decode steps have time for the request.
        may_gather: whether a card, on which some requests decode, may decode all of them and the request: its steps
            would still take no more than GATHERED_SHARE of the target, or some longer than those of one request if
            there is none.
        room: share of a step's time that a card has for prompts beside its decode rows: 1 without rows, or if steps
            have no limit.
        tokens_in_flight: prompt tokens of the steps that were launched on each card and have not ended.
    """

    number: int = 0
    tokens_left: Mapping[Card, float] = field(default_factory=dict)
    has_time: Callable[[Card], bool] = lambda card: True
    may_gather: Callable[[Card], bool] = lambda card: False
    room: Callable[[Card], float] = lambda card: 1.0
    tokens_in_flight: Mapping[Card, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Where a request runs.

    Attributes:
        prefill: computes its prompt; of a shared prompt, the card other than `decode`, which computes it, too.
        decode: decodes it.
        is_shared: whether both cards compute the prompt, chunk by chunk in turns.
        gathers: whether the request of a shared prompt decodes on `decode`, where others do, whichever card computes
            the last chunk.
    """

    prefill: Card
    decode: Card
    is_shared: bool = False
    gathers: bool = False


class Placement:
    """Fixed roles: one card prefills and another decodes, or one card does both.

    The decode card prefills what failed once on the prefill card, what has outgrown that card's pool, and everything
    while that card's circuit breaker is open.

    Attributes:
        prefill_card, decode_card: the same object if there is one device.
        cards: all of them, in the order in which they are given work.
        shares_prompts: whether two cards may compute one prompt, and KV may cross between elastic ones.
        bounds_steps: whether steps with prompts and decode rows are bounded also where no target is given.
        least_shared_tokens: minimum number of tokens to compute of a prompt that two cards share.
        least_shared_when_gathered: the same while requests gather on one card.
        most_other_prompts: maximum number of others beside it.
    """

    shares_prompts = False
    bounds_steps = False

    def __init__(self, prefill_card: Card, decode_card: Card) -> None:
        self.least_shared_tokens = LEAST_SHARED_TOKENS
        self.least_shared_when_gathered = LEAST_SHARED_WHEN_GATHERED
        self.most_other_prompts = MOST_OTHER_PROMPTS
        self.prefill_card = prefill_card
        self.decode_card = decode_card
        self.cards = list(dict.fromkeys((decode_card, prefill_card)))

    def decodes(self, card: Card) -> bool:
        """Whether requests decode on the card."""
        return card is self.decode_card

    def may_prefill(self, card: Card, seq: Sequence) -> bool:
        """Whether `places_of` may name the card as the one that prefills; quickly answered."""
        return True

    def places_of(self, seq: Sequence, sizes: Mapping[Card, StepSize], others: OtherPrompts) -> Places:
        """Where a request that gets its lease now runs.

        Args:
            seq: the request.
            sizes: what each card's decode steps will come to with the requests that have a lease.
            others: the other requests' prompts.
        """
        card, now = self.prefill_card, time.monotonic()
        is_left_out = card.breaker.is_open and not card.breaker.allows_trial(now)
        leaves_out = seq.failures or is_left_out or not may_hold(card, seq)
        return Places(self.decode_card if leaves_out else card, self.decode_card)

    def prefill_began(self, lease: Lease) -> None:
        """A request got its lease. If its prefill card is left out, this request is the trial."""
        if lease.crosses and self.prefill_card.breaker.is_open:
            self.prefill_card.breaker.begin_trial(time.monotonic())

    def prefill_worked(self, lease: Lease) -> None:
        """A request was prefilled, and its KV has arrived where it decodes."""
        if lease.crosses:
            self.prefill_card.breaker.worked()

    def prefill_failed(self, lease: Lease) -> None:
        """The prefill of a request, or the handoff of its KV, failed."""
        if lease.crosses:
            self.prefill_card.breaker.failed(time.monotonic())

    def step_worked(self, card: Card) -> None:
        """A step with decode rows has run on a card."""

    def step_failed(self, card: Card) -> None:
        """A step that was launched on a card of a cluster could not be run there."""

    @property
    def pools(self) -> dict[str, Card]:
        """The cards by what metrics call their pools."""
        return {"prefill": self.prefill_card, "decode": self.decode_card}

    @property
    def is_degraded(self) -> bool:
        """Whether prompts run where they should not, since too many failed where they should."""
        return self.prefill_card.breaker.is_open

    @property
    def words_for_degraded(self) -> tuple[str, str]:
        """What that is called in metrics and in the log."""
        words = f"{self.prefill_card} is left out for a while, {self.decode_card} prefills alone"
        return "prefill device left out", words

    @property
    def words_for_recovered(self) -> str:
        """What the log says once that is over."""
        return f"{self.prefill_card} works again"


class ElasticPlacement(Placement):
    """Both cards prefill and decode. Long prompts are shared: the cards compute their chunks in turns.

    While two decode steps of all requests fit into the target, streamed ones gather on one card, so that the other one
    has no decode rows. A short prompt of theirs is computed on that other card, and its KV crosses meanwhile, unless it
    would end much sooner where they decode; a longer one is shared, and its request joins them, too.

    Otherwise a prompt that is not shared is computed where its request decodes, on the card that then has fewer prompt
    tokens to compute for the room in its steps, its own among them but for what is in the card's prefix cache, or with
    less context if these are as many: one that is short, has many others beside it, has failed once, reports
    log-probabilities, or is too long for one of the pools; any prompt where a card has little room; and every prompt
    while too many fail whose KV crosses, or if the cards cannot write to each other's memory. It goes to the other card
    if this one has no blocks for it now, or no time beside its decode rows. A prompt that would be shared is computed
    on one card while the other one has more tokens in flight than that card and the prompt together.

    Where requests do not gather, that of a shared prompt decodes on the card with less context. What the other card has
    in its prefix cache it pushes there, so that a prefix that many requests have comes to be on both cards.

    The circuit breaker of `prefill_card` is that of sharing.

    Args:
        prefill_card, decode_card: the two cards, whose names mean nothing here.
        can_share: whether the cards can write to each other's memory.
    """

    def __init__(self, prefill_card: Card, decode_card: Card, *, can_share: bool) -> None:
        super().__init__(prefill_card, decode_card)
        self.shares_prompts = self.bounds_steps = can_share
        self._looked_up: tuple[Sequence, int, dict[Card, int]] | None = None
        """The request last looked up in the prefix caches, its length, and how many tokens each card would compute."""

    def decodes(self, card: Card) -> bool:
        return True

    def places_of(self, seq: Sequence, sizes: Mapping[Card, StepSize], others: OtherPrompts) -> Places:
        holding = [card for card in self.cards if may_hold(card, seq)] or self.cards
        decode, *rest = sorted(holding, key=lambda card: sizes[card].context)
        rooms = {card: others.room(card) for card in holding}

        def cost(card: Card, tokens_before: float) -> tuple[bool, float, int]:
            num_to_compute, pool = self._num_to_compute(seq, card), card.block_manager
            is_full = pool.blocks_for(num_to_compute) > pool.num_free_blocks
            return is_full, (tokens_before + num_to_compute) / max(rooms[card], SMALL_ROOM), sizes[card].context

        if rest and self._may_cross(seq):
            busier, num_to_compute = rest[0], self._num_to_compute(seq, decode)
            is_short = min(num_to_compute, self._num_to_compute(seq, busier)) < self.least_shared_when_gathered
            if is_short and self._may_gather(seq, busier, others):

                def cost_apart(card: Card) -> tuple[bool, float, int]:
                    is_full, tokens, context = cost(card, num_before(card, others))
                    return is_full, tokens * (COST_BESIDE_GATHERED if card is busier else 1.0), context

                card = min(holding, key=cost_apart)
                ends_at_once = seq.num_tokens + 1 >= seq.max_num_tokens  # then nothing reads its KV
                return Places(card, card if ends_at_once else busier)
            are_few = others.number <= self.most_other_prompts
            have_room = min(rooms.values()) >= LEAST_ROOM
            if num_to_compute >= self.least_shared_tokens and are_few and have_room:
                # A card whose steps in flight have so many more tokens is of no help: the other ends the prompt first.
                less_busy, more_busy = sorted(holding, key=lambda card: others.tokens_in_flight.get(card, 0.0))
                ahead = others.tokens_in_flight.get(more_busy, 0.0) - others.tokens_in_flight.get(less_busy, 0.0)
                if ahead > num_to_compute and others.has_time(less_busy):
                    return Places(less_busy, less_busy)
                if self._may_gather(seq, busier, others):
                    return Places(decode, busier, is_shared=True, gathers=True)
                return Places(busier, decode, is_shared=True)
        card = min(holding, key=lambda card: cost(card, others.tokens_left.get(card, 0.0)))
        if card is not decode and not others.has_time(card):
            card = decode
        return Places(card, card)

    def _may_gather(self, seq: Sequence, card: Card, others: OtherPrompts) -> bool:
        """Whether the request may join those that decode on the card: few prompt tokens of others are left to compute,
        half of the card's blocks stay free, and its steps stay short."""
        if sum(others.tokens_left.values()) > MOST_TOKENS_LEFT:
            return False
        pool = card.block_manager
        num_held = pool.num_held_blocks + pool.blocks_for(seq.num_tokens)
        return 2 * num_held <= pool.num_blocks and others.has_time(card) and others.may_gather(card)

    def _num_to_compute(self, seq: Sequence, card: Card) -> int:
        """Tokens of the request that the card's prefix cache lacks.

        Looked up once for the request that waits first: for each step anew it would take too long.
        """
        if self._looked_up is None or self._looked_up[:2] != (seq, seq.num_tokens):
            most, block_size = min(seq.num_tokens - 1, seq.num_reported_tokens), card.block_manager.block_size
            cached = {each: len(each.block_manager.match_prefix(seq, most)) for each in self.cards}
            self._looked_up = (
                seq,
                seq.num_tokens,
                {each: seq.num_tokens - num_blocks * block_size for each, num_blocks in cached.items()},
            )
        return self._looked_up[2][card]

    def _may_cross(self, seq: Sequence) -> bool:
        """Whether KV of the request's prompt may cross from one card to the other."""
        if not self.shares_prompts or seq.failures or seq.params.prompt_logprobs is not None:
            return False
        breaker = self.prefill_card.breaker
        return not breaker.is_open or breaker.allows_trial(time.monotonic())

    @property
    def words_for_degraded(self) -> tuple[str, str]:
        words = "too many prompts failed whose KV crossed between the cards; for a while each runs on one card"
        return "prompts not shared", words

    @property
    def words_for_recovered(self) -> str:
        return "prompts are shared again"


def num_before(card: Card, others: OtherPrompts) -> float:
    """Prompt tokens of others that a card has to compute, those of its steps in flight among them."""
    return others.tokens_left.get(card, 0.0) + others.tokens_in_flight.get(card, 0.0)


def may_hold(card: Card, seq: Sequence) -> bool:
    """Whether the card's pool has as many blocks, held or not, as the request needs."""
    return card.block_manager.blocks_for(seq.num_tokens) <= card.block_manager.num_blocks
