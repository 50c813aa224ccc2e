"""Cards in processes of their own, a GPU each: one card's tokens, KV by NIXL over NVLink, also when one is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time

import pytest

from nanovllm import LLM, SamplingParams
from tests import tiny
from tests.test_cluster_ray import run_scenario

if importlib.util.find_spec("nixl_cu13") is not None:
    from nanovllm.entrypoints.cluster_doctor import examine_cluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.two_gpu,
    pytest.mark.skipif(importlib.util.find_spec("nixl_cu13") is None, reason="needs nixl-cu13"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=24)
OPTIONS = {"device": "cuda", "dtype": "float32", "kvcache_block_size": 16, "num_kvcache_blocks": 2000}
MODES = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "preempted": {"num_kvcache_blocks": 9},
    "eager": {"enforce_eager": True},
    "torch": {"attention_backend": "torch"},
}


@pytest.fixture(scope="module")
def tiny_on_disk(tmp_path_factory):
    model = tiny.make_reference(seed=1, head_dim=64)
    return tiny.save(model, tmp_path_factory.mktemp("tiny64")), model


@pytest.mark.parametrize("mode", MODES)
def test_float32_tokens_equal_transformers(tiny_on_disk, mode):
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(6, seed=61) + tiny.random_prompts(3, seed=62, longest=40, shared=48)
    with LLM(path, cluster="local", verify_kv_handoff=True, **{**OPTIONS, **MODES[mode]}) as llm:
        for _ in range(2):  # the second time much is found in the prefix caches
            answers = llm.generate(prompts, GREEDY, use_tqdm=False)
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)
        metrics = llm.metrics()
        assert metrics["handoff_bytes_by_link"].keys() == {"card 0 (cuda:0) to card 1 (cuda:1)"}
        llm.scheduler.check_integrity()
        assert all(card.block_manager.num_held_blocks == 0 for card in llm.scheduler.cards)


@pytest.mark.parametrize("card", [0, 1])
def test_a_killed_card_takes_no_request_with_it(tiny_on_disk, card):
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(24, seed=63)
    params = SamplingParams(temperature=0, max_tokens=200)
    with LLM(path, cluster="local", **OPTIONS) as llm:
        victim = next(runner for runner in llm._runners if runner.device.index == card)
        timer = threading.Timer(0.15, os.kill, (victim.pid, signal.SIGKILL))
        timer.start()
        answers = llm.generate(prompts, params, use_tqdm=False)
        timer.join()
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 200)
        deadline_s = time.monotonic() + 120
        while not all(each.is_up for each in llm.scheduler.cards) or llm._handoffs.under_way:
            if time.monotonic() > deadline_s:
                for runner in llm._runners:
                    if runner.is_up:
                        os.kill(runner.pid, signal.SIGUSR1)  # it prints where it is
                time.sleep(1.0)
                raise AssertionError(f"the card does not come back: {[runner.reason for runner in llm._runners]}")
            llm.step()
            time.sleep(0.01)
        answers = llm.generate(prompts[:4], GREEDY, use_tqdm=False)
        for prompt, answer in zip(prompts[:4], answers, strict=True):
            assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)
        llm.scheduler.check_integrity()


def test_the_doctor_finds_that_kv_crosses_by_peer_access():
    """UCX takes CUDA's memory of other processes, not the network, and no pair is slow."""
    findings = list(examine_cluster("local", 1, 1, "cuda"))
    assert {finding.verdict for finding in findings} == {"ok"}, findings
    pairs = [finding.found for finding in findings if " to " in finding.check]
    assert len(pairs) == 2
    for found in pairs:
        assert "cuda_ipc" in found
        assert float(found.split(" GB/s")[0]) > 20.0


def test_cards_that_ray_starts(tiny_on_disk):
    """Each sees all GPUs and uses the one that Ray has given, so that KV crosses by peer access there, too."""
    path, reference = tiny_on_disk
    found = run_scenario("gpus", path)
    prompts = tiny.random_prompts(6, seed=61)
    assert found["tokens"] == [tiny.reference_tokens(reference, prompt, 40) for prompt in prompts]
    assert sorted(found["devices"]) == ["cuda:0", "cuda:1"]
    assert all("cuda_ipc" in each for each in found["pairs"]), found["pairs"]
