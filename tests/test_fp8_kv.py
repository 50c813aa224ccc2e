"""KV in FP8 on CPUs: the rule of its numbers, their scales, tokens in every mode, what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from nanovllm import LLM, BackendUnavailableError, ConfigError, ModelLoadError, SamplingParams
from nanovllm.engine import scheduler
from nanovllm.engine.builder import check_fp8, model_costs, model_memory, with_kv_cache
from nanovllm.engine.execution import kv_scales
from nanovllm.engine.execution.kv_scales import MARGIN, calibrate_kv_scales, scales_for
from nanovllm.engine.scheduling import shared_prompt
from nanovllm.kernels import BackendRequirements, torch_reference, unsupported_reasons
from nanovllm.layers.feed_forward import LINEAR_LAYERS
from nanovllm.models import resolve_model
from nanovllm.models.quantization import has_kv_scales, stored_format
from nanovllm.utils.device import Device
from nanovllm.utils.fp8 import E4M3, quantize_by
from tests import fp8_checkpoints, tiny
from tests.kernel_cases import (
    DECODE,
    MIXED,
    PREFILL,
    check_fp8_store,
    check_steps,
    make_case,
    mixed_error,
    relative_error,
)
from tests.test_mixed_step import serve
from tests.test_shared_prompts import assert_whole, make, num_shared
from tests.transfers import poison_after_handoff

TWO = {"enable_two_gpu_pd": True, "card_roles": "fixed"}
FP8 = {"device": "cpu", "kv_cache_dtype": "fp8"}
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SHAPE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 32, "device": "cpu"}
KV_SCHEME = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
    "group_size": None,
}
SIZES = {"vocab_size": 216, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint in float32 and its model in transformers."""
    model = tiny.make_reference(5, **SIZES)
    return tiny.save(model, tmp_path_factory.mktemp("wide")), model


def prompts_for(count, seed=0, shared=0):
    prompts = tiny.random_prompts(count, seed=seed, longest=60, shared=shared)
    return [[token % 208 for token in prompt] for prompt in prompts]


def scales_of(model):
    """[num_layers, 2, num_kv_heads]."""
    return torch.stack(model.kv_scales())


class Fp8Cache(DynamicCache):
    """What attention reads in transformers' model, rounded to e4m3 by each head's scale."""

    def __init__(self, config, scales):
        super().__init__(config=config)
        self.scales = scales

    def update(self, key_states, value_states, layer_idx, *args, **options):
        both = []
        for states, scales in zip((key_states, value_states), self.scales[layer_idx], strict=True):
            of_heads = scales[None, :, None, None]
            both.append((states / of_heads).clamp(-448, 448).to(E4M3).float() * of_heads)
        return super().update(*both, layer_idx, *args, **options)


def twin_logits(model, token_ids, scales):
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), past_key_values=Fp8Cache(model.config, scales)).logits[0]


def worst_choice(model, prompts, answers, scales):
    """How far the logit of a greedy token is below the largest, by the twin; 0 if it is the largest."""
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = twin_logits(model, prompt + answer, scales)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        worst = max(worst, (logits.max(dim=1).values - chosen).max().item())
    return worst


# The numbers


@pytest.mark.parametrize("spans", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_the_reference_attends_to_what_is_stored(spans):
    case = make_case(spans, dtype=torch.float32, has_fp8_kv=True, **SHAPE)
    assert relative_error(torch_reference.Backend(), case) < 1e-5


@pytest.mark.parametrize(("rows", "chunks", "num_empty_rows"), MIXED)
def test_the_reference_attends_in_both_parts_of_a_step(rows, chunks, num_empty_rows):
    shape = {**SHAPE, "dtype": torch.float32, "with_split": False, "has_fp8_kv": True}
    assert mixed_error(torch_reference.Backend(), rows, chunks, num_empty_rows, **shape) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_stored_saturates_and_shows_what_is_not_finite(dtype):
    check_fp8_store(torch_reference.Backend(), device="cpu", dtype=dtype)


def test_what_steps_leave_in_unused_places_reaches_no_answer():
    options = {"dtype": torch.float32, "block_size": 16, "has_fp8_kv": True}
    check_steps(torch_reference.Backend(), device="cpu", seed=3, **options)


def test_a_stored_number_is_as_near_as_the_format_allows():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 1, 2000)
    scale = torch.tensor(0.25)
    allowed = torch.maximum(x.abs() * 2**-4, scale * 2**-10)
    assert ((quantize_by(x, scale).float() * scale - x).abs() <= allowed).all()


