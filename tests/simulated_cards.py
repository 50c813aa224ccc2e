"""Two cards by simulated time, layer by layer, and the engine's loop before them: roles and shared prompts.

A card's steps take what was measured of the 8B shape on an H100 (`tests/test_step_time.py`). A step with a chunk that
waits for another card's does so layer by layer, as on a GPU.
"""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler, SchedulerLimits
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.cluster_placement import ElasticClusterPlacement
from nanovllm.engine.scheduling.placement import ElasticPlacement, Placement
from nanovllm.engine.scheduling.step import PrefillChunk, Step
from nanovllm.engine.scheduling.step_time import StepTimeModel
from tests.steps import SimulatedRequests
from tests.test_step_time import COSTS, MS, true_step_s

NUM_LAYERS = 36
STORED_SHARE = 0.3
"""Share of a layer's time before its KV is stored."""
PUSH_S, LAUNCH_S, LEAD_S = 0.05 * MS, 0.5 * MS, 2.0 * MS
EXCHANGE_S = 0.05 * MS
"""What a step takes longer that exchanges KV: 0.01 to 0.02 ms for flags on two H200s, and the pushes."""
NOISE = 0.015


def placement_of(mode: str, cards: tuple[Card, Card]) -> Placement:
    """The cards in a mode: `fixed`, `replicas`, `elastic`, or `cluster` for elastic cards that share no prompt."""
    if mode == "cluster":
        return ElasticClusterPlacement(list(cards))
    return Placement(*cards) if mode == "fixed" else ElasticPlacement(*cards, can_share=mode == "elastic")


