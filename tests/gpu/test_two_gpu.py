"""Prefill on one card, decode on another: one card's tokens, everything on the right card, faults and all."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, ModelLoadError, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.execution import kv_transfer
from nanovllm.utils import device as device_module
from tests import tiny
from tests.test_engine import drain, tokens_of
from tests.test_trace import rows_of
from tests.test_two_devices import assert_whole
from tests.transfers import FaultyTransfer, LazyTransfer, poison_after_handoff

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpu]

GREEDY = SamplingParams(temperature=0, max_tokens=24)
OPTIONS = {
    "device": "cuda",
    "dtype": "float32",
    "enable_two_gpu_pd": True,
    "card_roles": "fixed",
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 2000,  # few, since check_integrity looks at each of them after every step
}
MODES = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "preempted": {"num_kvcache_blocks": 9},
    "reversed": {"prefill_device_id": 1, "decode_device_id": 0},
    "torch": {"attention_backend": "torch"},
    "verified": {"verify_kv_handoff": True, "max_num_batched_tokens": 40},
}


@pytest.fixture(scope="module")
def tiny_on_disk(tmp_path_factory):
    model = tiny.make_reference(seed=1, head_dim=64)
    return tiny.save(model, tmp_path_factory.mktemp("tiny64")), model


@pytest.fixture(autouse=True)
def current_device():
    """Everything must land on its own card whichever card is current; the second one shows more mistakes."""
    with torch.cuda.device(1):
        yield


@pytest.mark.parametrize("handoff", ["copy", "push", "staged", "direct"])
@pytest.mark.parametrize("caching", [True, False], ids=["cached", "poisoned"])
@pytest.mark.parametrize("mode", MODES)
def test_float32_tokens_equal_transformers(tiny_on_disk, monkeypatch, mode, caching, handoff):
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(6, seed=1) + tiny.random_prompts(4, seed=2, longest=40, shared=48)
    options = {**OPTIONS, "kv_handoff": handoff, "enable_prefix_caching": caching, **MODES[mode]}
    if handoff == "staged":
        monkeypatch.setattr(kv_transfer, "peer_access", lambda source, target: False)
        options["kv_handoff"] = "auto"
    with LLM(path, **options) as llm:
        assert llm.kv_transfer.name == handoff
        if not caching:
            poison_after_handoff(llm)
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert_whole(llm)
        assert llm.counters.handoff_blocks > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.whole_card
def test_seeded_tokens_with_random_aborts_equal_one_card(tiny_on_disk):
    path, _ = tiny_on_disk
    rng = random.Random(0)
    prompts = tiny.random_prompts(30, seed=3, longest=60, shared=20)
    params = [SamplingParams(temperature=0.9, top_p=0.9, seed=i, max_tokens=24) for i in range(30)]
    with LLM(path, device="cuda", dtype="float32", gpu_memory_utilization=0.2) as llm:
        expected = [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)]
    doomed = {index: rng.randint(0, 60) for index in rng.sample(range(30), 9)}
    with LLM(path, **{**OPTIONS, "num_kvcache_blocks": 40, "max_num_batched_tokens": 60}) as llm:
        for prompt, p in zip(prompts, params, strict=True):
            llm.add_request(prompt, p)
        outputs = drain(llm, doomed)
        assert_whole(llm)
    for index in range(30):
        got = tokens_of(outputs[index])
        assert got == expected[index][: len(got)]
        if outputs[index][-1].finish_reason != "abort":
            assert got == expected[index]


def test_everything_is_on_its_own_card_and_both_work(tiny_on_disk):
    path, _ = tiny_on_disk
    with LLM(path, **OPTIONS) as llm:
        for runner, index in ((llm.prefill_runner, 0), (llm.decode_runner, 1)):
            assert runner.kv_pool.get_device() == index
            assert {p.get_device() for p in runner.model.parameters()} == {index}
            rotary = runner.model.model.layers[0].attention.rotary
            assert rotary.cos.get_device() == rotary.sin.get_device() == index
            assert runner.stream.device_index == runner.copy_stream.device_index == index
        llm.generate(tiny.random_prompts(4), GREEDY, use_tqdm=False)
        assert llm.prefill_runner.kv_pool.any()
        assert llm.decode_runner.kv_pool.any()
        assert llm.counters.decode_steps > 0
        allocated = [torch.cuda.memory_allocated(index) for index in (0, 1)]
        pools = [runner.kv_pool.nbytes for runner in (llm.prefill_runner, llm.decode_runner)]
        assert all(used >= pool for used, pool in zip(allocated, pools, strict=True))
    assert not torch.distributed.is_initialized()


def test_prefill_and_decode_are_in_flight_together(tiny_on_disk):
    path, _ = tiny_on_disk
    with LLM(path, **OPTIONS) as llm:
        first = llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=200))
        while not any(output.request_id == first and output.new_token_ids for output in llm.step()):
            continue
        together = False
        for prompt in tiny.random_prompts(20, seed=4):
            llm.add_request(prompt, GREEDY)
            llm._loop.launch_steps()
            together |= {work.step.card for work in llm._steps} == set(llm.scheduler.cards)
            llm.step()
        drain(llm)
        assert together


@pytest.mark.whole_card
@pytest.mark.parametrize("handoff", ["copy", "push", "direct"])
def test_a_trace_has_the_cards_own_times(tiny_on_disk, tmp_path, handoff):
    path, _ = tiny_on_disk
    file = tmp_path / "trace.json"
    with LLM(path, kv_handoff=handoff, trace=file, max_num_batched_tokens=64, **OPTIONS) as llm:
        started_s = time.perf_counter()
        llm.generate(tiny.random_prompts(8, seed=1), GREEDY, use_tqdm=False)
        assert_whole(llm)
        ended_s = time.perf_counter()
        spans = llm._observer._tracer._spans
        assert all(started_s - 50e-6 < span.start_s < span.end_s < ended_s + 50e-6 for span in spans)
        counters = llm.counters
    prefills, handoffs, decodes = rows_of(file).values()
    assert (len(prefills), len(decodes)) == (counters.prefill_steps, counters.decode_steps)
    assert sum(span["args"]["blocks"] for span in handoffs) == counters.handoff_blocks
    for row in (prefills, handoffs, decodes):
        for before, span in itertools.pairwise(row):
            assert before["ts"] + before["dur"] <= span["ts"] + 1e-3
    if handoff == "direct":
        assert {span["ts"] for span in handoffs} <= {span["ts"] for span in prefills}
    for request_id in range(8):
        first_decode, last_copy = (
            next(span for span in row if request_id in span["args"]["request_ids"]) for row in (decodes, handoffs[::-1])
        )
        assert last_copy["ts"] + last_copy["dur"] < first_decode["ts"] + 50


@pytest.mark.parametrize("fault", ["launch", "arrive", "stall"])
def test_faulty_copies_cost_a_retry(tiny_on_disk, fault):
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(8, seed=8, longest=60, shared=20)
    with LLM(path, **OPTIONS, handoff_timeout_s=0.2) as llm:
        llm.kv_transfer = FaultyTransfer(LazyTransfer(llm.kv_transfer), fault, lambda number: number in (1, 4))
        for prompt in prompts:
            llm.add_request(prompt, GREEDY)
        outputs = drain(llm)
        assert llm.kv_transfer.num_faults == 2
        llm.kv_transfer.unstall()
        llm.step()
        assert_whole(llm)
    for index, prompt in enumerate(prompts):
        assert tokens_of(outputs[index]) == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.whole_card
@pytest.mark.parametrize("handoff", ["copy", "push", "direct"])
def test_demo_answers_in_bfloat16_equal_the_written_ones(handoff):
    pairs = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
    conversations = [[{"role": "user", "content": pair["question"]}] for pair in pairs]
    options = {"enable_two_gpu_pd": True, "card_roles": "fixed", "kv_handoff": handoff}
    with LLM(DEMO_MODEL_PATH, gpu_memory_utilization=0.2, **options) as llm:
        assert llm.decode_runner.kv_pool.dtype == torch.bfloat16
        answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=512), use_tqdm=False)
        assert_whole(llm)
    wrong = [p["question"] for p, a in zip(pairs, answers, strict=True) if a["text"] != p["answer"]]
    assert not wrong


def test_too_little_memory_for_the_weights_names_the_card(tiny_on_disk, monkeypatch):
    path, _ = tiny_on_disk
    memory_info = device_module.Device.memory_info
    monkeypatch.setattr(
        device_module.Device, "memory_info", lambda self: (1000, 2000) if self.index == 1 else memory_info(self)
    )
    with pytest.raises(ModelLoadError, match=r"cuda:1 has 0.00 GiB free: .* GiB are missing"):
        LLM(path, **OPTIONS)
