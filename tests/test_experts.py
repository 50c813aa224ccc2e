"""Experts: their configs, checkpoints in FP8, padding that passes none, loading, what is refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, BackendUnavailableError, ModelLoadError, SamplingParams
from nanovllm.engine.builder import model_costs
from nanovllm.engine.execution import cuda_graph
from nanovllm.engine.execution.load_model import weight_bytes
from nanovllm.engine.scheduling.step_time import ModelCosts
from nanovllm.kernels import BackendRequirements, torch_reference, triton_experts, unsupported_reasons
from nanovllm.layers.experts import ExpertsConfig
from nanovllm.layers.linear import Linear
from nanovllm.layers.ranks import OneRank
from nanovllm.models import resolve_model
from nanovllm.models.quantization import stored_format
from nanovllm.utils.fp8 import E4M3, Fp8Format
from nanovllm.utils.loader import fill_randomly, load_weights
from tests import fp8_checkpoints, tiny
from tests.expert_cases import Sizes, check_all_to_one, check_experts, check_not_finite, check_ties, make_metadata
from tests.test_emulated_graphs import emulated  # noqa: F401 - a fixture
from tests.test_fp8 import CPU, FORMS, MODES, prompts_for, worst_choice
from tests.test_tensor_parallel import ThreadRanks, make_model, on_ranks, prefill

MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}
SIZES = {**fp8_checkpoints.SIZES, **MOE}
CONFIG = {**tiny.BASE, **MOE, "architectures": ["Qwen3MoeForCausalLM"]}
REFERENCE = torch_reference.Backend()
EXPERT_GEMMS = [
    {"is_gated": is_gated, "itemsize": itemsize, "block": block}
    for is_gated in (True, False)
    for itemsize, block in ((1, None), (1, 128), (2, None), (4, None))
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """For each form of FP8 the folder of a checkpoint with experts and its twin in transformers."""
    made = {}
    for form in FORMS:
        folder = tmp_path_factory.mktemp(form)
        made[form] = str(folder), fp8_checkpoints.write(folder, form, **MOE)
    return made


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    model = tiny.make_reference(5, **SIZES)
    return tiny.save(model, tmp_path_factory.mktemp("wide")), model


def share_of_best(model, prompts, answers):
    """The share of greedy tokens that are the best by the model in transformers, after the tokens before them."""
    num_best = num_tokens = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        token_ids = torch.tensor(answer["token_ids"])
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer["token_ids"]])).logits[0, len(prompt) - 1 : -1]
        num_best += int((logits.argmax(dim=1) == token_ids).sum())
        num_tokens += len(token_ids)
    return num_best / num_tokens


# The reference


@pytest.mark.parametrize("quantization", [None, Fp8Format(), Fp8Format(128)], ids=["wide", "channel", "block"])
@pytest.mark.parametrize(("num_tokens", "padding"), [(1, None), (40, [3, 39]), (7, list(range(7)))])
def test_the_reference_computes_what_the_format_says(quantization, num_tokens, padding):
    for sizes in (Sizes(8, 2, 256, 128), Sizes(5, 5, 128, 256, renormalizes=False)):
        shape = {"num_tokens": num_tokens, "padding": padding, "quantization": quantization}
        check_experts(REFERENCE, sizes, device="cpu", dtype=torch.float32, tolerance=1e-5, **shape)


def test_the_reference_chooses_the_first_of_equals_and_spoils_no_other_token():
    check_ties(REFERENCE, device="cpu", dtype=torch.float32)
    check_all_to_one(REFERENCE, device="cpu", dtype=torch.float32, num_tokens=20)
    for quantization in (None, Fp8Format(), Fp8Format(128)):
        check_not_finite(REFERENCE, device="cpu", dtype=torch.float32, quantization=quantization)


# Padding


def test_padding_of_graphs_passes_no_expert(checkpoint, emulated, monkeypatch):  # noqa: F811 - the fixture
    """In decode, prefill and mixed steps; the others' tokens are those of transformers."""
    path, reference = checkpoint("qwen3_moe")
    routed, padded = [], []
    route = torch_reference.route

    def counting(x, experts, metadata):
        chosen, weights = route(x, experts, metadata)
        assert metadata is not None
        is_padding = metadata.slot_mapping >= metadata.padding_slot
        assert ((chosen < 0).all(dim=1) == is_padding).all()
        routed.append(int((~is_padding).sum()))
        padded.append(int(is_padding.sum()))
        return chosen, weights

    monkeypatch.setattr(torch_reference, "route", counting)
    prompts = tiny.random_prompts(5, seed=1)
    options = {"max_num_batched_tokens": 40, "prefill_chunk_tokens": 20}
    with LLM(path, device="cpu", max_model_len=256, max_num_seqs=8, num_kvcache_blocks=200, **options) as llm:
        routed.clear()
        padded.clear()
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    num_layers = 2
    # Each token passes all layers once, but for the last of an answer; steps in flight may decode some beyond it.
    needed = num_layers * sum(len(prompt) + 11 for prompt in prompts)
    assert needed <= sum(routed) <= 1.2 * needed
    assert sum(padded) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == tiny.reference_tokens(reference, prompt, 12)


