"""Which tokens of which requests run next, and who gives up blocks. Decides only: no torch, no devices.

A request waits, gets a lease (its blocks in the decode pool) and prefill blocks, is prefilled in chunks, handed off
and decoded. On one device the two pools are one object and the prefill blocks are the leased ones, held twice.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.errors import OutOfKVCacheError
from nanovllm.outputs import FinishReason


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of a request to run through the model; `is_last` samples a token after them.

    `handoff` lists (prefill block, decode block) pairs whose KV is ready to cross once this chunk has run.
    """

    seq: Sequence
    start: int
    end: int
    is_last: bool
    handoff: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PrefillStep:
    chunks: list[PrefillChunk]

    def sequences(self) -> list[Sequence]:
        return [chunk.seq for chunk in self.chunks]

    def halves(self) -> tuple[PrefillStep, PrefillStep] | None:
        """The step as two smaller ones, None if one request is all it has."""
        middle = len(self.chunks) // 2
        return (PrefillStep(self.chunks[:middle]), PrefillStep(self.chunks[middle:])) if middle else None


@dataclass(frozen=True)
class DecodeStep:
    seqs: list[Sequence]

    def sequences(self) -> list[Sequence]:
        return self.seqs

    def halves(self) -> tuple[DecodeStep, DecodeStep] | None:
        """The step as two smaller ones, None if one request is all it has."""
        middle = len(self.seqs) // 2
        return (DecodeStep(self.seqs[:middle]), DecodeStep(self.seqs[middle:])) if middle else None


@dataclass(frozen=True)
class SchedulerLimits:
    max_num_batched_tokens: int
    prefill_chunk_tokens: int
    max_num_seqs: int
    max_model_len: int


