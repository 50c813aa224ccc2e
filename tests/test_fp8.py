"""FP8 weights: the rule of the format, checkpoints that have them, quantization at load, what is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, BackendUnavailableError, ConfigError, ModelLoadError, SamplingParams
from nanovllm.config import QUANTIZATIONS
from nanovllm.engine.builder import check_fp8, model_costs, model_memory, with_quantization
from nanovllm.engine.distributed import tensor_parallel
from nanovllm.engine.execution.load_model import weight_bytes
from nanovllm.kernels import BackendRequirements, torch_reference, unsupported_reasons
from nanovllm.layers.feed_forward import LINEAR_LAYERS
from nanovllm.layers.linear import Linear
from nanovllm.models import quantization, resolve_model
from nanovllm.models.quantization import stored_format
from nanovllm.utils.device import Device
from nanovllm.utils.fp8 import E4M3, Fp8Format, ScaledWeight, quantize
from nanovllm.utils.upload import Upload
from nanovllm.utils.weight import Part
from tests import fp8_checkpoints, tiny
from tests.test_tensor_parallel import ThreadRanks, make_model, on_ranks, prefill

FORMS = list(fp8_checkpoints.CONFIGS)
CPU = torch.device("cpu")
TWO = {"enable_two_gpu_pd": True, "card_roles": "fixed"}
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """For each form the folder of a checkpoint and its twin in transformers."""
    made = {}
    for form in FORMS:
        folder = tmp_path_factory.mktemp(form)
        made[form] = str(folder), fp8_checkpoints.write(folder, form)
    return made


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint in float32 and its model in transformers."""
    model = tiny.make_reference(5, **fp8_checkpoints.SIZES)
    return tiny.save(model, tmp_path_factory.mktemp("wide")), model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts_for(count, seed=0):
    return [[token % 208 for token in prompt] for prompt in tiny.random_prompts(count, seed=seed, longest=60)]


# The format


