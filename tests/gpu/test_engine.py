"""The engine on one card: tokens of transformers in float32, the demo model's answers in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, OutOfKVCacheError, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.kernels import cuda_prefill_attention
from tests import tiny
from tests.test_engine import drain, tokens_of
from tests.test_mixed_step import serve
from tests.test_prompt_logprobs import assert_reported
from tests.test_sampling import PENALTIES, penalised_tokens

pytestmark = pytest.mark.gpu

QUESTIONS = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
GREEDY = SamplingParams(temperature=0, max_tokens=40)
TINY_FOR_TRITON = {"head_dim": 64}


@pytest.fixture(scope="module")
def tiny_on_disk(tmp_path_factory):
    model = tiny.make_reference(seed=1, **TINY_FOR_TRITON)
    return tiny.save(model, tmp_path_factory.mktemp("tiny64")), model


@pytest.mark.whole_card
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
        {"num_kvcache_blocks": 9},
        {"max_num_seqs": 3},
        {"max_num_seqs": 3, "enforce_eager": True},
    ],
)
def test_float32_tokens_equal_transformers(tiny_on_disk, backend, mode):
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(8, seed=1) + tiny.random_prompts(4, seed=2, longest=40, shared=48)
    options = {"gpu_memory_utilization": 0.3, "kvcache_block_size": 16, **mode}
    kinds = set()
    with LLM(path, device="cuda", dtype="float32", attention_backend=backend, **options) as llm:
        llm.add_step_listener(lambda report: kinds.add(report.kind))
        params = [SamplingParams(temperature=0, max_tokens=20 + number) for number in range(12)]
        answers = llm.generate(prompts, params, use_tqdm=False)
        llm.scheduler.check_integrity()
    assert ("mixed" in kinds) == bool(mode.keys() - {"enforce_eager"})
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 20 + number)


@pytest.mark.whole_card
def test_seeded_tokens_equal_those_of_a_cpu(tiny_on_disk):
    path, _ = tiny_on_disk
    prompts = tiny.random_prompts(6, seed=3)
    params = [SamplingParams(temperature=0.8, top_k=20 * (i % 2), top_p=0.9, seed=i, max_tokens=30) for i in range(6)]
    with LLM(path, device="cpu") as llm:
        expected = [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)]
    with LLM(path, device="cuda", dtype="float32", gpu_memory_utilization=0.3) as llm:
        assert [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)] == expected


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_penalties_are_those_of_their_definition(tiny_on_disk, penalties):
    """The counts are on the device; steps that need them run from graphs, launched ahead."""
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(6, seed=15, longest=30)
    params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, **penalties)
    with LLM(path, device="cuda", dtype="float32", num_kvcache_blocks=200, max_num_seqs=4) as llm:
        answers = llm.generate(prompts, params, use_tqdm=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == penalised_tokens(reference, prompt, 25, penalties)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
        {"enforce_eager": True, "max_num_batched_tokens": 64},
    ],
)
def test_log_probabilities_of_prompts_are_those_of_transformers(tiny_on_disk, backend, mode):
    """Steps that report them run without a graph, beside steps that run from one; launched ahead."""
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(8, seed=17) + tiny.random_prompts(4, seed=18, longest=40, shared=48)
    params = [SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=(None, 2, 0)[i % 3]) for i in range(12)]
    options = {"num_kvcache_blocks": 400, "kvcache_block_size": 16, "max_num_seqs": 8, **mode}
    with LLM(path, device="cuda", dtype="float32", attention_backend=backend, **options) as llm:
        ids = [llm.add_request(*pair) for pair in zip(prompts, params, strict=True)]
        outputs = drain(llm)
    for index, (request_id, prompt) in enumerate(zip(ids, prompts, strict=True)):
        assert tokens_of(outputs[request_id]) == tiny.reference_tokens(reference, prompt, 20)
        if index % 3:
            assert_reported(outputs[request_id][0].prompt_logprobs, prompt, reference, params[index].prompt_logprobs)


@pytest.mark.whole_card
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 64},
        {"max_num_seqs": 100},
    ],
)
def test_demo_answers_in_bfloat16_equal_the_written_ones(options):
    assert not questions_answered_otherwise(options)


@pytest.mark.whole_card
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True, "max_num_batched_tokens": 512}])
def test_demo_answers_with_large_tiles_of_prompts_equal_the_written_ones(options, monkeypatch):
    """The kernel for prompts on Hopper in every step with prompts, however few their tokens."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper")
    monkeypatch.setattr(cuda_prefill_attention, "LEAST_TILES_PER_SM", 0)
    calls: list[int] = []
    attend = cuda_prefill_attention.attend

    def counted(query: torch.Tensor, *rest: Any) -> None:
        calls.append(len(query))
        attend(query, *rest)

    monkeypatch.setattr(cuda_prefill_attention, "attend", counted)
    assert not questions_answered_otherwise(options)
    assert calls


def questions_answered_otherwise(options: dict[str, Any]) -> list[str]:
    conversations = [[{"role": "user", "content": pair["question"]}] for pair in QUESTIONS]
    with LLM(DEMO_MODEL_PATH, device="cuda", gpu_memory_utilization=0.3, **options) as llm:
        assert llm.decode_runner.kv_pool.dtype == torch.bfloat16
        assert llm.decode_runner.spec.attention.backend.name == "triton"
        answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=512), use_tqdm=False)
    return [p["question"] for p, a in zip(QUESTIONS, answers, strict=True) if a["text"] != p["answer"]]


@pytest.mark.parametrize("eager", [False, True])
def test_requests_join_the_step_behind_their_prompts(tiny_on_disk, eager):
    """Streamed ones, which come while others decode: their first tokens go to their decode rows on the card."""
    path, reference = tiny_on_disk
    prompts = tiny.random_prompts(10, seed=16, longest=60)
    options = {"num_kvcache_blocks": 400, "max_num_batched_tokens": 64, "prefill_chunk_tokens": 16, "max_num_seqs": 8}
    with LLM(path, device="cuda", dtype="float32", enforce_eager=eager, **options) as llm:
        found, kinds = serve(llm, prompts, GREEDY)
        assert "mixed" in kinds
        assert llm.metrics()["leases"] == 0
    assert found == [tiny.reference_tokens(reference, prompt, 40) for prompt in prompts]


@pytest.mark.whole_card
def test_pool_fills_what_it_may_and_close_gives_it_back(tiny_on_disk):
    path, _ = tiny_on_disk
    free_before, total = torch.cuda.mem_get_info()
    llm = LLM(path, device="cuda", gpu_memory_utilization=0.5, max_num_batched_tokens=2048, max_num_seqs=16)
    used = total - torch.cuda.mem_get_info()[0]
    assert abs(used / total - 0.5) < 0.01
    llm.generate(tiny.random_prompts(4), GREEDY, use_tqdm=False)
    llm.close()
    torch.cuda.empty_cache()
    assert free_before - torch.cuda.mem_get_info()[0] < 1024**3
    with pytest.raises(OutOfKVCacheError, match="GiB"):
        LLM(path, device="cuda", num_kvcache_blocks=10**9)