# Scales


def test_scales_leave_room_and_are_powers_of_two():
    largest = torch.tensor([[3.7, 448.0 / MARGIN], [1e-9, 0.0]])
    scales = scales_for(largest)
    assert torch.equal(torch.frexp(scales)[0], torch.full_like(scales, 0.5))
    room = 448.0 * scales / largest
    assert (room[largest > 0] > MARGIN).all()
    assert (room[largest > 0] <= 2 * MARGIN).all()
    nearly = scales_for(largest * (1 - 1e-6))
    assert torch.equal(scales[0, :1], nearly[0, :1])
    assert torch.equal(scales_for(torch.tensor([float("nan"), float("inf")])), torch.ones(2))


def test_scales_are_found_by_the_same_prompt_each_time(wide):
    """By transformers, of what attention reads there; both devices have the same, and any limit of a step."""
    folder, model = wide
    seen = []

    class Seeing(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **options):
            seen.append(torch.stack([states[0].abs().amax(dim=(1, 2)) for states in (key_states, value_states)]))
            return super().update(key_states, value_states, layer_idx, *args, **options)

    with LLM(folder, **FP8, **TWO, max_num_batched_tokens=64) as llm:
        found = [scales_of(runner.model) for runner in (llm.prefill_runner, llm.decode_runner)]
        num_tokens = min(kv_scales.CALIBRATION_TOKENS, llm.decode_runner.spec.max_model_len)
    generator = torch.Generator().manual_seed(kv_scales.CALIBRATION_SEED)
    token_ids = torch.randint(SIZES["vocab_size"], (num_tokens,), generator=generator)
    with torch.inference_mode():
        model(token_ids[None], past_key_values=Seeing(config=model.config))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], scales_for(torch.stack(seen)))
    assert len(found[0].unique()) > 1


def test_ranks_have_the_scales_of_their_own_heads(wide, monkeypatch):
    from nanovllm.engine.execution.forward_pass import ForwardPass
    from tests.test_tensor_parallel import on_ranks

    folder, _ = wide
    with LLM(folder, **FP8) as llm:
        runner = llm.decode_runner
        expected, spec = scales_of(runner.model), dataclasses.replace(runner.spec, num_ranks=2)

        def scales_of_rank(ranks):
            from nanovllm.engine.execution.load_model import load_model

            with torch.inference_mode():
                model = load_model(spec, runner.device, ranks)
                calibrate_kv_scales(ForwardPass(runner.device, spec, ranks, model))
                return scales_of(model)

        found = on_ranks(2, scales_of_rank)
    assert torch.equal(torch.cat(found, dim=2), expected)
    assert not torch.equal(*found)


def test_random_weights_have_scales_too(wide):
    with LLM(wide[0], **FP8, load_format="dummy", seed=3) as llm:
        scales = scales_of(llm.decode_runner.model)
        assert len(llm.generate(prompts_for(2), GREEDY, use_tqdm=False)[0]["token_ids"]) == 24
    assert (scales > 0).all()
    assert (scales < 1).all()


# Engines

MODES = {
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "preempted": {"num_kvcache_blocks": 9},
    "without_prefix_cache": {"enable_prefix_caching": False},
    "copy": {**TWO, "kv_handoff": "copy", "verify_kv_handoff": True},
    "direct": {**TWO, "kv_handoff": "direct", "verify_kv_handoff": True},
    "poisoned": {**TWO, "kv_handoff": "direct", "enable_prefix_caching": False},
    "pipeline": {**TWO, "enable_decode_pipeline": True, "decode_pipeline": "static"},
    "elastic": {**TWO, "card_roles": "elastic", "verify_kv_handoff": True, "prefill_chunk_tokens": 32},
    "two_ranks": {"tensor_parallel_size": 2},
    "quantized": {"quantization": "fp8"},
}