@pytest.mark.parametrize("columns", [None, 128])
@pytest.mark.parametrize("rows", [1, 128])
def test_what_is_quantized_is_as_near_as_the_format_allows(rows, columns):
    """Half of the last of three bits of a number, or of the smallest number where it is below the normal ones."""
    x = normal(200, 300) * torch.logspace(-3, 3, 200)[:, None]
    values, scales = quantize(x, rows, columns)
    assert values.dtype == E4M3
    assert scales.shape == (200 if rows == 1 else 2, 1 if columns is None else 3)
    spread = torch.kron(scales, torch.ones(rows, columns or 300))[:200, :300].double()
    allowed = torch.maximum(x.double().abs() * 2**-4, spread * 2**-10) * (1 + 1e-6)
    assert ((values.double() * spread - x.double()).abs() <= allowed).all()
    expected, expected_scales = fp8_checkpoints.quantized(x, rows, columns or 300)
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scales, expected_scales)


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen():
    x = torch.zeros(4, 256)
    values, scales = quantize(x, 1, 128)
    assert not values.float().any()
    assert scales.isfinite().all()
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    weight = Fp8Format(128).empty_weight([5], 256, CPU)
    weight.quantize(normal(5, 256))
    result = torch_reference.Backend().linear(x, weight, None)
    assert result.isfinite().all(dim=1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("block", [None, 128])
def test_the_reference_computes_what_the_format_says(block):
    """In float64, with the sums of each block's products before the scales: the reference differs in float32's bits."""
    x, wide_weight, bias = normal(7, 300, seed=1), normal(200, 300, seed=2), normal(200, seed=3)
    weight = Fp8Format(block).empty_weight([200], 300, CPU)
    weight.quantize(wide_weight)
    tokens, token_scales = fp8_checkpoints.quantized(x, 1, block or 300)
    expected = bias.double().repeat(7, 1)
    for index in range(token_scales.shape[1]):
        inputs = slice(index * 128, (index + 1) * 128) if block else slice(None)
        products = tokens[:, inputs].double() @ weight.values[:, inputs].double().T
        of_outputs = weight.scales[:, index].double().repeat_interleave(block or 1)[:200]
        expected += products * token_scales[:, index, None].double() * of_outputs
    actual = torch_reference.Backend().linear(x, weight, bias).double()
    assert (actual - expected).norm() < 1e-6 * expected.norm()
    error = (actual - (x.double() @ wide_weight.double().T + bias)).norm() / expected.norm()
    assert 0.01 < error < 0.06, "what e4m3 allows, and not less: the inputs are quantized, too"


# Checkpoints


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_a_stored_checkpoint_equal_those_of_its_twin(stored, form):
    folder, twin = stored[form]
    with torch.inference_mode():
        expected = twin(((torch.arange(9) * 7 + 3) % 208)[None]).logits[0]
    error = (prefill(make_model(folder, None)) - expected).norm(dim=1) / expected.norm(dim=1)
    # Where a sum's last bits round an input of the next layer the other way, a token's logits differ by a percent.
    assert error.median() < 1e-5
    assert error.max() < 0.04


@pytest.mark.parametrize(("form", "changes"), [("block", {"hidden_size": 320}), ("channel", {"hidden_size": 200})])
def test_widths_that_are_no_whole_blocks(tmp_path, form, changes):
    """Parts of inputs, and of outputs that are not stacked, with a bias on top."""
    twin = fp8_checkpoints.write(tmp_path, form, attention_bias=True, **changes)
    with torch.inference_mode():
        expected = twin(((torch.arange(9) * 7 + 3) % 208)[None]).logits[0]
    error = (prefill(make_model(str(tmp_path), None)) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 1e-5


def test_ranks_with_whole_blocks_compute_what_one_does(stored):
    folder, _ = stored["block"]
    expected = prefill(make_model(folder, None))
    for logits in on_ranks(2, lambda ranks: prefill(make_model(folder, ranks))):
        assert (logits - expected).norm() < 0.03 * expected.norm()
        error = (logits - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.median() < 1e-5


def test_ranks_scale_their_own_inputs_where_a_scale_is_for_all(stored):
    """A token's scale is that of the rank's inputs then: finer, so the ranks together are no further from the truth."""
    folder, _ = stored["channel"]
    expected = prefill(make_model(folder, None))
    first, second = on_ranks(2, lambda ranks: prefill(make_model(folder, ranks)))
    assert torch.equal(first, second)
    assert 1e-4 < (first - expected).norm() / expected.norm() < 0.12


MODES = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 24, "prefill_chunk_tokens": 7},
    "preempted": {"num_kvcache_blocks": 9},
    "two_devices": TWO,
    "direct": {**TWO, "kv_handoff": "direct", "verify_kv_handoff": True},
    "pipeline": {**TWO, "enable_decode_pipeline": True, "decode_pipeline": "static"},
    "elastic": {**TWO, "card_roles": "elastic"},
    "two_ranks": {"tensor_parallel_size": 2},
}


def worst_choice(model, prompts, answers):
    """How far the logit of a greedy token is below the largest, by the model in transformers; 0 if it is the largest.

    Tokens themselves hang on last bits: see above.
    """
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        token_ids = answer["token_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(token_ids)[:, None])
        worst = max(worst, (logits.max(dim=1).values - chosen[:, 0]).max().item())
    return worst


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_in_every_mode(stored, form, mode):
    folder, twin = stored[form]
    prompts = prompts_for(6)
    with LLM(folder, device="cpu", **MODES[mode]) as llm:
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        assert (llm.scheduler.num_preemptions > 0) == (mode == "preempted")
    # Ranks have scales of their own for the tokens of a channel's form.
    assert worst_choice(twin, prompts, answers) < (0.4 if (form, mode) == ("channel", "two_ranks") else 0.12)


def test_a_part_of_a_checkpoint_that_is_missing_or_of_another_type_is_named(stored, tmp_path):
    folder, _ = stored["channel"]
    tensors = load_file(Path(folder) / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    for change, message in (
        ({f"{QUERY}.weight_scale": None}, f"lacks tensor {QUERY}.weight_scale"),
        ({f"{QUERY}.weight": tensors[f"{QUERY}.weight"].bfloat16()}, f"'{QUERY}.weight' is torch.bfloat16, quantiz"),
        ({f"{QUERY}.weight_scale": torch.ones(1)}, f"'{QUERY}.weight_scale' has shape"),
        (
            {"lm_head.weight": tensors["lm_head.weight"].to(E4M3)},
            "'lm_head.weight' is torch.float8_e4m3fn; this weight",
        ),
    ):
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelLoadError, match=message):
            LLM(str(tmp_path), device="cpu")


# Quantization at load


def linears_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def test_weights_are_quantized_as_they_are_loaded(wide):
    folder, reference = wide
    with LLM(folder, device="cpu", quantization="fp8") as llm:
        model, config = llm.decode_runner.model, llm.decode_runner.spec.model_config
        assert config.quantization == Fp8Format()
        layers = linears_of(model)
        assert len(layers) == 8
        state = reference.state_dict()
        for index in range(2):
            names = {"qkv_proj": "self_attn.{}_proj", "ffn.gate_up_proj": "mlp.{}_proj"}
            for own, theirs in names.items():
                parts = ("q", "k", "v") if own == "qkv_proj" else ("gate", "up")
                stacked = torch.cat([state[f"model.layers.{index}.{theirs.format(part)}.weight"] for part in parts])
                values, scales = fp8_checkpoints.quantized(stacked, 1, stacked.shape[1])
                weight = layers[f"model.layers.{index}.{own}"].weight
                assert torch.equal(weight.values.float(), values.float())
                assert torch.equal(weight.scales, scales)
        assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
        prompts = prompts_for(4)
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    twin = copy.deepcopy(reference)
    for layer in fp8_checkpoints.linear_layers(twin).values():
        size = fp8_checkpoints.blocks_of("channel", layer.weight)
        layer.weight.data = fp8_checkpoints.dequantized(*fp8_checkpoints.quantized(layer.weight, *size), *size)
    assert worst_choice(fp8_checkpoints.quantizing_inputs(twin, "channel"), prompts, answers) < 0.12


def test_the_option_says_the_same_of_a_checkpoint_that_has_fp8(stored):
    for form in FORMS:
        with LLM(stored[form][0], device="cpu", quantization="fp8") as llm:
            assert llm.decode_runner.spec.model_config.quantization.scale_name == fp8_checkpoints.SCALE_NAMES[form]


@pytest.mark.parametrize("part", [None, Part(0, 1, 2), Part(1, 1, 2)], ids=["whole", "outputs", "inputs"])
@pytest.mark.parametrize("block", [None, 128])
def test_drawn_weights_are_quantized_from_the_numbers_that_others_have(block, part):
    """More rows than are quantized at a time; random weights of a rank are its part of the whole."""
    rows, columns = (1280, 256) if part is None else (1280, 128) if part.dim else (1280, 256)
    options = {"bias": False, "dtype": torch.bfloat16, "device": CPU}
    drawn = []
    for quantization_format in (None, Fp8Format(block)):
        layer = Linear(columns, [rows], torch_reference.Backend(), quantization=quantization_format, **options)
        layer.checkpoint_tensors(["up_proj"], part)["up_proj.weight"].fill_normal(0.0, 0.02, seed=3)
        drawn.append(layer.weight)
    assert isinstance(drawn[1], ScaledWeight)
    expected = Fp8Format(block).empty_weight([rows], columns, CPU)
    expected.quantize(drawn[0])
    assert torch.equal(drawn[1].values.float(), expected.values.float())
    assert torch.equal(drawn[1].scales, expected.scales)


def test_a_part_is_loaded_with_scales_of_its_own():
    whole = normal(256, 512).bfloat16()
    layer = Linear(
        256, [256], torch_reference.Backend(), bias=False, dtype=torch.float32, device=CPU, quantization=Fp8Format()
    )
    (weight,) = layer.checkpoint_tensors(["down_proj"], Part(1, 1, 2)).values()
    assert weight.whole_shape == (256, 512)
    with Upload(CPU) as upload:
        weight.load(whole[weight.index], upload)
    values, scales = fp8_checkpoints.quantized(whole[:, 256:], 1, 256)
    assert torch.equal(layer.weight.values.float(), values.float())
    assert torch.equal(layer.weight.scales, scales)


@pytest.mark.parametrize("form", FORMS)
def test_random_weights_of_a_config_with_fp8(stored, form):
    """Drawn weights are as large as read ones, and answers near those of drawn weights that are not quantized."""
    folder, _ = stored[form]
    config = json.loads((Path(folder) / "config.json").read_text())
    options = {"device": "cpu", "load_format": "dummy", "seed": 4}
    with LLM(folder, **options) as llm:
        model = llm.decode_runner.model
        logits = prefill(model)
        assert llm.decode_runner.spec.model_config.quantization.scale_name is None
        model_class, described = resolve_model({**config, "quantization_config": None})
        unquantized = with_quantization(described, None, is_drawn=True)
        bytes_of_both = [
            weight_bytes(model_class, it, torch_reference.Backend(), torch.bfloat16)
            for it in (llm.decode_runner.spec.model_config, unquantized)
        ]
        held = sum(
            layer.weight.values.nbytes + layer.weight.scales.nbytes for layer in linears_of(model).values()
        ) + sum(tensor.numel() * 2 for tensor in model.parameters())
    assert bytes_of_both[0] == held
    assert bytes_of_both[0] < 0.62 * bytes_of_both[1]
    plain = Path(folder).parent / f"plain_{form}"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with LLM(str(plain), **options) as llm:
        expected = prefill(llm.decode_runner.model)
    assert 0 < (logits - expected).norm() / expected.norm() < 0.15


def test_both_devices_have_the_same_weights(wide, stored):
    for folder in (wide[0], stored["block"][0]):
        with LLM(folder, device="cpu", quantization="fp8", **TWO) as llm:
            ours, theirs = (linears_of(runner.model) for runner in (llm.prefill_runner, llm.decode_runner))
            for name, layer in ours.items():
                assert layer.weight.values.data_ptr() != theirs[name].weight.values.data_ptr()
                assert torch.equal(layer.weight.values.float(), theirs[name].weight.values.float())
                assert torch.equal(layer.weight.scales, theirs[name].weight.scales)


def test_step_times_begin_with_half_the_bytes_and_all_the_operations(wide):
    costs = []
    for option in (None, "fp8"):
        with LLM(wide[0], device="cpu", dtype="bfloat16", quantization=option) as llm:
            costs.append(model_costs(llm.decode_runner.spec))
    assert costs[1].context_token > 1.5 * costs[0].context_token
    assert costs[1].pair == costs[0].pair


# Refusals


def changed(form, **fields):
    return {**fp8_checkpoints.CONFIGS[form], **fields}


def with_scheme(name, **fields):
    config = copy.deepcopy(fp8_checkpoints.CONFIGS["channel"])
    config["config_groups"]["group_0"][name].update(fields)
    return config


REFUSED = [
    ({"quant_method": "awq", "bits": 4}, "quant_method='awq'"),
    ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
    ({}, "quant_method=None"),
    ("fp8", "is not an object"),
    (changed("block", activation_scheme="static"), "activation_scheme='static'"),
    (changed("block", weight_block_size=None), "weight_block_size=None"),
    (changed("block", weight_block_size=[64, 128]), r"weight_block_size=\[64, 128\]"),
    (changed("block", fmt="e5m2"), "fmt='e5m2'"),
    (changed("block", modules_to_not_convert=["model.layers.1.mlp"]), "leaves model.layers.1.mlp.gate_proj as it is"),
    (changed("block", modules_to_not_convert=["o_proj"]), "leaves model.layers.0.self_attn.o_proj as it is"),
    (changed("block", modules_to_not_convert="lm_head"), "not a list of names"),
    (changed("channel", ignore=[f"{QUERY}"]), f"leaves {QUERY} as it is"),
    (changed("channel", ignore=["re:.*down_proj"]), "leaves model.layers.0.mlp.down_proj as it is"),
    (changed("channel", ignore=["re:.*proj"]), "leaves model.layers.0.self_attn.q_proj as it is"),
    (changed("channel", ignore=["re:^model.layers.0.mlp.dow"]), "leaves model.layers.0.mlp.down_proj as it is"),
    (changed("channel", ignore=["re:(a+)+b"]), r"the pattern 're:\(a\+\)\+b' in ignore"),
    (changed("channel", kv_cache_scheme={"num_bits": 8}), "of kv_cache_scheme"),
    (changed("channel", sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config="),
    (changed("channel", transform_config={"config_groups": {"R1": {}}}), "transform_config="),
    (changed("channel", quantization_status="frozen"), "quantization_status='frozen'"),
    (changed("channel", config_groups={}), "one of config_groups"),
    (with_scheme("weights", strategy="tensor"), "strategy='tensor' of weights"),
    (with_scheme("weights", num_bits=4, type="int"), "num_bits=4 of weights"),
    (with_scheme("weights", symmetric=False), "symmetric=False of weights"),
    (with_scheme("input_activations", dynamic=False), "dynamic=False of input_activations"),
    (with_scheme("input_activations", strategy="tensor"), "strategy='tensor' of input_activations"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_other_schemes_are_refused_by_name(wide, tmp_path, config, message):
    fields = json.loads((Path(wide[0]) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
    with pytest.raises(ModelLoadError, match=f"quantization_config.*{message}.*served are FP8") as refused:
        LLM(str(tmp_path), device="cpu", load_format="dummy")
    assert "quantization='fp8'" in str(refused.value)


def test_other_parts_may_be_left_as_they_are():
    for form, field in (("channel", "ignore"), ("block", "modules_to_not_convert"), ("block", "ignored_layers")):
        names = [
            "lm_head",
            "re:.*lm_head",
            "re:^lm_head$",
            "re:.*mlp.gate$",
            "model.embed_tokens",
            "model.norm",
            "model.layers.1.mlp.gate",
            "visual",
        ]
        assert stored_format({"quantization_config": changed(form, **{field: names})}, 2, LINEAR_LAYERS) is not None
        # Of a layer that the model does not have.
        beyond = {
            "quantization_config": changed(
                form, **{field: ["model.layers.7.mlp.up_proj", "model.layers." + "9" * 5000]}
            )
        }
        assert stored_format(beyond, 2, LINEAR_LAYERS) is not None
    assert stored_format({"quantization_config": None}, 2, LINEAR_LAYERS) is None


def test_names_of_quantizations_are_those_of_the_option():
    assert tuple(quantization.QUANTIZATIONS) == QUANTIZATIONS


def test_an_unknown_quantization_is_refused(wide):
    with pytest.raises(ConfigError, match="quantization='int8' is not one of"):
        LLM(wide[0], device="cpu", quantization="int8")


def test_parts_that_are_no_whole_blocks_are_refused_by_name(tmp_path, monkeypatch):
    sizes = {"intermediate_size": 384, "num_hidden_layers": 1}
    fp8_checkpoints.write(tmp_path, "block", **sizes)
    with LLM(str(tmp_path), device="cpu"):
        pass
    with pytest.raises(
        ModelLoadError, match=r"tensor_parallel_size=2 leaves 192 outputs of mlp.gate_proj.weight to each"
    ):
        make_model(str(tmp_path), ThreadRanks(0, 2, None, None)).checkpoint_tensors()
    connect = tensor_parallel.ProcessRanks.connect

    def connect_slowly(ranks) -> None:
        connect(ranks)
        time.sleep(0.5)  # meanwhile the other rank has failed, which is no other error

    monkeypatch.setattr(tensor_parallel.ProcessRanks, "connect", connect_slowly)
    with pytest.raises(
        ModelLoadError, match=r"tensor_parallel_size=2 leaves 192 outputs of mlp.gate_proj.weight to each"
    ):
        LLM(str(tmp_path), device="cpu", tensor_parallel_size=2)
    layer = Linear(
        192, [64], torch_reference.Backend(), bias=False, dtype=torch.float32, device=CPU, quantization=Fp8Format(128)
    )
    with pytest.raises(ModelLoadError, match=r"leaves 192 inputs of mlp.down_proj.weight to each rank"):
        layer.checkpoint_tensors(["mlp.down_proj"], Part(1, 0, 2))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 32}))
    with pytest.raises(ModelLoadError, match=r"self_attn.k_proj.weight has 64 outputs, .*quantization='fp8'"):
        LLM(str(tmp_path), device="cpu", load_format="dummy")


def test_cards_without_fp8_are_refused_by_name(wide, stored, monkeypatch):
    config = json.loads((Path(stored["block"][0]) / "config.json").read_text())
    _, described = resolve_model(config)
    capabilities = {0: (9, 0), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    check_fp8(described, [Device("cpu", 0), Device("cuda", 0)])
    check_fp8(dataclasses.replace(described, quantization=None), [Device("cuda", 1)])
    with pytest.raises(ConfigError, match=r"cuda:1 \(sm_80\) has no FP8.*sm_89"):
        check_fp8(described, [Device("cuda", 0), Device("cuda", 1)])
    with pytest.raises(ConfigError, match=r"cuda:1 \(sm_80\) has no FP8"):
        model_memory(stored["block"][0], devices=[Device("cuda", 1)])
    assert model_memory(stored["block"][0])[0] < model_memory(wide[0])[0]


def test_a_backend_without_kernels_for_fp8_says_so(wide):
    needs = BackendRequirements("cuda", torch.bfloat16, 128, 256, has_scaled_weights=True)
    assert unsupported_reasons("torch", needs) == []
    pytest.importorskip("triton")
    assert unsupported_reasons("triton", needs) == []
    with pytest.raises(BackendUnavailableError, match="flash_attn"):
        LLM(wide[0], device="cpu", attention_backend="flash_attn", quantization="fp8")


@pytest.mark.parametrize(("shared_kib", "num_sms"), [(228, 132), (100, 142), (100, 170)], ids=["Hopper", "Ada", "RTX"])
def test_tiles_of_gemms_fit_into_the_shared_memory_of_a_program(shared_kib, num_sms):
    """A program may have 1 KiB less than the SM has, and needs some for other things than tiles."""
    triton_fp8 = pytest.importorskip("nanovllm.kernels.triton_fp8")
    sm_bytes = shared_kib * 1024 - triton_fp8.OTHER_SHARED_BYTES
    for num_outputs, num_inputs in itertools.product((1024, 2048, 4096, 6144, 19456, 24576), (1024, 2560, 4096, 12288)):
        for num_tokens, block in itertools.product((1, 2, 9, 16, 17, 33, 64, 65, 128, 2048), (None, 128)):
            made = triton_fp8.plan(num_tokens, num_outputs, num_inputs, num_sms, block, sm_bytes)
            tiles = made.stages * made.tile_k * (made.tile_n + made.tile_t)
            assert made.stages >= 2
            assert tiles <= (shared_kib - 3) * 1024, made
