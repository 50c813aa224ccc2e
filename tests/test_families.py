"""Every family that is served: transformers' greedy tokens in every mode, its defaults, its rotary tables."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanovllm import LLM, ConfigError, ModelLoadError, SamplingParams
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models import BY_ARCHITECTURE, FAMILIES, resolve_model
from nanovllm.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from tests import tiny
from tests.test_tensor_parallel import fork_server
from tests.transfers import poison_after_handoff

README = Path(__file__).parent.parent / "README.md"
TWO = {"enable_two_gpu_pd": True, "card_roles": "fixed"}
MODES = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "preempted": {"num_kvcache_blocks": 9},
    "two_devices": {**TWO, "enable_prefix_caching": False, "verify_kv_handoff": True},
    "direct": {**TWO, "kv_handoff": "direct", "max_num_batched_tokens": 24},
    "pipeline": {**TWO, "enable_decode_pipeline": True, "decode_pipeline": "static"},
}
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}


def prompts() -> list[list[int]]:
    return tiny.random_prompts(4, seed=1) + tiny.random_prompts(2, seed=2, longest=40, shared=48)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", tiny.FAMILY_VARIANTS)
def test_greedy_tokens_equal_transformers(checkpoint, variant, mode):
    path, reference = checkpoint(variant)
    with LLM(path, device="cpu", max_model_len=256, **MODES[mode]) as llm:
        if mode == "two_devices":
            poison_after_handoff(llm)
        answers = llm.generate(prompts(), GREEDY, use_tqdm=False)
        llm.scheduler.check_integrity()
        assert (llm.counters.handoff_blocks > 0) == ("enable_two_gpu_pd" in MODES[mode])
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.parametrize("variant", tiny.FAMILY_VARIANTS)
def test_greedy_tokens_of_ranks_equal_transformers(checkpoint, monkeypatch, variant):
    """Two ranks, or three where there are nine heads."""
    context = fork_server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    path, reference = checkpoint(variant)
    num_ranks = 3 if "nine_heads" in variant else 2
    with LLM(path, device="cpu", max_model_len=256, tensor_parallel_size=num_ranks) as llm:
        answers = llm.generate(prompts(), GREEDY, use_tqdm=False)
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 24)


@pytest.mark.parametrize("variant", tiny.FAMILY_VARIANTS)
def test_logits_are_within_1e_4_of_transformers(checkpoint, variant):
    path, reference = checkpoint(variant)
    prompt = tiny.random_prompts(1, seed=4, longest=90, shared=30)[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with LLM(path, device="cpu", max_model_len=256) as llm:
        for end in (1, 17, len(prompt)):
            answer = llm.generate([prompt[:end]], SamplingParams(temperature=0, max_tokens=1, logprobs=20), False)[0]
            for token, logprob in answer["logprobs"][0].top.items():
                assert logprob == pytest.approx(expected[end - 1, token].item(), abs=1e-4)


def test_every_family_has_a_variant():
    types = {variant.get("model_type", "qwen3") for variant in tiny.FAMILY_VARIANTS.values()}
    assert types == {family.model_type for family in FAMILIES}


@pytest.mark.parametrize("variant", ["llama_nine_heads_tied", "qwen3_nine_heads"])
def test_ranks_that_a_head_count_forbids_are_refused_by_name(checkpoint, variant):
    with pytest.raises(ConfigError, match=r"=2 does not divide 9 attention heads, 3 KV heads; pass one that divides 3"):
        LLM(checkpoint(variant)[0], device="cpu", tensor_parallel_size=2)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_what_a_config_leaves_out_is_as_in_transformers(family):
    theirs = AutoConfig.for_model(family.model_type, **SIZES, pad_token_id=None)
    # transformers' own defaults may not go together: 32 query heads do with each of its counts of KV heads.
    ours = family.read({"model_type": family.model_type, **SIZES})
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    share = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or share)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.rope.rope_type, ours.rope.theta) == ("default", theirs.rope_parameters["rope_theta"])
    has_rope = getattr(theirs, "no_rope_layers", [1] * SIZES["num_hidden_layers"])
    assert ours.layers_without_rope == tuple(layer for layer, rotates in enumerate(has_rope) if not rotates)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    architectures = [family.architectures[0]]
    model_class, description = resolve_model({"architectures": architectures, "model_type": family.model_type, **SIZES})
    assert description == ours
    made = model_class(ours, None, 1, dtype=torch.float32, device=torch.device("meta"))
    shapes = {name: weight.whole_shape for name, weight in made.checkpoint_tensors().items()}
    assert shapes == dict(tiny.stored_shapes(model))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_architectures_are_those_of_transformers(family):
    for name in family.architectures:
        assert getattr(transformers, name).config_class.model_type == family.model_type


REAL_ROPES = {
    "llama 2": (128, {"rope_theta": 10000.0}, 4096),
    "llama 3.1": (128, {**tiny.LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}, 131072),
    "llama 3.2": (
        64,
        {**tiny.LLAMA3, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192},
        131072,
    ),
    "llama3, other borders": (64, {**tiny.LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 20.0}, 4096),
    "linear": (128, {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0}, 16384),
    "yarn": (
        128,
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    "smollm3": (128, {"rope_theta": 5e6}, 65536),
}


@pytest.mark.parametrize("name", REAL_ROPES)
def test_rotary_tables_equal_transformers(name):
    head_dim, rope, max_positions = REAL_ROPES[name]
    fields = {**SIZES, "head_dim": head_dim, "rope_parameters": rope, "max_position_embeddings": max_positions}
    ours = RotaryEmbedding(FAMILIES[0].read({"model_type": "llama", **fields}).rope, max_positions, torch.device("cpu"))
    positions = torch.cat((torch.arange(4096), torch.arange(4096, max_positions, 997)))
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model("llama", **fields))
    cos, sin = theirs(torch.zeros(1), positions[None])
    # A frequency that is rounded otherwise turns the angle at position 131,072 by a few thousandths.
    tolerance = {"rtol": 0, "atol": 1e-6 if rope.get("rope_type", "default") == "default" else 5e-3}
    torch.testing.assert_close(ours.cos[positions], cos[0, :, : head_dim // 2], **tolerance)
    torch.testing.assert_close(ours.sin[positions], sin[0, :, : head_dim // 2], **tolerance)
    near = slice(None, 512)
    torch.testing.assert_close(ours.cos[near], cos[0, near, : head_dim // 2], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 512),
        ({**tiny.YARN, "original_max_position_embeddings": 64}, 256),
        (tiny.LLAMA3, 128),
        ({"rope_type": "default", "rope_theta": 1e4}, 128),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_stretched_positions_are_served(tmp_path, rope, most):
    model = tiny.make_reference(model_type="llama", max_position_embeddings=128, rope_parameters=rope)
    path = tiny.save(model, tmp_path)
    with pytest.raises(ConfigError, match=f"max_model_len={most + 1} is above the model's {most} positions"):
        LLM(path, device="cpu", max_model_len=most + 1)
    prompt = tiny.random_prompts(1, seed=3, longest=1, shared=most - 17)[0]
    with LLM(path, device="cpu", max_model_len=most) as llm:
        (answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    assert answer["token_ids"] == tiny.reference_tokens(model, prompt, 16)


def test_a_window_bounds_what_is_served(checkpoint, tmp_path, caplog):
    model = tiny.make_reference(model_type="mistral", sliding_window=48)
    path = tiny.save(model, tmp_path)
    with pytest.raises(ConfigError, match=r"max_model_len=49 is above the model's sliding_window=48.*pass at most 48"):
        LLM(path, device="cpu", max_model_len=49)
    prompt = tiny.random_prompts(1, seed=3, longest=20)[0]
    max_tokens = 48 - len(prompt)
    with LLM(path, device="cpu") as llm:
        assert llm.decode_runner.spec.max_model_len == 48
        (answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
    assert [record.getMessage() for record in caplog.records if "sliding_window=48" in record.getMessage()]
    assert answer["token_ids"] == tiny.reference_tokens(model, prompt, max_tokens)
    with LLM(checkpoint("mistral_window_yarn")[0], device="cpu", max_model_len=256) as llm:
        assert llm.decode_runner.spec.max_model_len == 256


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("Gemma2ForCausalLM", "gemma2"), ("GptOssForCausalLM", "gpt_oss"), ("Phi3ForCausalLM", "phi3")],
)
def test_other_families_are_refused_by_name(architecture, model_type):
    with pytest.raises(ModelLoadError, match=f"{architecture}.* is not supported; supported: LlamaForCausalLM, "):
        resolve_model({"architectures": [architecture], "model_type": model_type, **SIZES})
    with pytest.raises(ModelLoadError, match=f"model_type='{model_type}'.* is not supported; supported: llama, "):
        resolve_model({"architectures": ["LlamaForCausalLM"], "model_type": model_type, **SIZES})


def test_the_first_reader_keeps_its_names():
    config = Qwen3Config.from_dict({**SIZES, "attention_bias": True})
    assert isinstance(config, Qwen3Config)
    assert (config.attention_bias, config.intermediate_size, config.head_dim) == (True, 48, 128)
    model = Qwen3ForCausalLM(config, None, 16, dtype=torch.float32, device=torch.device("meta"))
    assert model.config is config


def test_the_readme_lists_the_families():
    rows = re.findall(r"(?m)^\| `(\w+)` \| ([^|]+) \| (`[^|]+`) \|$", README.read_text(encoding="utf-8"))
    listed = [(model_type, models, tuple(re.findall(r"`(\w+)`", names))) for model_type, models, names in rows]
    assert listed == [(family.model_type, family.models, family.architectures[:1]) for family in FAMILIES]
    assert len(BY_ARCHITECTURE) == sum(len(family.architectures) for family in FAMILIES)
