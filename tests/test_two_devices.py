"""Prefill on one logical CPU device, decode on another: one device's tokens, through every turn a request can take."""

from __future__ import annotations

import random
import time

import pytest
import torch

from nanovllm import (
    LLM,
    BackendUnavailableError,
    ConfigError,
    GreenContextError,
    HandoffError,
    HandoffTimeout,
    RequestError,
    SamplingParams,
)
from nanovllm.engine.execution import decode_calibrator, kv_transfer
from nanovllm.engine.execution.kv_transfer import resolve_handoff
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Cut
from nanovllm.engine.sequence import SequenceStatus
from nanovllm.utils.device import Device
from tests import tiny
from tests.test_engine import drain, tokens_of
from tests.transfers import FaultyTransfer, LazyTransfer, SabotagedTransfer, poison_after_handoff

GREEDY = SamplingParams(temperature=0, max_tokens=24)
TWO = {"device": "cpu", "enable_two_gpu_pd": True, "card_roles": "fixed"}

MODES = {
    "plain": {},
    "other_ids": {"prefill_device_id": 7, "decode_device_id": 3},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "preempted": {"num_kvcache_blocks": 9},
    "verified": {"verify_kv_handoff": True, "max_num_batched_tokens": 40},
    "few_at_a_time": {"max_num_seqs": 3, "kvcache_block_size": 32},
    "direct": {"kv_handoff": "direct"},
    "direct_chunked": {"kv_handoff": "direct", "max_num_batched_tokens": 24, "verify_kv_handoff": True},
    "direct_preempted": {"kv_handoff": "direct", "num_kvcache_blocks": 9},
    "pipeline": {"enable_decode_pipeline": True, "decode_pipeline": "static"},
    "pipeline_of_three": {
        "enable_decode_pipeline": True,
        "decode_attention_sm": 48,
        "decode_micro_batches": 3,
        "num_kvcache_blocks": 9,
    },
}


def two_devices(path: str, lazy: bool = True, **options) -> LLM:
    llm = LLM(path, **{**TWO, **options})
    if lazy:
        llm.kv_transfer = LazyTransfer(llm.kv_transfer)
    return llm


def assert_whole(llm: LLM) -> None:
    """Once the steps that were queued behind the last tokens have ended, nobody holds a block."""
    while llm._steps:
        llm.step()
    llm.scheduler.check_integrity()
    assert llm.scheduler.placement.prefill_card.block_manager.num_held_blocks == 0
    assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "poisoned"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ["gqa2", "gqa4_bias", "yarn_tied"])
def test_greedy_tokens_equal_transformers(checkpoint, variant, mode, caching):
    path, reference = checkpoint(variant)
    prompts = tiny.random_prompts(4, seed=1) + tiny.random_prompts(4, seed=2, longest=40, shared=48)
    with two_devices(path, enable_prefix_caching=caching, **MODES[mode]) as llm:
        if not caching:
            poison_after_handoff(llm)
        max_tokens = 40 if mode == "preempted" else 24
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
        assert_whole(llm)
        assert llm.counters.handoff_blocks > 0
        if mode == "preempted":
            assert llm.scheduler.num_preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, max_tokens)


def test_seeded_tokens_equal_those_of_one_device(tiny_path):
    prompts = tiny.random_prompts(8, seed=5)
    params = [SamplingParams(temperature=0.9, top_p=0.8 + 0.2 * (i % 2), seed=i, max_tokens=24) for i in range(8)]
    with LLM(tiny_path, device="cpu") as llm:
        expected = [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)]
    for options in ({}, {"num_kvcache_blocks": 9, "max_num_batched_tokens": 32}):
        with two_devices(tiny_path, **options) as llm:
            assert [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)] == expected


@pytest.mark.parametrize("kv_handoff", ["copy", "direct"])
@pytest.mark.parametrize("seed", range(4))
def test_aborts_at_random_moments_change_no_other_token(checkpoint, seed, kv_handoff):
    path, reference = checkpoint("gqa2")
    rng = random.Random(seed)
    prompts = tiny.random_prompts(20, seed=seed, longest=60, shared=20 * (seed % 2))
    options = {"num_kvcache_blocks": 16, "max_num_batched_tokens": 40} if seed > 1 else {}
    with two_devices(path, kv_handoff=kv_handoff, **options) as llm:
        ids = {llm.add_request(prompt, GREEDY): prompt for prompt in prompts}
        doomed = {request_id: rng.randint(0, 40) for request_id in rng.sample(list(ids), 6)}
        outputs = drain(llm, doomed)
        assert_whole(llm)
    for request_id, prompt in ids.items():
        expected = tiny.reference_tokens(reference, prompt, 24)
        got = tokens_of(outputs[request_id])
        if outputs[request_id][-1].finish_reason == "abort":
            assert request_id in doomed
            assert got == expected[: len(got)]
        else:
            assert got == expected


