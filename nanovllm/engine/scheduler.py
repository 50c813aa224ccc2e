"""Chooses the next step, queues and preempts requests, and accounts for KV blocks. No torch, no devices.

A request waits, gets a lease (its blocks on the card that decodes it, and on the card that prefills it, which may be
the same), is prefilled in chunks, handed off and decoded.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import logging
from collections import Counter, abc
from dataclasses import dataclass

from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.chunk_room import LEAST_TOKENS, MOST_PASSED_BY, ChunkRoom, Demand, TimeLimit
from nanovllm.engine.scheduling.decode_batch import NO_DECODE_ROWS, DecodeRow, DecodeRows
from nanovllm.engine.scheduling.decode_set import LOOK_AHEAD_STEPS, DecodeSet
from nanovllm.engine.scheduling.lease import Allocation, Lease
from nanovllm.engine.scheduling.placement import GATHERED_SHARE, MOST_EXCESS_PROMPTS, OtherPrompts, Placement, Places
from nanovllm.engine.scheduling.shared_prompt import SharedPrompt
from nanovllm.engine.scheduling.step import MAX_CHUNKS, BlockPair, PrefillChunk, Step
from nanovllm.engine.scheduling.step_time import TOKEN_MULTIPLE, StepSize
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.errors import ClusterError, OutOfKVCacheError
from nanovllm.outputs import FinishReason

logger = logging.getLogger(__name__)

FreeInSeconds = abc.Callable[[Card], float]
"""Gives the predicted seconds until a card has ended what was launched there."""

STEPS_AHEAD = 2
"""Steps in flight on a card: one that runs, and one queued behind it before the first one's tokens are seen."""

MOST_LOST_CARDS = 4
"""A request ends with an error once so many cards were lost while they ran it: it may be what ends them."""

STRETCH = 1.5
"""Where placement bounds steps and no target is given, a step takes at most so many times what it would take without
prompts."""

WAITED_FOR_SHARE = 0.9
"""A step with a chunk that waits for another card's step is launched if that one is predicted to end within so much of
this one's limit: the last layer follows, and predictions of both are off by some percent."""

MAX_STREAMED_PREFILL_TOKENS = 3072
"""Token budget of a prefill step while requests are streamed: larger steps give no more tokens per second, the first
prompt would wait for the last, and launches without graphs would keep the other card waiting."""


@dataclass(frozen=True)
class SchedulerLimits:
    prefill_chunk_tokens: int
    """Maximum number of prompt tokens in a step of a card on which a streamed request decodes."""
    max_num_seqs: int
    max_handoff_backlog: int
    """Maximum number of requests between the beginning of their prefill and the arrival of their KV."""
    itl_target_s: float | None = None
    """Maximum predicted seconds of a step with decode rows; None for no limit. Single steps vary around it."""
    verifies_handoffs: bool = False
    """Whether a chunk of a shared prompt waits until the blocks that were pushed before it are verified, since the
    prompt's first token goes by them."""


