"""One model on two cards: NCCL in CUDA graphs, transformers' tokens, a rank that dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from nanovllm import LLM, ConfigError, SamplingParams, WorkerError
from nanovllm.demo import DEMO_MODEL_PATH
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpu]

OPTIONS = {"device": "cuda", "dtype": "float32", "kvcache_block_size": 16, "num_kvcache_blocks": 2000}
MODES = {
    "plain": {},
    "eager": {"enforce_eager": True},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "preempted": {"num_kvcache_blocks": 9},
}


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    sizes = {"vocab_size": 208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    model = tiny.make_reference(seed=3, **sizes)
    return tiny.save(model, tmp_path_factory.mktemp("even")), model


def prompts_for(count, seed, **options):
    return [[token % 208 for token in prompt] for prompt in tiny.random_prompts(count, seed=seed, **options)]


@pytest.mark.parametrize("mode", MODES)
def test_float32_tokens_equal_transformers(even, mode):
    path, reference = even
    prompts = prompts_for(6, seed=1) + prompts_for(4, seed=2, longest=40, shared=48)
    with LLM(path, tensor_parallel_size=2, **{**OPTIONS, **MODES[mode]}) as llm:
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    assert multiprocessing.active_children() == []
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


def test_demo_answers_in_bfloat16_equal_the_written_ones():
    pairs = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
    conversations = [[{"role": "user", "content": pair["question"]}] for pair in pairs]
    with LLM(DEMO_MODEL_PATH, device="cuda", gpu_memory_utilization=0.2, tensor_parallel_size=2) as llm:
        answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=512), use_tqdm=False)
    wrong = [pair for pair, answer in zip(pairs, answers, strict=True) if answer["text"] != pair["answer"]]
    assert not wrong


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_is_gone_ends_all_requests_by_name(even, how):
    with LLM(even[0], tensor_parallel_size=2, step_timeout_s=3.0, **OPTIONS) as llm:
        (process,) = llm.decode_runner._followers._processes
        for prompt in prompts_for(6, seed=9):
            llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=400))
        for _ in range(5):
            llm.step()
        os.kill(process.pid, how)
        started, ended = time.monotonic(), []
        while not llm.is_finished():
            ended += [output for output in llm.step() if output.finished]
        assert time.monotonic() - started < 20
        assert [output.finish_reason for output in ended] == ["error"] * 6
        assert all(isinstance(output.error, WorkerError) for output in ended)
        with pytest.raises(WorkerError, match="start a new process"):
            llm.add_request([1])
        time.sleep(5)  # a watchdog that ends the process would have by now


def test_more_ranks_than_cards_are_refused(even):
    with pytest.raises(ConfigError, match="tensor_parallel_size=64, but torch sees"):
        LLM(even[0], tensor_parallel_size=64, **OPTIONS)
