"""Prompts that two cards compute together: tokens are those of `transformers`, whatever comes late or fails."""

from __future__ import annotations

import json
import random

import pytest
import torch

from nanovllm import LLM, ConfigError, SamplingParams
from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.execution import layer_exchange
from nanovllm.engine.execution.layer_exchange import LayerArrivals
from nanovllm.engine.execution.layer_push import PushToPool
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.scheduler import Scheduler, SchedulerLimits
from nanovllm.engine.scheduling import shared_prompt
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.placement import ElasticPlacement, OtherPrompts, Places
from nanovllm.engine.scheduling.shared_prompt import tokens_of_pair
from nanovllm.engine.scheduling.step import Step
from nanovllm.engine.scheduling.step_time import StepSize
from nanovllm.errors import HandoffError
from tests import tiny
from tests.test_emulated_graphs import EmulatedGraphs, emulated  # noqa: F401 - a fixture
from tests.test_engine import drain, tokens_of
from tests.test_mixed_step import serve
from tests.test_scheduler import make_sequence

ELASTIC = {
    "device": "cpu",
    "enable_two_gpu_pd": True,
    "card_roles": "elastic",
    "kvcache_block_size": 16,
    # All steps keep it: without a target, chunks are as long as steps without prompts take time.
    "itl_target_ms": 1e6,
}
GREEDY = SamplingParams(temperature=0, max_tokens=10)


def make(path: str, **options) -> LLM:
    """An engine that shares prompts of 30 tokens, in which no KV is there that was not stored or pushed."""
    llm = LLM(path, **{**ELASTIC, **options})
    placement = llm.scheduler.placement
    placement.least_shared_tokens = placement.least_shared_when_gathered = 30
    placement.most_other_prompts = 1000
    for runner in (llm.prefill_runner, llm.decode_runner):
        with runner.on(runner.stream):
            runner.kv_pool[:-1] = float("nan")
    return llm


@pytest.fixture(autouse=True)
def short_pairs(monkeypatch):
    monkeypatch.setattr(shared_prompt, "LEAST_PAIR_TOKENS", 17)


@pytest.fixture(autouse=True)
def short_parts_of_blocks(monkeypatch):
    """Chunks end within the tests' short blocks, as they do within long ones."""
    monkeypatch.setattr(scheduler_module, "TOKEN_MULTIPLE", 4)


def assert_whole(llm: LLM) -> None:
    llm.scheduler.check_integrity()
    assert [card.block_manager.num_held_blocks for card in llm.scheduler.cards] == [0, 0]


def num_shared(llm: LLM) -> int:
    return llm.metrics()["prefill_chunks"]["shared"]


def teach(llm: LLM, decode_s: float, with_chunk_s: float) -> None:
    """Has the cards know what a decode step takes, alone and with a chunk of 400 tokens, and learn nothing more."""
    for card in llm.scheduler.cards:
        for _ in range(50):
            card.step_time.observe(StepSize(1, 50), decode_s)
            card.step_time.observe(StepSize(1, 50).with_chunk(0, 400), with_chunk_s)
        card.step_time.observe = lambda *_: None


MODES = {
    "plain": {"itl_target_ms": None},
    "small chunks": {"max_num_batched_tokens": 64, "prefill_chunk_tokens": 32},
    "without prefix cache": {"enable_prefix_caching": False},
    "preempting": {"num_kvcache_blocks": 12, "max_num_batched_tokens": 64, "prefill_chunk_tokens": 32},
    "verified": {"verify_kv_handoff": True, "prefill_chunk_tokens": 48},
    "a row or a prompt at a time": {"max_num_seqs": 2},
    "no time": {"itl_target_ms": 1e-3},
}