class TwoCards(SimulatedRequests):
    """Serves a trace to its end.

    Args:
        trace: arrivals, as (seconds, prompt tokens, output tokens).
        mode: as of `placement_of`.
        target_ms: `itl_target_ms`.
        late_ms: mean of the times by which tokens are taken in late, which vary as exponentials do.
    """

    def __init__(
        self, trace, mode: str, target_ms: float | None, *, chunk_tokens: int = 1024, late_ms: float = 0.0
    ) -> None:
        limits = SchedulerLimits(chunk_tokens, 512, 64, itl_target_s=None if target_ms is None else target_ms * MS)
        self.cards = tuple(
            Card(f"cpu:{index}", "", BlockManager(2**13, 64, False), 16384, step_time=StepTimeModel(COSTS))
            for index in range(2)
        )
        super().__init__(Scheduler(limits, placement_of(mode, self.cards)))
        self.rng = random.Random(0)
        self.late_s = late_ms * MS
        self.taken_in_s = dict.fromkeys(self.cards, 0.0)
        """By card, when the last step's tokens are taken in."""
        self.steps: dict[Card, list[Step]] = {card: [] for card in self.cards}
        self.began_s: dict[Step, float] = {}
        self.waited_s: dict[Step, float] = {}
        self.free_s = dict.fromkeys(self.cards, 0.0)
        self.put_off: dict[Card, float] = {}
        self.stored_s: dict[int, np.ndarray] = {}
        """By the number of a shared chunk, when each layer's KV has arrived on the other card."""
        self.ends_s: dict[int, float] = {}
        self.before: dict[Step, tuple[Step, float]] = {}
        """By step, the one before it on its card if it was launched before that was taken in, and when it was."""
        self.ended_s: dict[Step, float] = {}
        self.chunks: Counter[str] = Counter()
        self.serve(trace, self.launch)

    def free_in_s(self, card: Card) -> float:
        """Predicted seconds until the card has ended what was launched; the same as `LaunchTimes.free_in_s`."""
        steps = self.steps[card]
        if not steps:
            return 0.0
        times = [card.step_time.predict(step.size) or 0.0 for step in steps]
        return max(self.began_s[steps[0]] + times[0] - self.now, 0.0) + sum(times[1:])

    def launch(self) -> None:
        for card in self.scheduler.cards:
            for _ in range(2):
                if not self.may_launch(card):
                    break
                step = self.scheduler.schedule(card, self.steps[card], self.free_in_s)
                if step is None:
                    break
                self.run_step(card, step)

    def may_launch(self, card: Card) -> bool:
        steps = self.steps[card]
        if len(steps) != 1:
            return True
        predicted_s = card.step_time.predict(steps[0].size)
        if predicted_s is None:
            return True
        launch_at_s = self.began_s[steps[0]] + 0.97 * predicted_s - LEAD_S
        if launch_at_s <= self.now:
            return True
        if self.put_off.get(card) != launch_at_s:
            self.put_off[card] = launch_at_s
            self.at(launch_at_s, lambda: None)
        return False

    def run_step(self, card: Card, step: Step) -> None:
        step_s = true_step_s(step.size) + EXCHANGE_S * any(chunk.number for chunk in step.chunks)
        layer_s = step_s * math.exp(self.rng.gauss(0, NOISE)) / NUM_LAYERS
        moment = max(self.free_s[card], self.now + LAUNCH_S)
        if not self.steps[card]:
            self.began_s[step] = moment
        waited_s, stored_s = 0.0, np.zeros(NUM_LAYERS)
        arrives_s = self.stored_s.get(step.waits_for)
        for layer in range(NUM_LAYERS):
            moment += STORED_SHARE * layer_s
            if arrives_s is not None and arrives_s[layer] > moment:
                waited_s += arrives_s[layer] - moment
                moment = float(arrives_s[layer])
            stored_s[layer] = moment + PUSH_S  # the push waits for the flag, too
            moment += (1 - STORED_SHARE) * layer_s
        self.free_s[card] = moment
        if step.number:
            self.stored_s[step.number], self.ends_s[step.number] = stored_s, moment
        self.waited_s[step] = waited_s
        for chunk in step.chunks:
            self.chunks["shared" if chunk.number else "single"] += 1
            if chunk.handoff:
                self.scheduler.hold(chunk.lease)
        self.steps[card].append(step)
        self.ended_s[step] = moment
        late_s = self.rng.expovariate(1 / self.late_s) if self.late_s else 0.0
        # A chunk is taken in after the one before it, whose KV it has read.
        readable_s = max(moment, self.ends_s.get(step.waits_for, 0.0))
        self.taken_in_s[card] = max(readable_s + late_s, self.taken_in_s[card])
        self.at(self.taken_in_s[card], self.step_ended, card)

    def step_ended(self, card: Card) -> None:
        step = self.steps[card].pop(0)
        if step in self.before:
            before, taken_in_s = self.before.pop(step)
            gap_s = self.now - taken_in_s if step.decode and before.decode else None
            took_s = self.ended_s[step] - self.ended_s[before] - self.waited_s[step]
            self.scheduler.step_took(step, took_s, gap_s)
        else:
            launched_s = self.rng.random() * LAUNCH_S
            took_s = self.ended_s[step] - self.began_s[step] - self.waited_s[step]
            self.scheduler.step_took(step, took_s + launched_s, launch_s=LAUNCH_S)
        if self.steps[card]:
            following = self.steps[card][0]
            self.before[following] = step, self.now
            self.began_s[following] = self.ended_s[step]
        for chunk in step.chunks:
            self.chunk_ended(chunk)
        self.take_decoded_tokens(step)

    def chunk_ended(self, chunk: PrefillChunk) -> None:
        if self.scheduler.prefill_done(chunk) and chunk.is_last:
            self.append(chunk.seq)
        if chunk.handoff:
            self.scheduler.blocks_arrived(chunk.lease)

    def good_share(self, ttft_ms: float, itl_ms: float) -> float:
        """Share of requests that are good: first token in time, at most one gap in a hundred (or one) too long, none
        three times so."""
        good = 0
        for seq, ttft_s in self.ttfts_s.items():
            gaps = np.array(self.gaps_s.get(seq, [])) / MS
            too_long = int((gaps > itl_ms).sum())
            is_even = too_long <= max(len(gaps) // 100, 1) and not (gaps > 3 * itl_ms).any()
            good += ttft_s / MS <= ttft_ms and is_even
        return good / len(self.ttfts_s)
