"""A real model, SmolLM2-135M-Instruct, on cards: bfloat16 says in every mode what transformers says in float32."""

from __future__ import annotations

import pytest
import torch

from nanovllm import LLM
from tests import weights

pytestmark = [pytest.mark.gpu, pytest.mark.weights]

OPTIONS = {"device": "cuda", "dtype": "bfloat16", "max_model_len": 1024, "num_kvcache_blocks": 512}
TWO = {"enable_two_gpu_pd": True, "card_roles": "fixed"}
MODES = [
    pytest.param({}, id="one_card"),
    pytest.param({"enforce_eager": True}, id="eager"),
    pytest.param({"max_num_batched_tokens": 96, "prefill_chunk_tokens": 40}, id="chunked"),
    pytest.param({"attention_backend": "torch"}, id="torch"),
    pytest.param(TWO, id="two_cards", marks=pytest.mark.two_gpu),
    pytest.param({**TWO, "kv_handoff": "copy"}, id="copy", marks=pytest.mark.two_gpu),
    pytest.param(
        {**TWO, "enable_decode_pipeline": True, "decode_pipeline": "static"}, id="pipeline", marks=pytest.mark.two_gpu
    ),
    # 9 query and 3 KV heads: three ranks share them, two cannot.
    pytest.param(
        {"tensor_parallel_size": 3},
        id="tensor_parallel",
        marks=[
            pytest.mark.two_gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs: 3 KV heads"),
        ],
    ),
]


@pytest.fixture(scope="module")
def reference(smollm2_path):
    return weights.load_reference(smollm2_path, "cuda")


@pytest.mark.parametrize("mode", MODES)
def test_perplexity_in_bfloat16_is_that_of_float32(smollm2_path, reference, mode):
    """Over some 2,000 sampled tokens: as the engine reports their log-probabilities, and as transformers computes them.

    A fixed text would not do: only what a mode samples has been through its handoff, its lanes and its graphs.
    """
    with LLM(str(smollm2_path), **OPTIONS, **mode) as llm:
        own, theirs = weights.sampled_perplexities(llm, reference)
        if mode.get("enable_decode_pipeline"):
            statistics = llm.decode_runner.get_pipeline_statistics()
            assert statistics["fallbacks"] == {}
            assert statistics["steps"] > 0
    assert own == pytest.approx(theirs, rel=0.003)
