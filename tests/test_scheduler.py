"""Scheduler and block managers without a model: any order of events leaves every block accounted for."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler, SchedulerLimits
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.decode_batch import DecodeRow
from nanovllm.engine.scheduling.step import PrefillChunk, Step
from nanovllm.engine.scheduling.step_time import StepSize
from nanovllm.engine.sequence import Sequence, SequenceStatus
from tests.steps import place

BLOCK_SIZE = 4
NUM_BLOCKS = 10
MAX_MODEL_LEN = 36
MAX_NUM_BATCHED_TOKENS = 14
LIMITS = SchedulerLimits(prefill_chunk_tokens=5, max_num_seqs=4, max_handoff_backlog=2)


def make_sequence(request_id: int, tokens: list[int], max_tokens: int = 8) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    longest = min(len(tokens) + max_tokens, MAX_MODEL_LEN)
    return Sequence(request_id, tokens, params, seed=request_id, arrival_s=0.0, max_num_tokens=longest)


class OnePool(RuleBasedStateMachine):
    """Plays the engine: launches steps, ends them in any order, aborts and fails requests at any moment."""

    limits = LIMITS

    def pools(self) -> tuple[BlockManager, BlockManager]:
        pool = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        return pool, pool

    def __init__(self) -> None:
        super().__init__()
        self.prefill_pool, self.decode_pool = self.pools()
        chunk_tokens = self.limits.prefill_chunk_tokens
        placement = place(self.prefill_pool, self.decode_pool, MAX_NUM_BATCHED_TOKENS, chunk_tokens)
        self.scheduler = Scheduler(self.limits, placement)
        self.prefill_card, self.decode_card = placement.prefill_card, placement.decode_card
        self.seqs: list[Sequence] = []
        self.prefills: dict[Card, list[Step]] = {}
        self.decodes: list[Step] = []
        self.handoffs: list[PrefillChunk] = []

    @rule(length=st.integers(1, 30), seed=st.integers(0, 2), max_tokens=st.integers(1, 20))
    def add(self, length: int, seed: int, max_tokens: int) -> None:
        # Few seeds: prompts share beginnings, so that prefix hits are common.
        tokens = [seed * 100 + place for place in range(length)]
        seq = make_sequence(len(self.seqs), tokens, max_tokens)
        self.seqs.append(seq)
        self.scheduler.add(seq)

    @rule(on_decode_device=st.booleans())
    def launch_prefill(self, on_decode_device: bool) -> None:
        card = self.decode_card if on_decode_device else self.prefill_card
        if len(self.prefills.get(card, ())) == (1 if card is self.decode_card else 2):
            return
        step = self.scheduler.schedule_prefill(card)
        if step is None:
            return
        assert step.card is card
        self.prefills.setdefault(card, []).append(step)
        for chunk in step.chunks:
            assert chunk.start < chunk.end <= chunk.seq.num_tokens
            assert chunk.allocation.card is card
            assert chunk.lease.crosses == (card is not self.decode_card)
            num_blocks = len(chunk.allocation.blocks)
            if chunk.lease.crosses:
                assert num_blocks == card.block_manager.blocks_for(chunk.seq.num_tokens)
            else:
                assert num_blocks >= card.block_manager.blocks_for(chunk.seq.num_tokens)
            for _, target in chunk.handoff:
                assert self.decode_pool._ref_counts[target] == 1, "a handoff writes to a block that others hold"
            if chunk.handoff:
                self.scheduler.hold(chunk.lease)
                self.handoffs.append(chunk)

    @precondition(lambda self: self.prefills)
    @rule(data=st.data(), fails=st.booleans())
    def end_prefill(self, data: st.DataObject, fails: bool) -> None:
        self.end_prefill_of(data.draw(st.sampled_from(list(self.prefills))), fails)

    def end_prefill_of(self, card: Card, fails: bool = False) -> None:
        step = self.prefills[card].pop(-1 if fails else 0)  # it is a launch that fails
        if not self.prefills[card]:
            del self.prefills[card]
        if fails:
            self.scheduler.cancel(step)
            for chunk in step.chunks:
                self.fail(chunk)
            return
        self.take_tokens_after_chunks(step)

    @precondition(lambda self: self.handoffs)
    @rule(data=st.data(), fails=st.booleans())
    def end_handoff(self, data: st.DataObject, fails: bool) -> None:
        self.end_handoff_of(data.draw(st.sampled_from(self.handoffs)), fails)

    def end_handoff_of(self, chunk: PrefillChunk, fails: bool = False) -> None:
        self.handoffs.remove(chunk)
        self.scheduler.release(chunk.lease)
        if fails and chunk.seq.lease is chunk.lease:
            self.scheduler.fail(chunk.seq, RuntimeError("injected"))

    @precondition(lambda self: len(self.decodes) < 2)
    @rule(splits=st.booleans())
    def launch_decode(self, splits: bool = False) -> None:
        step = self.scheduler.schedule_decode()
        if step is None:
            return
        self.decodes += (splits and self.scheduler.halve(step)) or [step]
        underway = {chunk.lease for chunk in self.handoffs}
        assert underway.isdisjoint(step.leases), "a request decodes before its KV has arrived"
        written = [row.lease.decode.blocks[row.position // BLOCK_SIZE] for row in step.decode]
        assert len(set(written)) == len(written), "two requests write to one block"
        for row, block in zip(step.decode, written, strict=True):
            assert self.decode_pool._ref_counts[block] == 1, "a request writes to a block that others hold"
            assert row.output_index < row.seq.params.max_tokens, "a step beyond the request's length"

    @precondition(lambda self: self.decodes)
    @rule(fails=st.booleans(), stopped=st.sets(st.integers(0, 3)))
    def end_decode(self, fails: bool, stopped: set[int]) -> None:
        if fails and len(self.decodes) == 1:
            step = self.decodes.pop()
            self.scheduler.cancel(step)
            for row in step.decode:
                self.fail(row)
            return
        step = self.decodes.pop(0)
        self.scheduler.decode_done(step)
        self.take_decoded_tokens(step, stopped)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        running = [seq for seq in self.seqs if not seq.is_finished]
        if running:
            self.scheduler.finish(data.draw(st.sampled_from(running)), "abort")

    def fail(self, row: PrefillChunk | DecodeRow) -> None:
        if row.seq.lease is row.lease:
            self.scheduler.fail(row.seq, RuntimeError("injected"))

    def take_tokens_after_chunks(self, step: Step) -> None:
        ended = []
        for chunk in step.chunks:
            if self.scheduler.prefill_done(chunk) and chunk.is_last:
                self.append(chunk.seq)
                ended += [] if chunk.seq.is_finished else [chunk.seq]
        assert self.scheduler.get_prefilled_sequences() == ended

    def take_decoded_tokens(self, step: Step, stopped: set[int]) -> None:
        for index, row in enumerate(step.decode):
            if row.seq.lease is row.lease:
                assert row.position == row.seq.num_tokens - 1, "a token is sampled after another than the last one"
                self.append(row.seq)
                if index in stopped and not row.seq.is_finished:
                    self.scheduler.finish(row.seq, "stop")

    def append(self, seq: Sequence) -> None:
        seq.token_ids.append(seq.request_id)
        self.scheduler.token_appended(seq)
        if seq.num_tokens >= seq.max_num_tokens:
            self.scheduler.finish(seq, "length")

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.scheduler.check_integrity()
        for pool in (self.prefill_pool, self.decode_pool):
            assert pool.num_free_blocks + pool.num_held_blocks == pool.num_blocks

    @invariant()
    def nobody_gets_a_block_that_work_in_flight_writes_to(self) -> None:
        for step in self.decodes:
            for row in step.decode:
                block = row.lease.decode.blocks[row.position // BLOCK_SIZE]
                assert self.decode_pool._ref_counts[block] == 1, "a decode step writes to a block that others may get"
        for chunk in self.handoffs:
            for source, target in chunk.handoff:
                assert chunk.lease.prefill.card.block_manager._ref_counts[source], (
                    "a handoff reads a block that others may get"
                )
                assert self.decode_pool._ref_counts[target] == 1, "a handoff writes to a block that others may get"
        for card, prefills in self.prefills.items():
            for chunk in (chunk for prefill in prefills for chunk in prefill.chunks):
                written = chunk.allocation.blocks[chunk.start // BLOCK_SIZE : -(-chunk.end // BLOCK_SIZE)]
                assert all(map(card.block_manager._ref_counts.__getitem__, written)), (
                    "a prefill writes to a block that others may get"
                )

    def teardown(self) -> None:
        """Left alone, the engine's loop ends every request and returns every block."""
        for _ in range(3000):
            for on_decode_device in (False, True):
                self.launch_prefill(on_decode_device)
            for _ in range(2 - len(self.decodes)):
                self.launch_decode()
            for card in list(self.prefills):
                self.end_prefill_of(card)
            for chunk in list(self.handoffs):
                self.end_handoff_of(chunk)
            if self.decodes:
                self.end_decode(fails=False, stopped=set())
            if not (self.scheduler.unfinished() or self.prefills or self.handoffs or self.decodes):
                break
        assert all(seq.is_finished for seq in self.seqs), "a request is lost"
        assert self.prefill_pool.num_held_blocks == self.decode_pool.num_held_blocks == 0
        self.scheduler.check_integrity()