@pytest.mark.parametrize("kv_handoff", ["copy", "direct"])
def test_prefix_hits_on_both_devices(checkpoint, kv_handoff):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(4, seed=3, shared=70)
    with two_devices(path, lazy=False, kv_handoff=kv_handoff) as llm:
        llm.generate([prompts[0]], GREEDY, use_tqdm=False)
        computed, sent = llm.counters.prefill_tokens, llm.counters.handoff_blocks
        answers = llm.generate(prompts[1:], GREEDY, use_tqdm=False)
        # 64 of the 70 shared tokens are whole blocks: neither computed nor sent again.
        assert llm.counters.prefill_tokens - computed == sum(map(len, prompts[1:])) - 3 * 64
        assert llm.counters.handoff_blocks - sent == sum(-(-len(prompt) // 16) - 4 for prompt in prompts[1:])
    for prompt, answer in zip(prompts[1:], answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.parametrize("kv_handoff", ["copy", "direct"])
def test_blocks_cached_on_the_prefill_device_alone_are_sent(checkpoint, kv_handoff):
    path, reference = checkpoint("gqa2")
    prompt = tiny.random_prompts(1, seed=4, longest=1, shared=79)[0]
    with two_devices(path, lazy=False, kv_handoff=kv_handoff) as llm:
        copied = []
        copy = llm.prefill_runner.sync_kv_cache_to
        llm.prefill_runner.sync_kv_cache_to = lambda other, pairs, **options: (
            copied.extend(pairs),
            copy(other, pairs, **options),
        )[1]
        # A request that ends with its first token leaves KV on the prefill device and hands nothing over.
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        assert llm.counters.handoffs == 0
        computed = llm.counters.prefill_tokens
        answer = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
        assert llm.counters.prefill_tokens - computed == 16
        assert llm.counters.handoff_blocks == 5
        assert len(copied) == (5 if kv_handoff == "copy" else 0)
    assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


def test_the_first_token_comes_before_the_handoff_ends_and_once(checkpoint):
    path, reference = checkpoint("gqa2")
    prompt = tiny.random_prompts(1, seed=6, shared=40)[0]
    with two_devices(path) as llm:
        llm.kv_transfer = stalled = FaultyTransfer(llm.kv_transfer, "stall", lambda number: True)
        request_id = llm.add_request(prompt, GREEDY)
        outputs = []
        while not outputs:
            outputs += llm.step()
        assert llm._handoffs
        assert llm.counters.handoffs == 0
        stalled.unstall()
        outputs += drain(llm)[request_id]
        assert_whole(llm)
    assert tokens_of(outputs) == tiny.reference_tokens(reference, prompt, 24)


def test_chunks_cross_while_later_chunks_prefill(tiny_path):
    prompt = tiny.random_prompts(1, seed=7, longest=1, shared=95)[0]
    with two_devices(tiny_path, lazy=False, max_num_batched_tokens=32) as llm:
        llm.generate([prompt], GREEDY, use_tqdm=False)
        assert (llm.counters.prefill_steps, llm.counters.handoffs, llm.counters.handoff_blocks) == (3, 3, 6)


def test_nothing_is_shared_between_the_devices(tiny_path):
    with two_devices(tiny_path) as llm:
        prefill, decode = llm.prefill_runner, llm.decode_runner
        assert prefill is not decode
        assert prefill.device != decode.device
        assert (
            llm.scheduler.placement.prefill_card.block_manager is not llm.scheduler.placement.decode_card.block_manager
        )
        assert prefill.kv_pool.data_ptr() != decode.kv_pool.data_ptr()
        theirs = decode.model.checkpoint_tensors()
        for name, weight in prefill.model.checkpoint_tensors().items():
            assert weight.data.data_ptr() != theirs[name].data.data_ptr()
            assert torch.equal(weight.data, theirs[name].data)
        assert prefill.model.model.layers[0].attention.rotary is not decode.model.model.layers[0].attention.rotary
        assert prefill.model.model.layers[0].attention.rotary is prefill.model.model.layers[1].attention.rotary
        assert not torch.distributed.is_initialized()


def test_one_device_is_the_same_loop_with_one_runner(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        assert llm.prefill_runner is llm.decode_runner
        assert llm.scheduler.placement.prefill_card.block_manager is llm.scheduler.placement.decode_card.block_manager
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
        assert llm.counters.handoffs == 0


# Faults


def run_with_fault(llm: LLM, prompts: list[list[int]]) -> dict[int, list]:
    for prompt in prompts:
        llm.add_request(prompt, GREEDY)
    return drain(llm)


@pytest.mark.parametrize("fault", ["launch", "arrive"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_copy_that_fails_once_costs_a_retry_on_the_decode_device(checkpoint, fault, chunked):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=8, longest=60, shared=20)
    with two_devices(path, lazy=False, **({"max_num_batched_tokens": 32} if chunked else {})) as llm:
        llm.kv_transfer = FaultyTransfer(llm.kv_transfer, fault, lambda number: number in (1, 3))
        prefilled_on_decode = []
        launch = llm.decode_runner.launch
        llm.decode_runner.launch = lambda step: (
            prefilled_on_decode.append(bool(step.chunks)),
            launch(step),
        )[1]
        outputs = run_with_fault(llm, prompts)
        assert llm.kv_transfer.num_faults == 2
        assert any(prefilled_on_decode)
        assert_whole(llm)
    for index, prompt in enumerate(prompts):
        assert tokens_of(outputs[index]) == tiny.reference_tokens(reference, prompt, 24)
        assert outputs[index][-1].finish_reason == "length"


def test_a_copy_that_never_ends_times_out_with_both_sides_state(checkpoint, caplog):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(5, seed=9, longest=60)
    with two_devices(path, lazy=False, handoff_timeout_s=0.05) as llm:
        llm.kv_transfer = faulty = FaultyTransfer(llm.kv_transfer, "stall", lambda number: number == 2)
        outputs = run_with_fault(llm, prompts)
        assert "handoff_timeout_s=0.05; cpu:0: " in caplog.text
        assert " blocks held; cpu:1: " in caplog.text
        assert "handoff_timeout_s=0.05" in caplog.text
        # What the copy may still write to is held until it ends, and then free.
        llm.scheduler.check_integrity()
        assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks > 0
        faulty.unstall()
        llm.step()
        assert_whole(llm)
    for index, prompt in enumerate(prompts):
        assert tokens_of(outputs[index]) == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.parametrize("limit", [1, 3])
def test_a_backlog_of_handoffs_holds_prefill_back(checkpoint, limit):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(9, seed=15, longest=60)
    with two_devices(path, lazy=False, max_handoff_backlog=limit) as llm:
        llm.kv_transfer = faulty = FaultyTransfer(llm.kv_transfer, "stall", lambda number: True)
        ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
        for _ in range(40):
            llm._loop.launch_steps()
            llm._loop.collect_steps()
        statuses = [llm._outputs.sequences[request_id].status for request_id in ids]
        assert statuses.count(SequenceStatus.HANDING_OFF) == limit
        assert statuses.count(SequenceStatus.WAITING) == len(prompts) - limit
        faulty.unstall()
        outputs = drain(llm)
        assert_whole(llm)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 24)


def test_a_handoffs_time_runs_from_the_end_of_its_step(checkpoint, monkeypatch, caplog):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(2, seed=14)
    with two_devices(path, lazy=False, handoff_timeout_s=0.05) as llm:
        monkeypatch.setattr(StepHandle, "is_done", lambda handle: time.perf_counter() > handle.launched_s + 0.1)
        launch = llm.prefill_runner.launch

        def slow(step):
            handle = launch(step)
            handle.launched_s = time.perf_counter()
            return handle

        llm.prefill_runner.launch = slow
        monkeypatch.setattr(StepHandle, "launched_s", 0.0, raising=False)
        outputs = run_with_fault(llm, prompts[:1])
    assert "failed" not in caplog.text
    assert tokens_of(outputs[0]) == tiny.reference_tokens(reference, prompts[0], 24)


def test_a_retried_request_is_not_overtaken(tiny_path):
    """It waits for the other pool than those behind it, and still comes first."""
    prompts = tiny.random_prompts(12, seed=15, longest=1, shared=60)
    with two_devices(tiny_path, lazy=False, num_kvcache_blocks=6, enable_prefix_caching=False) as llm:
        llm.kv_transfer = FaultyTransfer(llm.kv_transfer, "arrive", lambda number: number == 0)
        ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
        ended = []
        while not llm.is_finished():
            ended += [output.request_id for output in llm.step() if output.finished]
    assert ended == ids


def test_blocks_that_a_stuck_copy_holds_end_the_requests_that_need_them_by_name(tiny_path):
    prompts = tiny.random_prompts(2, seed=10, longest=1, shared=100)
    with two_devices(tiny_path, lazy=False, handoff_timeout_s=0.05, num_kvcache_blocks=10) as llm:
        llm.kv_transfer = FaultyTransfer(llm.kv_transfer, "stall", lambda number: True)
        outputs = run_with_fault(llm, prompts)
        assert llm.is_finished()
        llm.scheduler.check_integrity()
        llm.kv_transfer.unstall()
        llm.step()
        assert_whole(llm)
    for index in range(2):
        assert outputs[index][-1].finish_reason == "error"
        assert isinstance(outputs[index][-1].error, HandoffTimeout)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("injected"), RuntimeError("injected")])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("device", ["prefill", "decode"])
def test_a_request_that_fails_in_a_forward_pass_is_retried_once_then_ends_by_name(checkpoint, error, times, device):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=11, longest=60)
    with two_devices(path) as llm:
        left = [times]

        def failing(runner):
            launch = runner.launch

            def fail(step):
                hit = any(seq.request_id == 2 for seq in step.seqs)
                if hit and (step.num_requests > 1 or left[0] > 0):
                    left[0] -= step.num_requests == 1
                    raise error
                return launch(step)

            runner.launch = fail

        for runner in (llm.prefill_runner, llm.decode_runner) if device == "prefill" else (llm.decode_runner,):
            failing(runner)
        outputs = run_with_fault(llm, prompts)
        assert_whole(llm)
    for index, prompt in enumerate(prompts):
        expected = tiny.reference_tokens(reference, prompt, 24)
        got = tokens_of(outputs[index])
        if index == 2 and times == 2:
            assert outputs[2][-1].finish_reason == "error"
            assert outputs[2][-1].error is error
            assert got == expected[: len(got)]
        else:
            assert got == expected


def test_verify_notices_what_a_step_pushed_wrong(checkpoint, caplog):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(3, seed=12, longest=60, shared=30)
    with two_devices(path, lazy=False, kv_handoff="direct", verify_kv_handoff=True) as llm:
        launch, launched = llm.prefill_runner.launch, []

        def corrupting(step):
            handle = launch(step)
            if not launched:
                with torch.inference_mode():
                    llm.decode_runner.kv_pool[step.chunks[0].handoff[0][1], 1, 0, 0, 0, 0] += 1e-3
            launched.append(step)
            return handle

        llm.prefill_runner.launch = corrupting
        outputs = run_with_fault(llm, prompts)
        assert_whole(llm)
    goal = launched[0].chunks[0].handoff[0][1]
    assert f"handoff of request 0 from cpu:0 to cpu:1 by 'direct': block {goal} of the target pool" in caplog.text
    assert "differs in layer 1" in caplog.text
    for index, prompt in enumerate(prompts):
        assert tokens_of(outputs[index]) == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.parametrize("kv_handoff", ["copy", "direct"])
def test_prefill_steps_are_launched_ahead(checkpoint, kv_handoff):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(8, seed=21, longest=60)
    most = 0
    with two_devices(path, lazy=False, kv_handoff=kv_handoff, max_num_batched_tokens=24) as llm:
        launch = llm._loop.launch_steps

        def watched_launch():
            nonlocal most
            launched = launch()
            most = max(most, len(llm._steps.on(llm.scheduler.placement.prefill_card)))
            return launched

        llm._loop.launch_steps = watched_launch
        ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
        outputs = drain(llm, steps_overlap=True)
        assert_whole(llm)
    assert most == 2
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 24)