def test_padding_changes_no_other_token(checkpoint):
    model = make_model(checkpoint("qwen3_moe")[0], None)
    layer = model.model.layers[0]
    hidden, residual = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, _ = layer.feed_forward(hidden, residual)
        found, _ = layer.feed_forward(hidden, residual, metadata=make_metadata(9, [0, 5], "cpu"))
    kept = [1, 2, 3, 4, 6, 7, 8]
    torch.testing.assert_close(found[kept], expected[kept])
    assert not found[[0, 5]].any()


# Checkpoints in FP8


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_a_stored_checkpoint_equal_those_of_its_twin(stored, form):
    folder, twin = stored[form]
    with torch.inference_mode():
        expected = twin(((torch.arange(9) * 7 + 3) % 208)[None]).logits[0]
    model = make_model(folder, None)
    error = (prefill(model) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 1e-5
    assert error.max() < 0.06
    for layer in model.model.layers:
        assert layer.ffn.router.weight.dtype == torch.float32
        assert layer.ffn.gate_up_proj.weight.values.dtype == E4M3


def test_ranks_with_whole_blocks_compute_what_one_does(stored):
    folder, _ = stored["block"]
    expected = prefill(make_model(folder, None))
    for logits in on_ranks(2, lambda ranks: prefill(make_model(folder, ranks))):
        error = (logits - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.median() < 1e-5
        assert error.max() < 0.06


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_in_every_mode(stored, form, mode):
    folder, twin = stored[form]
    prompts = prompts_for(6)
    with LLM(folder, device="cpu", **MODES[mode]) as llm:
        answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    if (form, mode) == ("channel", "two_ranks"):
        # Ranks have scales of their own for the tokens: some pass another expert, whose probability is about the same.
        assert share_of_best(twin, prompts, answers) > 0.85
    else:
        assert worst_choice(twin, prompts, answers) < 0.25


def test_weights_are_quantized_as_they_are_loaded(wide):
    folder, reference = wide
    with LLM(folder, device="cpu", quantization="fp8") as llm:
        layer = llm.decode_runner.model.model.layers[1].ffn
        theirs = reference.model.layers[1].mlp
        assert torch.equal(layer.router.weight, theirs.gate.weight)
        for ours, stacked in (
            (layer.gate_up_proj, theirs.experts.gate_up_proj),
            (layer.down_proj, theirs.experts.down_proj),
        ):
            rows = stacked.detach().flatten(0, 1)
            values, scales = fp8_checkpoints.quantized(rows, 1, rows.shape[1])
            assert torch.equal(ours.weight.values.float(), values.float())
            assert torch.equal(ours.weight.scales, scales)


def test_blocks_that_ranks_would_cut_are_refused_by_name(tmp_path):
    fp8_checkpoints.write(tmp_path, "block", **{**MOE, "moe_intermediate_size": 384, "num_hidden_layers": 1})
    with pytest.raises(
        ModelLoadError, match=r"tensor_parallel_size=2 leaves 192 outputs of mlp.experts.0.gate_proj.we"
    ):
        make_model(str(tmp_path), ThreadRanks(0, 2, None, None)).checkpoint_tensors()
    prefill(make_model(str(tmp_path), None))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 96}))
    with pytest.raises(ModelLoadError, match=r"mlp.experts.0.gate_proj.weight has 96 outputs, .*quantization='fp8'"):
        LLM(str(tmp_path), device="cpu", load_format="dummy")


def test_more_experts_than_the_router_has_room_for_are_refused():
    _, description = resolve_model({**CONFIG, "num_experts": 512})
    assert description.ffn.num_experts == 512
    with pytest.raises(ModelLoadError, match="num_experts=513 is not supported; a layer has at most 512 experts"):
        resolve_model({**CONFIG, "num_experts": 513})