def answers_of(folder, prompts, *, is_poisoned=False, **options):
    with LLM(folder, **{**FP8, **options}) as llm:
        if is_poisoned:
            poison_after_handoff(llm)
        first = [answer["token_ids"] for answer in llm.generate(prompts, GREEDY, use_tqdm=False)]
        again = [answer["token_ids"] for answer in llm.generate(prompts, GREEDY, use_tqdm=False)]
        llm.scheduler.check_integrity()
        metrics = llm.metrics()
    return first, again, metrics


@pytest.fixture(scope="module")
def plain(wide):
    """Prompts, some of which begin alike, and their greedy tokens on one device."""
    prompts = [*prompts_for(6), *prompts_for(4, seed=1, shared=40)]
    first, again, _ = answers_of(wide[0], prompts)
    assert first == again, "the second time from the prefix cache"
    return prompts, first


def test_greedy_tokens_are_those_of_transformers_with_such_kv(wide, plain):
    folder, model = wide
    prompts, answers = plain
    with LLM(folder, **FP8) as llm:
        scales = scales_of(llm.decode_runner.model)
        assert llm.decode_runner.kv_pool.dtype == E4M3
    assert worst_choice(model, prompts, answers, scales) < 0.02
    with torch.inference_mode():
        unrounded = model(torch.tensor([prompts[0]])).logits[0]
    rounded = twin_logits(model, prompts[0], scales)
    assert (rounded - unrounded).norm() > 0.01 * unrounded.norm(), "KV that is not FP8 says something else"


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_in_every_mode(wide, plain, mode):
    prompts, expected = plain
    first, again, metrics = answers_of(wide[0], prompts, is_poisoned=mode == "poisoned", **MODES[mode])
    assert first == again
    if mode == "quantized":
        assert first != expected, "weights are rounded, too"
        return
    assert first == expected
    assert bool(metrics["preemptions"]) == (mode == "preempted")