def test_verify_names_request_block_and_layer(checkpoint, caplog):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(3, seed=12, longest=60, shared=30)
    with two_devices(path, lazy=False, verify_kv_handoff=True) as llm:
        send = llm.prefill_runner.sync_kv_cache_to
        sent = []

        def corrupt(other, pairs, **options):
            event = send(other, pairs, **options)
            if len(sent) == 1:
                with torch.inference_mode():
                    other.kv_pool[pairs[0][1], 1, 0, 0, 0, 0] += 1e-3
            sent.append(pairs)
            return event

        llm.prefill_runner.sync_kv_cache_to = corrupt
        outputs = run_with_fault(llm, prompts)
        assert_whole(llm)
    assert (
        f"handoff of request 1 from cpu:0 to cpu:1 by 'copy': block {sent[1][0][1]} of the target pool" in caplog.text
    )
    assert "differs in layer 1" in caplog.text
    for index, prompt in enumerate(prompts):
        assert tokens_of(outputs[index]) == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.parametrize("mistake", ["skip_wait", "skip_block", "wrong_slot", "nothing_sent"])
def test_the_tests_above_would_notice_a_wrong_handoff(checkpoint, mistake):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(6, seed=13, longest=60, shared=20)
    with two_devices(path, lazy=False, enable_prefix_caching=False) as llm:
        if mistake == "nothing_sent":
            llm.scheduler._handoff = lambda *chunk: ((), range(0))  # as if both cards had one pool
        else:
            llm.kv_transfer = SabotagedTransfer(llm.kv_transfer, mistake)
        try:
            answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        except AssertionError:
            return
        tokens = [answer["token_ids"] for answer in answers]
    assert tokens != [tiny.reference_tokens(reference, prompt, 24) for prompt in prompts]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_device_id": 1}, "are both 1; pass two different ids"),
        ({"prefill_device_id": -1}, "prefill_device_id=-1 is not a device id"),
        ({"decode_device_id": True}, "decode_device_id=True is not a device id"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 and enable_two_gpu_pd=True exclude each other"),
        ({"kv_handoff": "push"}, "kv_handoff='push' needs two GPUs with peer access"),
        ({"kv_handoff": "pusch"}, "did you mean 'push'"),
        ({"handoff_timeout_s": 0}, "handoff_timeout_s=0 is not a positive number of seconds"),
        ({"device": "cuda:1"}, "names one GPU, enable_two_gpu_pd uses two"),
        ({"enable_two_gpu_pd": False, "kv_handoff": "copy"}, "kv_handoff given without enable_two_gpu_pd=True"),
        ({"enable_two_gpu_pd": "yes"}, "enable_two_gpu_pd='yes' is not a bool"),
        ({"decode_attention_sm": 48}, "decode_attention_sm given without enable_decode_pipeline=True"),
        ({"enable_decode_pipeline": True, "decode_ffn_sm": 0}, "decode_ffn_sm=0 is not a positive integer"),
        ({"enable_decode_pipeline": True, "decode_micro_batches": 1}, "decode_micro_batches=1 is not an integer from"),
        ({"enable_decode_pipeline": True, "decode_pipeline": "statc"}, "did you mean 'static'"),
    ],
)
def test_refused_options(tiny_path, options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(tiny_path, **{**TWO, **options})


def test_a_pipeline_needs_two_devices(tiny_path):
    with pytest.raises(ConfigError, match="enable_decode_pipeline=True needs enable_two"):
        LLM(tiny_path, device="cpu", enable_decode_pipeline=True)


def test_ways_of_handing_over(monkeypatch):
    gpus, cpus = ([Device(kind, index) for index in range(2)] for kind in ("cuda", "cpu"))
    monkeypatch.setattr(kv_transfer, "peer_access", lambda source, target: source.is_cuda)
    assert resolve_handoff("auto", *gpus) == "direct"
    assert resolve_handoff("push", *gpus) == "push"
    assert resolve_handoff("auto", *cpus) == "copy"
    assert resolve_handoff("direct", *cpus) == "direct"
    monkeypatch.setattr(kv_transfer, "peer_access", lambda source, target: False)
    assert [resolve_handoff(option, *gpus) for option in ("auto", "copy")] == ["staged", "staged"]
    for option in ("push", "direct"):
        with pytest.raises(ConfigError, match=f"kv_handoff='{option}' needs two GPUs with peer access"):
            resolve_handoff(option, *gpus)


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="two GPUs are here")
def test_fewer_than_two_gpus_are_refused(tiny_path):
    with pytest.raises(ConfigError, match="needs two GPUs and torch sees"):
        LLM(tiny_path, enable_two_gpu_pd=True)