@pytest.mark.parametrize("most", [256, 640, 1000, 2048, 16_384])
def test_no_kernel_is_loaded_while_a_graph_is_captured(most):
    """All sizes use kernels that a larger size has run: those of powers of two, up to 256 all."""
    for buckets in (cuda_graph.prefill_buckets(most), cuda_graph.mixed_buckets(most)):
        warm = cuda_graph._to_warm_up(buckets)
        for top_k in (1, 2, 4, 6, 8, 10):
            for count in (10, 13, 60, 64, 96, 103, 128, 160, 299):
                for options in EXPERT_GEMMS:
                    plans = {size: triton_experts.plan(size, top_k, count, **options) for size in buckets}
                    seen = set()
                    for size in reversed(buckets):
                        seen |= {plans[size]} if size in warm else set()
                        assert plans[size] in seen, f"{size} tokens, {top_k} of {count} experts"


def test_the_router_may_be_left_as_it_is_and_no_expert_may():
    ffn_layers = ExpertsConfig(4, 2, 64, renormalizes=True).linear_layers
    assert len(ffn_layers) == 12
    for form, field in (("channel", "ignore"), ("block", "modules_to_not_convert")):
        quantization = fp8_checkpoints.CONFIGS[form]
        left = ["lm_head", "model.layers.1.mlp.gate", "re:.*mlp.gate$", "mlp.gate"]
        config = {"quantization_config": {**quantization, field: left}}
        assert stored_format(config, 2, ffn_layers) is not None
        for name in (
            "model.layers.1.mlp.experts.3.up_proj",
            "mlp.experts.3",
            "experts",
            "re:.*mlp.experts.2.down_proj$",
        ):
            config = {"quantization_config": {**quantization, field: [name]}}
            with pytest.raises(ModelLoadError, match=r"leaves model.layers.\d.mlp.experts.*as it is"):
                stored_format(config, 2, ffn_layers)
        beyond = {"quantization_config": {**quantization, field: ["model.layers.1.mlp.experts.4"]}}
        assert stored_format(beyond, 2, ffn_layers) is not None


