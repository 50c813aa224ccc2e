"""Chooses the next step; queues and preempts requests; accounts for KV blocks. Decides only: no torch, no devices.

A request waits, gets a lease (its blocks in the decode pool, and blocks to prefill into), is prefilled in chunks,
handed off and decoded. On one device the two pools are one object, and the blocks to prefill into are the leased ones.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduling.admission import LOOK_AHEAD_STEPS, AdmissionPolicy
from nanovllm.engine.scheduling.circuit_breaker import CircuitBreaker
from nanovllm.engine.scheduling.decode_batch import DecodeRow, DecodeStep, HostDecodeBatch
from nanovllm.engine.sequence import Lease, Sequence, SequenceStatus
from nanovllm.errors import OutOfKVCacheError
from nanovllm.outputs import FinishReason

logger = logging.getLogger(__name__)

GROW_AHEAD_TOKENS = 16
"""When a request needs a block, others that will need one within this many tokens get theirs too, if blocks abound: the
device is then told of new blocks once in several steps."""

MOST_PREFILL_REQUESTS = 32
"""Most requests in a prefill step: the device keeps room for this many, and pads every step to it."""
ENOUGH_PREFILL_TOKENS = 4096
"""If any request of a prefill step is streamed, the step is capped at this many tokens: larger steps are no faster, and
the first prompt would wait for the last."""

MOST_FAILURES_IN_A_ROW = 2
"""Failures in a row on a separate prefill device that may be the requests' own fault; more are the device's."""

BlockPair = tuple[int, int]
"""A block of the prefill pool and the block of the decode pool that its KV goes to."""


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of a request to run through the model; `is_last` samples a token after them.

    `handoff` lists the blocks whose KV is ready to cross to the decode pool once this chunk has run.
    """

    seq: Sequence
    lease: Lease
    start: int
    end: int
    is_last: bool
    handoff: tuple[BlockPair, ...]

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PrefillStep:
    """Chunks of prompts, of one pool."""

    rows: list[PrefillChunk]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.rows)

    @property
    def is_plain(self) -> bool:
        """Whether sampling takes no more than each request's temperature, seed and index."""
        return all(chunk.end > chunk.seq.first_plain_position for chunk in self.rows if chunk.is_last)

    def halves(self) -> tuple[PrefillStep, PrefillStep] | None:
        """The step as two smaller ones, None if one request is all it has."""
        middle = len(self.rows) // 2
        return (PrefillStep(self.rows[:middle]), PrefillStep(self.rows[middle:])) if middle else None


Step = PrefillStep | DecodeStep


@dataclass(frozen=True)
class SchedulerLimits:
    max_num_batched_tokens: int
    prefill_chunk_tokens: int
    max_num_seqs: int