def test_a_prompt_larger_than_either_pool_is_refused(tiny_path):
    with two_devices(tiny_path, num_kvcache_blocks=4) as llm:
        with pytest.raises(RequestError, match="the KV pool holds 64"):
            llm.add_request([1] * 65, GREEDY)
        assert llm.is_finished()


def test_sync_kv_cache_to_copies_blocks_between_runners(tiny_path):
    with two_devices(tiny_path, lazy=False, num_kvcache_blocks=6) as llm:
        source, target = llm.prefill_runner, llm.decode_runner
        with torch.inference_mode():
            source.kv_pool.normal_()
        event = source.sync_kv_cache_to(target, [(0, 5), (3, 1)])
        event.synchronize()
        assert torch.equal(target.kv_pool[5], source.kv_pool[0])
        assert torch.equal(target.kv_pool[1], source.kv_pool[3])
        assert not target.kv_pool[[0, 2, 3, 4]].any()


def test_handoff_errors_are_errors_of_this_package():
    assert issubclass(HandoffTimeout, HandoffError)
    assert issubclass(HandoffTimeout, TimeoutError)


def test_direct_writes_no_block_that_the_decode_device_has(checkpoint):
    path, _ = checkpoint("gqa2")
    prompt = tiny.random_prompts(1, seed=9, longest=1, shared=60)[0]
    with two_devices(path, lazy=False, kv_handoff="direct") as llm:
        llm.generate([prompt[:40]], GREEDY, use_tqdm=False)
        before = llm.decode_runner.kv_pool.clone()
        ids = llm.add_request([*prompt, 5], SamplingParams(temperature=0, max_tokens=2))
        table: list[int] = []
        while not llm.is_finished():
            seq = llm._outputs.sequences[ids]
            table = list(seq.lease.decode.blocks) if seq.lease else table
            llm.step()
        changed = (llm.decode_runner.kv_pool != before).flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) <= set(table[2:])
    assert set(table[2:4]) <= set(changed)