def test_an_expert_that_a_checkpoint_lacks_is_named(stored, tmp_path):
    folder, _ = stored["channel"]
    tensors = load_file(Path(folder) / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    name = "model.layers.1.mlp.experts.5.down_proj.weight_scale"
    save_file({one: it for one, it in tensors.items() if one != name}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"lacks tensor {name}"):
        LLM(str(tmp_path), device="cpu")
    router = "model.layers.0.mlp.gate.weight"
    save_file({**tensors, router: tensors[router].to(E4M3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"'{router}' is torch.float8_e4m3fn; this weight"):
        LLM(str(tmp_path), device="cpu")


# Weights


def test_many_experts_are_loaded_and_drawn_in_little_time(tmp_path):
    """18,432 tensors of experts in a model of 30B: what each costs besides its bytes is what counts here."""
    config = {
        **CONFIG,
        "num_experts": 128,
        "num_hidden_layers": 8,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 8,
    }
    model_class, description = resolve_model(config)

    def make():
        return model_class(description, REFERENCE, 16, dtype=torch.bfloat16, device=CPU)

    with torch.inference_mode():
        model = make()
        began = time.process_time()
        targets = model.checkpoint_tensors()
        assert len(targets) == 3 + 8 * (8 + 1 + 3 * 128)
        fill_randomly(targets, seed=3)
        drawn_s = time.process_time() - began
        save_file({name: weight.data.contiguous() for name, weight in targets.items()}, tmp_path / "model.safetensors")
        loaded = make()
        began = time.process_time()
        assert load_weights(tmp_path, loaded.checkpoint_tensors()) == []
        loaded_s = time.process_time() - began
        assert torch.equal(loaded.model.layers[7].ffn.down_proj.weight, model.model.layers[7].ffn.down_proj.weight)
    assert drawn_s < 20
    assert loaded_s < 20


def test_random_routers_choose_all_experts_about_evenly():
    """The benchmarks' floor counts on it: drawn weights, normed hidden states."""
    config = ExpertsConfig(32, 4, 16, renormalizes=True)
    layer = config.make(512, REFERENCE, OneRank(), dtype=torch.float32, device=CPU)
    with torch.inference_mode():
        fill_randomly(layer.checkpoint_tensors(), seed=1)
        chosen, _ = torch_reference.route(torch.randn(4096, 512), layer.weights, None)
    counts = chosen.flatten().bincount(minlength=32)
    assert counts.min() > 0.5 * counts.float().mean()
    assert counts.max() < 1.7 * counts.float().mean()
    distinct = torch.stack([rows.unique().numel() * torch.ones(()) for rows in chosen.view(512, 8, 4)]).mean().item()
    of_one = config.num_read(512, 1) - config.num_unquantized(512)
    of_eight = config.num_read(512, 8) - config.num_unquantized(512)
    assert of_eight / of_one * 4 == pytest.approx(distinct, rel=0.05)


def test_counts_of_weights():
    model_class, description = resolve_model(CONFIG)
    stored_bytes = weight_bytes(model_class, description, REFERENCE, torch.float32)
    made = model_class(description, REFERENCE, 16, dtype=torch.float32, device=CPU).checkpoint_tensors()
    in_gemms = sum(it.data.numel() for name, it in made.items() if "norm" not in name and "embed" not in name)
    assert stored_bytes == sum(weight.nbytes for weight in made.values())
    assert description.num_read(float("inf")) == in_gemms
    experts = sum(it.data.numel() for name, it in made.items() if "experts" in name)
    assert description.num_read(1) == description.num_parameters == in_gemms - experts * 4 // 6
    routers = sum(it.data.numel() for name, it in made.items() if "mlp.gate." in name)
    assert description.num_unquantized == routers + made["lm_head.weight"].data.numel()


def test_step_times_begin_with_the_experts_that_a_token_passes(wide):
    with LLM(wide[0], device="cpu") as llm:
        costs = model_costs(llm.decode_runner.spec)
        description = llm.decode_runner.spec.model_config
    assert (costs.num_experts, costs.experts_per_token) == (6, 2)
    in_experts = 2 * 2 * 3 * 256 * 256
    assert costs.expert_share == pytest.approx(in_experts / (description.num_parameters + 208 * 256), rel=0.02)
    reads = costs.weights_read(torch.tensor([1.0, 2.0, 1e6]).numpy())
    share = costs.expert_share
    assert reads.tolist() == pytest.approx([1, 1 + share * (5 / 3 - 1), 1 + 2 * share])
    assert (ModelCosts().weights_read(torch.tensor([1.0, 64.0]).numpy()) == 1).all()


# Configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 is not a positive integer"),
        ({"num_experts": None}, "num_experts=None is not a positive integer"),
        ({"num_local_experts": 7}, "num_experts=6 and num_local_experts=7 differ; leave one out"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 is above the number of experts, 6"),
        ({"num_experts_per_tok": 1.0}, "num_experts_per_tok=1.0 is not a positive integer"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size=None is not a positive integer"),
        ({"norm_topk_prob": None}, "norm_topk_prob=None is not true or false"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported; only layers that all have experts"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported; only layers that all have experts"),
        ({"mlp_only_layers": 1}, "mlp_only_layers=1 is not a list of integers"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64 is not supported; only experts"),
        ({"head_dim": None}, "head_dim=None is not a positive integer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_served_is_refused_by_name(fields, message):
    with pytest.raises(ModelLoadError, match=message):
        resolve_model({**CONFIG, **fields})


def test_fields_by_either_name_and_those_that_change_nothing():
    _, expected = resolve_model(CONFIG)
    renamed = {name: value for name, value in CONFIG.items() if name != "num_experts"}
    for fields in ({"num_local_experts": 6}, {"num_local_experts": 6, "num_experts": 6}):
        assert resolve_model({**renamed, **fields})[1] == expected
    for fields in (
        {"mlp_only_layers": []},
        {"mlp_only_layers": None},
        {"mlp_only_layers": [2]},
        {"decoder_sparse_step": 1},
    ):
        assert resolve_model({**CONFIG, **fields})[1] == expected
    windowed = resolve_model({**CONFIG, "use_sliding_window": True, "sliding_window": 48})[1]
    assert (windowed.sliding_window, expected.sliding_window) == (48, None)


def test_a_backend_without_kernels_for_experts_says_so(wide):
    needs = BackendRequirements("cuda", torch.bfloat16, 128, 256, has_experts=True)
    assert unsupported_reasons("torch", needs) == []
    pytest.importorskip("triton")
    assert unsupported_reasons("triton", needs) == []
    with pytest.raises(BackendUnavailableError, match="flash_attn"):
        LLM(wide[0], device="cpu", attention_backend="flash_attn")


def test_experts_are_stored_as_the_kernels_take_them():
    layer = ExpertsConfig(3, 2, 4, renormalizes=True).make(8, REFERENCE, OneRank(), dtype=torch.float32, device=CPU)
    assert isinstance(layer.gate_up_proj, Linear)
    with torch.inference_mode():
        for number, weight in enumerate(layer.checkpoint_tensors().values()):
            weight.data.fill_(number)
    gate_up, down = layer.weights.of(1)
    tensors = {name: weight.data for name, weight in layer.checkpoint_tensors().items()}
    assert torch.equal(gate_up[:4], tensors["mlp.experts.1.gate_proj.weight"])
    assert torch.equal(gate_up[4:], tensors["mlp.experts.1.up_proj.weight"])
    assert torch.equal(down, tensors["mlp.experts.1.down_proj.weight"])