def test_with_experts_too(tmp_path):
    """Tokens that are routed otherwise, or read other KV, would differ soon."""
    experts = {"model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    folder = tiny.save(tiny.make_reference(7, **{**fp8_checkpoints.SIZES, **experts}), tmp_path)
    prompts = prompts_for(6, seed=9)
    expected, again, _ = answers_of(folder, prompts)
    assert expected == again
    assert len(set(map(tuple, expected))) == len(prompts)
    for mode in ("direct", "chunked", "elastic"):
        first, again, _ = answers_of(folder, prompts, **MODES[mode])
        assert first == again == expected, mode


@pytest.mark.parametrize("steps_ahead", [1, 2])
@pytest.mark.parametrize("options", [{}, {"verify_kv_handoff": True, "prefill_chunk_tokens": 48}], ids=["", "verified"])
def test_prompts_that_two_devices_compute_together(wide, monkeypatch, options, steps_ahead):
    """Each layer's KV is pushed into the other pool within the step; no KV is there that was not stored or pushed."""
    monkeypatch.setattr(shared_prompt, "LEAST_PAIR_TOKENS", 17)
    monkeypatch.setattr(scheduler, "TOKEN_MULTIPLE", 4)
    prompts = [[token % 208 for token in prompt] for prompt in tiny.random_prompts(10, seed=61, longest=110)]
    params = SamplingParams(temperature=0, max_tokens=10)
    with LLM(wide[0], **FP8) as llm:
        expected = [answer["token_ids"] for answer in llm.generate(prompts, params, use_tqdm=False)]
    with make(wide[0], kv_cache_dtype="fp8", **options) as llm:
        found, _ = serve(llm, prompts, params, steps_ahead=steps_ahead)
        assert num_shared(llm) > 4
        assert_whole(llm)
    assert found == expected


def test_a_pool_of_as_many_bytes_has_twice_the_blocks(wide):
    numbers = {}
    for name in ("auto", "fp8"):
        with LLM(wide[0], device="cpu", dtype="bfloat16", kv_cache_dtype=name) as llm:
            runner = llm.decode_runner
            numbers[name] = runner.num_kv_blocks, runner.kv_pool[0].nbytes, runner.spec.block_bytes
            assert runner.kv_pool.nbytes == (runner.num_kv_blocks + 1) * runner.spec.block_bytes
    assert numbers["fp8"][0] == 2 * numbers["auto"][0]
    assert numbers["fp8"][1] == numbers["fp8"][2] == numbers["auto"][1] // 2


def test_the_step_time_model_counts_the_bytes_that_are_read(wide):
    token_bytes = {}
    for name in ("auto", "fp8"):
        with LLM(wide[0], device="cpu", kv_cache_dtype=name) as llm:
            token_bytes[name] = dataclasses.astuple(model_costs(llm.decode_runner.spec))
    assert token_bytes["fp8"][0] == token_bytes["auto"][0] / 4
    assert token_bytes["fp8"][1] == token_bytes["auto"][1]


# Scales of checkpoints


def write_scales(folder, *, scales, shape, quantization=None):
    """Puts k_scale and v_scale of each layer into a checkpoint."""
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = load_file(path)
    for index, pair in enumerate(scales):
        for name, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            tensors[f"model.layers.{index}.self_attn.{name}"] = torch.full(shape, scale, dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    quantization = quantization or config["quantization_config"]
    config["quantization_config"] = {**quantization, "kv_cache_scheme": KV_SCHEME}
    (folder / "config.json").write_text(json.dumps(config))


SCALES = [(0.0859375, 0.02734375), (0.09375, 0.0234375)]


@pytest.mark.parametrize("shape", [(1,), ()], ids=str)
@pytest.mark.parametrize("form", ["channel", "nothing but KV"])
def test_the_scales_of_a_checkpoint_are_used(tmp_path, form, shape, caplog):
    if form == "channel":
        model = fp8_checkpoints.write(tmp_path, form)
        write_scales(tmp_path, scales=SCALES, shape=shape)
    else:
        model = tiny.make_reference(7, **SIZES)
        tiny.save(model, tmp_path)
        kv_only = {"quant_method": "compressed-tensors", "config_groups": {}, "quantization_status": "compressed"}
        write_scales(tmp_path, scales=SCALES, shape=shape, quantization=kv_only)
    prompts = prompts_for(3)
    for options in ({}, TWO, {"tensor_parallel_size": 2} if form != "channel" else {"max_num_seqs": 2}):
        with LLM(str(tmp_path), **FP8, **options) as llm:
            answers = [answer["token_ids"] for answer in llm.generate(prompts, GREEDY, use_tqdm=False)]
            for runner in (llm.prefill_runner, llm.decode_runner):
                found = scales_of(runner.model)
                assert torch.equal(found, torch.tensor(SCALES)[:, :, None].expand_as(found))
        scales = torch.tensor(SCALES)[:, :, None].expand(-1, -1, model.config.num_key_value_heads)
        assert worst_choice(model, prompts, answers, scales) < (0.15 if form == "channel" else 0.02)
    with caplog.at_level(logging.INFO), LLM(str(tmp_path), device="cpu") as llm:
        assert llm.decode_runner.kv_pool.dtype == torch.float32
    assert "scales of FP8 KV, which kv_cache_dtype='fp8' would use" in caplog.text
    assert "no layer takes" not in caplog.text


def test_random_weights_do_not_have_the_scales_of_the_checkpoint(tmp_path):
    fp8_checkpoints.write(tmp_path, "channel")
    write_scales(tmp_path, scales=SCALES, shape=(1,))
    with LLM(str(tmp_path), **FP8, load_format="dummy") as llm:
        assert not (scales_of(llm.decode_runner.model) == torch.tensor(SCALES)[:, :, None]).any()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_named(tmp_path, scale):
    fp8_checkpoints.write(tmp_path, "channel")
    write_scales(tmp_path, scales=[SCALES[0], (0.1, scale)], shape=(1,))
    with pytest.raises(ModelLoadError, match=r"model.layers.1.self_attn.v_scale is .*not a positive number"):
        LLM(str(tmp_path), **FP8)


def test_scales_that_are_missing_or_of_another_shape_are_named(tmp_path):
    fp8_checkpoints.write(tmp_path, "channel")
    write_scales(tmp_path, scales=SCALES[:1], shape=(1,))
    with pytest.raises(ModelLoadError, match=r"lacks tensors model.layers.1.self_attn.k_scale"):
        LLM(str(tmp_path), **FP8)
    write_scales(tmp_path, scales=SCALES, shape=(2,))
    with pytest.raises(ModelLoadError, match=r"k_scale' has shape \[2\], config.json implies \[1\]"):
        LLM(str(tmp_path), **FP8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 4}, "num_bits=4 of kv_cache_scheme"),
        ({"type": "int"}, "type='int' of kv_cache_scheme"),
        ({"strategy": "attn_head"}, "strategy='attn_head' of kv_cache_scheme"),
        ({"dynamic": True}, "dynamic=True of kv_cache_scheme"),
        ({"symmetric": False}, "symmetric=False of kv_cache_scheme"),
    ],
)
def test_other_schemes_are_refused_by_name(changes, message):
    for groups in (fp8_checkpoints.CONFIGS["channel"]["config_groups"], {}):
        quantization = {**fp8_checkpoints.CONFIGS["channel"], "config_groups": groups}
        config = {"quantization_config": {**quantization, "kv_cache_scheme": {**KV_SCHEME, **changes}}}
        with pytest.raises(ModelLoadError, match=f"{message}, which is not supported; served are"):
            has_kv_scales(config)
        config["quantization_config"]["kv_cache_scheme"] = KV_SCHEME
        assert has_kv_scales(config)
        assert (stored_format(config, 2, LINEAR_LAYERS) is None) == (not groups)


