"""Many cards without a model: placement, and any order of events, lost cards among them, leaves every block whole."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.card_watch import CardWatch
from nanovllm.engine.in_flight import StepsInFlight
from nanovllm.engine.scheduler import MOST_LOST_CARDS, STEPS_AHEAD, Scheduler, SchedulerLimits
from nanovllm.engine.scheduling import cluster_placement
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.cluster_placement import ClusterPlacement, ElasticClusterPlacement
from nanovllm.engine.scheduling.placement import OtherPrompts, Places
from nanovllm.engine.scheduling.step import PrefillChunk, Step
from nanovllm.engine.scheduling.step_time import StepSize
from nanovllm.engine.sequence import Sequence

BLOCK_SIZE = 4
MAX_MODEL_LEN = 48


@pytest.fixture
def time_stands_still(monkeypatch):
    """What is left out for a while stays so."""
    monkeypatch.setattr(cluster_placement, "time", SimpleNamespace(monotonic=lambda: 0.0))


def make_cards(num_prefill: int, num_decode: int, num_blocks: int = 24) -> ClusterPlacement:
    """Cards with fixed roles, or elastic ones if there are none that decode."""
    cards = [
        Card(f"card {index}", f"card {index}", BlockManager(num_blocks, BLOCK_SIZE), 16)
        for index in range(num_prefill + num_decode)
    ]
    return ClusterPlacement(cards[:num_prefill], cards[num_prefill:]) if num_decode else ElasticClusterPlacement(cards)


def make_sequence(request_id: int, tokens: list[int], max_tokens: int = 8) -> Sequence:
    longest = min(len(tokens) + max_tokens, MAX_MODEL_LEN)
    return Sequence(
        request_id, tokens, SamplingParams(max_tokens=max_tokens), request_id, arrival_s=0.0, max_num_tokens=longest
    )


class World:
    """Plays the engine and its cards: steps of a card end in order, everything else in any order."""

    def __init__(self, num_prefill: int, num_decode: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.placement = make_cards(num_prefill, num_decode)
        limits = SchedulerLimits(prefill_chunk_tokens=7, max_num_seqs=12, max_handoff_backlog=6)
        self.scheduler = Scheduler(limits, self.placement)
        self.seqs: list[Sequence] = []
        self.steps: dict[Card, list[Step]] = {card: [] for card in self.placement.cards}
        self.handoffs: list[PrefillChunk] = []

    def add(self) -> None:
        start, length = self.rng.randrange(3) * 100, self.rng.randrange(1, 30)
        seq = make_sequence(len(self.seqs), list(range(start, start + length)), self.rng.randrange(1, 16))
        self.seqs.append(seq)
        self.scheduler.add(seq)

    def launch(self, card: Card) -> None:
        step = self.scheduler.schedule(card, self.steps[card])
        if step is None:
            return
        assert card.is_up, "a card that is gone gets no work"
        self.steps[card].append(step)
        assert len(self.steps[card]) <= STEPS_AHEAD
        touched = [row.lease for row in step.decode]
        assert not {chunk.lease for chunk in self.handoffs} & set(touched), "decodes before its KV has arrived"
        for chunk in step.chunks:
            assert chunk.allocation.card is card
            if chunk.handoff:
                for _, target in chunk.handoff:
                    assert chunk.handoff_target.block_manager._ref_counts[target] == 1, "writes to a shared block"
                self.scheduler.hold(chunk.lease)
                self.handoffs.append(chunk)

    def end(self, card: Card) -> None:
        if not self.steps[card]:
            return
        step = self.steps[card].pop(0)
        for chunk in step.chunks:
            if self.scheduler.prefill_done(chunk) and chunk.is_last:
                self.append(chunk.seq)
        if step.decode:
            self.scheduler.decode_done(step)
            for row in step.decode:
                if row.seq.lease is row.lease:
                    self.append(row.seq)

    def append(self, seq: Sequence) -> None:
        seq.token_ids.append(len(seq.token_ids))
        if seq.num_tokens == seq.max_num_tokens:
            self.scheduler.finish(seq, "length")
        else:
            self.scheduler.token_appended(seq)

    def end_handoff(self) -> None:
        """A push arrives if both cards are there; if one is gone, it ends some time, and has failed."""
        if not self.handoffs:
            return
        chunk = self.handoffs.pop(self.rng.randrange(len(self.handoffs)))
        if chunk.seq.lease is chunk.lease:
            self.scheduler.blocks_arrived(chunk.lease)
        else:
            self.scheduler.release(chunk.lease)

    def lose(self, card: Card) -> None:
        if card.is_up:
            steps, self.steps[card] = self.steps[card], []
            self.scheduler.card_lost(card, steps)
            for seq in self.scheduler.unfinished():
                assert seq.lease is None or not seq.lease.holds_on(card), "its KV there is gone"
            self.scheduler.get_outgrown_sequences()

    def fail_step(self, card: Card) -> None:
        """All steps in flight on a card are lost, but not the card."""
        steps, self.steps[card] = self.steps[card], []
        self.scheduler.steps_lost(steps)

    def abort(self) -> None:
        unfinished = self.scheduler.unfinished()
        if unfinished:
            self.scheduler.finish(self.rng.choice(unfinished), "abort")

    def act(self) -> None:
        card = self.rng.choice(self.placement.cards)
        actions = [
            (self.add, 4),
            (lambda: self.launch(card), 12),
            (lambda: self.end(card), 10),
            (self.end_handoff, 8),
            (lambda: self.lose(card), 0.3),
            (lambda: setattr(card, "is_up", True), 2),
            (lambda: self.fail_step(card), 0.2),
            (self.abort, 0.3),
        ]
        self.rng.choices([action for action, _ in actions], [weight for _, weight in actions])[0]()
        self.scheduler.check_integrity()

    def drain(self) -> None:
        for card in self.placement.cards:
            card.is_up = True
        for _ in range(3000):
            for card in self.placement.cards:
                self.launch(card)
                self.end(card)
            self.end_handoff()
            if not (self.scheduler.unfinished() or self.handoffs or any(self.steps.values())):
                return
        raise AssertionError("requests are left that nobody serves")


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(1, 1), (2, 1), (1, 3), (3, 2), (2, 0), (4, 0)])
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events_leaves_every_block_whole(num_prefill, num_decode, seed):
    world = World(num_prefill, num_decode, seed)
    for _ in range(400):
        world.act()
    world.drain()
    world.scheduler.check_integrity()
    for card in world.placement.cards:
        assert card.block_manager.num_held_blocks == 0
    for seq in world.seqs:
        assert seq.finish_reason is not None
        if seq.finish_reason == "length":
            assert seq.num_tokens == seq.max_num_tokens
        elif seq.finish_reason == "error":
            assert seq.num_lost_cards == MOST_LOST_CARDS


def sizes_of(placement: ClusterPlacement, **contexts: int) -> dict[Card, StepSize]:
    return {card: StepSize(1, contexts.get(card.name.replace(" ", "_"), 0)) for card in placement.cards}


def test_a_prompt_is_prefilled_where_least_is_to_be_computed():
    placement = make_cards(3, 1)
    first, second, third = placement.prefill_cards
    seq, sizes = make_sequence(0, list(range(16))), sizes_of(placement)
    assert placement.places_of(seq, sizes, OtherPrompts(0, {first: 5, second: 3, third: 4})).prefill is second
    in_flight = OtherPrompts(0, {first: 5, second: 3, third: 4}, tokens_in_flight={second: 9})
    assert placement.places_of(seq, sizes, in_flight).prefill is third, "what was launched is to be computed, too"


def test_a_card_that_has_the_beginning_comes_first_until_others_have_less_to_do():
    placement = make_cards(2, 1)
    first, second = placement.prefill_cards
    cached = make_sequence(0, list(range(12)))
    blocks = second.block_manager.allocate((), 3)
    second.block_manager.cache(cached, blocks, 0, 12)
    second.block_manager.free(blocks)
    for waiting, expected in ((0, second), (11, second), (13, first)):
        seq = make_sequence(1, [*range(12), 50, 51])
        places = placement.places_of(seq, sizes_of(placement), OtherPrompts(0, {second: waiting}))
        assert places.prefill is expected, waiting


def test_a_request_decodes_where_the_context_is_least():
    placement = make_cards(1, 3)
    sizes = sizes_of(placement, card_1=90, card_2=40, card_3=70)
    assert placement.places_of(make_sequence(0, [1, 2, 3]), sizes, OtherPrompts()).decode is placement.decode_cards[1]


def test_cards_that_are_gone_get_nothing_and_any_card_can_do_all():
    placement = make_cards(2, 2)
    sizes, numbers = sizes_of(placement), itertools.count()

    def names() -> tuple[str, str]:
        places = placement.places_of(make_sequence(next(numbers), [1, 2, 3]), sizes, OtherPrompts())
        return places.prefill.name, places.decode.name

    first, second = placement.prefill_cards
    third, fourth = placement.decode_cards
    assert names() == ("card 0", "card 2")
    first.is_up = third.is_up = False
    assert names() == ("card 1", "card 3")
    second.is_up = False
    assert names() == ("card 3", "card 3"), "it prefills, too"
    second.is_up, fourth.is_up = True, False
    assert names() == ("card 1", "card 1"), "it decodes, too"
    assert placement.is_degraded
    assert "card 2, card 3, card 0 left out" in placement.words_for_degraded[1]


def test_an_elastic_card_prefills_and_decodes():
    placement = make_cards(3, 0)
    first, second, third = placement.cards
    seq, sizes = make_sequence(0, list(range(16))), sizes_of(placement)
    others = OtherPrompts(0, {first: 5, second: 3, third: 4})
    assert placement.places_of(seq, sizes, others) == Places(second, second)
    narrow = dataclasses.replace(others, room=lambda card: 0.5 if card is second else 1.0)
    assert placement.places_of(seq, sizes, narrow) == Places(third, third), "what it has to do, by its room"


@pytest.mark.usefixtures("time_stands_still")
def test_an_elastic_card_hands_over_what_it_cannot_decode():
    placement = make_cards(3, 0)
    first, second, third = placement.cards
    seq, others = make_sequence(0, list(range(16))), OtherPrompts(0, {second: 9, third: 9})
    contexts = {"card_1": 20, "card_2": 10}
    assert placement.places_of(seq, sizes_of(placement, card_0=42, **contexts), others) == Places(first, first)
    full = sizes_of(placement, card_0=43, **contexts)
    assert placement.places_of(seq, full, others) == Places(first, third), "by more than two of its prompts"
    busy = dataclasses.replace(others, has_time=lambda card: card is second)
    assert placement.places_of(seq, sizes_of(placement, **contexts), busy) == Places(first, second)
    for _ in range(3):
        placement._handoffs_from[first].failed(0.0)
    assert placement.words_for_degraded == ("handoffs stopped", "no KV is handed over from card 0 for a while")
    assert placement.places_of(seq, full, others) == Places(first, first), "its handoffs fail"
    assert placement.places_of(seq, sizes_of(placement, **contexts), busy) == Places(second, second)
    first.is_up = False
    assert placement.places_of(seq, full, others) == Places(third, third)


def watch_over(world: World, failed: list[tuple[Sequence, Exception]]) -> tuple[CardWatch, StepsInFlight]:
    """What looks after the cards of a world, and is told of steps that fail."""

    def fail(seq: Sequence, error: Exception, *, blames_card: bool) -> None:
        failed.append((seq, error))
        world.scheduler.fail(seq, error, blames_card=blames_card)

    runner, steps = SimpleNamespace(forget_device_batch=lambda: None), StepsInFlight()
    runners = dict.fromkeys(world.placement.cards, runner)
    return CardWatch(runners, world.scheduler, steps, SimpleNamespace(fail=fail), None), steps


def test_a_step_that_fails_counts_once_against_its_card():
    """However many prompts it had: the breaker opens after failures in a row. None of them is blamed yet."""
    world = World(1, 1, seed=0)
    (card,) = world.placement.prefill_cards
    for request_id in range(5):
        seq = make_sequence(request_id, [request_id])
        world.seqs.append(seq)
        world.scheduler.add(seq)
    step = world.scheduler.schedule(card, [])
    assert len(step.chunks) == 5
    failed: list[tuple[Sequence, Exception]] = []
    watch, steps = watch_over(world, failed)
    steps.add(step, SimpleNamespace(stream=None), 0.0)
    watch.step_failed(next(iter(steps)), RuntimeError("injected"))
    assert not failed
    assert [seq.failures for seq in world.seqs] == [0] * 5
    assert not card.breaker.is_open, "one failure"
    assert card.breaker._num_failures == 1
    world.drain()


def serve_where_steps_fail(
    world: World, failed: list[tuple[Sequence, Exception]], fails: Callable[[Card, Step], bool]
) -> int:
    """Serves all requests of a world. Returns how many steps have failed."""
    (watch, steps), num_failed_steps = watch_over(world, failed), 0
    for _ in range(3000):
        if not (world.scheduler.unfinished() or world.handoffs or any(world.steps.values())):
            break
        for card in world.placement.cards:
            world.launch(card)
            step = world.steps[card][0] if world.steps[card] else None
            if step is None:
                continue
            if not fails(card, step):
                if step.decode:
                    world.scheduler.step_worked(step)
                world.end(card)
                continue
            num_failed_steps += 1
            for each in world.steps[card]:
                steps.add(each, SimpleNamespace(stream=None), 0.0)
            # What was to be pushed behind it will not be.
            lost = [chunk for each in world.steps[card] for chunk in each.chunks if chunk.handoff]
            world.steps[card] = []
            watch.step_failed(next(iter(steps)), RuntimeError("injected"))
            for chunk in lost:
                world.handoffs.remove(chunk)
                world.scheduler.release(chunk.lease)
            world.scheduler.check_integrity()
        world.end_handoff()
    return num_failed_steps


@pytest.mark.parametrize("where", ["prefill", "decode"])
@pytest.mark.parametrize("culprit", [0, 4, 7])
def test_the_request_at_fault_is_found_by_halves(where, culprit):
    """Every step with it fails, in its prompt or as it decodes; no other request has a failure."""
    world = World(1, 1, seed=0)
    failed: list[tuple[Sequence, Exception]] = []
    for request_id in range(8):
        world.seqs.append(make_sequence(request_id, [request_id, 50]))
        world.scheduler.add(world.seqs[-1])
    bad = world.seqs[culprit]

    def fails(card: Card, step: Step) -> bool:
        return bad in ([chunk.seq for chunk in step.chunks] if where == "prefill" else step.decode.batch.seqs)

    num_failed_steps = serve_where_steps_fail(world, failed, fails)
    assert [seq for seq, _ in failed] == [bad, bad]
    assert bad.finish_reason == "error"
    assert [seq.finish_reason for seq in world.seqs if seq is not bad] == ["length"] * 7
    assert [seq.failures for seq in world.seqs if seq is not bad] == [0] * 7
    assert num_failed_steps <= 5, "8, 4, 2, 1 requests, and once more"


@pytest.mark.usefixtures("time_stands_still")
@pytest.mark.parametrize(("num_prefill", "num_decode", "sick"), [(2, 1, 0), (1, 2, 1), (3, 0, 0), (3, 0, 1)], ids=str)
def test_a_card_on_which_all_steps_fail_is_left_out(num_prefill, num_decode, sick):
    """What has failed there is tried elsewhere, and ends well."""
    world = World(num_prefill, num_decode, seed=0)
    for request_id in range(60):
        world.seqs.append(make_sequence(request_id, [request_id, 50], max_tokens=4))
        world.scheduler.add(world.seqs[-1])
    sick_card = next(card for card in world.placement.cards if card.name == f"card {sick}")
    failed: list[tuple[Sequence, Exception]] = []
    num_failed_steps = serve_where_steps_fail(world, failed, lambda card, step: card is sick_card)
    assert [seq.finish_reason for seq in world.seqs] == ["length"] * 60
    assert 3 <= num_failed_steps <= 6, "some were launched before the first of them had failed"
    assert world.placement.words_for_degraded[0] == "card left out"


def test_where_a_request_goes_is_asked_once_for_all_cards(monkeypatch):
    """And again once something has changed."""
    world = World(8, 0, seed=0)
    asked, last = [], world.placement.cards[-1]
    monkeypatch.setattr(world.placement, "places_of", lambda seq, *_: asked.append(seq) or Places(last, last))
    world.add()
    for card in world.placement.cards:
        world.launch(card)
    assert len(asked) == 2, "by the first of the cards, and by the one that takes it"
    assert world.steps[last]
    world.add()
    for card in world.placement.cards[:3]:
        world.launch(card)
    world.end(last)
    world.launch(world.placement.cards[0])
    assert len(asked) == 4, "once, and once more since a step has ended"


def test_nothing_is_admitted_while_no_card_is_there():
    world = World(2, 1, seed=0)
    for card in world.placement.cards:
        world.lose(card)
    world.add()
    for card in world.placement.cards:
        world.launch(card)
    assert not any(world.steps.values())
    world.drain()
    assert world.seqs[0].finish_reason == "length"
