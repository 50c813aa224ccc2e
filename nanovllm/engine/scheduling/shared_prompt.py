"""How the chunks of a prompt that two cards compute are cut, so that both end together. No torch.

Whichever card forms its next step takes the next chunk, so that they alternate unless one of them is held up. A chunk
attends to all chunks before it, whose KV the other card pushes layer by layer: so it runs a layer behind the one before
it, and a later chunk of the same length takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.step_time import StepSize

FIRST_SHARE = 0.53
"""Share of the first chunk of a pair where nothing is known of the cards' times."""
LEAST_PAIR_TOKENS = 512
"""The rest of a prompt that is shorter is one chunk."""


@dataclass
class SharedPrompt:
    """How far a prompt is that two cards compute.

    Attributes:
        first_card: computes the first chunk; None if either may.
        gathers: whether its request decodes where others do, whichever card computes the last chunk.
        last_numbers: number of the last chunk that each card was given, if any.
        ended_numbers: number of the last one of them that has ended.
        planned_end: where the next chunk is to end.
        pair_end: where the pair ends to which it belongs.
    """

    first_card: Card | None
    gathers: bool = False
    last_numbers: dict[Card, int] = field(default_factory=dict)
    ended_numbers: dict[Card, int] = field(default_factory=dict)
    planned_end: int = 0
    pair_end: int = 0

    def planned_tokens(self, cards: tuple[Card, Card], start: int, num_left: int, most: int, multiple: int) -> int:
        """Tokens of the next chunk by the plan, which is made if there is none left, for `cards[0]` to compute it.

        See `tokens_of_pair` for what it goes by.
        """
        left_of_plan = self.planned_end - start
        # Less than `multiple` may be left of a plan that was made with a smaller one.
        if left_of_plan <= 0 or left_of_plan < min(multiple, num_left):
            first, second = tokens_of_pair(cards, start, num_left, most, multiple)
            self.planned_end, self.pair_end = start + first, start + first + second
        return self.planned_end - start

    def may_take(self, card: Card) -> bool:
        """Whether the card may compute the next chunk."""
        return bool(self.last_numbers) or self.first_card in (None, card)

    def has_in_flight(self, card: Card) -> bool:
        """Whether a chunk of the card has not ended."""
        return self.last_numbers.get(card) != self.ended_numbers.get(card)

    def took(self, card: Card, end: int, number: int) -> None:
        """Notes that the card was given the next chunk, which ends there, perhaps sooner than planned."""
        self.last_numbers[card] = number
        # The second chunk of a pair as planned, unless the first one was shorter.
        self.planned_end = self.pair_end if end == self.planned_end else 0


def tokens_of_pair(cards: tuple[Card, Card], start: int, num_left: int, most: int, multiple: int) -> tuple[int, int]:
    """Tokens of the next pair of chunks, the first of which `cards[0]` computes and the second `cards[1]`.

    The rest of the prompt is divided into pairs of the same length, whose two chunks are predicted to take equally
    long.

    Args:
        cards: that share the prompt.
        start: tokens of the prompt before these.
        num_left: tokens of it that are left.
        most: maximum number of tokens of a chunk, at least `multiple`.
        multiple: what chunks but the prompt's last are multiples of.

    Returns:
        Tokens of the two chunks. The second may be 0: the rest is one chunk, or longer than a chunk may be.
    """
    most -= most % multiple
    if num_left < LEAST_PAIR_TOKENS:
        return (num_left if num_left <= most else most), 0
    num_pairs = -(-num_left // (2 * most))
    pair = min(_up(-(-num_left // num_pairs), multiple), num_left)
    least, greatest = _up(max(pair - most, multiple), multiple), min(most, _up(pair, multiple) - multiple)
    if least > greatest:
        return min(most, num_left), 0
    first = _fewest_that_take_longer(cards, start, pair, range(least, greatest + 1, multiple))
    return first, pair - first


def _fewest_that_take_longer(cards: tuple[Card, Card], start: int, pair: int, firsts: range) -> int:
    """The fewest tokens with which the first chunk takes as long as the second; the most of them if none do."""
    low, high = 0, len(firsts) - 1
    while low < high:
        middle = (low + high) // 2
        if _takes_longer(cards, start, firsts[middle], pair):
            high = middle
        else:
            low = middle + 1
    return firsts[low]


def _takes_longer(cards: tuple[Card, Card], start: int, first: int, pair: int) -> bool:
    """Whether the first chunk of a pair, with so many of its tokens, takes at least as long as the second.

    By what one card has learned, for both: they are of one kind, and what is wrong of its larger steps is wrong for
    both chunks.
    """
    for card in cards:
        first_s = card.step_time.predict(StepSize(0).with_chunk(start, first))
        second_s = card.step_time.predict(StepSize(0).with_chunk(start + first, pair - first))
        if first_s is not None and second_s is not None:
            return first_s >= second_s
    return first >= FIRST_SHARE * pair


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