@pytest.mark.parametrize(
    "others",
    [{"transform_config": {"config_groups": {"R3": {}}}}, {"sparsity_config": {"format": "sparse-24-bitmask"}}],
)
def test_what_else_is_done_to_weights_is_refused_where_only_kv_is_quantized_too(others):
    for groups in (fp8_checkpoints.CONFIGS["channel"]["config_groups"], {}):
        quantization = {**fp8_checkpoints.CONFIGS["channel"], "config_groups": groups, "kv_cache_scheme": KV_SCHEME}
        with pytest.raises(ModelLoadError, match=f"{next(iter(others))}=.*, which is not supported"):
            stored_format({"quantization_config": {**quantization, **others}}, 2, LINEAR_LAYERS)


# Refusals


def test_an_unknown_type_of_kv_is_refused(wide):
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp8_e5m2' is not one of"):
        LLM(wide[0], device="cpu", kv_cache_dtype="fp8_e5m2")


def test_a_backend_that_does_not_read_it_says_so(wide):
    needs = BackendRequirements("cuda", torch.bfloat16, 128, 256, has_fp8_kv=True)
    assert unsupported_reasons("torch", needs) == []
    pytest.importorskip("triton")
    assert unsupported_reasons("triton", needs) == []
    with pytest.raises(BackendUnavailableError, match="flash_attn"):
        LLM(wide[0], **FP8, attention_backend="flash_attn")


def test_cards_without_fp8_are_refused_by_name(wide, monkeypatch):
    _, described = resolve_model(json.loads((Path(wide[0]) / "config.json").read_text()))
    capabilities = {0: (9, 0), 1: (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    described = with_kv_cache(described, "fp8", is_drawn=False)
    check_fp8(described, [Device("cpu", 0), Device("cuda", 0)])
    check_fp8(with_kv_cache(described, "auto", is_drawn=False), [Device("cuda", 1)])
    with pytest.raises(ConfigError, match=r"cuda:1 \(sm_86\) has no FP8, in which KV would be.*kv_cache_dtype='fp8'"):
        check_fp8(described, [Device("cuda", 0), Device("cuda", 1)])
    assert model_memory(wide[0])[1] > 0