def test_pipeline_statistics(checkpoint, capsys):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(5, seed=8)
    with two_devices(
        path, lazy=False, enable_decode_pipeline=True, decode_pipeline="static", decode_pipeline_profiling=True
    ) as llm:
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        result = llm.decode_runner.get_pipeline_statistics()
        llm.decode_runner.print_pipeline_statistics()
    assert result["total_tokens"] == sum(len(answer["token_ids"]) - 1 for answer in answers)
    assert result["avg_total_ms"] >= result["avg_attention_ms"] > 0
    assert "[M2 Pipeline Statistics - decode card cpu:1]" in capsys.readouterr().out
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)
    with two_devices(path, lazy=False, enable_decode_pipeline=True, decode_pipeline="disabled") as llm:
        llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.decode_runner.get_pipeline_statistics()["total_tokens"] == 0


def test_a_refused_partition_falls_back_to_plain_decode(checkpoint, monkeypatch, caplog):
    path, reference = checkpoint("gqa2")

    def refuse(manager, split=None):
        raise GreenContextError("cuGreenCtxCreate failed for 48 SMs: injected")

    monkeypatch.setattr(GreenManager, "allocate", refuse)
    prompts = tiny.random_prompts(3, seed=8)
    with two_devices(path, lazy=False, enable_decode_pipeline=True) as llm:
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        result = llm.decode_runner.get_pipeline_statistics()
    assert result["fallbacks"] == {"cuGreenCtxCreate failed for 48 SMs: injected": 1}
    assert result["total_tokens"] == 0
    assert "no decode pipeline, decode is plain: cuGreenCtxCreate failed" in caplog.text
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


