"""Two cards that compute prompts together: tokens are those of `transformers`, whatever comes late or not at all."""

from __future__ import annotations

import random
import time

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.execution.layer_exchange import LayerArrivals
from nanovllm.engine.scheduling import shared_prompt
from nanovllm.utils.device import Device
from tests import tiny
from tests.test_demo import QUESTIONS
from tests.test_engine import tokens_of
from tests.test_shared_prompts import assert_whole, num_shared

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpu]

GREEDY = SamplingParams(temperature=0, max_tokens=16)
OPTIONS = {
    "device": "cuda",
    "dtype": "float32",
    "enable_two_gpu_pd": True,
    "card_roles": "elastic",
    "kvcache_block_size": 64,
    "num_kvcache_blocks": 500,
    # All steps keep it: without a target, chunks are as long as steps without prompts take time.
    "itl_target_ms": 1e6,
}
MODES = {
    "graphs": {"itl_target_ms": None},
    "eager": {"itl_target_ms": None, "enforce_eager": True},
    "small chunks": {"max_num_batched_tokens": 96, "prefill_chunk_tokens": 80},
    "small blocks": {"max_num_batched_tokens": 96, "prefill_chunk_tokens": 48, "kvcache_block_size": 16},
    "preempted": {"num_kvcache_blocks": 10, "max_num_batched_tokens": 96, "prefill_chunk_tokens": 80},
    "reversed": {"prefill_device_id": 1, "decode_device_id": 0},
    "verified": {"verify_kv_handoff": True},
    "without prefix cache": {"enable_prefix_caching": False},
    "a target": {"itl_target_ms": 3.0, "max_num_batched_tokens": 96, "prefill_chunk_tokens": 96},
}
CYCLES = 20_000_000
"""Ten milliseconds or more."""


@pytest.fixture(scope="module")
def tiny_on_disk(tmp_path_factory):
    model = tiny.make_reference(seed=1, head_dim=64)
    return tiny.save(model, tmp_path_factory.mktemp("tiny64")), model


@pytest.fixture(autouse=True)
def short_pairs(monkeypatch):
    monkeypatch.setattr(shared_prompt, "LEAST_PAIR_TOKENS", 33)


def make(path: str, **options) -> LLM:
    """An engine that shares prompts of 48 tokens, in which no KV is there that was not stored or pushed."""
    llm = LLM(path, **{**OPTIONS, **options})
    placement = llm.scheduler.placement
    placement.least_shared_tokens = placement.least_shared_when_gathered = 48
    placement.most_other_prompts = 1000
    for runner in (llm.prefill_runner, llm.decode_runner):
        with runner.on(runner.stream):
            runner.kv_pool[:-1] = float("nan")
        runner.synchronize()
    return llm


def serve(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    """Tokens of each request; they come one after another, while others decode."""
    ids, outputs = [], {}
    while len(ids) < len(prompts) or not llm.is_finished():
        if len(ids) < len(prompts):
            ids.append(llm.add_request(prompts[len(ids)], params))
        for output in llm.step():
            outputs.setdefault(output.request_id, []).append(output)
    return [tokens_of(outputs[number]) for number in ids]


def begins_on(card: int) -> dict[str, int]:
    """Options with which this card is given work first: with both idle, it begins every prompt."""
    return {"decode_device_id": card, "prefill_device_id": 1 - card}


def make_prompts(seed: int, count: int = 16, longest: int = 260) -> list[list[int]]:
    return tiny.random_prompts(count, seed=seed, longest=longest) + tiny.random_prompts(4, seed + 1, 60, shared=100)


@pytest.mark.parametrize("mode", MODES)
def test_float32_tokens_equal_transformers(tiny_on_disk, mode):
    path, reference = tiny_on_disk
    prompts = make_prompts(31)
    with make(path, **MODES[mode]) as llm:
        found = serve(llm, prompts)
        assert num_shared(llm) > 8
        assert_whole(llm)
    assert found == [tiny.reference_tokens(reference, prompt, 16) for prompt in prompts]


@pytest.mark.parametrize("mode", ["graphs", "eager", "small blocks", "reversed", "verified"])
def test_short_prompts_cross_to_the_card_where_requests_gather(tiny_on_disk, mode):
    """One request decodes there from the first to the last; the other card has no decode rows."""
    path, reference = tiny_on_disk
    prompts = make_prompts(32)
    with make(path, **{**MODES[mode], "itl_target_ms": 1e6, "num_kvcache_blocks": 1000}) as llm:
        llm.scheduler.placement.least_shared_when_gathered = 1000
        llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        while llm.metrics()["predicted_itl_s"] is None:
            llm.step()
        found = serve(llm, prompts)
        assert num_shared(llm) == 0
        assert len(llm.metrics()["handoff_bytes_by_link"]) == 1
        _, idle = sorted(llm.metrics()["busy_s"].values(), key=lambda kinds: -kinds["decode"])
        assert idle["prefill"] > 0
        assert idle["decode"] == idle["mixed"] == 0
        assert_whole(llm)
    assert found == [tiny.reference_tokens(reference, prompt, 16) for prompt in prompts]


@pytest.mark.parametrize("seed", range(2))
def test_chunks_may_be_cut_anywhere(tiny_on_disk, monkeypatch, seed):
    path, reference = tiny_on_disk
    rng = random.Random(seed)

    def cut(cards, start, num_left, most, block_size):
        first = min(rng.randrange(1, 6) * block_size, num_left)
        return first, min(rng.randrange(1, 6) * block_size, num_left - first)

    monkeypatch.setattr(shared_prompt, "tokens_of_pair", cut)
    prompts = make_prompts(33)
    with make(path) as llm:
        found = serve(llm, prompts)
        assert num_shared(llm) > 40
    assert found == [tiny.reference_tokens(reference, prompt, 16) for prompt in prompts]


def test_seeded_tokens_are_those_of_one_card(tiny_on_disk):
    path, _ = tiny_on_disk
    prompts = make_prompts(35)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=16, top_p=0.9)
    with LLM(path, device="cuda", dtype="float32", num_kvcache_blocks=2000) as llm:
        expected = [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)]
    with make(path) as llm:
        assert serve(llm, prompts, params) == expected