@pytest.mark.parametrize("steps_ahead", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_transformers(checkpoint, mode, steps_ahead):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(8, seed=61, longest=110) + tiny.random_prompts(4, seed=62, longest=40, shared=50)
    with make(path, **MODES[mode]) as llm:
        if mode == "plain":
            teach(llm, 1e-4, 5e-4)  # chunks are as long as these say
        found, kinds = serve(llm, prompts, GREEDY, steps_ahead=steps_ahead)
        assert num_shared(llm) > (4 if mode != "no time" else 0)
        assert "mixed" in kinds or mode == "no time"
        assert mode == "preempting" or not llm.metrics()["preemptions"], "nothing fails"
        assert_whole(llm)
    assert found == [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("seed", range(4))
def test_chunks_may_be_cut_anywhere(checkpoint, monkeypatch, seed):
    path, reference = checkpoint("gqa2")
    rng = random.Random(seed)
    cuts = []

    def cut(cards, start, num_left, most, block_size):
        first = min(rng.randrange(1, 5) * block_size, num_left)
        cuts.append(first)
        return first, min(rng.randrange(1, 4) * block_size, num_left - first)

    monkeypatch.setattr(shared_prompt, "tokens_of_pair", cut)
    prompts = tiny.random_prompts(6, seed=seed, longest=200)
    with make(path) as llm:
        found, _ = serve(llm, prompts, GREEDY, steps_ahead=2)
        assert_whole(llm)
    assert len(set(cuts)) > 2
    assert found == [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]


def test_seeded_tokens_are_those_of_one_card(tiny_path):
    prompts = tiny.random_prompts(8, seed=63, longest=120)
    params = [SamplingParams(temperature=1.0, seed=index, max_tokens=10, top_k=20 * (index % 2)) for index in range(8)]
    with LLM(tiny_path, device="cpu") as llm:
        expected = [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)]
    with make(tiny_path) as llm:
        found, _ = serve(llm, prompts, params, steps_ahead=2)
        assert num_shared(llm)
    assert found == expected


def test_graphs_of_shared_steps_give_the_same_tokens(checkpoint, emulated, monkeypatch):  # noqa: F811
    # Nobody gathers, so that both cards have rows.
    monkeypatch.setattr("nanovllm.engine.scheduling.placement.MOST_TOKENS_LEFT", -1)
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(10, seed=64, longest=110)
    with make(path, max_num_seqs=6, max_num_batched_tokens=64, prefill_chunk_tokens=32) as llm:
        found, _ = serve(llm, prompts, GREEDY, steps_ahead=2)
        for runner in (llm.prefill_runner, llm.decode_runner):
            for graphs in (runner.prefill._exchange_graphs, runner.mixed._exchange_graphs):
                assert isinstance(graphs, EmulatedGraphs)
                assert graphs.num_replays
    assert found == [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]


# What comes late, or not at all


class Late:
    """Has pushes and flags arrive only when a step waits for them, or when the step that pushes has been collected."""

    def __init__(self, monkeypatch) -> None:
        self.arriving: dict[int, list] = {}
        """By the layer, what is on its way, in order."""
        self.num_waited_for = 0
        push_by_layer, raise_flag, wait = PushToPool.push_by_layer, LayerArrivals.raise_flag, LayerArrivals.wait
        collect = StepHandle.collect

        def late_store(push, pushed_blocks):
            push_layer, layers, blocks = push_by_layer(push, pushed_blocks), iter(range(1000)), pushed_blocks.clone()

            def later(kv_cache):
                layer, snapshot, targets = next(layers), kv_cache.clone(), push._pool.unbind(1)
                parts = blocks[1 : 1 + 4 * int(blocks[0])].view(-1, 4).tolist()

                def arrive():
                    for block, target_block, first, end in parts:
                        targets[layer][target_block, :, :, first:end] = snapshot[block, :, :, first:end]

                self.arriving.setdefault(layer, []).append(arrive)

            assert push_layer is not None
            return later

        def late_flag(arrivals, numbers, layer):
            sent = numbers.clone()
            self.arriving[layer].append(lambda: raise_flag(arrivals, sent, layer))

        def waited(arrivals, numbers, layer):
            self.num_waited_for += int(numbers[1]) > 0
            self.arrive(layer)
            wait(arrivals, numbers, layer)

        def collected(handle):
            for layer in list(self.arriving):
                self.arrive(layer)
            return collect(handle)

        monkeypatch.setattr(PushToPool, "push_by_layer", late_store)
        monkeypatch.setattr(LayerArrivals, "raise_flag", late_flag)
        monkeypatch.setattr(LayerArrivals, "wait", waited)
        monkeypatch.setattr(StepHandle, "collect", collected)

    @torch.inference_mode()
    def arrive(self, layer: int) -> None:
        for arrive in self.arriving.pop(layer, ()):
            arrive()


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_a_layer_waits_for_what_comes_late(checkpoint, monkeypatch, steps_ahead):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(10, seed=65, longest=150)
    late = Late(monkeypatch)
    with make(path, max_num_batched_tokens=64, prefill_chunk_tokens=32) as llm:
        found, _ = serve(llm, prompts, GREEDY, steps_ahead=steps_ahead)
        assert_whole(llm)
    assert late.num_waited_for
    assert found == [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]


def test_a_wait_that_is_forgotten_is_noticed(checkpoint, monkeypatch):
    """The test above can fail."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=66, longest=150)
    Late(monkeypatch)
    monkeypatch.setattr(LayerArrivals, "wait", lambda arrivals, numbers, layer: None)
    with make(path) as llm:
        found, _ = serve(llm, prompts, GREEDY, steps_ahead=2)
    assert found != [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]


def lose_flags(monkeypatch, chosen) -> list[int]:
    """Some chunks' flags are never raised: those whose number `chosen` picks."""
    raise_flag, lost = LayerArrivals.raise_flag, []

    def lossy(arrivals, numbers, layer):
        if layer == 1 and chosen(int(numbers[0])):
            lost.append(int(numbers[0]))
        else:
            raise_flag(arrivals, numbers, layer)

    monkeypatch.setattr(LayerArrivals, "raise_flag", lossy)
    return lost


@pytest.mark.parametrize("parity", [0, 1])
def test_a_request_whose_layer_does_not_come_is_computed_again_alone(checkpoint, monkeypatch, caplog, parity):
    """From either card, beside rows that count."""
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(9, seed=67, longest=150)
    lost = lose_flags(monkeypatch, lambda number: number > 4 and number % 9 == parity)
    with make(path, max_num_batched_tokens=64, prefill_chunk_tokens=32) as llm:
        found, _ = serve(llm, prompts, GREEDY, steps_ahead=2)
        assert_whole(llm)
        assert set(llm.metrics()["requests_ended"]) == {"length"}
        lives = [[span.what for span in llm.explain(number).spans()] for number in range(len(prompts))]
    assert lost
    assert found == [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]
    assert "the KV of layer 1 of the tokens before" in caplog.text
    retried = [life for life in lives if "preempted" in life]
    assert retried
    for life in retried:
        assert any(" on cpu:" in what for what in life[: life.index("preempted")])
        assert not any(" on cpu:" in what for what in life[life.index("preempted") :]), "it is not shared again"


def test_too_many_failures_end_sharing_for_a_while(checkpoint, monkeypatch, caplog):
    path, reference = checkpoint("gqa2")
    prompts = [prompt + prompt for prompt in tiny.random_prompts(12, seed=68, longest=60)]
    lose_flags(monkeypatch, lambda number: True)
    with make(path) as llm:
        found, _ = serve(llm, prompts, GREEDY)
        metrics = llm.metrics()
        assert metrics["fallbacks"] == {"prompts not shared": 1}
        assert metrics["prefill_chunks"]["shared"] < 12
        llm.scheduler.placement.prefill_card.breaker._next_trial_s = 0.0
        monkeypatch.undo()
        monkeypatch.setattr(shared_prompt, "LEAST_PAIR_TOKENS", 17)
        again, _ = serve(llm, [prompt[::-1] for prompt in prompts[:3]], GREEDY)
        assert llm.metrics()["recoveries"] == 1
        assert_whole(llm)
    assert found == [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]
    assert again == [tiny.reference_tokens(reference, prompt[::-1], 10) for prompt in prompts[:3]]
    assert "for a while each runs on one card" in caplog.text


@pytest.mark.parametrize("card", ["cpu:0", "cpu:1"])
def test_a_step_that_fails_to_launch_fails_alone(checkpoint, monkeypatch, card):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(8, seed=69, longest=150)
    with make(path, max_num_batched_tokens=64, prefill_chunk_tokens=32) as llm:
        for runner in (llm.prefill_runner, llm.decode_runner):

            def launch(step, launch=runner.launch):
                has_it = any(chunk.seq.request_id == 3 and not chunk.seq.failures for chunk in step.shared_chunks)
                if has_it and str(step.card) == card:
                    raise RuntimeError("injected")
                return launch(step)

            monkeypatch.setattr(runner, "launch", launch)
        found, _ = serve(llm, prompts, GREEDY, steps_ahead=2)
        assert llm.scheduler.num_preemptions
        assert_whole(llm)
    assert found == [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]


def test_without_a_target_steps_that_others_wait_for_are_short(checkpoint):
    """Where requests are streamed, a step with prompts takes little longer than one without; else it may be full."""
    path, _ = checkpoint("gqa2")
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    with make(path, itl_target_ms=None) as llm:
        teach(llm, 0.01, 0.05)
        running = llm.add_request([1, 2, 3] * 10, params)
        outputs = []
        while not outputs:
            outputs = llm.step()
        other = llm.add_request([4, 5, 6] * 150, SamplingParams(temperature=0, max_tokens=1))
        while not any(output.request_id == other for output in llm.step()):
            pass
        chunks = [span.what for span in llm.explain(other).spans() if span.what.startswith("prefill of")]
        assert len(chunks) > 5
        assert any(f"{scheduler_module.STRETCH:g} decode steps" in span.what for span in llm.explain(other).spans())
        llm.abort(running)
        drain(llm)
        before = llm.metrics()["prefill_steps"]
        llm.generate([[7, 8, 9] * 150] * 2, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        assert llm.metrics()["prefill_steps"] - before < 8


def test_requests_that_are_aborted_midway_leave_nothing(checkpoint):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(12, seed=70, longest=150)
    with make(path, max_num_batched_tokens=64, prefill_chunk_tokens=32) as llm:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        ids = [llm.add_request(prompt, params) for prompt in prompts]
        outputs: dict[int, list] = {}
        for turn in range(400):
            if turn < 8:
                llm.abort(ids[turn])  # waiting, or between two of its chunks
            if llm.is_finished():
                break
            llm._loop.launch_steps()
            for output in llm.step():
                outputs.setdefault(output.request_id, []).append(output)
            llm.scheduler.check_integrity()
        assert num_shared(llm)
        assert_whole(llm)
    assert {outputs[number][-1].finish_reason for number in ids[:8]} == {"abort"}
    for number, prompt in list(zip(ids, prompts, strict=True))[8:]:
        assert tokens_of(outputs[number]) == tiny.reference_tokens(reference, prompt, 30)


def test_what_one_card_has_cached_is_pushed_to_the_other(checkpoint):
    """The hits of the two cards are of different lengths; the prompt's other tokens are computed once."""
    path, reference = checkpoint("gqa2")
    (beginning,) = ([*prompt, *prompt] for prompt in tiny.random_prompts(1, seed=71, longest=90))
    beginning = (beginning * 4)[:96]
    long = [*beginning, *tiny.random_prompts(1, seed=72, longest=60)[0], *beginning[::-1]]
    with make(path) as llm:
        llm.scheduler.placement.least_shared_tokens = 1000
        llm.generate([beginning], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        llm.scheduler.placement.least_shared_tokens = 30
        before = llm.metrics()
        for runner in (llm.prefill_runner, llm.decode_runner):
            assert torch.isnan(runner.kv_pool).any()
        found = llm.generate([long], GREEDY, use_tqdm=False)[0]["token_ids"]
        after = llm.metrics()
        assert after["prefix_cache_hit_tokens"] - before["prefix_cache_hit_tokens"] == 96
        assert after["prefill_tokens"] - before["prefill_tokens"] == len(long) - 96
        # Each card has the whole prompt now, where the other begins.
        for card in llm.scheduler.cards:
            seq = make_sequence(0, long)
            assert len(card.block_manager.match_prefix(seq, len(long))) == len(long) // 16
    assert found == tiny.reference_tokens(reference, long, 10)


def test_the_copy_where_a_request_does_not_decode_is_evicted_first():
    pool = BlockManager(6, 4)
    kept, copy = make_sequence(0, list(range(8))), make_sequence(1, list(range(100, 108)))
    tables = [pool.allocate((), 2), pool.allocate((), 2)]
    for seq, table in zip((copy, kept), tables, strict=True):
        pool.cache(seq, table, 0, 8)
    pool.free(tables[1])
    pool.free(tables[0], evict_first=True)
    assert set(pool.allocate((), 2)).isdisjoint([*tables[0], *tables[1]]), "blocks without content come first"
    assert pool.match_prefix(copy, 8) == tables[0]
    pool.allocate((), 2)
    assert pool.match_prefix(copy, 8) == []
    assert pool.match_prefix(kept, 8) == tables[1]


def test_one_token_answers_leave_their_prompts_cached(tiny_path):
    (prompt,) = tiny.random_prompts(1, seed=73, longest=10, shared=100)
    once = SamplingParams(temperature=0, max_tokens=1)
    with make(tiny_path) as llm:
        llm.generate([prompt], once, use_tqdm=False)
        assert num_shared(llm)
        llm.generate([prompt], once, use_tqdm=False)
        assert llm.metrics()["prefix_cache_hit_tokens"] >= 96
        assert_whole(llm)


@pytest.mark.parametrize("target", [0, 1])
def test_blocks_that_arrive_damaged_are_noticed(checkpoint, monkeypatch, caplog, target):
    path, reference = checkpoint("gqa2")
    prompts = [prompt + prompt for prompt in tiny.random_prompts(4, seed=74, longest=60)]
    # Verified chunk by chunk, they all run on the card that is given work first: the one named for decode.
    with make(path, verify_kv_handoff=True, prefill_device_id=target, decode_device_id=1 - target) as llm:
        damaged = llm.prefill_runner
        push_by_layer, spoiled = PushToPool.push_by_layer, []

        def spoil(push, pushed_blocks):
            push_layer = push_by_layer(push, pushed_blocks)

            def push_and_spoil(kv_cache):
                push_layer(kv_cache)
                if push._pool is damaged.kv_pool and not spoiled:
                    spoiled.append(int(pushed_blocks[4 * int(pushed_blocks[0]) - 2]))
                    push._pool[spoiled[0], 0] += 1

            return push_and_spoil

        monkeypatch.setattr(PushToPool, "push_by_layer", spoil)
        found, _ = serve(llm, prompts, GREEDY)
        assert_whole(llm)
    assert spoiled
    assert "differs in layer 0 from block" in caplog.text
    assert found == [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]


# What is seen


def test_timelines_metrics_and_the_trace_name_the_cards(tiny_path, tmp_path):
    path = tmp_path / "trace.json"
    (prompt,) = tiny.random_prompts(1, seed=75, longest=10, shared=150)
    with make(tiny_path, trace=path) as llm:
        request_id = llm.add_request(prompt, GREEDY)
        drain(llm, steps_overlap=True)
        life = [span.what for span in llm.explain(request_id).spans()]
        metrics = llm.metrics()
    phases = [what for what in life if what.startswith("prefill of tokens")]
    assert len(phases) == 2
    assert {what.split(" on ")[1] for what in phases} == {"cpu:0", "cpu:1"}
    assert metrics["prefill_chunks"] == {"shared": 2, "single": 0}
    assert set(metrics["handoff_bytes_by_link"]) == {"cpu:0 to cpu:1", "cpu:1 to cpu:0"}
    events = json.loads(path.read_text())["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"device cpu:0", "device cpu:1", "handoff cpu:0 to cpu:1", "handoff cpu:1 to cpu:0"} <= rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"card_roles": "elastc"}, "did you mean 'elastic'"),
        ({"card_roles": "elastic", "enable_two_gpu_pd": False}, "without enable_two_gpu_pd=True"),
        ({"kv_handoff": "push"}, "kv_handoff='push' is for fixed roles"),
        ({"enable_decode_pipeline": True}, "exclude each other"),
    ],
)
def test_options_that_contradict_are_refused(tiny_path, options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(tiny_path, **{**ELASTIC, **options})


def test_chunks_smaller_than_a_block_are_not_shared(checkpoint, caplog):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=76, longest=90)
    with make(path, prefill_chunk_tokens=15) as llm:
        found, _ = serve(llm, prompts, GREEDY)
        assert num_shared(llm) == 0
        with pytest.raises(ConfigError, match="steps push KV themselves"):
            llm.kv_transfer = llm.kv_transfer
    assert "prompts are not shared" in caplog.text
    assert found == [tiny.reference_tokens(reference, prompt, 10) for prompt in prompts]


# How prompts are cut, and who waits for whom


def cards(slower: float = 1.0, *, num_blocks: int = 300) -> tuple[Card, Card]:
    found = []
    for index in range(2):
        card = Card(f"cpu:{index}", "", BlockManager(num_blocks, 64), 4096)
        for tokens in (64, 512, 1024, 2048, 4096) * 3:
            size = StepSize(0).with_chunk(0, tokens)
            card.step_time.observe(size, (tokens + 4e-5 * size.num_pairs) * 25e-6 * (slower if index else 1.0))
        found.append(card)
    return tuple(found)


@pytest.mark.parametrize(("length", "most"), [(2048, 4096), (8192, 4096), (32768, 4096), (5000, 1024), (1025, 4096)])
def test_pairs_cover_the_prompt_and_end_together(length, most):
    pair_of_cards, start, ends = cards(), 0, []
    while start < length:
        first, second = tokens_of_pair(pair_of_cards, start, length - start, most, 64)
        assert 0 < first <= most
        assert 0 <= second <= most
        assert first % 64 == 0 or start + first == length
        assert second % 64 == 0 or start + first + second == length
        if second:
            times = [
                card.step_time.predict(StepSize(0).with_chunk(begin, tokens))
                for card, begin, tokens in zip(pair_of_cards, (start, start + first), (first, second), strict=True)
            ]
            if first < most:
                assert times[0] == pytest.approx(times[1], rel=0.2, abs=4e-3)
            assert first >= second
        start += first + second
        ends.append(start)
    assert len(ends) <= -(-length // (2 * most)) + 1


def with_history(card: Card, tokens: list[int]) -> None:
    """Puts a prompt that has ended into the card's prefix cache."""
    pool, seq = card.block_manager, make_sequence(99, tokens)
    table = pool.allocate((), pool.blocks_for(len(tokens)))
    pool.cache(seq, table, 0, len(tokens))
    pool.free(table)


@pytest.mark.parametrize("has_history", [0, 1])
@pytest.mark.parametrize("can_share", [True, False])
def test_a_turn_is_computed_where_its_history_is(can_share, has_history):
    both, history = cards(), list(range(40)) * 20
    here, there = both[has_history], both[1 - has_history]
    with_history(here, history)
    placement = ElasticPlacement(*both, can_share=can_share)
    sizes = {here: StepSize(3, 900), there: StepSize(4, 1000)}

    def places(tokens: list[int], left: float = 0.0, number: int = 0) -> Places:
        others = OtherPrompts(number, {here: left, there: 0.0})
        return placement.places_of(make_sequence(1, history + tokens), sizes, others)

    assert places([1] * 100) == Places(here, here)
    assert places([1] * 100, left=600, number=3) == Places(here, here)
    assert places([1] * 100, left=800, number=3) == Places(there, there), "the wait is longer than the history"
    if can_share:
        assert places([1] * 600) == Places(there, here, is_shared=True)
    sizes = {here: StepSize(9, 9000), there: StepSize(4, 1000)}
    # A card with less context takes the request over where both can share the prompt: what it lacks is pushed.
    expected = Places(here, there, is_shared=True) if can_share else Places(here, here)
    assert places([1] * 100) == expected


def test_a_turn_does_not_wait_for_its_history(monkeypatch):
    """Where the card that has it has no block left, or no time, the request runs on the other one."""
    both, history = cards(num_blocks=32), list(range(40)) * 20
    here, there = both
    with_history(here, history)
    sizes = {here: StepSize(3, 900), there: StepSize(4, 1000)}

    def places(number: int, has_time=lambda card: True) -> Places:
        placement, others = ElasticPlacement(*both, can_share=False), OtherPrompts(0, {}, has_time)
        return placement.places_of(make_sequence(number, history + [number] * 100), sizes, others)

    assert places(1) == Places(here, here)
    held = here.block_manager.allocate((), 20)
    here.block_manager.share(here.block_manager.match_prefix(make_sequence(2, history), 800))
    assert here.block_manager.num_free_blocks < 2
    assert places(2) == Places(there, there)
    here.block_manager.free(held)
    sizes = {here: StepSize(9, 9000), there: StepSize(4, 1000)}
    assert places(3) == Places(here, here)
    assert places(4, has_time=lambda card: card is there) == Places(there, there)


def test_a_prompt_is_shared_only_where_both_cards_have_room():
    both = cards()
    first, second = both
    placement, sizes = ElasticPlacement(*both, can_share=True), dict.fromkeys(both, StepSize(0))

    def places(number: int, **room: float) -> Places:
        others = OtherPrompts(room=lambda card: room["first" if card is first else "second"])
        return placement.places_of(make_sequence(number, [number] * 900), sizes, others)

    assert places(1, first=1.0, second=0.3).is_shared
    assert places(2, first=0.2, second=0.1) == Places(first, first), "to exchange KV would take most of the time"
    assert places(3, first=1.0, second=0.1) == Places(first, first)
    assert places(4, first=0.1, second=0.4) == Places(second, second)


def test_a_card_that_is_busy_for_longer_than_a_prompt_takes_is_given_no_part_of_it():
    """Nor does its request decode there: its first token would wait for that step to end."""
    both = cards()
    first, second = both
    placement, sizes = ElasticPlacement(*both, can_share=True), {first: StepSize(0), second: StepSize(3, 900)}

    def places(in_flight: float, *, number: int = 0, num_tokens: int = 900) -> Places:
        others = OtherPrompts(number, tokens_in_flight={first: in_flight})
        return placement.places_of(make_sequence(1, [1] * num_tokens), sizes, others)

    assert places(600) == Places(second, first, is_shared=True)
    assert places(3000) == Places(second, second)
    assert places(3000, num_tokens=4000).is_shared


def test_a_card_without_rows_takes_a_prompt_of_its_own_in_large_chunks():
    """Nobody waits for its steps, while the other card has no room."""
    scheduler = scheduler_of(cards(), 0.0018)
    first, second = scheduler.cards
    prefilled(scheduler, first, 0, 5)
    assert scheduler.schedule(first, []).decode
    prompt = long_sequence(1, 3000)
    scheduler.add(prompt)
    (chunk,) = scheduler.schedule(second, []).chunks
    assert (chunk.lease.shared, chunk.num_tokens) == (None, 3000)


def test_what_a_card_has_wrong_of_large_steps_does_not_tip_a_pair():
    """Each has learned on its own, and one of them thinks that it is slower than it is."""
    even, uneven = (tokens_of_pair(cards(slower), 0, 6000, 4096, 64) for slower in (1.0, 1.4))
    assert uneven == even
    assert even[0] == pytest.approx(0.53 * 6000, rel=0.05)


@pytest.mark.parametrize("target_s", [None, 10.0])
@pytest.mark.parametrize("block_size", [4, 8])
@pytest.mark.parametrize("seed", range(12))
def test_steps_wait_only_for_steps_that_were_launched_before(seed, block_size, target_s):
    """The scheduler alone, under random ends, failures and aborts: no two steps can wait for each other."""
    rng = random.Random(seed)
    both = [Card(f"cpu:{index}", "", BlockManager(160 // block_size, block_size), 24) for index in range(2)]
    placement = ElasticPlacement(*both, can_share=True)
    placement.least_shared_tokens, placement.most_other_prompts = 9, 1000
    limits = SchedulerLimits(prefill_chunk_tokens=12, max_num_seqs=6, max_handoff_backlog=4, itl_target_s=target_s)
    scheduler = Scheduler(limits, placement)
    steps: dict[Card, list[Step]] = {card: [] for card in both}
    handoffs, seqs, launched = [], [], {0}
    last_number = 0

    def end(step: Step, *, fails: bool = False) -> None:
        for chunk in step.chunks:
            if fails and chunk.seq.lease is chunk.lease and chunk.waits_for:
                scheduler.release(chunk.lease)
                scheduler.fail(chunk.seq, RuntimeError("injected"))
            elif scheduler.prefill_done(chunk) and chunk.is_last:
                append(chunk.seq)
        if step.decode:
            scheduler.decode_done(step)
            for row in step.decode:
                if row.seq.lease is row.lease:
                    append(row.seq)

    def append(seq) -> None:
        seq.token_ids.append(7)
        scheduler.token_appended(seq)
        if seq.num_tokens >= seq.max_num_tokens:
            scheduler.finish(seq, "length")

    for turn in range(3000):
        if turn < 600 and rng.random() < 0.1:
            beginning = [rng.randrange(3)] * rng.randrange(1, 30)
            seqs.append(make_sequence(len(seqs), [*beginning, *range(rng.randrange(1, 40))][:30], rng.randrange(1, 6)))
            scheduler.add(seqs[-1])
        card = rng.choice(both)
        step = scheduler.schedule(card, steps[card])
        if step is not None:
            for chunk in step.shared_chunks:
                assert chunk.number == last_number + 1, "numbers are in the order of the launches"
                last_number = chunk.number
                assert chunk.waits_for in launched, "it waits for a chunk that was launched before"
                assert chunk.allocation.card is card
                assert chunk.end % (4 if target_s is None else 2) == 0 or chunk.is_last
                assert chunk.num_tokens >= 4 or chunk.is_last
                assert chunk.num_tokens > 1 or chunk.start % block_size == 0, "it clears what follows in its block"
                for _, target in chunk.handoff:
                    assert chunk.handoff_target.block_manager._ref_counts[target] == 1, "others hold it"
            launched |= {chunk.number for chunk in step.shared_chunks}
            for chunk in step.chunks:
                if chunk.handoff:
                    scheduler.hold(chunk.lease)
                    handoffs.append(chunk)
            steps[card].append(step)
        running = {chunk.number for each in steps.values() for one in each for chunk in one.shared_chunks}
        ready = [
            each for each in steps.values() if each and not any(c.waits_for in running for c in each[0].shared_chunks)
        ]
        assert ready or not any(steps.values()), "the oldest step waits for nobody"
        if ready and rng.random() < 0.7:
            end(rng.choice(ready).pop(0), fails=rng.random() < 0.1)
        if handoffs and rng.random() < 0.6:
            scheduler.release(handoffs.pop(rng.randrange(len(handoffs))).lease)
        if turn < 600 and rng.random() < 0.02 and scheduler.unfinished():
            scheduler.finish(rng.choice(scheduler.unfinished()), "abort")
        scheduler.check_integrity()
    assert all(seq.is_finished for seq in seqs)
    assert [card.block_manager.num_held_blocks for card in both] == [0, 0]
    assert last_number > 20


def scheduler_of(both: tuple[Card, Card], target_s: float | None, *, chunk_tokens: int = 1024, most: int = 8):
    """A scheduler of two cards that share prompts."""
    limits = SchedulerLimits(chunk_tokens, most, most, itl_target_s=target_s)
    return Scheduler(limits, ElasticPlacement(*both, can_share=True))


def prefilled(scheduler: Scheduler, card: Card, number: int, length: int):
    """A request that decodes on the card."""
    seq = make_sequence(number, list(range(length)))
    scheduler.add(seq)
    scheduler.prefill_done(scheduler.schedule(card, []).chunks[0])
    seq.token_ids.append(1)
    assert seq.lease.decode.card is card
    return seq


def test_a_step_takes_no_chunk_that_would_keep_its_rows_waiting():
    """With a target: the other card has not begun the chunk before, and will end it too late."""
    scheduler = scheduler_of(cards(), 0.02)
    first, second = scheduler.cards
    row = prefilled(scheduler, first, 0, 5)
    prompt = make_sequence(1, list(range(3000)))
    prompt.max_num_tokens = 3100
    scheduler.add(prompt)
    producing = scheduler.schedule(second, [], lambda card: 0.0)
    assert producing.number == 1
    free_in_s = {first: 0.001, second: 0.02}  # in time by its prediction, but its last layer follows
    late = scheduler.schedule(first, [], free_in_s.__getitem__)
    assert late.decode
    assert not late.chunks
    scheduler.decode_done(late)
    row.token_ids.append(1)
    free_in_s[second] = 0.015
    in_time = scheduler.schedule(first, [], free_in_s.__getitem__)
    assert in_time.waits_for == 1


def test_requests_gather_on_a_card_that_decodes_now():
    """One whose requests are all being computed may have just begun a long step of prompts."""
    scheduler = scheduler_of(cards(num_blocks=3000), 0.02)
    first, second = scheduler.cards
    joining = long_sequence(9, 100)

    def may_gather() -> list[bool]:
        others = scheduler._other_prompts(joining, scheduler._sizes_ahead())
        return [others.may_gather(card) for card in (first, second)]

    scheduler.add(long_sequence(0, 5))
    chunk = scheduler.schedule(first, []).chunks[0]
    assert scheduler._leases_on[first] == 1
    assert may_gather() == [False, False]
    scheduler.prefill_done(chunk)
    chunk.seq.token_ids.append(1)
    assert scheduler.schedule(first, []).decode
    assert may_gather() == [True, False]


def test_the_room_of_a_card_without_a_target():
    """A third of a step of 1.5 decode steps; all of one that nobody's tokens wait for."""
    scheduler = scheduler_of(cards(num_blocks=3000), None)
    first, second = scheduler.cards
    plain, streamed = (prefilled(scheduler, card, number, 5) for number, card in enumerate((first, second)))
    plain.is_streamed, streamed.is_streamed = False, True
    scheduler._streamed = {streamed}
    assert all(scheduler.schedule(card, []).decode for card in (first, second))
    sizes = scheduler._sizes_ahead()
    rooms = [scheduler._other_prompts(long_sequence(9, 100), sizes).room(card) for card in (first, second)]
    assert rooms == pytest.approx([1.0, 1 / 3])


def test_a_plan_of_which_too_little_is_left_is_made_anew():
    """It was made for a step with a limit, whose chunks are multiples of 2."""
    both, shared = cards(), shared_prompt.SharedPrompt(None)
    shared.planned_end = shared.pair_end = 1006
    assert shared.planned_tokens(both, 1000, 500, 4096, 2) == 6
    assert shared.planned_tokens(both, 1000, 500, 4096, 16) >= 16
    assert shared.planned_end % 16 == 1000 % 16 or shared.planned_end == 1500


def test_a_card_without_rows_keeps_to_the_target_while_the_other_has_some():
    scheduler = scheduler_of(cards(), 0.02, chunk_tokens=4096)
    first, second = scheduler.cards
    prefilled(scheduler, first, 0, 5)
    assert scheduler.schedule(first, []).decode
    prompt = make_sequence(1, list(range(8000)))
    prompt.max_num_tokens = 8100
    scheduler.add(prompt)
    chunk = scheduler.schedule(second, []).chunks[0]
    assert second.step_time.predict(StepSize(0).with_chunk(0, chunk.num_tokens)) < 0.021


def test_reports_are_not_reused_while_steps_are_in_flight():
    arrivals = LayerArrivals(layer_exchange.Device("cpu", 0), 2, 1.0)
    first = arrivals.new_report()
    arrivals.wait(torch.tensor([0, 5, first]), 0)
    assert arrivals.report(first).missed_layer == 0
    others = [arrivals.new_report() for _ in range(layer_exchange.NUM_REPORTS - 1)]
    assert first not in others
    assert arrivals.report(first).missed_layer == 0
    assert arrivals.new_report() == first
    assert arrivals.report(first) == layer_exchange.NOTHING_WAITED_FOR


def test_an_error_names_request_layer_and_cards(checkpoint, monkeypatch):
    path, _ = checkpoint("gqa2")
    errors = []
    lose_flags(monkeypatch, lambda number: True)
    with make(path, handoff_timeout_s=300.0) as llm:
        fail = llm._outputs.fail
        monkeypatch.setattr(llm._outputs, "fail", lambda seq, error: (errors.append(error), fail(seq, error)))
        llm.generate([list(range(1, 100))], GREEDY, use_tqdm=False)
    (error,) = errors
    assert isinstance(error, HandoffError)
    assert "request 0: the KV of layer 1 of the tokens before" in str(error)
    assert "handoff_timeout_s=300.0" in str(error)


def long_sequence(number: int, length: int):
    seq = make_sequence(number, [number] * length)
    seq.max_num_tokens = length + 50
    seq.is_streamed = True
    return seq


@pytest.mark.parametrize("target_s", [None, 0.02])
def test_short_prompts_are_not_held_up_by_long_ones_that_are_shared(target_s):
    scheduler = scheduler_of(cards(num_blocks=3000), target_s, most=16)
    scheduler.placement.least_shared_when_gathered = 0  # a row stays on each card
    for number, card in enumerate(scheduler.cards):
        row = prefilled(scheduler, card, number, 5)
        row.is_streamed = True
        scheduler._streamed.add(row)
    for number in (2, 3):
        scheduler.add(long_sequence(number, 32_000))
    short = long_sequence(4, 50)
    steps: dict[Card, list[Step]] = {card: [] for card in scheduler.cards}
    for turn in range(100):
        if turn == 4:
            scheduler.add(short)
        for card in scheduler.cards:
            step = scheduler.schedule(card, steps[card], lambda card: 0.0)
            for chunk in step.chunks:
                if chunk.handoff:
                    scheduler.hold(chunk.lease)
            steps[card].append(step)
            if any(chunk.seq is short for chunk in step.chunks):
                assert turn <= 6
                return
        for card in scheduler.cards:
            step = steps[card].pop(0)
            for chunk in step.chunks:
                scheduler.prefill_done(chunk)
                if chunk.handoff:
                    scheduler.blocks_arrived(chunk.lease)
            scheduler.decode_done(step)
            for row in step.decode:
                row.seq.token_ids.append(1)
                row.seq.max_num_tokens += 1
    raise AssertionError("it got no chunk")


def test_a_step_grants_no_leases_to_prompts_that_get_nothing_of_it():
    both = tuple(Card(f"cpu:{n}", "", BlockManager(3000, 64), 3000) for n in range(2))
    scheduler = scheduler_of(both, None, most=64)
    for number in range(20):
        scheduler.add(long_sequence(number, 5000))
    for card in scheduler.cards:
        assert scheduler.schedule(card, []).chunks
    assert scheduler.num_leases <= 8


def test_the_timeline_says_why_there_is_no_chunk(monkeypatch):
    monkeypatch.setattr("nanovllm.engine.scheduling.placement.LEAST_ROOM", 0.0)  # as if rows had joined since
    both = cards()
    decode_s = both[0].step_time.predict(StepSize(2, 3100))
    for card in both:
        for _ in range(200):
            card.step_time.observe(StepSize(2, 3100), decode_s)
    scheduler = scheduler_of(both, 1.1 * decode_s)
    first, second = scheduler.cards
    for number, card in enumerate((first, second)):
        prefilled(scheduler, card, number, 5)
        assert scheduler.schedule(card, []).decode
    prompt = long_sequence(2, 3000)
    scheduler.add(prompt)
    chunk = scheduler.schedule(second, []).chunks[0]
    assert chunk.num_tokens == 32, "no time, and yet it comes to its end"
    assert not scheduler.schedule(second, []).chunks, "its last chunk is in flight"
    assert not scheduler.schedule(first, []).chunks
    assert [span.what for span in prompt.timeline.spans()][-1] == (
        f"prefill queue (itl_target_ms={1.1e3 * decode_s:g})"
    )


def test_a_card_whose_launch_fails_takes_no_token_before_what_it_goes_by_is_known(checkpoint, monkeypatch):
    """The other card has missed a layer and was not collected; a chunk that has read what it computed was launched."""
    path, reference = checkpoint("gqa2")
    (prompt,) = tiny.random_prompts(1, seed=77, longest=10, shared=120)
    monkeypatch.setattr(shared_prompt, "tokens_of_pair", lambda cards, start, left, *_: (min(left, 48), 48))
    lost = lose_flags(monkeypatch, lambda number: number == 1)
    with make(path, max_num_batched_tokens=64, prefill_chunk_tokens=32) as llm:
        first, second = llm.scheduler.cards
        request_id = llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=5))
        llm._loop.take_in_mail()
        for card in (first, second, first):
            step = llm.scheduler.schedule(card, [work.step for work in llm._steps.on(card)])
            assert step is not None
            llm._loop._launch(step)
        assert step.chunks[0].is_last
        llm._loop._collect(llm._steps.on(first)[0])
        llm._loop._undo_launch(Step(first))
        assert not llm._steps.on(second), "it was collected before"
        outputs = drain(llm, steps_overlap=True)
        assert_whole(llm)
    assert lost
    assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 5)


def test_blocks_larger_than_a_streamed_step_are_not_shared(tiny_path, caplog):
    with LLM(tiny_path, **{**ELASTIC, "kvcache_block_size": 4096, "prefill_chunk_tokens": 4096}) as llm:
        assert "prompts are not shared" in caplog.text
        assert list(llm.generate_stream([1, 2, 3], SamplingParams(max_tokens=2)))


# Everything at once


ENGINES = [
    {},
    {"max_num_batched_tokens": 64, "prefill_chunk_tokens": 32},
    {"max_num_batched_tokens": 18, "prefill_chunk_tokens": 18},
    {"max_num_batched_tokens": 64, "prefill_chunk_tokens": 32, "num_kvcache_blocks": 14},
    {"verify_kv_handoff": True, "prefill_chunk_tokens": 48},
    {"itl_target_ms": 1e-3, "num_kvcache_blocks": 20},
    {"max_handoff_backlog": 1, "enable_prefix_caching": False},
]


class Mischief:
    """Loses flags, fails launches, interrupts them between two layers, and has steps end late, by a random choice."""

    def __init__(self, monkeypatch, seed: int) -> None:
        self.is_on = False
        rng, delays = random.Random(seed), random.Random(seed)
        shares = [rng.choice([0.0, share]) for share in (0.1, 0.03, 0.02)]
        raise_flag, late = LayerArrivals.raise_flag, {}

        def maybe(arrivals, numbers, layer):
            lost, failed, interrupted = (rng.random() < share and self.is_on for share in shares)
            if layer == 1 and interrupted:
                raise KeyboardInterrupt
            if layer == 1 and failed:
                raise RuntimeError("injected")
            if not (lost and int(numbers[0])):
                raise_flag(arrivals, numbers, layer)

        def is_done(handle):
            if handle not in late:  # how often it is asked for is a matter of time, and draws nothing
                late[handle] = delays.choice([0, 0, 1, 3, 8])
            late[handle] -= 1
            return late[handle] < 0

        monkeypatch.setattr(LayerArrivals, "raise_flag", maybe)
        monkeypatch.setattr(StepHandle, "is_done", is_done)


@pytest.mark.parametrize("seed", range(14))
def test_tokens_are_right_and_blocks_whole_whatever_goes_wrong(checkpoint, monkeypatch, seed):
    path, reference = checkpoint("gqa2")
    rng = random.Random(seed)
    prompts = tiny.random_prompts(10, seed, longest=150) + tiny.random_prompts(4, seed + 1, longest=40, shared=70)
    params = [SamplingParams(temperature=0, max_tokens=rng.choice([1, 3, 10, 25]), ignore_eos=True) for _ in prompts]
    mischief = Mischief(monkeypatch, seed)
    with make(path, **ENGINES[seed % len(ENGINES)]) as llm:
        if seed >= 7:  # all prompts are short, so that requests gather
            llm.scheduler.placement.least_shared_when_gathered = 1000
        mischief.is_on = True
        ids, outputs, stopped = [], {}, set()
        for _ in range(6000):
            try:
                if len(ids) < len(prompts) and rng.random() < 0.4:
                    ids.append(llm.add_request(prompts[len(ids)], params[len(ids)]))
                if len(ids) == len(prompts) and llm.is_finished():
                    break
                if rng.random() < 0.5:
                    llm._recovery.guard(llm._loop.launch_steps)
                for output in llm.step():
                    outputs.setdefault(output.request_id, []).append(output)
                if ids and rng.random() < 0.02 and (number := rng.choice(ids)) in llm._outputs.sequences:
                    llm.abort(number)
                    stopped.add(number)
            except KeyboardInterrupt:
                stopped.update(llm._outputs.sequences)  # one that was just being given a token may be aborted
            llm.scheduler.check_integrity()
        else:
            raise AssertionError("they do not come to their end")
        mischief.is_on = False
        assert_whole(llm)
        assert num_shared(llm)
        again = llm.generate(prompts, [SamplingParams(temperature=0, max_tokens=4)] * len(prompts), use_tqdm=False)
    for number, prompt, asked, cached in zip(ids, prompts, params, again, strict=True):
        tokens, reason = tokens_of(outputs[number]), outputs[number][-1].finish_reason
        expected = tiny.reference_tokens(reference, prompt, asked.max_tokens)
        assert tokens == expected[: len(tokens)]
        assert reason != "length" or len(tokens) == asked.max_tokens
        assert reason != "abort" or number in stopped
        assert cached["token_ids"] == tiny.reference_tokens(reference, prompt, 4), "what the prefix cache has is right"