def test_a_split_that_was_asked_for_and_is_not_granted_is_an_error(checkpoint, monkeypatch):
    path, _ = checkpoint("gqa2")
    allocate = GreenManager.allocate

    def grant_no_odd_ones(manager, split=None):
        if manager.split[0] % 2:
            raise GreenContextError("asked for 5 and 7 SMs and grants 8 and 8")
        return allocate(manager, split)

    monkeypatch.setattr(GreenManager, "allocate", grant_no_odd_ones)
    options = {"enable_decode_pipeline": True, "decode_attention_sm": 5, "decode_ffn_sm": 7}
    with pytest.raises(GreenContextError, match="asked for 5 and 7 SMs and grants 8 and 8"):
        two_devices(path, lazy=False, **options)


def test_auto_on_a_cpu_is_plain_decode(checkpoint):
    path, _ = checkpoint("gqa2")
    with two_devices(path, lazy=False, enable_decode_pipeline=True) as llm:
        assert list(llm.decode_runner.decode.paths.steps) == [None]


def test_a_pipeline_that_cannot_run_is_known_at_the_start(checkpoint, monkeypatch):
    path, reference = checkpoint("gqa2")

    def fail(pipeline, *args):
        raise BackendUnavailableError("cuda_gemm.cu needs NVRTC: injected")

    monkeypatch.setattr(PipelineScheduler, "decode_token", fail)
    prompts = tiny.random_prompts(3, seed=8)
    with two_devices(path, lazy=False, enable_decode_pipeline=True, decode_pipeline="static") as llm:
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        result = llm.decode_runner.get_pipeline_statistics()
    assert result["fallbacks"] == {"cuda_gemm.cu needs NVRTC: injected": 1}
    assert (result["steps"], result["arrangements"]) == (0, [])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