class Scheduler:
    """First come, first served: a request is never overtaken by a younger one for a lease.

    Whoever launches a scheduled step or a handoff reports its end (`prefill_done`, `decode_done`, `release`), so that
    blocks in use by work in flight are freed only after it. Steps may be launched ahead; those of one device end in the
    order of their launch.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        admission: AdmissionPolicy,
        prefill_pool: BlockManager,
        decode_pool: BlockManager,
    ) -> None:
        self.limits = limits
        self.admission = admission
        self.prefill_pool = prefill_pool
        self.decode_pool = decode_pool
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        """Tokens of requests that got a lease, and were looked up in the prefix cache of where they are prefilled."""
        self.num_hit_tokens = 0
        self.prefill_breaker = CircuitBreaker(MOST_FAILURES_IN_A_ROW)
        """Guards a separate prefill device. While it is open, requests are prefilled on the decode device."""
        self._clear()

    def _clear(self) -> None:
        """No requests, no work in flight."""
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._prefill_backlog: set[Sequence] = set()
        """Requests between the start of their prefill and the arrival of their KV."""
        self._batch = HostDecodeBatch.of((), self.decode_pool.block_size)
        self._batch_has_ended_leases = False
        self._joining: list[DecodeRow] = []
        """Requests that decode and are not in the batch: new ones, and those that wait for a block."""
        self._decode_steps: list[DecodeStep] = []
        """Decode steps in flight. They are counted on a lease (`in_flight`) only once it has ended."""
        self._draining_leases: list[Lease] = []
        """Leases that nobody wants any more and that work in flight still touches."""
        self._blocks_reserved = False
        """Whether a decoding request waits for the blocks of such a lease: no new lease may take them first."""
        self._prefilled: list[Sequence] = []
        self._failed: list[Sequence] = []

    # Entering and leaving

    def add(self, seq: Sequence) -> None:
        """Queues a request in the place of its arrival."""
        seq.timeline.mark("waits for a lease (its turn)")
        bisect.insort(self._waiting, seq, key=_request_id)

    def unfinished(self) -> list[Sequence]:
        """Requests that have not ended, oldest first."""
        return sorted([*self._waiting, *self._running], key=_request_id)

    def finish(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a request in whatever state it is; its blocks return as soon as nothing in flight touches them."""
        assert not seq.is_finished, f"request {seq.request_id} finishes twice"
        (self._waiting if seq.status is SequenceStatus.WAITING else self._running).remove(seq)
        seq.finish_reason, seq.error = reason, error
        seq.status = SequenceStatus.FINISHED
        seq.timeline.mark(f"ended: {reason}" if error is None else f"ended: {reason}, {error}")
        self._end_lease(seq)

    def preempt(self, seq: Sequence) -> None:
        """Takes all blocks from a running request and puts it back in its place in the queue, to be recomputed."""
        self._running.remove(seq)
        self._end_lease(seq)
        seq.status = SequenceStatus.WAITING
        seq.timeline.mark("preempted")
        self.add(seq)
        self.num_preemptions += 1

    def fail(self, seq: Sequence, error: Exception) -> None:
        """Something went wrong for this request alone: the first time it is recomputed, on the decode device."""
        if seq in self._prefill_backlog and seq.lease is not None and self._prefills_remotely(seq.lease):
            self.prefill_breaker.failed(time.monotonic())
        seq.failures += 1
        if seq.failures == 1:
            self.preempt(seq)
        else:
            self.give_up(seq, error)

    def give_up(self, seq: Sequence, error: Exception) -> None:
        """Ends a request by name; `get_failed_sequences` tells of it."""
        self.finish(seq, "error", error)
        self._failed.append(seq)

    def get_failed_sequences(self) -> list[Sequence]:
        """Requests that have ended with an error since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def num_by_status(self) -> dict[SequenceStatus, int]:
        """Requests in each state, but for those that have ended."""
        counts = Counter(seq.status for seq in [*self._waiting, *self._running])
        return {status: counts[status] for status in SequenceStatus if status is not SequenceStatus.FINISHED}

    @property
    def num_leases(self) -> int:
        """Those that requests hold, and those that they have given up and work in flight still touches."""
        return len(self._running) + len(self._draining_leases)

    @property
    def predicted_itl_s(self) -> float | None:
        """What a decode step will take with all that decode or are under way; None without any, or if unknown."""
        if self.admission.itl_target_s is None:
            return None
        # Another thread may ask at any moment, such as when no request has a token left to decode.
        num_rows, num_tokens = len(self._running), self._num_tokens_ahead()
        return self.admission.expected_s(num_rows, num_tokens) if num_rows and num_tokens else None

    # Prefill

    def schedule_prefill(self, pool: BlockManager | None = None) -> PrefillStep | None:
        """The next step of the requests that are prefilled into `pool`, the prefill pool by default.

        Into the decode pool go, besides all requests where there is one pool, those that failed once and those that
        have outgrown the prefill pool. None if there is nothing to run, or no lease to be had.
        """
        pool = self.prefill_pool if pool is None else pool
        candidates = self._prefill_candidates(pool)
        seq = next(candidates, None)
        if seq is None:
            return None
        budget = self._prefill_budget(pool)
        step = PrefillStep([])
        while seq is not None:
            step.rows.append(self._next_chunk(seq, budget - step.num_tokens))
            if seq.is_streamed:
                budget = min(budget, ENOUGH_PREFILL_TOKENS)
            is_full = step.num_tokens >= budget or len(step.rows) == MOST_PREFILL_REQUESTS
            seq = None if is_full else next(candidates, None)
        return step

    def prefill_done(self, chunk: PrefillChunk) -> bool:
        """The chunk has run: its full blocks are shareable where it ran.

        Returns whether it still counts: False if the request has ended or lost its lease meanwhile.
        """
        seq, lease = chunk.seq, chunk.lease
        counts = seq.lease is lease
        if counts:
            lease.prefill_pool.cache(seq, lease.prefill_table, chunk.start, chunk.end)
            if self._prefills_remotely(lease) and chunk.is_last and not chunk.handoff:
                self.prefill_breaker.worked()
            if chunk.is_last:
                seq.status = SequenceStatus.HANDING_OFF
                seq.timeline.mark("handoff")
                self._prefilled.append(seq)
            elif _has_tokens_to_prefill(seq):
                seq.timeline.mark("prefill queue")
        self.release(lease)
        return counts

    def blocks_arrived(self, lease: Lease) -> None:
        """A handoff of blocks of the lease has ended well."""
        self.prefill_breaker.worked()
        self.release(lease)

    def get_prefilled_sequences(self) -> list[Sequence]:
        """Requests whose prefill has ended since the last call and which have not ended themselves."""
        prefilled, self._prefilled = self._prefilled, []
        return [seq for seq in prefilled if seq.status is SequenceStatus.HANDING_OFF]

    def handoff_done(self, seq: Sequence) -> None:
        """All KV of the request is in the decode pool: it is shareable there, and the prefill blocks return."""
        assert seq.status is SequenceStatus.HANDING_OFF, f"request {seq.request_id} was not being handed off"
        assert seq.lease is not None, f"request {seq.request_id} is handed off without a lease"
        lease = seq.lease
        self.decode_pool.cache(seq, lease.decode_table, 0, seq.num_prefilled_tokens)
        logger.debug(
            "request %d: releases %d blocks that it was prefilled into, joins decode with %d",
            seq.request_id,
            len(lease.prefill_table),
            len(lease.decode_table),
        )
        lease.prefill_pool.free(lease.prefill_table)
        lease.prefill_table = []
        seq.status = SequenceStatus.DECODING
        self._prefill_backlog.remove(seq)
        seq.timeline.mark("decode queue")
        self._joining.append(DecodeRow(seq, lease, seq.num_tokens - 1))

    # Decode

    def schedule_decode(self) -> DecodeStep | None:
        """One token for every request that decodes, has not all its tokens under way, and can get the block it needs.

        Where the pool runs out, the youngest request is preempted. While blocks that were given up are still touched
        by work in flight, a request that needs one sits this step out.
        """
        self._blocks_reserved = False
        grown = self._update_batch()
        if not self._batch:
            return None
        step = DecodeStep(self._batch, self._batch.positions.copy(), grown)
        self._batch.positions += 1
        self._decode_steps.append(step)
        return step

    def decode_done(self, step: DecodeStep) -> None:
        """The step has run: the KV of the tokens it was fed is in the decode pool.

        It still counts for those of its requests that have the same lease as then.
        """
        self._decode_steps.remove(step)
        for lease in step.ended_leases:
            self.release(lease)

    def token_appended(self, seq: Sequence) -> None:
        """A decoding request got a token: the block that its predecessor filled, if it did, is shareable."""
        num_computed = seq.num_tokens - 1
        if seq.status is SequenceStatus.DECODING and num_computed % self.decode_pool.block_size == 0:
            assert seq.lease is not None, f"request {seq.request_id} decodes without a lease"
            start = num_computed - self.decode_pool.block_size
            self.decode_pool.cache(seq, seq.lease.decode_table, start, num_computed)

    def forget_cached_blocks(self, seq: Sequence) -> None:
        """The KV of a running request may be wrong: its blocks are shared no more."""
        assert seq.lease is not None, f"request {seq.request_id} has no blocks"
        self.decode_pool.forget(seq.lease.decode_table)
        seq.lease.prefill_pool.forget(seq.lease.prefill_table)

    # Work in flight

    def split(self, step: Step) -> SequenceOf[Step] | None:
        """Two smaller steps to launch instead of one that could not be; None if it has a single request."""
        if isinstance(step, PrefillStep):
            return step.halves()
        halves = step.halves()
        if halves is not None:
            self._decode_steps.remove(step)
            self._decode_steps += halves
        return halves

    def cancel(self, step: Step) -> None:
        """A step that could not be launched never will be."""
        if isinstance(step, DecodeStep):
            self.decode_done(step)
        else:
            for chunk in step.rows:
                self.release(chunk.lease)

    def hold(self, lease: Lease) -> None:
        """Work that touches the lease's blocks was launched."""
        lease.in_flight += 1

    def release(self, lease: Lease) -> None:
        """Such work has ended."""
        assert lease.in_flight > 0, "no work is in flight on this lease"
        lease.in_flight -= 1
        if lease.in_flight == 0 and lease in self._draining_leases:
            self._draining_leases.remove(lease)
            self._free(lease)

    def start_over(self, unfinished: SequenceOf[Sequence], stuck: SequenceOf[Lease]) -> None:
        """Whatever state an interrupt left: all requests wait to be recomputed, and all work has ended.

        Only the leases of `stuck`, one entry for each copy that may still touch their blocks, go on holding them.
        """
        for seq in unfinished:
            if seq.lease is not None:
                seq.lease.ended = True
            seq.lease, seq.num_prefilled_tokens, seq.status = None, 0, SequenceStatus.WAITING
        for lease in [*self._batch.leases, *stuck]:
            lease.ended = True
        self._clear()
        self._waiting = sorted(unfinished, key=_request_id)
        self._draining_leases = list(dict.fromkeys(stuck))
        for lease in self._draining_leases:
            lease.in_flight = stuck.count(lease)
        for pool, tables in self._tables_of(self._draining_leases):
            pool.reset(tables)

    def check_integrity(self) -> None:
        """Asserts that every block of both pools is accounted for."""
        leases = [*self._draining_leases, *(seq.lease for seq in self._running if seq.lease is not None)]
        for pool, tables in self._tables_of(leases):
            pool.check_integrity(tables)
        for seq in self._running:
            assert seq.lease is not None, f"request {seq.request_id} is {seq.status} without a lease"
        under_way = {seq for seq in self._running if seq.status is not SequenceStatus.DECODING}
        assert self._prefill_backlog == under_way, "who is under way and who is counted as such differ"
        for seq in self._waiting:
            assert seq.lease is None, f"waiting request {seq.request_id} holds a lease"
            assert seq.status is SequenceStatus.WAITING, f"request {seq.request_id} waits but is {seq.status}"

    # Inside

    def _tables_of(self, leases: SequenceOf[Lease]) -> Iterator[tuple[BlockManager, list[list[int]]]]:
        """Each pool, and the blocks that the leases hold of it."""
        for pool in {self.prefill_pool, self.decode_pool}:
            tables = [lease.prefill_table for lease in leases if lease.prefill_pool is pool]
            if pool is self.decode_pool:
                tables += [lease.decode_table for lease in leases]
            yield pool, tables

    def _prefill_pool_of(self, seq: Sequence) -> BlockManager:
        outgrown = self.prefill_pool.blocks_for(seq.num_tokens) > self.prefill_pool.num_blocks
        is_out = self.prefill_breaker.is_out and not self.prefill_breaker.allows_trial(time.monotonic())
        return self.decode_pool if seq.failures or outgrown or is_out else self.prefill_pool

    def _prefills_remotely(self, lease: Lease) -> bool:
        """Whether its request is prefilled on a device of its own."""
        return lease.prefill_pool is not self.decode_pool

    def _prefill_budget(self, pool: BlockManager) -> int:
        if pool is not self.decode_pool:
            return self.limits.max_num_batched_tokens
        chunk_tokens = min(self.limits.prefill_chunk_tokens, self.limits.max_num_batched_tokens)
        is_awaited = any(seq.is_streamed and seq.status is SequenceStatus.DECODING for seq in self._running)
        # A device of its own for decode has workspace for chunks of this size only.
        return chunk_tokens if is_awaited or pool is not self.prefill_pool else self.limits.max_num_batched_tokens

    def _prefill_candidates(self, pool: BlockManager) -> Iterator[Sequence]:
        """Requests with tokens left to prefill, oldest lease first, then those of the queue that get a lease."""
        self._prefilling = [seq for seq in self._prefilling if _has_tokens_to_prefill(seq)]
        for seq in list(self._prefilling):
            if seq.lease is not None and seq.lease.prefill_pool is pool:
                yield seq
        # Once for all that are admitted here: whoever runs is looked at.
        num_tokens_ahead = self._num_tokens_ahead() if self._waiting and self.admission.itl_target_s is not None else 0
        while self._waiting and self._may_admit(self._waiting[0], num_tokens_ahead):
            seq = self._waiting[0]
            if self.decode_pool.blocks_for(seq.num_tokens) > self.decode_pool.num_blocks:
                self.give_up(seq, self._does_not_fit(seq))
            elif self._prefill_pool_of(seq) is pool and self._admit(seq, pool):
                self._waiting.remove(seq)
                self._running.append(seq)
                self._prefilling.append(seq)
                self._prefill_backlog.add(seq)
                num_tokens_ahead += _num_tokens_ahead_of(seq)
                yield seq
            else:
                return

    def _may_admit(self, seq: Sequence, num_tokens_ahead: int) -> bool:
        num_leases = len(self._running) + sum(not lease.stuck for lease in self._draining_leases)
        if num_leases >= self.limits.max_num_seqs:
            seq.timeline.mark(f"waits for a lease (max_num_seqs={self.limits.max_num_seqs} are held)")
            return False
        if self._blocks_reserved:
            seq.timeline.mark("waits for a lease (a decoding request needs the next free blocks)")
            return False
        if self._prefill_pool_of(seq) is self.decode_pool:
            return True
        num_tokens = num_tokens_ahead + _num_tokens_ahead_of(seq)
        reason = self.admission.reason_to_wait(len(self._prefill_backlog), len(self._running) + 1, num_tokens)
        if reason is not None:
            seq.timeline.mark(f"waits for a lease ({reason})")
        return reason is None

    def _num_tokens_ahead(self) -> int:
        """Context tokens, LOOK_AHEAD_STEPS from now, of all requests that decode or are being prefilled."""
        others = [*self._prefill_backlog, *(row.seq for row in self._joining)]
        return self._batch.num_tokens_ahead(LOOK_AHEAD_STEPS) + sum(map(_num_tokens_ahead_of, others))

    def _admit(self, seq: Sequence, pool: BlockManager) -> bool:
        """Grants blocks in the decode pool and in the pool to prefill into, or none."""
        into_decode_pool = pool is self.decode_pool
        # A prefill must run at least the last token to have logits; what is handed off may all be there already.
        most_cached = seq.num_tokens - 1 if into_decode_pool else seq.num_tokens
        cached = self.decode_pool.match_prefix(seq, most_cached)
        num_leased = self._lease_blocks(seq)
        hit = cached if into_decode_pool else pool.match_prefix(seq, seq.num_tokens - 1)
        num_prefilled = pool.blocks_for(seq.num_tokens)
        if not self.decode_pool.can_take(cached, num_leased):
            seq.timeline.mark(f"waits for a lease ({num_leased} blocks of the decode pool)")
            return False
        if not into_decode_pool and not pool.can_take(hit, num_prefilled):
            seq.timeline.mark(f"waits for a lease ({num_prefilled} blocks of the prefill pool)")
            return False
        decode_table = self.decode_pool.take(cached, num_leased)
        if into_decode_pool:
            prefill_table = decode_table[:num_prefilled]
            pool.share(prefill_table)
        else:
            prefill_table = pool.take(hit, num_prefilled)
        seq.lease = Lease(decode_table, prefill_table, pool, num_handed_off_blocks=len(cached))
        if self.prefill_breaker.is_out and not into_decode_pool:
            self.prefill_breaker.begin_trial(time.monotonic())
        seq.num_prefilled_tokens = len(hit) * pool.block_size
        self.num_queried_tokens += seq.num_tokens
        self.num_hit_tokens += seq.num_prefilled_tokens
        seq.status = SequenceStatus.PREFILLING
        seq.timeline.mark("prefill queue")
        logger.debug(
            "request %d: lease granted of %d blocks of the decode pool (%d cached) and %d to prefill into (%d cached)",
            seq.request_id,
            len(decode_table),
            len(cached),
            num_prefilled,
            len(hit),
        )
        return True

    def _lease_blocks(self, seq: Sequence) -> int:
        """The request's blocks plus one to grow into, if it may grow that far and the pool has one."""
        needed = self.decode_pool.blocks_for(seq.num_tokens)
        # The KV of the last token is not needed.
        most = max(needed, min(self.decode_pool.blocks_for(seq.max_num_tokens - 1), self.decode_pool.num_blocks))
        return min(needed + 1, most)

    def _next_chunk(self, seq: Sequence, budget: int) -> PrefillChunk:
        assert seq.lease is not None, f"request {seq.request_id} is prefilled without a lease"
        start = seq.num_prefilled_tokens
        end = min(seq.num_tokens, start + budget)
        seq.num_prefilled_tokens = end
        seq.timeline.mark(f"prefill of tokens {start} to {end} of {seq.num_tokens}")
        self.hold(seq.lease)
        is_last = end == seq.num_tokens
        return PrefillChunk(seq, seq.lease, start, end, is_last, self._handoff_pairs(seq, seq.lease, end, is_last))

    def _handoff_pairs(self, seq: Sequence, lease: Lease, end: int, is_last: bool) -> tuple[BlockPair, ...]:
        """Blocks that are complete once the tokens before `end` are computed, and that the decode pool lacks."""
        if lease.prefill_pool is self.decode_pool or seq.num_tokens + 1 == seq.max_num_tokens:
            return ()
        first = lease.num_handed_off_blocks
        complete = self.decode_pool.blocks_for(end) if is_last else end // self.decode_pool.block_size
        last = max(first, complete)
        lease.num_handed_off_blocks = last
        return tuple(zip(lease.prefill_table[first:last], lease.decode_table[first:last], strict=True))

    def _update_batch(self) -> list[int]:
        """Makes the batch that of the requests to decode next; the places of rows that got blocks, if it is the same.

        The oldest request is served first, and younger ones may lose their lease to it.
        """
        batch = self._batch
        place_of = {batch.leases[place]: place for place in batch.due()}
        candidates = [*map(batch.row, place_of.values()), *self._joining]
        self._joining = []
        leaving: set[Lease] = set()
        joined: list[DecodeRow] = []
        grown: list[int] = []
        for row in sorted(candidates, key=lambda row: row.seq.request_id):
            place = place_of.get(row.lease)
            if row.lease.ended:
                continue
            if row.position > row.seq.last_fed_position:
                leaving.add(row.lease)
            elif not self._grow(row):
                if place is not None:
                    leaving.add(row.lease)
                if not row.lease.ended:
                    self._joining.append(row)
            elif place is None:
                joined.append(row)
            else:
                self._note_growth(place)
                grown.append(place)
        if grown:
            grown += self._grow_ahead()
        if leaving or self._batch_has_ended_leases:
            stays = [not (lease.ended or lease in leaving) for lease in batch.leases]
            self._batch = self._batch.select([place for place, stay in enumerate(stays) if stay])
            self._batch_has_ended_leases = False
        if joined:
            for row in joined:
                row.seq.timeline.mark("decodes")
            self._batch = self._batch.joined_by(HostDecodeBatch.of(joined, self.decode_pool.block_size))
        return grown if self._batch is batch else []

    def _grow(self, row: DecodeRow) -> bool:
        """Makes room for the KV of the token at the row's position; False if it cannot decode in this step."""
        seq, lease = row.seq, row.lease
        needed = row.position // self.decode_pool.block_size + 1
        while needed > len(lease.decode_table):
            if needed > self.decode_pool.num_blocks:
                # What it has sampled and not yet shown comes first.
                if seq.num_tokens == row.position + 1:
                    self.give_up(seq, self._does_not_fit(seq))
                return False
            if self.decode_pool.can_take((), 1):
                lease.decode_table += self.decode_pool.take((), 1)
            elif any(not closing.stuck for closing in self._draining_leases):
                self._blocks_reserved = True
                return False
            else:
                youngest = max(self._running, key=_request_id)
                self.preempt(youngest)
                if youngest is seq:
                    return False
        return True

    def _grow_ahead(self) -> list[int]:
        """A block for each row that will need one soon, as long as there is one for everybody; their places."""
        batch, grown = self._batch, []
        is_near = (batch.capacities - batch.positions < GROW_AHEAD_TOKENS) & (batch.capacities <= batch.last_positions)
        for place in is_near.nonzero()[0].tolist():
            if self.decode_pool.num_free_blocks > len(batch) and not batch.leases[place].ended:
                batch.leases[place].decode_table += self.decode_pool.take((), 1)
                self._note_growth(place)
                grown.append(place)
        return grown

    def _note_growth(self, place: int) -> None:
        self._batch.capacities[place] = len(self._batch.leases[place].decode_table) * self.decode_pool.block_size

    def _does_not_fit(self, seq: Sequence) -> OutOfKVCacheError:
        return OutOfKVCacheError(
            f"request {seq.request_id} has {seq.num_tokens} tokens and cannot grow: the KV pool of "
            f"{self.decode_pool.num_blocks} blocks of {self.decode_pool.block_size} tokens holds no more; "
            "raise num_kvcache_blocks or gpu_memory_utilization, or lower max_tokens"
        )

    def _end_lease(self, seq: Sequence) -> None:
        lease, seq.lease = seq.lease, None
        seq.num_prefilled_tokens = 0
        self._prefill_backlog.discard(seq)
        if lease is None:
            return
        lease.ended = True
        logger.debug("request %d: gives up its lease of %d blocks", seq.request_id, len(lease.decode_table))
        for step in self._decode_steps:
            if lease in step.batch.leases:
                lease.in_flight += 1
                step.ended_leases.append(lease)
        if lease in self._batch.leases:
            self._batch_has_ended_leases = True
        if lease.in_flight:
            self._draining_leases.append(lease)
        else:
            self._free(lease)

    def _free(self, lease: Lease) -> None:
        lease.prefill_pool.free(lease.prefill_table)
        self.decode_pool.free(lease.decode_table)


def _has_tokens_to_prefill(seq: Sequence) -> bool:
    return seq.status is SequenceStatus.PREFILLING and seq.num_prefilled_tokens < seq.num_tokens


def _num_tokens_ahead_of(seq: Sequence) -> int:
    return min(seq.num_tokens + LOOK_AHEAD_STEPS, seq.last_fed_position + 1)


def _request_id(seq: Sequence) -> int:
    return seq.request_id