class Scheduler:
    """First come, first served: a request is never overtaken by a younger one for a lease.

    The caller launches scheduled steps and handoffs and reports their end (`prefill_done`, `decode_done`, `release`),
    so that blocks in use by work in flight are freed only after it. Steps may be launched ahead; those of one card end
    in the order of their launch.
    """

    def __init__(self, limits: SchedulerLimits, placement: Placement) -> None:
        self.limits = limits
        target_s = limits.itl_target_s
        self._target = None if target_s is None else TimeLimit(target_s, f"itl_target_ms={target_s * 1e3:g}")
        self.placement = placement
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        """Tokens of requests that got a lease, looked up in the prefix caches of the cards that prefill them."""
        self.num_hit_tokens = 0
        self._num_shared_chunks = 0
        """Chunks of shared prompts that were formed; never set back, since cards compare these numbers."""
        self._clear()

    def _clear(self) -> None:
        """Resets the state: no requests, no work in flight."""
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._streamed: set[Sequence] = set()
        """Those of both that are streamed."""
        self._suspects: dict[Sequence, int] = {}
        """Requests of steps that have failed on remote cards, one of which is at fault, each with the number of the
        group in which it is tried again."""
        self._num_suspect_groups = 0
        self._prefilling: list[Sequence] = []
        self._prefill_backlog: set[Sequence] = set()
        """Requests between the start of their prefill and the arrival of their KV."""
        self._handing_off: dict[Sequence, None] = {}
        """Requests of the backlog whose prefill has ended, in that order."""
        self._joined_early: dict[Sequence, None] = {}
        """Requests that decode while work of their shared prompt is in flight: chunks, and blocks that are pushed."""
        self._decoding = {card: DecodeSet(card) for card in self.cards}
        self._leases_on: Counter[Card] = Counter()
        """Running requests by the card where they decode, or will."""
        self._tokens_in_flight: Counter[Card] = Counter()
        """Prompt tokens of the steps in flight on each card."""
        self._draining_leases: list[Lease] = []
        """Leases that have ended while work in flight still touches their blocks."""
        self._prefilled: dict[Sequence, None] = {}
        self._outgrown: list[Sequence] = []
        self._num_changes = 0
        """Grows when chunks are formed, steps and handoffs end, and leases: with what placement goes by."""
        self._taken_by: tuple[Sequence, int, Card] | None = None
        """The request that waits first, the changes until then, and the card on which it is to be prefilled."""

    @property
    def cards(self) -> list[Card]:
        """All cards, in the order in which they are given work."""
        return self.placement.cards

    # Entering and leaving

    def add(self, seq: Sequence) -> None:
        """Queues a request, in order of arrival."""
        seq.timeline.mark("waits for a lease (its turn)")
        bisect.insort(self._waiting, seq, key=_request_id)
        if seq.is_streamed:
            self._streamed.add(seq)

    def unfinished(self) -> list[Sequence]:
        """Requests that have not ended, oldest first."""
        return sorted([*self._waiting, *self._running], key=_request_id)

    def finish(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a request in whatever state it is; its blocks return as soon as nothing in flight touches them."""
        assert not seq.is_finished, f"request {seq.request_id} finishes twice"
        (self._waiting if seq.status is SequenceStatus.WAITING else self._running).remove(seq)
        self._streamed.discard(seq)
        self._suspects.pop(seq, None)
        seq.finish_reason, seq.error = reason, error
        seq.status = SequenceStatus.FINISHED
        seq.timeline.mark(f"ended: {reason}" if error is None else f"ended: {reason}, {error}")
        self._end_lease(seq)

    def preempt(self, seq: Sequence) -> None:
        """Takes all blocks from a running request and puts it back in its place in the queue, to be recomputed."""
        self._requeue(seq, "preempted")
        self.num_preemptions += 1

    def _requeue(self, seq: Sequence, why: str) -> None:
        self._running.remove(seq)
        self._end_lease(seq)
        seq.status = SequenceStatus.WAITING
        seq.timeline.mark(why)
        self.add(seq)

    def card_lost(self, card: Card, in_flight: abc.Sequence[Step]) -> None:
        """A card and what its pool held are gone: requests with blocks there are recomputed elsewhere.

        Args:
            card: gets no work until its `is_up` is set again.
            in_flight: its steps that were launched and will not end.
        """
        card.is_up = False
        card.block_manager.forget(range(card.block_manager.num_blocks))
        pairs = [pair for step in in_flight for pair in zip(step.seqs, step.leases, strict=True)]
        for seq in dict.fromkeys(seq for seq, lease in pairs if seq.lease is lease):
            seq.num_lost_cards += 1
            if seq.num_lost_cards >= MOST_LOST_CARDS:
                message = f"{seq.num_lost_cards} cards were lost while they ran request {seq.request_id}"
                self.finish(seq, "error", ClusterError(f"{message}, the last one was {card}; it is not tried again"))
                self._outgrown.append(seq)
        self.steps_lost(in_flight)
        for seq in [seq for seq in self._running if seq.lease is not None and seq.lease.holds_on(card)]:
            self._requeue(seq, f"recomputed: {card} is lost")

    def steps_lost(self, steps: abc.Sequence[Step]) -> None:
        """Steps that were launched have not run, and will not: their requests are recomputed."""
        for step in steps:
            self.cancel(step)
        for step in steps:
            for seq, lease in zip(step.seqs, step.leases, strict=True):
                if seq.lease is lease:
                    self._requeue(seq, f"recomputed: a step on {step.card} has not run")

    def step_failed(self, step: Step) -> Sequence | None:
        """A step that was launched on a remote card could not be run: its requests are recomputed.

        Which of them is at fault is found by halves: each is recomputed without the other. Returns the request at fault
        if no other one comes into question; the caller has to `fail` it.
        """
        self.cancel(step)
        live = [seq for seq, lease in zip(step.seqs, step.leases, strict=True) if seq.lease is lease]
        suspects = [seq for seq in live if seq in self._suspects] or live
        middle = (len(suspects) + 1) // 2
        for half in (suspects[:middle], suspects[middle:]):
            self._num_suspect_groups += 1
            self._suspects |= dict.fromkeys(half, self._num_suspect_groups)
        at_fault = suspects[0] if len(suspects) == 1 else None
        if at_fault is not None:
            at_fault.failed_on = step.card
        self.placement.step_failed(step.card)
        for seq in live:
            if seq is not at_fault:
                self._requeue(seq, f"recomputed: a step on {step.card} has failed")
        return at_fault

    def step_worked(self, step: Step) -> None:
        """Notes that a step with decode rows has run: their requests are suspects no more."""
        self.placement.step_worked(step.card)
        if self._suspects:
            for seq in step.decode.batch.seqs:
                self._suspects.pop(seq, None)

    def fail(self, seq: Sequence, error: Exception, *, blames_card: bool = True) -> bool:
        """Handles an error of one request: preempts it, to be retried, the first time, and ends it the second time.

        Its card's breaker counts it if `blames_card`. Returns whether the request has ended.
        """
        if blames_card and (seq in self._prefill_backlog or seq in self._joined_early) and seq.lease is not None:
            self.placement.prefill_failed(seq.lease)
        seq.failures += 1
        if seq.failures == 1:
            self.preempt(seq)
            return False
        self.finish(seq, "error", error)
        return True

    def get_outgrown_sequences(self) -> list[Sequence]:
        """Requests that have ended since the last call, with an error, because no pool can hold them, or too many cards
        were lost that ran them."""
        outgrown, self._outgrown = self._outgrown, []
        return outgrown

    def num_by_status(self) -> dict[SequenceStatus, int]:
        """Requests in each state, but for those that have ended."""
        counts = Counter(seq.status for seq in [*self._waiting, *self._running])
        return {status: counts[status] for status in SequenceStatus if status is not SequenceStatus.FINISHED}

    @property
    def has_streamed_requests(self) -> bool:
        """Whether a request that has not ended is streamed."""
        return bool(self._streamed)

    @property
    def num_leases(self) -> int:
        """Number of leases: those that requests hold, and ended ones whose blocks work in flight still touches."""
        return len(self._running) + len(self._draining_leases)

    @property
    def predicted_itl_s(self) -> float | None:
        """Predicted seconds of a decode step with all running requests, of those on the card where it takes longest;
        None if there are none, or it is unknown."""
        predicted = [card.step_time.predict(size) for card, size in self._sizes_ahead().items() if size.num_tokens]
        known = [seconds for seconds in predicted if seconds is not None]
        return max(known) if known else None

    # Forming steps

    def schedule(
        self, card: Card, in_flight: abc.Sequence[Step], free_in_s: FreeInSeconds | None = None
    ) -> Step | None:
        """The step to launch on a card now, if there is one.

        Args:
            card: one of `cards`.
            in_flight: its steps that have been launched and have not ended.
            free_in_s: gives the predicted seconds until a card has ended what was launched there. By these, a step with
                a target waits for no chunk of the other card that would make it too long; None for no such care.
        """
        if len(in_flight) >= STEPS_AHEAD or not card.is_up:
            return None
        if not self.placement.decodes(card):
            return self.schedule_prefill(card)
        return self._schedule_mixed(card, in_flight, free_in_s)

    def schedule_prefill(self, card: Card | None = None) -> Step | None:
        """The next chunks of the requests that are prefilled on `card`, by default the one that prefills.

        None if there is nothing to run, or no request can get a lease.
        """
        card = self.placement.prefill_card if card is None else card
        self._join_arrived()  # first, since chunks are small while a streamed request decodes
        chunks = self._next_chunks(card)
        return Step(card, chunks) if chunks else None

    def schedule_decode(self, card: Card | None = None) -> Step | None:
        """One token for every request that decodes on `card`, by default the one that decodes; None if there are none.

        Those whose KV has arrived join. Where the pool runs out, the youngest request is preempted. While blocks that
        were given up are still touched by work in flight, a request that needs one sits this step out.
        """
        card = self.placement.decode_card if card is None else card
        self._join_arrived()
        rows = self._decoding[card].next_rows(self._grow)
        return None if rows is None else Step(card, decode=rows)

    def _schedule_mixed(
        self, card: Card, in_flight: abc.Sequence[Step], free_in_s: FreeInSeconds | None
    ) -> Step | None:
        """A token for every request that decodes on a card, and the next chunks of those that are prefilled there."""
        self._join_arrived()
        if in_flight:
            self._join_ahead(in_flight[-1])
        # The rows first: room for their next tokens may be taken from a request that is prefilled.
        rows = self._decoding[card].next_rows(self._grow)
        ending = (chunk for step in in_flight for chunk in step.sampling_chunks)
        if rows is None and any(
            chunk.seq.params.needs_counts and chunk.allocation is chunk.lease.decode for chunk in ending
        ):
            return None  # who joins only once that step has ended would wait for one more step of prompts
        rows = rows or NO_DECODE_ROWS
        limit = self._time_limit(card)
        keeps_to_it = rows or (limit is not None and self._is_waited_for(card))
        chunks = self._chunks_beside(card, rows, free_in_s, limit) if keeps_to_it else self._next_chunks(card)
        return Step(card, chunks, rows) if chunks or rows else None

    def _is_waited_for(self, card: Card) -> bool:
        """Whether a card's next step keeps to the limit even without decode rows, since tokens wait for it.

        So it is if the other card has rows and computes a prompt together with this one: its steps take as long as what
        they wait for. And so it is while another card computes the prompt of a request that will decode here, or the
        last chunk of a shared one.
        """
        is_any_shared = any(seq.lease is not None and seq.lease.shared is not None for seq in self._prefilling)
        if is_any_shared and any(decoding.leases for decoding in self._decoding.values()):
            return True
        return any(
            lease.decode.card is card and lease.crosses and not (lease.shared and _has_tokens_to_prefill(seq))
            for seq in self._prefill_backlog
            if (lease := seq.lease) is not None
        )

    def _time_limit(self, card: Card) -> TimeLimit | None:
        """How long a step with prompts may take that tokens of other requests wait for.

        `itl_target_ms`, or else, where placement bounds steps and requests are streamed, somewhat longer than a decode
        step: of the card, or of the other ones if it has none.
        """
        if self._target is not None or not (self.placement.bounds_steps and self._streamed):
            return self._target
        decoding = [card] if self._decoding[card].leases else [other for other in self.cards if other is not card]
        steps_s = [
            one.step_time.predict(self._decoding[one].size) for one in decoding if self._decoding[one].has_streamed
        ]
        known_s = [step_s for step_s in steps_s if step_s is not None]
        return TimeLimit(STRETCH * max(known_s), f"{STRETCH:g} decode steps") if known_s else None

    def get_prefilled_sequences(self) -> list[Sequence]:
        """Requests whose prefill has ended since the last call and which have not ended themselves."""
        prefilled, self._prefilled = self._prefilled, {}
        return list(prefilled)

    # Steps and copies that have ended

    def prefill_done(self, chunk: PrefillChunk) -> bool:
        """A chunk has run: its full blocks may be shared on the card where it ran.

        Returns whether the chunk is live: False if its request has ended or lost its lease meanwhile.
        """
        seq, lease = chunk.seq, chunk.lease
        is_live = seq.lease is lease
        self._chunk_ended(chunk)
        if lease.shared is not None:
            lease.shared.ended_numbers[chunk.allocation.card] = chunk.number
        if is_live:
            self._cache_computed(chunk)
            if chunk.is_last and not chunk.handoff:
                self.placement.prefill_worked(lease)
            if chunk.is_last:
                self._prefilled[seq] = None
            if chunk.is_last and seq.status is SequenceStatus.PREFILLING:
                seq.status = SequenceStatus.HANDING_OFF
                seq.timeline.mark("handoff")
                self._handing_off[seq] = None
            elif _has_tokens_to_prefill(seq):
                seq.timeline.mark("prefill queue")
        self.release(lease)
        return is_live

    def chunk_missed(self, chunk: PrefillChunk) -> None:
        """A chunk has run without the KV that it waits for: what it computed means nothing."""
        self._chunk_ended(chunk)
        self.release(chunk.lease)

    def _chunk_ended(self, chunk: PrefillChunk) -> None:
        self._num_changes += 1
        self._tokens_in_flight[chunk.allocation.card] -= chunk.num_tokens

    def _cache_computed(self, chunk: PrefillChunk) -> None:
        lease, block_manager = chunk.lease, chunk.allocation.card.block_manager
        if lease.shared is None:
            block_manager.cache(chunk.seq, chunk.allocation.blocks, chunk.start, chunk.end)
        elif chunk.is_last and not chunk.handoff:  # the steps before it, and what they have pushed, have ended
            block_manager.cache(chunk.seq, chunk.allocation.blocks, 0, chunk.end)

    def blocks_arrived(self, lease: Lease) -> None:
        """A handoff of blocks of the lease has succeeded."""
        if lease.shared is None:
            self.placement.prefill_worked(lease)
        self.release(lease)

    def step_took(self, step: Step, seconds: float, gap_s: float | None = None, *, launch_s: float = 0.0) -> None:
        """A step has taken so long on its card; waits for another card are not in it.

        Args:
            step: the step.
            seconds: what it took.
            gap_s: the time from the tokens of the decode step before it to its own; None if there was none just before.
            launch_s: how much of `seconds` may have been its launch.
        """
        if any(chunk.logprob_positions for chunk in step.chunks):
            return  # it took longer than its size says, to make the logits of prompts
        step.card.step_time.observe(step.size, seconds, launch_s)
        if gap_s is not None:
            step.card.step_time.observe_gap(step.size, gap_s)

    def decode_done(self, step: Step) -> None:
        """The decode part of a step has run: the KV of the tokens that it was fed is in the card's pool."""
        self._num_changes += 1
        self._decoding[step.card].rows_ended(step.decode)
        for lease in step.decode.ended_leases:
            self.release(lease)

    def token_appended(self, seq: Sequence) -> None:
        """A request got a token: if it decodes and the KV of the token before completes a block, that may be shared."""
        num_computed = seq.num_tokens - 1
        if seq.status is SequenceStatus.DECODING:
            assert seq.lease is not None, f"request {seq.request_id} decodes without a lease"
            allocation = seq.lease.decode
            block_manager = allocation.card.block_manager
            if num_computed % block_manager.block_size == 0:
                start = num_computed - block_manager.block_size
                block_manager.cache(seq, allocation.blocks, start, num_computed)

    def forget_cached_blocks(self, seq: Sequence) -> None:
        """Removes the blocks of a running request from the prefix cache: its KV may be wrong."""
        assert seq.lease is not None, f"request {seq.request_id} has no blocks"
        for allocation in seq.lease.allocations:
            allocation.card.block_manager.forget(allocation.blocks)

    # Work in flight

    def halve(self, step: Step) -> abc.Sequence[Step] | None:
        """Two smaller steps to launch instead of one that failed to launch; None for a single request."""
        halves = step.halves()
        if halves is not None and step.decode:
            self._decoding[step.card].rows_halved(step.decode, [half.decode for half in halves if half.decode])
        return halves

    def cancel(self, step: Step) -> None:
        """Gives up a step that failed to launch."""
        for chunk in step.chunks:
            self._chunk_ended(chunk)
            self.release(chunk.lease)
        if step.decode:
            self.decode_done(step)

    def hold(self, lease: Lease, num_works: int = 1) -> None:
        """Counts launched work that touches the lease's blocks."""
        lease.in_flight += num_works

    def release(self, lease: Lease) -> None:
        """Counts one piece of that work as ended; frees the blocks of an ended lease after the last one."""
        assert lease.in_flight > 0, "no work is in flight on this lease"
        lease.in_flight -= 1
        if lease.in_flight == 0 and lease in self._draining_leases:
            self._draining_leases.remove(lease)
            _free(lease)

    def start_over(self, unfinished: abc.Sequence[Sequence], stuck: abc.Sequence[Lease]) -> None:
        """Resets the state after an interrupt: all requests wait to be recomputed, and no work is in flight.

        Only the leases of `stuck`, one entry for each copy that may still touch their blocks, keep their blocks.
        """
        for seq in unfinished:
            if seq.lease is not None:
                seq.lease.ended = True
            seq.lease, seq.num_prefilled_tokens, seq.status = None, 0, SequenceStatus.WAITING
        for lease in [*(lease for decoding in self._decoding.values() for lease in decoding.leases), *stuck]:
            lease.ended = True
        self._clear()
        self._waiting = sorted(unfinished, key=_request_id)
        self._streamed = {seq for seq in unfinished if seq.is_streamed}
        self._draining_leases = list(dict.fromkeys(stuck))
        for lease in self._draining_leases:
            lease.in_flight = stuck.count(lease)
        for card in self.cards:
            card.block_manager.reset(_blocks_on(card, self._draining_leases))

    def check_integrity(self) -> None:
        """Asserts that every block of all pools is accounted for."""
        leases = [*self._draining_leases, *(seq.lease for seq in self._running if seq.lease is not None)]
        for card in self.cards:
            card.block_manager.check_integrity(_blocks_on(card, leases))
        for seq in self._running:
            assert seq.lease is not None, f"request {seq.request_id} is {seq.status} without a lease"
        num_leases = Counter(seq.lease.decode.card for seq in self._running if seq.lease is not None)
        assert +self._leases_on == num_leases, f"{self._leases_on} leases are counted, there are {num_leases}"
        under_way = {seq for seq in self._running if seq.status is not SequenceStatus.DECODING}
        assert self._prefill_backlog == under_way, (
            "the backlog is not the set of requests that are prefilled or handed off"
        )
        handing_off = {seq for seq in self._running if seq.status is SequenceStatus.HANDING_OFF}
        assert self._handing_off.keys() == handing_off, "the list of handoffs is not the set of requests in HANDING_OFF"
        assert self._streamed == {seq for seq in self.unfinished() if seq.is_streamed}
        for seq in self._waiting:
            assert seq.lease is None, f"waiting request {seq.request_id} holds a lease"
            assert seq.status is SequenceStatus.WAITING, f"request {seq.request_id} waits but is {seq.status}"

    # Inside

    def _next_chunks(self, card: Card) -> list[PrefillChunk]:
        """The next chunks of the requests that are prefilled on a card, as many as a step takes."""
        chunks: list[PrefillChunk] = []
        candidates = self._prefill_candidates(card)
        seq = next(candidates, None)
        if seq is None:
            return chunks
        budget, num_tokens, num_refused = self._prefill_token_budget(card), 0, 0
        while seq is not None:
            demand = self._demand(seq, card)
            most = demand.rounded(min(demand.num_tokens, budget - num_tokens))
            if most:
                chunks.append(self._next_chunk(seq, card, most))
            num_tokens += most
            num_refused += not most  # each holds blocks from the moment that it is looked at
            is_full = num_tokens >= budget or len(chunks) == MAX_CHUNKS or num_refused > MOST_PASSED_BY
            seq = None if is_full else next(candidates, None)
        return chunks

    def _chunks_beside(
        self, card: Card, rows: DecodeRows, free_in_s: FreeInSeconds | None, limit: TimeLimit | None
    ) -> list[PrefillChunk]:
        """The next chunks for a step that has decode rows, or is to be no longer than one."""
        chunks: list[PrefillChunk] = []
        candidates = self._prefill_candidates(card)
        oldest = next(candidates, None)
        if oldest is None:
            return chunks  # as in most steps
        size = StepSize(len(rows), rows.num_tokens)
        demand_of = functools.partial(self._demand, card=card, free_in_s=free_in_s, limit=limit)
        room = ChunkRoom(card.step_time, size, self._prefill_token_budget(card), limit, demand_of)
        for seq, num_tokens, reason in room.share_out(itertools.chain((oldest,), candidates)):
            if num_tokens:
                chunks.append(self._next_chunk(seq, card, num_tokens, reason))
                room.take(chunks[-1])
            else:
                seq.timeline.mark(f"prefill queue ({reason})")
        return chunks

    def _demand(
        self, seq: Sequence, card: Card, *, free_in_s: FreeInSeconds | None = None, limit: TimeLimit | None = None
    ) -> Demand:
        """What a request with a lease asks of the card's next step; `free_in_s` is given if that keeps to the limit.

        Of a shared prompt at least LEAST_TOKENS, too, but only with nothing of it in flight.
        """
        lease, start, num_left = seq.lease, seq.num_prefilled_tokens, seq.num_tokens_to_prefill
        assert lease is not None, f"request {seq.request_id} is prefilled without a lease"
        if lease.shared is None:
            return Demand(num_left, LEAST_TOKENS, num_left)
        partner, block_size = lease.card_beside(card), card.block_manager.block_size
        multiple = fewest = min(block_size, TOKEN_MULTIPLE)
        if self.limits.verifies_handoffs:
            multiple = block_size  # blocks that are to be verified are pushed as a whole
        elif limit is not None:
            multiple = 2  # rows and chunk together fill the step up; a single token must not be left
        if limit is not None and free_in_s is not None and lease.shared.has_in_flight(partner):
            # The step is as long as what it waits for, and some more.
            is_too_long = free_in_s(partner) > free_in_s(card) + WAITED_FOR_SHARE * limit.seconds
            if is_too_long:
                return Demand(0, 0, num_left, reason=f"{limit.reason}, waits for its chunk on {partner}")
        most = min(self._prefill_token_budget(card), self._prefill_token_budget(partner))
        if num_left > multiple + 1:  # else it is cut nowhere
            most = min(most, lease.shared.planned_tokens((card, partner), start, num_left, most, multiple))
        rest = Demand(min(most, num_left), 0, num_left, multiple, fewest)
        most, least = rest.rounded(rest.num_tokens), 0
        if not any(map(lease.shared.has_in_flight, self.cards)):
            least = rest.rounded(min(max(LEAST_TOKENS, multiple + 1), most))
        return Demand(most, least, num_left, multiple, fewest)

    def _prefill_token_budget(self, card: Card) -> int:
        """Maximum number of prompt tokens in the card's next step."""
        if not self._streamed:
            return card.max_prefill_tokens
        has_streamed = self._decoding[card].has_streamed
        most = self.limits.prefill_chunk_tokens if has_streamed else MAX_STREAMED_PREFILL_TOKENS
        return min(card.max_prefill_tokens, most)

    def _prefill_candidates(self, card: Card) -> abc.Iterator[Sequence]:
        """Requests with tokens left to prefill, oldest lease first, then those of the queue that get a lease."""
        self._prefilling = [seq for seq in self._prefilling if _has_tokens_to_prefill(seq)]
        for seq in list(self._prefilling):
            lease = seq.lease
            is_to_be_verified = self.limits.verifies_handoffs and lease is not None and lease.shared and lease.in_flight
            if lease is not None and lease.may_compute_on(card) and not is_to_be_verified:
                yield seq
        sizes: dict[Card, StepSize] = {}
        while self._waiting and self.placement.may_prefill(card, self._waiting[0]):
            seq = self._waiting[0]
            if self._is_taken_by_another(seq, card):
                return
            # Computed once for all requests admitted here, since it visits every running request.
            sizes = sizes or self._sizes_ahead()
            others = self._other_prompts(seq, sizes)
            places = self.placement.places_of(seq, sizes, others)
            if not self._may_admit(seq, places, sizes):
                return
            decode_card = places.decode
            if decode_card.block_manager.blocks_for(seq.num_tokens) > decode_card.block_manager.num_blocks:
                self._outgrew(seq, decode_card)
            elif (places.is_shared or places.prefill is card) and self._admit(seq, places):
                self._waiting.remove(seq)
                self._running.append(seq)
                self._prefilling.append(seq)
                self._prefill_backlog.add(seq)
                sizes[decode_card] = sizes[decode_card].with_row(seq.num_tokens_ahead(LOOK_AHEAD_STEPS))
                assert seq.lease is not None, "it was just granted"
                if seq.lease.may_compute_on(card):
                    yield seq
            else:
                if not places.is_shared and places.prefill is not card:
                    self._taken_by = seq, self._num_changes, places.prefill
                return

    def _is_taken_by_another(self, seq: Sequence, card: Card) -> bool:
        """Whether the request is to be prefilled on another card, as was found when that one or a third was asked.

        Else all of many cards would be compared once for each of them, in every turn. A card that is up is asked
        itself: at once, or when one of its steps has ended, which is a change.
        """
        if len(self.cards) <= 2 or self._taken_by is None:
            return False
        first, num_changes, other = self._taken_by
        return first is seq and num_changes == self._num_changes and other is not card and other.is_up

    def _other_prompts(self, seq: Sequence, sizes: abc.Mapping[Card, StepSize]) -> OtherPrompts:
        """The prompts beside that of `seq`, the first request in the queue."""
        number, tokens_left = len(self._waiting) - 1, dict.fromkeys(self.cards, 0.0)
        for other in self._prefilling:
            lease = other.lease
            if lease is not None and _has_tokens_to_prefill(other):
                number += 1
                cards = [lease.prefill.card] if lease.shared is None else self.cards
                for card in cards:
                    tokens_left[card] += other.num_tokens_to_prefill / len(cards)
        has_time, may_gather = (functools.partial(ask, seq, sizes) for ask in (self._has_time, self._may_gather))
        room = functools.partial(self._room, sizes)
        return OtherPrompts(number, tokens_left, has_time, may_gather, room, self._tokens_in_flight)

    def _may_admit(self, seq: Sequence, places: Places, sizes: abc.Mapping[Card, StepSize]) -> bool:
        if not places.decode.is_up:
            seq.timeline.mark("waits for a lease (no card is up)")
            return False
        num_leases = len(self._running) + sum(not lease.stuck for lease in self._draining_leases)
        if num_leases >= self.limits.max_num_seqs:
            seq.timeline.mark(f"waits for a lease (max_num_seqs={self.limits.max_num_seqs} are held)")
            return False
        if any(decoding.waits_for_blocks for decoding in self._decoding.values()):
            seq.timeline.mark("waits for a lease (a decoding request needs the next free blocks)")
            return False
        group = self._suspects.get(seq)
        if self._suspects and any(self._suspects.get(other, group) != group for other in self._running):
            seq.timeline.mark("waits for a lease (it is recomputed apart from others: a step with them has failed)")
            return False
        card, most_under_way = places.decode, self.limits.max_handoff_backlog
        if places.prefill is not card and len(self._prefill_backlog) >= most_under_way:
            seq.timeline.mark(f"waits for a lease (max_handoff_backlog={most_under_way} are under way)")
            return False
        if self._target is not None and not self._has_time(seq, sizes, card):
            seq.timeline.mark(f"waits for a lease ({self._target.reason} would be exceeded)")
            return False
        return True

    def _has_time(self, seq: Sequence, sizes: abc.Mapping[Card, StepSize], card: Card) -> bool:
        """Whether the card's decode steps stay within the target with the request among them."""
        size = sizes[card].with_row(seq.num_tokens_ahead(LOOK_AHEAD_STEPS))
        is_alone = size.num_tokens == 1  # then it makes the shortest possible steps
        return self._target is None or is_alone or not card.step_time.may_exceed(self._target.seconds, size)

    def _may_gather(self, seq: Sequence, sizes: abc.Mapping[Card, StepSize], card: Card) -> bool:
        """Whether a streamed request may gather on the card: some decode there, and its steps would still take no more
        than GATHERED_SHARE of the target, or STRETCH steps of one request without a target, with those of all cards and
        this one."""
        is_backlog_full = len(self._prefill_backlog) >= self.limits.max_handoff_backlog
        if is_backlog_full or not (seq.is_streamed and self._decoding[card].leases):
            return False
        size = StepSize(sum(each.num_tokens for each in sizes.values()), sum(each.context for each in sizes.values()))
        size = size.with_row(seq.num_tokens_ahead(LOOK_AHEAD_STEPS))
        if self._target is not None:
            limit_s = GATHERED_SHARE * self._target.seconds
        else:
            limit_s = STRETCH * (card.step_time.predict(StepSize(1, 1)) or 0.0)
        decode_s = card.step_time.predict(size)
        return decode_s is not None and decode_s <= limit_s

    def _room(self, sizes: abc.Mapping[Card, StepSize], card: Card) -> float:
        """Share of a step's time that the card has for prompts, beside so many decode rows."""
        size = sizes[card]
        decode_s = card.step_time.predict(size) if size.num_tokens else None
        if decode_s is None:
            return 1.0
        if self._target is None:
            return 1.0 if self._time_limit(card) is None else 1 - 1 / STRETCH
        return max(1 - decode_s / self._target.seconds, 0.0)

    def _sizes_ahead(self) -> dict[Card, StepSize]:
        """The step of each card LOOK_AHEAD_STEPS from now, with all requests that have a lease and decode there.

        Other threads may ask at any moment.
        """
        contexts = Counter({card: decoding.num_tokens_ahead() for card, decoding in self._decoding.items()})
        for seq in list(self._prefill_backlog):
            if (lease := seq.lease) is not None:
                contexts[lease.decode.card] += seq.num_tokens_ahead(LOOK_AHEAD_STEPS)
        return {card: StepSize(self._leases_on[card], contexts[card]) for card in self.cards}

    def _admit(self, seq: Sequence, places: Places) -> bool:
        """Grants a lease, with blocks on both cards, if both pools have enough. Returns whether it did.

        A prompt that only the card where it decodes has blocks for, or has most of, is not shared.
        """
        prefill_card, decode_card = places.prefill, places.decode
        is_one_card, block_size = prefill_card is decode_card, decode_card.block_manager.block_size
        # A prefill must compute at least the last token, for its logits; blocks to hand off may all be cached already.
        # It computes also whatever has log-probabilities of the prompt to report.
        most_hit = min(seq.num_tokens - 1, seq.num_reported_tokens)
        computes_there = is_one_card or places.is_shared
        cached = decode_card.block_manager.match_prefix(seq, most_hit if computes_there else seq.num_tokens)
        alone = Places(decode_card, decode_card)
        num_to_compute = seq.num_tokens - len(cached) * block_size
        if places.is_shared and num_to_compute < self.placement.least_shared_tokens:
            return self._admit(seq, alone)
        num_leased = self._lease_blocks(seq, decode_card)
        hit = cached if is_one_card else prefill_card.block_manager.match_prefix(seq, most_hit)
        num_prefilled = prefill_card.block_manager.blocks_for(seq.num_tokens)
        if not decode_card.block_manager.can_allocate(cached, num_leased):
            seq.timeline.mark(f"waits for a lease ({num_leased} blocks of the decode pool)")
            return False
        if not is_one_card and not prefill_card.block_manager.can_allocate(hit, num_prefilled):
            if places.is_shared:
                return self._admit(seq, alone)
            seq.timeline.mark(f"waits for a lease ({num_prefilled} blocks of the prefill pool)")
            return False
        decode = Allocation(decode_card, decode_card.block_manager.allocate(cached, num_leased))
        prefill = (
            decode if is_one_card else Allocation(prefill_card, prefill_card.block_manager.allocate(hit, num_prefilled))
        )
        seq.lease = Lease(prefill, decode, num_handed_off_tokens=len(cached) * block_size)
        self._leases_on[decode_card] += 1
        num_hit_blocks = len(hit)
        if places.is_shared:
            # The card that has more of the prompt begins, and pushes what the other lacks.
            longer = None if len(hit) == len(cached) else prefill_card if len(hit) > len(cached) else decode_card
            seq.lease.shared = SharedPrompt(longer, places.gathers)
            num_on_both, num_hit_blocks = sorted((len(hit), len(cached)))
            seq.lease.num_handed_off_tokens = num_on_both * block_size
        self.placement.prefill_began(seq.lease)
        seq.num_prefilled_tokens = num_hit_blocks * block_size
        self.num_queried_tokens += seq.num_tokens
        self.num_hit_tokens += seq.num_prefilled_tokens
        seq.status = SequenceStatus.PREFILLING
        seq.timeline.mark("prefill queue")
        logger.debug(
            "request %d: lease granted of %d blocks of the decode pool (%d cached) and %d to prefill into (%d cached)",
            seq.request_id,
            len(decode.blocks),
            len(cached),
            num_prefilled,
            len(hit),
        )
        return True

    def _lease_blocks(self, seq: Sequence, card: Card) -> int:
        """Number of blocks for the request plus one to grow into, if request and pool allow so many."""
        needed = card.block_manager.blocks_for(seq.num_tokens)
        # The KV of a request's last token is never stored.
        most = max(needed, min(card.block_manager.blocks_for(seq.max_num_tokens - 1), card.block_manager.num_blocks))
        return min(needed + 1, most)

    def _next_chunk(self, seq: Sequence, card: Card, num_tokens: int, reason: str | None = None) -> PrefillChunk:
        """The request's next tokens, for a step of the card; `reason` is why there are no more, for `explain`."""
        lease = seq.lease
        assert lease is not None, f"request {seq.request_id} is prefilled without a lease"
        start = seq.num_prefilled_tokens
        end = start + num_tokens
        seq.num_prefilled_tokens = end
        names_card = lease.shared is not None or (self.placement.shares_prompts and lease.crosses)
        where = f" on {card}" if names_card else ""
        cut = "" if reason is None else f" ({reason})"
        seq.timeline.mark(f"prefill of tokens {start} to {end} of {seq.num_tokens}{where}{cut}")
        self.hold(lease)
        self._num_changes += 1
        self._tokens_in_flight[card] += num_tokens
        is_last = end == seq.num_tokens
        if is_last and lease.shared is not None and lease.decode.card is not card:
            self._decode_here(seq, lease, card)
        handoff, handoff_tokens = self._handoff(seq, lease, card, end, is_last)
        number = waits_for = 0
        if lease.shared is not None:
            waits_for = lease.shared.last_numbers.get(lease.card_beside(card), 0)
            self._num_shared_chunks += 1
            number = self._num_shared_chunks
            lease.shared.took(card, end, number)
        num_known = len(seq.prompt_logprobs)
        allocation = lease.allocation_on(card)
        return PrefillChunk(
            seq, lease, allocation, start, end, is_last, handoff, handoff_tokens, num_known, number, waits_for
        )

    def _decode_here(self, seq: Sequence, lease: Lease, card: Card) -> None:
        """Has a request decode where its last chunk runs: it joins the next step there, while the other card would have
        to wait for the end of this step and of its own.

        Unless that card has much more context to decode than the other one, has no time for it or no block, or the
        request is to join others.
        """
        if lease.shared is not None and lease.shared.gathers:
            return
        sizes = self._sizes_ahead()
        excess = sizes[card].context - sizes[lease.decode.card].context
        if excess > MOST_EXCESS_PROMPTS * seq.num_tokens or not self._has_time(seq, sizes, card):
            return
        here, block_manager = lease.allocation_on(card), card.block_manager
        num_missing = max(self._lease_blocks(seq, card) - len(here.blocks), 0)
        if block_manager.can_allocate((), num_missing):
            here.blocks += block_manager.allocate((), num_missing)
            lease.prefill, lease.decode = lease.decode, lease.prefill
            self._leases_on[card] += 1
            self._leases_on[lease.prefill.card] -= 1

    def _handoff(
        self, seq: Sequence, lease: Lease, card: Card, end: int, is_last: bool
    ) -> tuple[tuple[BlockPair, ...], range]:
        """Blocks to send once the card has computed the tokens before `end`, and which tokens' KV.

        These are the tokens that the other card lacks, in complete blocks but for a shared prompt. The prompt's last
        block is sent to its end: what follows the last token has been cleared.
        """
        if not lease.crosses:
            return (), range(0)
        if seq.num_tokens + 1 == seq.max_num_tokens and (lease.shared is None or is_last):
            return (), range(0)  # it ends with its first token: nothing reads its KV
        first, block_manager = lease.num_handed_off_tokens, lease.decode.card.block_manager
        block_size = block_manager.block_size
        if is_last:
            end = block_manager.blocks_for(end) * block_size
        elif lease.shared is None:
            end -= end % block_size
        if end <= first:
            return (), range(0)
        tokens, lease.num_handed_off_tokens = range(first, end), end
        source, target = lease.prefill, lease.decode
        if source.card is not card:
            source, target = target, source
        blocks = slice(first // block_size, block_manager.blocks_for(end))
        return tuple(zip(source.blocks[blocks], target.blocks[blocks], strict=True)), tokens

    def _join_arrived(self) -> None:
        """Moves requests on to decode whose prefill has ended and whose blocks have all arrived."""
        arrived = [seq for seq in self._handing_off if seq.lease is not None and not seq.lease.in_flight]
        for seq in arrived:
            self.handoff_done(seq)
        for seq in [seq for seq in self._joined_early if seq.lease is not None and not seq.lease.in_flight]:
            del self._joined_early[seq]
            self._release_prefill_blocks(seq)

    def _join_ahead(self, step: Step) -> None:
        """Has requests decode whose prompts end with the card's last step, which is still in flight.

        Their first tokens stay on the device, and all of their KV is there by the end of that step: it has waited for
        what another card has computed. A request whose tokens the host has to count waits for its own.
        """
        for chunk in step.sampling_chunks:
            seq, lease = chunk.seq, chunk.lease
            is_there = chunk.allocation is lease.decode
            # Blocks that are to be verified must not be written to meanwhile.
            is_to_be_verified = self.limits.verifies_handoffs and lease.shared is not None
            may_join = seq.lease is lease and is_there and seq.status is SequenceStatus.PREFILLING
            if may_join and not (seq.params.needs_counts or is_to_be_verified):
                seq.status = SequenceStatus.DECODING
                if lease.shared is not None:
                    self._joined_early[seq] = None
                self._prefill_backlog.remove(seq)
                seq.timeline.mark("decode queue")
                self._decoding[step.card].join(DecodeRow(seq, lease, seq.num_tokens))

    def handoff_done(self, seq: Sequence) -> None:
        """All KV of a request is on its decode card, where it joins the others."""
        self._num_changes += 1
        self._release_prefill_blocks(seq)
        lease = seq.lease
        assert lease is not None, f"request {seq.request_id} is handed off without a lease"
        seq.status = SequenceStatus.DECODING
        del self._handing_off[seq]
        self._prefill_backlog.remove(seq)
        seq.timeline.mark("decode queue")
        self._decoding[lease.decode.card].join(DecodeRow(seq, lease, seq.num_tokens - 1))

    def _release_prefill_blocks(self, seq: Sequence) -> None:
        """Nothing touches a request's prompt any more: it may be shared where it decodes, and the other blocks are
        freed.

        Both cards have a prompt that both computed: its copy where it does not decode is the first to be evicted.
        """
        lease = seq.lease
        assert lease is not None, f"request {seq.request_id} is handed off without a lease"
        lease.decode.card.block_manager.cache(seq, lease.decode.blocks, 0, seq.num_prefilled_tokens)
        logger.debug(
            "request %d: releases %d blocks that it was prefilled into, joins decode with %d",
            seq.request_id,
            len(lease.prefill.blocks) if lease.crosses else 0,
            len(lease.decode.blocks),
        )
        if lease.crosses:
            prefill_pool, is_copy = lease.prefill.card.block_manager, lease.shared is not None
            if is_copy:
                self.placement.prefill_worked(lease)
                prefill_pool.cache(seq, lease.prefill.blocks, 0, seq.num_prefilled_tokens)
            prefill_pool.free(lease.prefill.blocks, evict_first=is_copy)
            lease.prefill, lease.shared = lease.decode, None

    def _grow(self, row: DecodeRow) -> bool:
        """Makes room for the KV of the token at the row's position. Returns False if the row sits this step out."""
        seq, allocation = row.seq, row.lease.decode
        card = allocation.card
        needed = row.position // card.block_manager.block_size + 1
        while needed > len(allocation.blocks):
            if needed > card.block_manager.num_blocks:
                # Its tokens in flight, if any, are taken in first.
                if seq.num_tokens == row.position + 1:
                    self._outgrew(seq, card)
                return False
            if card.block_manager.can_allocate((), 1):
                allocation.blocks += card.block_manager.allocate((), 1)
            elif any(lease.holds_on(card) and not lease.stuck for lease in self._draining_leases):
                self._decoding[card].waits_for_blocks = True
                return False
            else:
                holders = (other for other in self._running if other.lease is not None and other.lease.holds_on(card))
                youngest = max(holders, key=_request_id)
                self.preempt(youngest)
                if youngest is seq:
                    return False
        return True

    def _outgrew(self, seq: Sequence, card: Card) -> None:
        error = OutOfKVCacheError(
            f"request {seq.request_id} has {seq.num_tokens} tokens and cannot grow: the KV pool of "
            f"{card.block_manager.num_blocks} blocks of {card.block_manager.block_size} tokens holds no more; "
            "raise num_kvcache_blocks or gpu_memory_utilization, or lower max_tokens"
        )
        self.finish(seq, "error", error)
        self._outgrown.append(seq)

    def _end_lease(self, seq: Sequence) -> None:
        lease, seq.lease = seq.lease, None
        self._num_changes += 1
        seq.num_prefilled_tokens = 0
        self._prefill_backlog.discard(seq)
        self._handing_off.pop(seq, None)
        self._joined_early.pop(seq, None)
        self._prefilled.pop(seq, None)
        if lease is None:
            return
        lease.ended = True
        self._leases_on[lease.decode.card] -= 1
        logger.debug("request %d: gives up its lease of %d blocks", seq.request_id, len(lease.decode.blocks))
        self.hold(lease, self._decoding[lease.decode.card].lease_ended(lease))
        if lease.in_flight:
            self._draining_leases.append(lease)
        else:
            _free(lease)


def _free(lease: Lease) -> None:
    for allocation in lease.allocations:
        allocation.card.block_manager.free(allocation.blocks)


def _blocks_on(card: Card, leases: abc.Iterable[Lease]) -> list[list[int]]:
    """The blocks of each lease that holds some on the card."""
    return [allocation.blocks for lease in leases for allocation in lease.allocations if allocation.card is card]


def _has_tokens_to_prefill(seq: Sequence) -> bool:
    return seq.status is SequenceStatus.PREFILLING and seq.num_tokens_to_prefill > 0


def _request_id(seq: Sequence) -> int:
    return seq.request_id
