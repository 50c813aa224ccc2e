"""Every family on cards: tokens of transformers in float32, in every mode."""

from __future__ import annotations

import pytest

from nanovllm import LLM, SamplingParams
from tests import tiny

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=24)
OPTIONS = {"device": "cuda", "dtype": "float32", "kvcache_block_size": 16, "num_kvcache_blocks": 500}
ONE_CARD = {
    "plain": {},
    "eager": {"enforce_eager": True},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "torch": {"attention_backend": "torch"},
}
TWO_CARDS = {
    "direct": {"enable_two_gpu_pd": True, "card_roles": "fixed", "kv_handoff": "direct"},
    "push": {"enable_two_gpu_pd": True, "kv_handoff": "push", "verify_kv_handoff": True},
    "pipeline": {"enable_two_gpu_pd": True, "enable_decode_pipeline": True, "decode_pipeline": "static"},
    "ranks": {"tensor_parallel_size": 2},
}


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Variants with heads as the Triton kernels have them: the folder, and transformers' model."""
    made = {}

    def make(variant):
        if variant not in made:
            model = tiny.make_reference(seed=1, **{**tiny.FAMILY_VARIANTS[variant], "head_dim": 64})
            made[variant] = tiny.save(model, tmp_path_factory.mktemp(variant)), model
        return made[variant]

    return make


def check(path, reference, options):
    prompts = tiny.random_prompts(6, seed=1) + tiny.random_prompts(3, seed=2, longest=40, shared=48)
    with LLM(path, max_model_len=256, **{**OPTIONS, **options}) as llm:
        answers = llm.generate(prompts, GREEDY, use_tqdm=False)
        llm.scheduler.check_integrity()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.parametrize("mode", ONE_CARD)
@pytest.mark.parametrize("variant", tiny.FAMILY_VARIANTS)
def test_float32_tokens_equal_transformers(on_disk, variant, mode):
    check(*on_disk(variant), ONE_CARD[mode])


@pytest.mark.two_gpu
@pytest.mark.parametrize("mode", TWO_CARDS)
@pytest.mark.parametrize("variant", tiny.FAMILY_VARIANTS)
def test_float32_tokens_of_two_cards_equal_transformers(on_disk, variant, mode):
    if mode == "ranks" and "nine_heads" in variant:
        pytest.skip("two ranks do not share nine heads")
    check(*on_disk(variant), TWO_CARDS[mode])
