"""Greedy tokens equal transformers' own `generate`, whatever turns a request takes on the way."""

from __future__ import annotations

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests import tiny

GREEDY = SamplingParams(temperature=0, max_tokens=40)

MODES = {
    "plain": {},
    "no_prefix_caching": {"enable_prefix_caching": False},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    # 9 blocks of 16 tokens for 8 requests of up to 130 tokens: they push each other out.
    "preempted": {"num_kvcache_blocks": 9},
    "preempted_chunked": {"num_kvcache_blocks": 9, "max_num_batched_tokens": 20, "enable_prefix_caching": False},
    "few_at_a_time": {"max_num_seqs": 3, "kvcache_block_size": 32},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_greedy_tokens_equal_transformers(checkpoint, variant, mode):
    path, reference = checkpoint(variant)
    prompts = tiny.random_prompts(4, seed=1) + tiny.random_prompts(4, seed=2, longest=40, shared=48)
    with LLM(path, device="cpu", **MODES[mode]) as llm:
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        llm.scheduler.check_integrity()
        assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0
        if mode.startswith("preempted"):
            assert llm.scheduler.num_preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 40)
        assert answer["finish_reason"] == "length"


def test_prefix_hits_change_no_token(checkpoint):
    path, reference = checkpoint("gqa2")
    prompts = tiny.random_prompts(5, seed=3, shared=70)
    with LLM(path, device="cpu") as llm:
        llm.generate([prompts[0]], GREEDY, use_tqdm=False)
        before = llm.counters.prefill_tokens
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        saved = sum(map(len, prompts)) - (llm.counters.prefill_tokens - before)
        # The first prompt comes back whole but for its last token's block; the others share 64 tokens of 70.
        assert saved >= 64 * 4 + 64
        # Output tokens are cached too: the continuation of an answer finds its blocks.
        before = llm.counters.prefill_tokens
        longer = prompts[0] + answers[0]["token_ids"] + [5]
        again = llm.generate([longer], GREEDY, use_tqdm=False)[0]
        assert llm.counters.prefill_tokens - before <= 17
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 40)
    assert again["token_ids"] == tiny.reference_tokens(reference, longer, 40)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_logits_are_within_1e_4_of_transformers(checkpoint, variant):
    path, reference = checkpoint(variant)
    prompt = tiny.random_prompts(1, seed=4, longest=90, shared=30)[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with LLM(path, device="cpu") as llm:
        for end in (1, 16, 17, len(prompt)):
            answer = llm.generate([prompt[:end]], SamplingParams(temperature=0, max_tokens=1, logprobs=20), False)[0]
            for token, logprob in answer["logprobs"][0].top.items():
                assert logprob == pytest.approx(expected[end - 1, token].item(), abs=1e-4)


def test_two_engines_in_one_process_do_not_mix(checkpoint):
    (path_a, model_a), (path_b, model_b) = checkpoint("yarn_tied"), checkpoint("gqa8_three_layers")
    prompts = tiny.random_prompts(3, seed=5)
    with LLM(path_a, device="cpu") as a, LLM(path_b, device="cpu", kvcache_block_size=32) as b:
        streams = [(llm.generate_stream(p, GREEDY), m, p) for llm, m in ((a, model_a), (b, model_b)) for p in prompts]
        tokens: list[list[int]] = [[] for _ in streams]
        for _ in range(40):
            for collected, (stream, _, _) in zip(tokens, streams, strict=True):
                collected += next(stream).new_token_ids
    for collected, (_, model, prompt) in zip(tokens, streams, strict=True):
        assert collected == tiny.reference_tokens(model, prompt, 40)


def test_sharded_checkpoint_loads_the_same(checkpoint, tmp_path):
    _, reference = checkpoint("gqa2")
    path = tiny.save(reference, tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    prompt = tiny.random_prompts(1, seed=6)[0]
    with LLM(path, device="cpu") as llm:
        answer = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 40)
