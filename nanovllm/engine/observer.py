"""Observes an engine's work: metrics, timelines, the trace, log lines. Has no influence on the work."""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict, abc
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.execution.decode_paths import DecodePaths, NoPaths
from nanovllm.engine.execution.layer_exchange import NOTHING_WAITED_FOR, WaitReport
from nanovllm.engine.in_flight import Handoff, InFlight
from nanovllm.engine.observability.metrics import Metrics
from nanovllm.engine.observability.trace import Moments, Tracer
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.step import BlockPair, Step
from nanovllm.engine.scheduling.timeline import Timeline
from nanovllm.engine.sequence import Sequence, SequenceStatus

logger = logging.getLogger(__name__)

MAX_TIMELINES = 1000
"""Timelines of ended requests that are kept."""


@dataclass
class Counters:
    """What the engine has run since it was made; tokens found in a prefix cache are not counted."""

    prefill_steps: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    handoffs: int = 0
    handoff_blocks: int = 0
    late_launches: int = 0
    shared_chunks: int = 0
    single_chunks: int = 0
    waited_s: float = 0.0


class Observer:
    """Records what the engine does, and reports it when asked.

    Args:
        scheduler: whose state `metrics` reports.
        decode_paths: how decode steps run.
        block_bytes: bytes of a KV block.
        handoff_name: name of the KV transfer. Blocks of `direct` are part of their steps.
        tracer: collects the trace; None for none.
        verifies_handoffs: whether blocks that arrive are compared with those that left.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        decode_paths: DecodePaths | NoPaths,
        block_bytes: int,
        handoff_name: str,
        tracer: Tracer | None,
        *,
        verifies_handoffs: bool,
    ) -> None:
        self.counters = Counters()
        self.times = Metrics()
        self._timelines: OrderedDict[int, Timeline] = OrderedDict()
        self._tracer = tracer
        self._scheduler = scheduler
        self._placement = scheduler.placement
        self._decode_paths = decode_paths
        self._block_bytes = block_bytes
        self._handoff_name = handoff_name
        self._verifies_handoffs = verifies_handoffs
        self._fallbacks: Counter[str] = Counter()
        self._busy_s = {card.name: {"prefill": 0.0, "decode": 0.0, "mixed": 0.0} for card in scheduler.cards}
        self._last_end_s = {card.name: 0.0 for card in scheduler.cards}
        self._sent_bytes: Counter[str] = Counter()
        """Bytes of KV that have arrived, by link."""
        self._num_recoveries = 0
        self._prefill_is_out = False

    # What happens

    def step_launched(self, step: Step) -> None:
        if not logger.isEnabledFor(logging.DEBUG):
            return
        for chunk in step.chunks:
            logger.debug(
                "request %d: prefill of tokens %d to %d of %d launched on %s, completes %d blocks to hand over",
                chunk.seq.request_id,
                chunk.start,
                chunk.end,
                chunk.seq.num_tokens,
                step.card,
                len(chunk.handoff),
            )

    def step_ended(self, work: InFlight, waits: WaitReport = NOTHING_WAITED_FOR) -> None:
        """A step has ended, which has waited for another card's layers like this."""
        card, now = work.step.card.name, time.perf_counter()
        num_shared = len(work.step.shared_chunks)
        self.counters.shared_chunks += num_shared
        self.counters.single_chunks += len(work.step.chunks) - num_shared
        self.counters.waited_s += waits.waited_s
        # Steps of a card follow each other: one that was launched ahead begins when the one before it ends.
        self._busy_s[card][work.step.kind] += now - max(work.began_s, self._last_end_s[card])
        self._last_end_s[card] = now
        if self._tracer is None:
            return
        moments = work.handle.moments()
        self._tracer.add_step(work.step.card.label, work.step, moments, waited_s=waits.waited_s)
        # Copies of `direct` are part of their step.
        if self._handoff_name == "direct":
            sent = [chunk for chunk in work.step.chunks if chunk.handoff]
            if sent:
                pairs = [pair for chunk in sent for pair in chunk.handoff]
                source, target = work.step.card, sent[0].handoff_target
                self._trace_copies([chunk.seq for chunk in sent], pairs, source, target, moments)

    def handoff_sent(self, handoff: Handoff) -> None:
        self._log_blocks("sent", handoff)

    def handoff_ended(self, handoff: Handoff, *, arrived: bool) -> None:
        self._trace_handoff(handoff)
        if handoff.computed_s is not None:
            self.times.handoff_s.observe(time.perf_counter() - handoff.computed_s)
        if arrived:
            self.counters.handoffs += 1
            self.counters.handoff_blocks += len(handoff.pairs)
            block_size = handoff.source.block_manager.block_size
            num_bytes = handoff.num_tokens * self._block_bytes // block_size
            self._sent_bytes[_link(handoff.source, handoff.target)] += num_bytes
            what = "arrived and verified" if self._verifies_handoffs else "arrived"
            self._log_blocks(what, handoff)

    def dropped(self, steps: abc.Iterable[InFlight], handoffs: abc.Iterable[Handoff]) -> None:
        """Traces steps and handoffs that nobody will collect; the steps, and perhaps the handoffs, have ended."""
        for work in steps:
            self.step_ended(work)
        for handoff in handoffs:
            if handoff.handle.is_done():
                self._trace_handoff(handoff)

    def request_ended(self, seq: Sequence) -> None:
        self.times.has_ended(seq, seq.finish_reason or "error")
        self._timelines[seq.request_id] = seq.timeline
        if len(self._timelines) > MAX_TIMELINES:
            self._timelines.popitem(last=False)
        if self._tracer is not None:
            self._tracer.add_request(seq)

    def log_prefill_health(self) -> None:
        """Logs, once each time, that prompts run where they should not, or again where they should."""
        was_out, self._prefill_is_out = self._prefill_is_out, self._placement.is_degraded
        if self._prefill_is_out and not was_out:
            cause, words = self._placement.words_for_degraded
            self._fallbacks[cause] += 1
            logger.warning("%s", words)
        elif was_out and not self._prefill_is_out:
            self._num_recoveries += 1
            logger.warning("%s", self._placement.words_for_recovered)

    def close(self, unfinished: abc.Iterable[Sequence]) -> None:
        """Writes the trace, with these requests in it."""
        if self._tracer is None:
            return
        for seq in unfinished:
            if seq.finished_s is None:
                self._tracer.add_request(seq)
        self._tracer.write()

    # What is asked

    def timeline(self, request_id: int) -> Timeline | None:
        """The timeline of one of the last MAX_TIMELINES requests that ended, None for others."""
        return self._timelines.get(request_id)

    def metrics(self) -> dict[str, Any]:
        """See `LLMEngine.metrics`."""
        scheduler, counters, times = self._scheduler, self.counters, self.times
        states = scheduler.num_by_status()
        pools = {name: card.block_manager for name, card in self._placement.pools.items()}
        paths = self._decode_paths
        stages, arrangement = paths.lane_times, paths.current
        sent_bytes = dict(self._sent_bytes)  # the loop may add a link meanwhile
        return {
            "requests": {status.name.lower(): number for status, number in states.items()},
            "requests_ended": dict(times.ended),
            "ttft_s": times.ttft_s.as_dict(),
            "tpot_s": times.tpot_s.as_dict(),
            "itl_s": times.itl_s.as_dict(),
            "latency_s": times.latency_s.as_dict(),
            "prefill_steps": counters.prefill_steps,
            "prefill_tokens": counters.prefill_tokens,
            "decode_steps": counters.decode_steps,
            "decode_tokens": counters.decode_tokens,
            "late_launches": counters.late_launches,
            "pipeline_steps": paths.counters.steps,
            "pipeline_split": arrangement and dict(zip(("attention", "ffn"), arrangement.split, strict=True)),
            "stage_s": stages and {"attention": stages.attention_s, "ffn": stages.ffn_s},
            "rebalances": paths.num_rebalances,
            "prefix_cache_queried_tokens": scheduler.num_queried_tokens,
            "prefix_cache_hit_tokens": scheduler.num_hit_tokens,
            "handoff_s": times.handoff_s.as_dict(),
            "handoff_bytes": sum(sent_bytes.values()),
            "handoff_bytes_by_link": sent_bytes,
            "prefill_chunks": {"shared": counters.shared_chunks, "single": counters.single_chunks},
            "layer_wait_s": counters.waited_s,
            "handoff_backlog": states[SequenceStatus.PREFILLING] + states[SequenceStatus.HANDING_OFF],
            "predicted_itl_s": scheduler.predicted_itl_s,
            "step_time": {card.name: card.step_time.statistics() for card in scheduler.cards},
            "leases": scheduler.num_leases,
            "kv_blocks": {
                name: {"held": pool.num_held_blocks, "total": pool.num_blocks} for name, pool in pools.items()
            },
            "busy_s": {card: dict(kinds) for card, kinds in self._busy_s.items()},
            "preemptions": scheduler.num_preemptions,
            "fallbacks": {**dict(paths.counters.fallbacks), **dict(self._fallbacks)},
            "recoveries": paths.counters.recoveries + self._num_recoveries,
        }

    def about_handoff(self, seq: Sequence, source: Card, target: Card) -> str:
        """How messages name a request's handoff."""
        return f"handoff of request {seq.request_id} from {_link(source, target)} by {self._handoff_name!r}"

    def _log_blocks(self, what: str, handoff: Handoff) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            about = self.about_handoff(handoff.seq, handoff.source, handoff.target)
            num_blocks = len(handoff.pairs)
            logger.debug("%s: %d blocks (%d bytes) %s", about, num_blocks, num_blocks * self._block_bytes, what)

    def _trace_handoff(self, handoff: Handoff) -> None:
        moments = None if self._tracer is None else handoff.handle.moments()
        if moments is not None:
            self._trace_copies([handoff.seq], handoff.pairs, handoff.source, handoff.target, moments)

    def _trace_copies(
        self,
        seqs: abc.Sequence[Sequence],
        pairs: abc.Sequence[BlockPair],
        source: Card,
        target: Card,
        moments: Moments,
    ) -> None:
        assert self._tracer is not None, "nothing is timed without a tracer"
        num_bytes = len(pairs) * self._block_bytes
        self._tracer.add_handoff(f"handoff {_link(source, target)}", seqs, len(pairs), num_bytes, moments)


def _link(source: Card, target: Card) -> str:
    return f"{source} to {target}"