@pytest.mark.parametrize("card", [0, 1])
@pytest.mark.parametrize("lateness", ["a layer", "a step", "a launch"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_either_card_may_be_late(tiny_on_disk, monkeypatch, eager, lateness, card):
    """By a kernel before each push's flag, before each step, or on the host."""
    path, reference = tiny_on_disk
    prompts = make_prompts(37, count=8)
    raise_flag = LayerArrivals.raise_flag

    def late(arrivals, numbers, layer):
        if numbers.device.index == card:
            torch.cuda._sleep(CYCLES)
        raise_flag(arrivals, numbers, layer)

    if lateness == "a layer":
        monkeypatch.setattr(LayerArrivals, "raise_flag", late)  # captured, too
    with make(path, enforce_eager=eager, **begins_on(card)) as llm:
        runner = next(each for each in (llm.prefill_runner, llm.decode_runner) if each.device.index == card)

        def launch(step, launch=runner.launch):
            if lateness == "a launch":
                time.sleep(0.01)
            if lateness == "a step":
                with runner.on(runner.stream):
                    torch.cuda._sleep(3 * CYCLES)
            return launch(step)

        monkeypatch.setattr(runner, "launch", launch)
        # Else a launch may be put off until the late card's step has ended, and then nothing is waited for.
        llm._loop._launch_times._puts_off = False
        found = serve(llm, prompts)
        assert num_shared(llm) > 4
        # A card whose steps are late may be given no chunk at all.
        assert lateness != "a layer" or llm.metrics()["layer_wait_s"] > 5e-3
        assert_whole(llm)
    assert found == [tiny.reference_tokens(reference, prompt, 16) for prompt in prompts]


@pytest.mark.parametrize("card", [0, 1])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_a_flag_that_is_never_raised_costs_its_request_a_retry(tiny_on_disk, monkeypatch, caplog, eager, card):
    """The bounded wait ends; rows beside it count, its prompt is computed again on one card."""
    path, reference = tiny_on_disk
    prompts = make_prompts(39, count=6)
    raise_flag = LayerArrivals.raise_flag

    def lost(arrivals, numbers, layer):
        if not (numbers.device.index == card and layer == 1):
            raise_flag(arrivals, numbers, layer)

    monkeypatch.setattr(LayerArrivals, "raise_flag", lost)
    with make(path, enforce_eager=eager, handoff_timeout_s=0.05, **begins_on(card)) as llm:
        found = serve(llm, prompts)
        metrics = llm.metrics()
        assert set(metrics["requests_ended"]) == {"length"}
        assert metrics["preemptions"] > 0
        assert metrics["layer_wait_s"] > 0.05
        assert_whole(llm)
    assert f"has not come from cuda:{card} to cuda:{1 - card}" in caplog.text
    assert found == [tiny.reference_tokens(reference, prompt, 16) for prompt in prompts]


def test_a_wait_ends_when_the_host_says_so(tiny_on_disk, monkeypatch):
    path, reference = tiny_on_disk
    prompts = make_prompts(41, count=4)
    raise_flag = LayerArrivals.raise_flag

    def lost(arrivals, numbers, layer):
        if layer:
            raise_flag(arrivals, numbers, layer)

    monkeypatch.setattr(LayerArrivals, "raise_flag", lost)
    with make(path) as llm:
        for runner in (llm.prefill_runner, llm.decode_runner):
            runner.arrivals.give_up()
        began_s = time.perf_counter()
        found = serve(llm, prompts)
        assert time.perf_counter() - began_s < 10, "it did not wait for handoff_timeout_s"
        assert_whole(llm)
    assert found == [tiny.reference_tokens(reference, prompt, 16) for prompt in prompts]


def test_every_step_that_waits_for_what_does_not_come_says_so():
    """The second of two steps that wait for the same chunk goes on at once, and reports it as well."""
    device = Device("cuda", 0)
    with torch.cuda.device(0):
        arrivals = LayerArrivals(device, num_layers=3, limit_s=0.02)
        reports = [arrivals.new_report() for _ in range(3)]
        for report, number in zip(reports, (5, 5, 4), strict=True):
            numbers = torch.tensor([0, number, report], device="cuda")
            for layer in range(3):
                arrivals.note_stored(layer)
                arrivals.wait(numbers, layer)
            arrivals.report_waits(numbers)
            if report == reports[1]:
                raised = torch.tensor([4, 0, 0], device="cuda")
                for layer in range(3):
                    arrivals.raise_flag(raised, layer)
        torch.cuda.synchronize()
        assert [arrivals.report(report).missed_layer for report in reports] == [0, 0, None]
        assert arrivals.report(reports[0]).waited_s > 0.02
        assert arrivals.report(reports[1]).waited_s < 0.02


def test_only_what_comes_after_the_own_kv_is_stored_counts_as_waited_for():
    device, sleep_s = Device("cuda", 0), 0.02
    with torch.cuda.device(0):
        arrivals = LayerArrivals(device, num_layers=2, limit_s=5.0)
        waits, stores = torch.cuda.Stream(), torch.cuda.Stream()
        stored_s = raised_s = 0.0
        nothing = torch.zeros(3, dtype=torch.int64, device="cuda")
        arrivals.note_stored(0)  # loaded now: a module that is loaded may wait for the kernels that run
        arrivals.raise_flag(nothing, 0)
        arrivals.report_waits(nothing)
        for number, is_late in ((1, False), (2, True)):
            numbers = torch.tensor([number, number, arrivals.new_report()], device="cuda")
            torch.cuda.synchronize()
            with torch.cuda.stream(waits):
                for layer in range(2):
                    arrivals.wait(numbers, layer)
            time.sleep(sleep_s)
            for layer in range(2):
                with torch.cuda.stream(stores):
                    if is_late and layer == 0:
                        stored_s = time.perf_counter()
                        arrivals.note_stored(layer)
                        stores.synchronize()
                        time.sleep(sleep_s)
                    arrivals.raise_flag(numbers, layer)
                    stores.synchronize()
                    raised_s = raised_s if layer else time.perf_counter()
                    time.sleep(sleep_s)
                    if not (is_late and layer == 0):
                        arrivals.note_stored(layer)
            torch.cuda.synchronize()
            arrivals.report_waits(numbers)
            torch.cuda.synchronize()
            waited_s = arrivals.report(int(numbers[2])).waited_s
            assert sleep_s <= waited_s <= raised_s - stored_s if is_late else waited_s == 0


def test_thousands_of_requests_leave_both_pools_whole(tiny_on_disk):
    """Arrivals, aborts and preemptions in a random order."""
    path, reference = tiny_on_disk
    rng = random.Random(5)
    prompts = tiny.random_prompts(60, seed=43, longest=300)
    expected = [tiny.reference_tokens(reference, prompt, 16) for prompt in prompts]
    with make(path, num_kvcache_blocks=50, max_num_seqs=24, prefill_chunk_tokens=80) as llm:
        of, outputs, aborted = {}, {}, set()
        while len(of) < 2000 or not llm.is_finished():
            for _ in range(rng.choice([0, 0, 1, 4])):
                if len(of) < 2000:
                    number = rng.randrange(len(prompts))
                    of[llm.add_request(prompts[number], GREEDY)] = number
            for output in llm.step():
                outputs.setdefault(output.request_id, []).append(output)
            if rng.random() < 0.02:
                request_id = rng.choice(list(of))
                if request_id not in aborted and request_id in outputs and not outputs[request_id][-1].finished:
                    llm.abort(request_id)
                    aborted.add(request_id)
        assert num_shared(llm) > 1000
        assert_whole(llm)
    for request_id, number in of.items():
        tokens = tokens_of(outputs[request_id])
        assert tokens == expected[number][: len(tokens)]
        assert request_id in aborted or len(tokens) == 16


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_demo_answers_in_bfloat16_equal_the_written_ones(monkeypatch, eager):
    options = {**OPTIONS, "dtype": "bfloat16", "num_kvcache_blocks": 1000}
    conversations = [[{"role": "user", "content": pair["question"]}] for pair in QUESTIONS]
    with LLM(DEMO_MODEL_PATH, **options, enforce_eager=eager, enable_prefix_caching=False) as llm:
        llm.scheduler.placement.least_shared_tokens = 17
        llm.scheduler.placement.most_other_prompts = 1000
        monkeypatch.setattr(shared_prompt, "LEAST_PAIR_TOKENS", 17)
        answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=512), use_tqdm=False)
        assert num_shared(llm) > 300
    assert not [p["question"] for p, a in zip(QUESTIONS, answers, strict=True) if a["text"] != p["answer"]]