def one_candidate(*calibrator_and_options):
    return [Arrangement((0, 0), Cut.GEMMS)]


def test_auto_of_requests_too_short_to_time_is_plain_decode(checkpoint, monkeypatch):
    path, _ = checkpoint("gqa2")
    monkeypatch.setattr(decode_calibrator, "CALIBRATED_BATCHES", (2, 4))
    monkeypatch.setattr(
        decode_calibrator.DecodeCalibrator, "_candidates", lambda *args: [Arrangement((0, 0), Cut.GEMMS)]
    )
    with two_devices(path, lazy=False, enable_decode_pipeline=True, max_model_len=3) as llm:
        assert llm.decode_runner.decode.paths.calibration.points == []
        llm.generate([[1]], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        assert llm.decode_runner.get_pipeline_statistics()["steps"] == 0


def test_auto_runs_the_pipeline_where_it_measured_faster(checkpoint, monkeypatch):
    path, reference = checkpoint("gqa2")
    monkeypatch.setattr(decode_calibrator, "CALIBRATED_BATCHES", (2, 4, 8))
    monkeypatch.setattr(decode_calibrator, "CALIBRATED_CONTEXTS", (16, 64))
    monkeypatch.setattr(
        decode_calibrator.DecodeCalibrator, "_candidates", lambda *args: [Arrangement((0, 0), Cut.GEMMS)]
    )
    monkeypatch.setattr(decode_calibrator.DecodeCalibrator, "_warm_up", lambda paths, run: None)
    monkeypatch.setattr(decode_calibrator.DecodeCalibrator, "_time", lambda paths, run: timed(run))

    def timed(run):
        # As if the pipeline paid for batches of 4 and more.
        (size,), is_plain = run.args, run.keywords["arrangement"] is None
        run()
        return 1.0 if is_plain else 0.9 if size >= 4 else 1.1

    prompts = tiny.random_prompts(7, seed=8)
    params = [SamplingParams(temperature=0, max_tokens=4 + 4 * place) for place in range(7)]
    with two_devices(path, lazy=False, enable_decode_pipeline=True) as llm:
        runner = llm.decode_runner
        assert [(point.batch, point.context) for point in runner.decode.paths.calibration.points] == [
            (batch, context) for batch in (2, 4, 8) for context in (16, 64)
        ]
        answers = llm.generate(prompts, params, use_tqdm=False)
        result = runner.get_pipeline_statistics()
        assert_whole(llm)
    # The last requests decode alone.
    assert 0 < result["steps"] < llm.counters.decode_steps
    for prompt, answer, of_it in zip(prompts, answers, params, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, of_it.max_tokens)


def test_auto_without_a_batch_to_calibrate_for_is_plain_decode(checkpoint):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(3, seed=8)
    with two_devices(path, lazy=False, enable_decode_pipeline=True, max_num_seqs=8) as llm:
        assert llm.decode_runner.decode.paths.calibration.points == []
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.decode_runner.get_pipeline_statistics()["steps"] == 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)