class TwoPools(OnePool):
    """The same with handoffs between two pools, the smaller of which a growing request can outgrow."""

    def pools(self) -> tuple[BlockManager, BlockManager]:
        return BlockManager(NUM_BLOCKS - 2, BLOCK_SIZE), BlockManager(NUM_BLOCKS, BLOCK_SIZE)


class OneAtATime(TwoPools):
    """The same with a target that no step keeps to."""

    limits = replace(LIMITS, itl_target_s=1e-6)

    def __init__(self) -> None:
        super().__init__()
        self.decode_card.step_time.observe(StepSize(1, 10), 1.0)


class MixedSteps(OnePool):
    """The same as the engine does it: `schedule` forms the steps of a card, which end in the order of their launch."""

    launch_prefill = end_prefill = end_handoff = launch_decode = end_decode = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[Card, list[Step]] = {card: [] for card in self.scheduler.cards}

    def note_steps(self) -> None:
        """For the invariants."""
        self.decodes = [step for step in self.steps[self.decode_card] if step.decode]
        self.prefills = {card: [step for step in steps if step.chunks] for card, steps in self.steps.items()}

    @rule(on_decode_card=st.booleans(), splits=st.booleans())
    def launch(self, on_decode_card: bool, splits: bool = False) -> None:
        card = self.decode_card if on_decode_card else self.prefill_card
        step = self.scheduler.schedule(card, self.steps[card])
        if step is None:
            return
        assert len(self.steps[card]) < 2
        assert step.chunks or step.decode
        assert not step.decode or card is self.decode_card
        assert not {chunk.lease for chunk in step.chunks} & set(step.decode.batch.leases), "a chunk beside its row"
        underway = {chunk.lease for chunk in self.handoffs}
        assert underway.isdisjoint(step.decode.batch.leases), "a request decodes before its KV has arrived"
        self.steps[card] += (splits and self.scheduler.halve(step)) or [step]
        for row in step.decode:
            assert self.decode_pool._ref_counts[row.lease.decode.blocks[row.position // BLOCK_SIZE]] == 1
            assert row.output_index < row.seq.params.max_tokens, "a step beyond the request's length"
        for chunk in step.chunks:
            assert chunk.allocation.card is card
            if chunk.handoff:
                self.scheduler.hold(chunk.lease)
                self.handoffs.append(chunk)
        assert step.num_prefill_tokens <= card.max_prefill_tokens
        self.note_steps()

    @precondition(lambda self: any(self.steps.values()))
    @rule(data=st.data(), fails=st.booleans(), stopped=st.sets(st.integers(0, 3)))
    def end(self, data: st.DataObject, fails: bool, stopped: set[int]) -> None:
        card = data.draw(st.sampled_from([card for card, steps in self.steps.items() if steps]))
        self.end_step_of(card, fails, stopped)

    def end_step_of(self, card: Card, fails: bool, stopped: set[int]) -> None:
        step = self.steps[card].pop(0)
        self.note_steps()
        sends = any(chunk.handoff for chunk in step.chunks)  # a launch that fails has sent nothing
        if fails and not self.steps[card] and not sends:  # and the steps before it have ended
            self.scheduler.cancel(step)
            for part in [*step.chunks, *step.decode]:
                self.fail(part)
            return
        self.take_tokens_after_chunks(step)
        if step.decode:
            self.scheduler.decode_done(step)
        self.take_decoded_tokens(step, stopped)

    def teardown(self) -> None:
        for _ in range(3000):
            for on_decode_card in (False, True, True):
                self.launch(on_decode_card)
            for card, steps in self.steps.items():
                if steps:
                    self.end_step_of(card, fails=False, stopped=set())
            for chunk in list(self.handoffs):
                self.end_handoff_of(chunk)
            if not (self.scheduler.unfinished() or any(self.steps.values()) or self.handoffs):
                break
        assert all(seq.is_finished for seq in self.seqs), "a request is lost"
        assert self.prefill_pool.num_held_blocks == self.decode_pool.num_held_blocks == 0
        self.scheduler.check_integrity()


class MixedStepsOfTwoPools(MixedSteps):
    """The same with two cards, where the decode card prefills what failed, or has outgrown the other pool."""

    pools = TwoPools.pools
    end_handoff = TwoPools.end_handoff


TestOnePool = OnePool.TestCase
TestTwoPools = TwoPools.TestCase
TestOneAtATime = OneAtATime.TestCase
TestMixedSteps = MixedSteps.TestCase
TestMixedStepsOfTwoPools = MixedStepsOfTwoPools.TestCase


def scheduler_with(
    num_blocks: int,
    *prompts: list[int],
    max_num_batched_tokens: int = 100,
    prefill_chunk_tokens: int = 5,
    is_streamed: bool = True,
) -> tuple[Scheduler, list[Sequence]]:
    pool = BlockManager(num_blocks, BLOCK_SIZE)
    limits = SchedulerLimits(prefill_chunk_tokens=prefill_chunk_tokens, max_num_seqs=8, max_handoff_backlog=8)
    placement = place(pool, pool, max_num_batched_tokens, prefill_chunk_tokens)
    scheduler = Scheduler(limits, placement)
    seqs = [make_sequence(index, tokens, max_tokens=50) for index, tokens in enumerate(prompts)]
    for seq in seqs:
        seq.is_streamed = is_streamed
        scheduler.add(seq)
    return scheduler, seqs


def run_prefill(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    step = scheduler.schedule_prefill()
    chunks = step.chunks if step else []
    for chunk in chunks:
        if scheduler.prefill_done(chunk) and chunk.is_last:
            chunk.seq.token_ids.append(9)
            scheduler.token_appended(chunk.seq)
    return [(chunk.seq.request_id, chunk.start, chunk.end) for chunk in chunks]


def run_decode(scheduler: Scheduler) -> list[int]:
    step = scheduler.schedule_decode()
    if step is None:
        return []
    scheduler.decode_done(step)
    for seq in step.seqs:
        seq.token_ids.append(9)
        scheduler.token_appended(seq)
    return [seq.request_id for seq in step.seqs]


def test_chunks_are_small_only_while_others_decode():
    scheduler, _ = scheduler_with(40, [1] * 6, max_num_batched_tokens=20)
    assert run_prefill(scheduler) == [(0, 0, 6)]
    late = make_sequence(1, list(range(12)))
    scheduler.add(late)
    assert run_prefill(scheduler) == [(1, 0, 5)]
    assert run_decode(scheduler) == [0]
    assert run_prefill(scheduler) == [(1, 5, 10)]
    scheduler.finish(scheduler.unfinished()[0], "abort")
    scheduler.add(make_sequence(2, [7] * 30))
    assert run_prefill(scheduler) == [(1, 10, 12), (2, 0, 18)]


def test_a_prefill_step_has_at_most_so_many_requests(monkeypatch):
    monkeypatch.setattr("nanovllm.engine.scheduler.MAX_CHUNKS", 3)
    scheduler, _ = scheduler_with(40, *([[place] * 2 for place in range(8)]), prefill_chunk_tokens=100)
    assert [len(run_prefill(scheduler)) for _ in range(3)] == [3, 3, 2]


def test_the_first_request_of_a_step_waits_for_few_others_if_one_is_streamed(monkeypatch):
    monkeypatch.setattr("nanovllm.engine.scheduler.MAX_STREAMED_PREFILL_TOKENS", 10)
    scheduler, _ = scheduler_with(40, [1] * 6, [2] * 20, [3] * 4)
    assert run_prefill(scheduler) == [(0, 0, 6), (1, 0, 4)]
    scheduler, _ = scheduler_with(40, [1] * 30, [2] * 20)
    assert run_prefill(scheduler) == [(0, 0, 10)]
    scheduler, _ = scheduler_with(40, [1] * 6, [2] * 20, [3] * 4, is_streamed=False)
    assert run_prefill(scheduler) == [(0, 0, 6), (1, 0, 20), (2, 0, 4)]


def test_first_come_first_served_even_if_a_younger_one_would_fit():
    scheduler, _ = scheduler_with(8, [1] * 16, [2] * 20, [3] * 2)
    assert run_prefill(scheduler) == [(0, 0, 16)]
    assert run_prefill(scheduler) == []
    scheduler.finish(scheduler.unfinished()[0], "abort")
    assert [chunk[0] for chunk in run_prefill(scheduler)] == [1, 2]


def test_the_youngest_is_preempted_and_keeps_its_place():
    scheduler, (first, second, third, _) = scheduler_with(6, [1] * 3, [2] * 3, [3] * 3, [4] * 3)
    run_prefill(scheduler)
    run_decode(scheduler)
    assert [seq.status for seq in (first, second, third)] == [SequenceStatus.DECODING] * 3
    for _ in range(5):
        run_decode(scheduler)
    assert scheduler.num_preemptions == 1
    assert third.status is SequenceStatus.WAITING
    assert third.num_tokens > third.num_prompt_tokens
    assert scheduler.unfinished()[2] is third, "it waits before the request that came after it"


@pytest.mark.parametrize(("num_blocks", "abound"), [(60, True), (8, False)])
def test_blocks_are_given_ahead_while_they_abound_and_are_needed(num_blocks, abound):
    scheduler, (first, second, short) = scheduler_with(num_blocks, [1] * 7, [2] * 5, [3] * 2)
    short.max_num_tokens = 4
    run_prefill(scheduler)
    assert [len(seq.lease.decode.blocks) for seq in (first, second, short)] == [3, 3, 1]
    for _ in range(6):
        run_decode(scheduler)
    # The first one has passed the end of its third block, the second has not.
    assert len(first.lease.decode.blocks) > 3
    assert (len(second.lease.decode.blocks) > 3) == abound
    assert len(short.lease.decode.blocks) == 1
    scheduler.check_integrity()


def test_the_batch_stays_the_same_while_a_request_waits_for_a_block():
    """A new batch is sent to the device as a whole: not for the sake of a request that is not in it."""
    scheduler, (first, second, third) = scheduler_with(8, [1] * 7, [2] * 5, [3] * 3)
    run_prefill(scheduler)
    for _ in range(4):
        assert run_decode(scheduler) == [0, 1, 2]
    in_flight = scheduler.schedule_decode()
    without_first = scheduler.schedule_decode()
    assert third.status is SequenceStatus.WAITING, "the youngest gives its blocks up"
    assert without_first.seqs == [second], "which a step in flight still touches"
    still_without = scheduler.schedule_decode()
    assert still_without.decode.batch is without_first.decode.batch
    scheduler.decode_done(in_flight)
    assert set(scheduler.schedule_decode().seqs) == {first, second}


def test_the_batch_stays_the_same_when_a_request_that_has_left_it_ends():
    """One that ends by length leaves with its last step; a second new batch at its end would be for nothing."""
    scheduler, (_, short) = scheduler_with(60, [1] * 7, [2] * 5)
    short.max_num_tokens = 7
    run_prefill(scheduler)
    assert run_decode(scheduler) == [0, 1]
    without_short = scheduler.schedule_decode()
    assert short not in without_short.seqs
    scheduler.finish(short, "length")
    assert scheduler.schedule_decode().decode.batch is without_short.decode.batch
    scheduler.check_integrity()


def test_a_request_that_outgrows_the_pool_ends_by_name():
    scheduler, (first, second) = scheduler_with(3, [1] * 3, [2] * 2)
    for _ in range(40):
        run_prefill(scheduler)
        run_decode(scheduler)
        scheduler.check_integrity()
    failed = scheduler.get_outgrown_sequences()
    assert {seq.request_id for seq in failed} == {0, 1}
    assert all("raise num_kvcache_blocks" in str(seq.error) for seq in failed)
    assert first.num_tokens == second.num_tokens == 3 * BLOCK_SIZE + 1
    assert scheduler.placement.decode_card.block_manager.num_held_blocks == 0


def test_a_hash_hit_with_other_tokens_is_no_hit():
    pool = BlockManager(8, BLOCK_SIZE)
    seq = make_sequence(0, list(range(8)))
    table = pool.allocate((), 2)
    pool.cache(seq, table, 0, 8)
    assert pool.match_prefix(make_sequence(1, list(range(8))), 8) == table
    forged = make_sequence(2, [9] * 8)
    forged._block_hashes = [seq.block_hash(0, BLOCK_SIZE), seq.block_hash(1, BLOCK_SIZE)]
    assert pool.match_prefix(forged, 8) == []


def test_free_blocks_without_content_are_given_out_first_then_the_oldest():
    pool = BlockManager(4, BLOCK_SIZE)
    old, new = make_sequence(0, [1] * 4), make_sequence(1, [2] * 4)
    first, second = pool.allocate((), 1), pool.allocate((), 1)
    pool.cache(old, first, 0, 4)
    pool.cache(new, second, 0, 4)
    pool.free(first)
    pool.free(second)
    assert set(pool.allocate((), 3)) == {2, 3, *first}
    assert pool.match_prefix(old, 4) == []
    assert pool.match_prefix(new, 4) == second