class Scheduler:
    """First come, first served: a request is never overtaken by a younger one for a lease.

    Whoever launches a scheduled step reports its end for every request in it (`prefill_done`, `decode_done`, or
    `step_failed`), so that blocks in use by work in flight are freed only after it. One step of each kind is in
    flight at a time.
    """

    def __init__(self, limits: SchedulerLimits, prefill_pool: BlockManager, decode_pool: BlockManager) -> None:
        self.limits = limits
        self.prefill_pool = prefill_pool
        self.decode_pool = decode_pool
        self.num_preemptions = 0
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._closing: list[Sequence] = []
        self._prefilled: list[Sequence] = []
        self._failed: list[Sequence] = []

    # Entering and leaving

    def add(self, seq: Sequence) -> None:
        bisect.insort(self._waiting, seq, key=lambda waiting: waiting.request_id)

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running or self._closing)

    def unfinished(self) -> list[Sequence]:
        """Requests that have not ended, oldest first."""
        return sorted([*self._waiting, *self._running], key=lambda seq: seq.request_id)

    def finish(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a request in whatever state it is; its blocks return as soon as nothing in flight touches them."""
        assert not seq.is_finished, f"request {seq.request_id} finishes twice"
        (self._waiting if seq.status is SequenceStatus.WAITING else self._running).remove(seq)
        seq.status, seq.finish_reason, seq.error = SequenceStatus.FINISHED, reason, error
        self._closing.append(seq)
        self._close_if_idle(seq)

    def preempt(self, seq: Sequence) -> None:
        """Takes all blocks from a running request and puts it back in its place in the queue, to be recomputed."""
        assert seq.in_flight == 0, f"request {seq.request_id} is preempted with work in flight"
        self._running.remove(seq)
        self._free_blocks(seq)
        seq.status = SequenceStatus.WAITING
        self.add(seq)
        self.num_preemptions += 1

    def get_failed_sequences(self) -> list[Sequence]:
        """Requests that have ended with an error since the last call."""
        failed, self._failed = self._failed, []
        return failed

    # Prefill

    def schedule_prefill(self) -> PrefillStep | None:
        """The next prefill step, or None if no request waits that could have a lease."""
        budget = self._prefill_budget()
        chunks: list[PrefillChunk] = []
        candidates = self._prefill_candidates()
        while budget > 0 and (seq := next(candidates, None)) is not None:
            chunk = self._next_chunk(seq, budget)
            budget -= chunk.end - chunk.start
            chunks.append(chunk)
        return PrefillStep(chunks) if chunks else None

    def prefill_done(self, chunk: PrefillChunk) -> None:
        """The chunk has run: its full blocks are shareable on the prefill device."""
        seq = chunk.seq
        if not seq.is_finished:
            assert seq.prefill_pool is not None, "a request that is prefilled has a prefill pool"
            seq.prefill_pool.cache(seq, seq.prefill_table, chunk.start, chunk.end)
            if chunk.is_last:
                seq.status = SequenceStatus.HANDING_OFF
                self._prefilled.append(seq)
        self.release(seq)

    def get_prefilled_sequences(self) -> list[Sequence]:
        """Requests whose prefill has ended since the last call and which have not ended themselves."""
        prefilled, self._prefilled = self._prefilled, []
        return [seq for seq in prefilled if seq.status is SequenceStatus.HANDING_OFF]

    def handoff_done(self, seq: Sequence) -> None:
        """All KV of the request is in the decode pool: it is shareable there, and the prefill blocks return."""
        assert seq.status is SequenceStatus.HANDING_OFF, f"request {seq.request_id} was not being handed off"
        assert seq.prefill_pool is not None, "a request that is handed off has a prefill pool"
        self.decode_pool.cache(seq, seq.decode_table, 0, seq.num_prefilled_tokens)
        seq.prefill_pool.free(seq.prefill_table)
        seq.prefill_table, seq.prefill_pool = [], None
        seq.status = SequenceStatus.DECODING

    # Decode

    def schedule_decode(self) -> DecodeStep | None:
        """One token for every request that decodes and has, or can get, the block its KV goes to.

        Where the pool runs out, the youngest request is preempted. A request that cannot get a block while all
        others that hold some have work in flight sits this step out.
        """
        seqs: list[Sequence] = []
        for seq in sorted(self._running, key=lambda seq: seq.request_id):
            if seq.status is SequenceStatus.DECODING and self._grow(seq):
                self.hold(seq)
                seqs.append(seq)
        return DecodeStep(seqs) if seqs else None

    def decode_done(self, seq: Sequence) -> None:
        """The step has run: the KV of the token it was fed is in the decode pool."""
        self.release(seq)

    def step_failed(self, seq: Sequence, error: Exception, retry: bool) -> None:
        """A step that held the request failed because of it: it is recomputed from the start, or ends by name."""
        self.release(seq)
        if seq.is_finished:
            return
        seq.failures += 1
        if retry:
            self.preempt(seq)
        else:
            self._fail(seq, error)

    def token_appended(self, seq: Sequence) -> None:
        """A decoding request got a token: the block that its predecessor filled, if it did, is shareable."""
        num_computed = seq.num_tokens - 1
        if seq.status is SequenceStatus.DECODING and num_computed % self.decode_pool.block_size == 0:
            start = num_computed - self.decode_pool.block_size
            self.decode_pool.cache(seq, seq.decode_table, start, num_computed)

    # Work in flight

    def hold(self, seq: Sequence) -> None:
        """Work that touches the request's blocks was launched."""
        seq.in_flight += 1

    def release(self, seq: Sequence) -> None:
        """Such work has ended."""
        assert seq.in_flight > 0, f"request {seq.request_id} has no work in flight"
        seq.in_flight -= 1
        self._close_if_idle(seq)

    def check_integrity(self) -> None:
        """Asserts that every block of both pools is accounted for."""
        holders = [*self._running, *self._closing]
        for pool in {id(pool): pool for pool in (self.prefill_pool, self.decode_pool)}.values():
            tables = [seq.prefill_table for seq in holders if seq.prefill_pool is pool]
            if pool is self.decode_pool:
                tables += [seq.decode_table for seq in holders]
            pool.check_integrity(tables)
        for seq in self._waiting:
            assert seq.prefill_table == seq.decode_table == [], f"waiting request {seq.request_id} holds blocks"
            assert seq.status is SequenceStatus.WAITING, f"request {seq.request_id} waits but is {seq.status}"

    # Inside

    def _prefill_budget(self) -> int:
        shares_device = self.prefill_pool is self.decode_pool
        if shares_device and any(seq.status is SequenceStatus.DECODING for seq in self._running):
            return min(self.limits.prefill_chunk_tokens, self.limits.max_num_batched_tokens)
        return self.limits.max_num_batched_tokens

    def _prefill_candidates(self) -> Iterator[Sequence]:
        """Requests with tokens left to prefill, oldest lease first, then those of the queue that get a lease."""
        for seq in list(self._running):
            if seq.status is SequenceStatus.PREFILLING and seq.num_prefilled_tokens < seq.num_tokens:
                yield seq
        while self._waiting and len(self._running) + len(self._closing) < self.limits.max_num_seqs:
            seq = self._waiting[0]
            if not self._admit(seq):
                return
            del self._waiting[0]
            self._running.append(seq)
            yield seq

    def _admit(self, seq: Sequence) -> bool:
        """Grants the lease and the prefill blocks, or neither."""
        cached = self.decode_pool.match_prefix(seq, self._max_shared_tokens(seq, self.decode_pool))
        lease = self.decode_pool.take(cached, self._lease_blocks(seq))
        if lease is None:
            return False
        if self.prefill_pool is self.decode_pool:
            table, num_cached = lease[: self.decode_pool.blocks_for(seq.num_tokens)], len(cached)
            self.prefill_pool.share(table)
        else:
            hit = self.prefill_pool.match_prefix(seq, self._max_shared_tokens(seq, self.prefill_pool))
            granted = self.prefill_pool.take(hit, self.prefill_pool.blocks_for(seq.num_tokens))
            if granted is None:
                self.decode_pool.free(lease)
                return False
            table, num_cached = granted, len(hit)
        seq.decode_table, seq.num_handed_off_blocks = lease, len(cached)
        seq.prefill_table, seq.prefill_pool = table, self.prefill_pool
        seq.num_prefilled_tokens = num_cached * self.prefill_pool.block_size
        seq.status = SequenceStatus.PREFILLING
        return True

    def _max_shared_tokens(self, seq: Sequence, pool: BlockManager) -> int:
        """A prefill must run at least the last token to have logits; a decode pool may hold the whole of it."""
        return seq.num_tokens - 1 if pool is self.prefill_pool else seq.num_tokens

    def _lease_blocks(self, seq: Sequence) -> int:
        """The request's blocks plus one to grow into, if it may grow that far and the pool has one."""
        needed = self.decode_pool.blocks_for(seq.num_tokens)
        num_output_left = seq.params.max_tokens - seq.num_output_tokens
        most_tokens = min(seq.num_tokens + num_output_left - 1, self.limits.max_model_len)
        most = max(needed, min(self.decode_pool.blocks_for(most_tokens), self.decode_pool.num_blocks))
        return min(needed + 1, most)

    def _next_chunk(self, seq: Sequence, budget: int) -> PrefillChunk:
        start = seq.num_prefilled_tokens
        end = min(seq.num_tokens, start + budget)
        seq.num_prefilled_tokens = end
        self.hold(seq)
        is_last = end == seq.num_tokens
        return PrefillChunk(seq, start, end, is_last, self._handoff_pairs(seq, end, is_last))

    def _handoff_pairs(self, seq: Sequence, end: int, is_last: bool) -> tuple[tuple[int, int], ...]:
        """Blocks that are complete once the tokens before `end` are computed, and that the decode pool lacks."""
        if seq.prefill_pool is self.decode_pool:
            return ()
        first = seq.num_handed_off_blocks
        last = self.decode_pool.blocks_for(end) if is_last else end // self.decode_pool.block_size
        seq.num_handed_off_blocks = max(first, last)
        return tuple(zip(seq.prefill_table[first:last], seq.decode_table[first:last], strict=True))

    def _grow(self, seq: Sequence) -> bool:
        """Makes room for the KV of the last token; False if the request cannot decode in this step."""
        while (needed := self.decode_pool.blocks_for(seq.num_tokens)) > len(seq.decode_table):
            if needed > self.decode_pool.num_blocks:
                self._fail(seq, self._does_not_fit(seq))
                return False
            block = self.decode_pool.take((), 1)
            if block is not None:
                seq.decode_table += block
                continue
            others = [other for other in self._running if other is not seq]
            younger = [other for other in others if other.request_id > seq.request_id]
            idle = [other for other in younger if other.in_flight == 0]
            if idle:
                self.preempt(max(idle, key=lambda other: other.request_id))
            elif younger or self._closing:
                return False
            else:
                self.preempt(seq)
                return False
        return True

    def _fail(self, seq: Sequence, error: Exception) -> None:
        self.finish(seq, "error", error)
        self._failed.append(seq)

    def _does_not_fit(self, seq: Sequence) -> OutOfKVCacheError:
        return OutOfKVCacheError(
            f"request {seq.request_id} has {seq.num_tokens} tokens and cannot grow: the KV pool of "
            f"{self.decode_pool.num_blocks} blocks of {self.decode_pool.block_size} tokens holds no more; "
            "raise num_kvcache_blocks or gpu_memory_utilization, or lower max_tokens"
        )

    def _close_if_idle(self, seq: Sequence) -> None:
        if seq.is_finished and seq.in_flight == 0:
            self._closing.remove(seq)
            self._free_blocks(seq)

    def _free_blocks(self, seq: Sequence) -> None:
        if seq.prefill_pool is not None:
            seq.prefill_pool.free(seq.prefill_table)
        self.decode_pool.free(seq.decode_table)
        seq.prefill_table, seq.decode_table, seq.prefill_pool = [], [], None
        seq.num_prefilled_tokens = seq.num_handed_off_blocks = 0
