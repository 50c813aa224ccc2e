"""Cards without devices, simulated time, and single steps of an engine."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from nanovllm import LLM
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import STEPS_AHEAD
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.placement import Placement


def place(
    prefill_pool: BlockManager, decode_pool: BlockManager, max_num_batched_tokens: int, prefill_chunk_tokens: int
) -> Placement:
    """One card if the two pools are one, else a card for each, with workspace as an engine gives it."""
    if prefill_pool is decode_pool:
        card = Card("cpu:0", "device cpu:0", decode_pool, max_num_batched_tokens)
        return Placement(card, card)
    return Placement(
        Card("cpu:0", "prefill device cpu:0", prefill_pool, max_num_batched_tokens),
        Card("cpu:1", "decode device cpu:1", decode_pool, min(prefill_chunk_tokens, max_num_batched_tokens)),
    )


class SimulatedTime:
    """Events in the order of their moments; of those at one moment, in the order in which they were added.

    Attributes:
        now: the moment of the event that happens, in seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple] = []
        self._order = itertools.count()

    def at(self, moment: float, event: Callable[..., None], *arguments: object) -> None:
        """Adds an event."""
        heapq.heappush(self._events, (moment, next(self._order), event, arguments))

    def run(self, after_each: Callable[[], None]) -> None:
        """Has all events happen, those that they add among them, and `after_each` after each."""
        while self._events:
            self.now, _, event, arguments = heapq.heappop(self._events)
            event(*arguments)
            after_each()


def launch_decode(llm: LLM) -> bool:
    """Launches one more decode step, if so many may be in flight; whether it did."""
    card = llm.scheduler.placement.decode_card
    if sum(bool(work.step.decode) for work in llm._steps.on(card)) >= STEPS_AHEAD:
        return False
    step = llm.scheduler.schedule_decode()
    return step is not None and llm._loop._launch(step)


def launch_prefill(llm: LLM, card: Card) -> bool:
    """Launches one more prefill step there; whether there was one."""
    step = llm.scheduler.schedule_prefill(card)
    return step is not None and llm._loop._launch(step)
