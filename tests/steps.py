"""Cards without devices, simulated time, and single steps of an engine."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import numpy as np

from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import STEPS_AHEAD, Scheduler
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.placement import Placement
from nanovllm.engine.scheduling.step import Step
from nanovllm.engine.sequence import Sequence


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


class SimulatedRequests(SimulatedTime):
    """Requests that come and get their tokens by simulated time, before a scheduler.

    Args:
        scheduler: forms the steps.

    Attributes:
        seqs: the requests, in the order in which they came.
        ttfts_s, gaps_s: times to their first tokens, and those between tokens.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.seqs: list[Sequence] = []
        self.last_token_s: dict[Sequence, float] = {}
        self.ttfts_s: dict[Sequence, float] = {}
        self.gaps_s: dict[Sequence, list[float]] = {}

    def serve(self, trace, launch: Callable[[], None]) -> None:
        """Has the requests of a trace, as (seconds, prompt tokens, output tokens), come and end; `launch` is called
        after each event."""
        for moment, prompt, output in trace:
            self.at(moment, self.arrive, prompt, output)
        self.run(launch)
        assert all(seq.is_finished for seq in self.seqs), "a request is lost"
        self.scheduler.check_integrity()

    def arrive(self, prompt: int, output: int) -> None:
        number = len(self.seqs)
        params = SamplingParams(max_tokens=output)
        seq = Sequence(number, [1] * prompt, params, number, self.now, prompt + output, is_streamed=True)
        self.seqs.append(seq)
        self.scheduler.add(seq)

    def take_decoded_tokens(self, step: Step) -> None:
        """A step has ended whose chunks were taken in."""
        self.scheduler.get_prefilled_sequences()
        if step.decode:
            self.scheduler.decode_done(step)
            for seq, lease in zip(step.decode.batch.seqs, step.decode.batch.leases, strict=True):
                if seq.lease is lease:
                    self.append(seq)

    def append(self, seq: Sequence) -> None:
        seq.token_ids.append(2)
        self.scheduler.token_appended(seq)
        if seq in self.last_token_s:
            self.gaps_s.setdefault(seq, []).append(self.now - self.last_token_s[seq])
        else:
            self.ttfts_s[seq] = self.now - seq.arrival_s
        self.last_token_s[seq] = self.now
        if seq.num_tokens == seq.max_num_tokens:
            self.scheduler.finish(seq, "length")

    def ttft_ms(self, quantile: float, longest: int = 10**9) -> float:
        """The quantile over requests with prompts of at most that many tokens."""
        times = [time for seq, time in self.ttfts_s.items() if seq.num_prompt_tokens <= longest]
        return float(np.quantile(times, quantile)) * 1e3

    def itl_ms(self, quantile: float) -> float:
        return float(np.quantile([gap for gaps in self.gaps_s.values() for gap in gaps], quantile)) * 1e3


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
