"""Folders that differ from a plain checkpoint in one way: served with transformers' tokens, or refused by name."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from nanovllm import LLM, ConfigError, ModelLoadError, SamplingParams
from nanovllm.engine.execution import load_model
from tests import tiny

NUM_TOKENS = 8
PROMPTS = tiny.random_prompts(2, seed=3, longest=60)
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DROPPED = object()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

Change = Callable[[Path], Any]


@dataclass(frozen=True)
class Row:
    """One way to differ.

    Attributes:
        change: makes the difference in a copy of the checkpoint.
        refused: a part of the message of the refusal; none means that the folder is served.
        variant: which checkpoint of `tiny.VARIANTS` or `tiny.FAMILY_VARIANTS`.
        warned: a part of the one warning.
        why_served: where transformers fails, or its `generate` follows the folder and ours does not.
        asked: options of transformers' `generate` that take the place of what the folder asks for.
        meant: fields of config.json with which transformers serves what the folder means.
    """

    name: str
    change: Change
    refused: str = ""
    variant: str = "gqa2"
    warned: str = ""
    why_served: str = ""
    asked: dict[str, Any] | None = None
    meant: dict[str, Any] | None = None


# Changes


def config(**fields: Any) -> Change:
    """Sets fields of config.json, or drops them."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | fields
        kept = {name: value for name, value in values.items() if value is not DROPPED}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def config_text(rewrite: Callable[[str], str]) -> Change:
    return lambda folder: (folder / "config.json").write_text(rewrite((folder / "config.json").read_text()))


def generation(**fields: Any) -> Change:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(fields))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def store(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"} if metadata is None else metadata)


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Edits what model.safetensors holds."""

    def change(folder: Path) -> None:
        stored = tensors_of(folder)
        edit(stored)
        store(stored, folder / "model.safetensors")

    return change


def adding(**extra: torch.Tensor) -> Change:
    return tensors(lambda stored: stored.update({name.replace("__", "."): tensor for name, tensor in extra.items()}))


def named(rename: Callable[[str], str]) -> Change:
    def edit(stored: dict[str, torch.Tensor]) -> None:
        renamed = {rename(name): tensor for name, tensor in stored.items()}
        stored.clear()
        stored.update(renamed)

    return tensors(edit)


def typed(dtype: torch.dtype, only: str = "") -> Change:
    return tensors(
        lambda stored: stored.update({name: t.to(dtype) for name, t in stored.items() if name.startswith(only)})
    )


def sharded(
    *,
    keep_whole: bool = False,
    scale: float = 1.0,
    edit: Callable[[dict[str, dict[str, torch.Tensor]], dict[str, str]], Any] = lambda shards, index: None,
) -> Change:
    """Two shards and their index in place of, or beside, the whole file."""

    def change(folder: Path) -> None:
        names = sorted(tensors_of(folder))
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        shards = {
            file: {name: tensors_of(folder)[name] * scale for name in names[part::2]} for part, file in enumerate(files)
        }
        index = {name: file for file, shard in shards.items() for name in shard}
        edit(shards, index)
        for file, shard in shards.items():
            store(shard, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        if not keep_whole:
            (folder / "model.safetensors").unlink()

    return change


def beside(name: str, content: bytes | str | None = None) -> Change:
    """A file beside the others; without content, the weights times two."""

    def change(folder: Path) -> None:
        if content is None:
            store({key: tensor * 2 for key, tensor in tensors_of(folder).items()}, folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def moved(name: str, to: str) -> Change:
    return lambda folder: (folder / name).rename(folder / to)


def replaced(name: str, make: Callable[[Path], Any]) -> Change:
    """Something else in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def dangling(path: Path) -> None:
    path.symlink_to("../../blobs/0123abcd")


def linked(folder: Path) -> None:
    """Links to files elsewhere, as in a Hugging Face cache."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(f"../blobs/{number}")


def tokenizer(num_words: int) -> Change:
    def change(folder: Path) -> None:
        words = {f"w{number}": number for number in range(num_words)}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))

    return change


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def as_auto_model_saves(folder: Path) -> None:
    named(lambda name: name.removeprefix("model."))(folder)
    config(architectures=["Qwen3Model"])(folder)


def llama_base(folder: Path) -> None:
    named(lambda name: name.removeprefix("model."))(folder)
    config(architectures=["LlamaModel"])(folder)


def without_biases(stored: dict[str, torch.Tensor]) -> None:
    for name in [name for name in stored if name.endswith("k_proj.bias")]:
        del stored[name]


def llama3(**changes: Any) -> dict[str, Any]:
    """Llama 3's rope with some fields changed or dropped."""
    return {"rope_parameters": {name: v for name, v in {**tiny.LLAMA3, **changes}.items() if v is not DROPPED}}


ROPE_OF_BEFORE = {"rope_parameters": DROPPED, "rope_theta": 1e6}

ROWS = [
    Row("plain", lambda folder: None),
    Row("tied", lambda folder: None, variant="gqa1_tied"),
    Row("attention bias", lambda folder: None, variant="gqa4_bias"),
    Row("links, as in a cache", linked),
    # What kind of model
    Row("another model_type", config(model_type="qwen2"), "model_type='qwen2'"),
    Row("another family", config(model_type="gemma"), "model_type='gemma'", "llama"),
    Row("an unknown model_type", config(model_type="unheard_of"), "model_type='unheard_of'"),
    Row("no model_type", config(model_type=DROPPED), "model_type"),
    Row("model_type null", config(model_type=None), "model_type=None"),
    Row("no architectures", config(architectures=DROPPED), "architectures=None"),
    Row("another architecture", config(architectures=["GemmaForCausalLM"]), "GemmaForCausalLM"),
    Row("an architecture of another family", config(architectures=["LlamaForCausalLM"]), "model_type='qwen3'"),
    Row("several architectures", config(architectures=["Unheard", "Qwen3ForCausalLM"])),
    Row("auto_map", config(auto_map={"AutoModelForCausalLM": "modeling.Model"})),
    Row("quantization_config", config(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    Row("quantization_config null", config(quantization_config=None)),
    Row("other settings of a layer", config(per_layer_config={"0": {"head_dim": 16}}), "per_layer_config"),
    Row("weights of another name", config(transformers_weights="other.safetensors"), "transformers_weights"),
    Row("a classifier", config(architectures=["Qwen3ForSequenceClassification"]), "Qwen3ForSequenceClassification"),
    # Rotary embedding
    Row("rope_scaling beside rope_parameters", config(rope_scaling=YARN)),
    Row("rope_scaling of before, type", config(**ROPE_OF_BEFORE, rope_scaling={**YARN, "type": "yarn"})),
    Row(
        "rope_scaling of before, only type",
        config(**ROPE_OF_BEFORE, rope_scaling={"type": "linear", "factor": 2.0}),
    ),
    Row(
        "rope_scaling that says default",
        config(
            rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            rope_scaling={"rope_type": "default"},
        ),
    ),
    Row("rope_scaling {}", config(rope_parameters={**YARN, "rope_theta": 1e4}, rope_scaling={})),
    Row("rope_scaling null", config(rope_parameters={**YARN, "rope_theta": 1e4}, rope_scaling=None)),
    Row(
        "rope_scaling that loses a rope_theta",
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_scaling=YARN),
        "rope_theta=1000000.0",
    ),
    Row(
        "rope_scaling with its rope_theta",
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_scaling={**YARN, "rope_theta": 1e6}),
    ),
    Row(
        "rope_scaling with another rope_theta",
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_scaling={**YARN, "rope_theta": 1e4}),
        "rope_theta",
    ),
    Row("rope_theta of before", config(**ROPE_OF_BEFORE)),
    Row("rope_theta an integer", config(rope_parameters={"rope_type": "default", "rope_theta": 1000000})),
    Row("rope_theta twice", config(rope_theta=1e6)),
    Row("rope_theta at the top only", config(rope_parameters={"rope_type": "default"}, rope_theta=500)),
    Row("no rope_theta", config(rope_parameters=DROPPED)),
    Row("rope_parameters null", config(rope_parameters=None, rope_theta=1e6)),
    Row("rope_theta a string", config(rope_parameters={"rope_theta": "10000.0"}), "rope_theta='10000.0'"),
    Row("rope_theta null", config(rope_parameters={"rope_type": "default", "rope_theta": None}), "rope_theta=None"),
    Row("rope_theta null at the top", config(rope_parameters=DROPPED, rope_theta=None), "rope_theta=None"),
    Row("rope_type null", config(rope_parameters={"rope_type": None, "rope_theta": 1e4}), "rope type None"),
    Row("rope by layer type", config(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "full_attention"),
    Row("rope of an absent layer type", config(rope_parameters={"sliding_attention": YARN}), "sliding_attention"),
    Row("dynamic rope", config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
    Row("partial rotary at the top", config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    Row(
        "a rope field that its type has not",
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "factor": 4.0, "mrope_section": [1, 2]}),
        warned="factor",
    ),
    Row("yarn, original length by default", config(rope_scaling={"rope_type": "yarn", "factor": 4.0})),
    Row("yarn, original length at the top", config(rope_scaling=YARN, original_max_position_embeddings=64)),
    Row(
        "yarn, original length at the top only",
        config(rope_scaling={"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=64),
    ),
    Row(
        "yarn, original length null",
        config(rope_scaling={**YARN, "original_max_position_embeddings": None}),
        "original_max_position_embeddings=None",
    ),
    Row("yarn, truncate null", config(rope_scaling={**YARN, "truncate": None}), "truncate=None"),
    Row("yarn, not truncated", config(rope_scaling={**YARN, "truncate": False, "beta_fast": 8, "beta_slow": 2})),
    Row("yarn, betas null", config(rope_scaling={**YARN, "beta_fast": None, "beta_slow": None})),
    Row("yarn, betas tiny", config(rope_scaling={**YARN, "beta_fast": 1e-310}), "beta_fast=1e-310"),
    Row("yarn, factor huge", config(rope_scaling={**YARN, "factor": 1e300}), "factor=1e+300"),
    Row("yarn, mscale", config(rope_scaling={**YARN, "mscale": 2.0, "mscale_all_dim": 0.5})),
    Row("yarn, mscale alone", config(rope_scaling={**YARN, "mscale": 2.0})),
    Row("yarn, attention_factor an integer", config(rope_scaling={**YARN, "attention_factor": 2})),
    Row("yarn, no factor", config(rope_scaling={"rope_type": "yarn"}), "factor"),
    # Other fields of config.json
    Row("no max_position_embeddings", config(max_position_embeddings=DROPPED)),
    Row("no rms_norm_eps", config(rms_norm_eps=DROPPED)),
    Row("rms_norm_eps large", config(rms_norm_eps=0.5)),
    Row("rms_norm_eps a string", config(rms_norm_eps="1e-6"), "rms_norm_eps='1e-6'"),
    Row("rms_norm_eps null", config(rms_norm_eps=None), "rms_norm_eps=None"),
    Row("hidden_size a float", config(hidden_size=64.0), "hidden_size=64.0"),
    Row("max_position_embeddings null", config(max_position_embeddings=None), "max_position_embeddings=None"),
    Row("no head_dim", config(head_dim=DROPPED), "[128, 64], config.json implies [512, 64]"),
    Row("head_dim null", config(head_dim=None), "head_dim=None"),
    Row("head_dim huge", config(head_dim=2**30), "GiB are missing"),
    Row("head_dim of hidden_size", config(head_dim=16), "shape [128, 64]"),
    Row("no num_key_value_heads", config(num_key_value_heads=DROPPED), "num_key_value_heads=32", "gqa1_tied"),
    Row("num_key_value_heads null", config(num_key_value_heads=None), variant="gqa1_tied"),
    Row("too many layers", config(num_hidden_layers=3, layer_types=None), "lacks tensors model.layers.2."),
    Row("too few layers", config(num_hidden_layers=1, layer_types=None), warned="model.layers.1."),
    Row("layers without number", config(num_hidden_layers=2**31 - 1, layer_types=None), "GiB are missing"),
    Row("no num_hidden_layers", config(num_hidden_layers=DROPPED), "num_hidden_layers"),
    Row("another vocab_size", config(vocab_size=300), "[211, 64]"),
    Row("hidden_act null", config(hidden_act=None), "hidden_act=None"),
    Row("layer_types null", config(layer_types=None)),
    Row("layer_types []", config(layer_types=[]), "layer_types=[]"),
    Row("layer_types of three layers", config(layer_types=["full_attention"] * 3), "num_hidden_layers=2"),
    Row("layer_types sliding", config(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
    Row("a window that is not used", config(use_sliding_window=False, sliding_window=4, max_window_layers=0)),
    Row(
        "a window that is used",
        config(use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=None),
        "use_sliding_window",
    ),
    Row(
        "a window of no layer",
        config(use_sliding_window=True, sliding_window=4, max_window_layers=2, layer_types=None),
    ),
    Row(
        "a window that layer_types does without",
        config(use_sliding_window=True, sliding_window=4, max_window_layers=0),
    ),
    Row(
        "max_window_layers a string",
        config(use_sliding_window=True, sliding_window=4, max_window_layers="0", layer_types=None),
        "max_window_layers='0'",
    ),
    Row("use_sliding_window null", config(use_sliding_window=None), "use_sliding_window=None"),
    Row("attention_bias null", config(attention_bias=None), "attention_bias=None"),
    Row("tie_word_embeddings a string", config(tie_word_embeddings="true"), "tie_word_embeddings='true'"),
    Row("tie_word_embeddings null", config(tie_word_embeddings=None), "tie_word_embeddings=None"),
    Row("no tie_word_embeddings", config(tie_word_embeddings=DROPPED)),
    Row("torch_dtype of before", config(dtype=DROPPED, torch_dtype="bfloat16")),
    Row("two dtypes", config(dtype="float16", torch_dtype="bfloat16")),
    Row("an unknown dtype", config(dtype="bf16"), "dtype='bf16'"),
    Row("a dtype of eight bits", config(dtype="float8_e4m3fn")),
    Row("dtype null", config(dtype=None)),
    Row(
        "rms_norm_eps an integer",
        config(rms_norm_eps=1),
        why_served="it says the same number",
        meant={"rms_norm_eps": 1.0},
    ),
    Row("attention_dropout", config(attention_dropout=0.5)),
    Row("attn_implementation", config(attn_implementation="eager")),
    Row("attention_bias without biases", config(attention_bias=True), "self_attn.k_proj.bias"),
    Row("another intermediate_size", config(intermediate_size=64), "config.json implies [64, 64]"),
    Row("more heads", config(num_attention_heads=8), "shape [128, 64], config.json implies [256, 64]"),
    Row(
        "a field of training of the wrong type",
        config(initializer_range="0.02", use_cache="yes"),
        why_served="serving does not read these fields",
    ),
    Row(
        "pad_token_id outside the vocabulary",
        config(pad_token_id=500),
        why_served="nothing is padded with a token",
    ),
    # Families
    Row("llama", lambda folder: None, variant="llama"),
    Row("llama, saved by AutoModel, tied", llama_base, variant="llama_llama3_tied"),
    Row("llama, no head_dim", config(head_dim=DROPPED), variant="llama"),
    Row("llama, head_dim null", config(head_dim=None), variant="llama"),
    Row("llama, head_dim by default", config(head_dim=DROPPED), "shape [128, 64]", "llama_llama3_tied"),
    Row("llama, no num_key_value_heads", config(num_key_value_heads=DROPPED), variant="llama"),
    Row("llama, num_key_value_heads null", config(num_key_value_heads=None), variant="llama"),
    Row("llama, no max_position_embeddings", config(max_position_embeddings=DROPPED), variant="llama"),
    Row("llama, heads that do not divide", config(hidden_size=66), "hidden_size=66", "llama"),
    Row("llama, mlp_bias null", config(mlp_bias=None), "mlp_bias=None", "llama"),
    Row("llama, mlp_bias without biases", config(mlp_bias=True), "mlp.down_proj.bias", "llama"),
    Row("llama, biases that it does not have", config(mlp_bias=False), warned="bias", variant="llama_mlp_bias_yarn"),
    Row("llama, a window", config(sliding_window=4), "sliding_window=4", "llama"),
    Row("llama, a window as long as what is served", config(sliding_window=128), variant="llama"),
    Row("llama, attention in chunks", config(attention_chunk_size=4), "attention_chunk_size=4", "llama"),
    Row("llama, pretraining_tp", config(pretraining_tp=2), variant="llama"),
    Row("llama, soft caps", config(final_logit_softcapping=30.0), "final_logit_softcapping=30.0", "llama"),
    Row("llama, no soft caps", config(attn_logit_softcapping=None), variant="llama"),
    Row("llama, gelu", config(hidden_act="gelu"), "hidden_act='gelu'", "llama"),
    Row("llama3 rope of before", config(rope_parameters=DROPPED, rope_scaling=tiny.LLAMA3), variant="llama"),
    Row(
        "llama3 rope, original length at the top", config(original_max_position_embeddings=32, **llama3()), "", "llama"
    ),
    Row(
        "llama3 rope, original length by default",
        config(**llama3(original_max_position_embeddings=DROPPED)),
        "",
        "llama",
    ),
    Row("llama3 rope, no low_freq_factor", config(**llama3(low_freq_factor=DROPPED)), "'low_freq_factor'", "llama"),
    Row("llama3 rope, no high_freq_factor", config(**llama3(high_freq_factor=DROPPED)), "'high_freq_factor'", "llama"),
    Row("llama3 rope, no factor", config(**llama3(factor=DROPPED)), "'factor'", "llama"),
    Row("llama3 rope, borders the other way", config(**llama3(low_freq_factor=4.0)), "low_freq_factor=4.0", "llama"),
    Row("llama3 rope, border null", config(**llama3(low_freq_factor=None)), "low_freq_factor=None", "llama"),
    Row("longrope", config(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "'longrope'", "llama"),
    Row("mistral", lambda folder: None, variant="mistral"),
    Row("mistral, head_dim null", config(head_dim=None), "shape [128, 64]", "mistral"),
    Row("mistral, no sliding_window", config(sliding_window=DROPPED), variant="mistral"),
    Row("mistral, a window as long as what is served", config(sliding_window=128), variant="mistral"),
    Row("mistral, a window that is used", config(sliding_window=127), "sliding_window=127", "mistral"),
    Row("mistral, sliding_window a string", config(sliding_window="4096"), "sliding_window='4096'", "mistral"),
    Row("mistral, no num_key_value_heads", config(num_key_value_heads=DROPPED), "num_key_value_heads=8", "mistral"),
    Row("mistral, attention_bias", config(attention_bias=True, mlp_bias=True), variant="mistral"),
    Row("mixtral", lambda folder: None, variant="mixtral_odd_tied"),
    Row("mixtral, no num_experts_per_tok", config(num_experts_per_tok=DROPPED), variant="mixtral_odd_tied"),
    Row(
        "mixtral, experts of another name", config(num_local_experts=DROPPED, num_experts=5), variant="mixtral_odd_tied"
    ),
    Row("mixtral, a window as long as what is served", config(sliding_window=128), variant="mixtral_odd_tied"),
    Row("mixtral, more experts than it has", config(num_local_experts=6), "lacks tensor", variant="mixtral_odd_tied"),
    Row("mixtral, top 6 of 5", config(num_experts_per_tok=6), "num_experts_per_tok=6", variant="mixtral_odd_tied"),
    Row("qwen3_moe", lambda folder: None, variant="qwen3_moe"),
    Row("qwen3_moe, as published", config(num_local_experts=DROPPED, num_experts=8), variant="qwen3_moe"),
    Row("qwen3_moe, no norm_topk_prob", config(norm_topk_prob=DROPPED), variant="qwen3_moe"),
    Row("qwen3_moe, norm_topk_prob null", config(norm_topk_prob=None), "norm_topk_prob=None", variant="qwen3_moe"),
    Row("qwen3_moe, no num_experts_per_tok", config(num_experts_per_tok=DROPPED), variant="qwen3_moe"),
    Row("qwen3_moe, mlp_only_layers null", config(mlp_only_layers=None), variant="qwen3_moe"),
    Row("qwen3_moe, a layer without experts", config(mlp_only_layers=[1]), "mlp_only_layers=[1]", variant="qwen3_moe"),
    Row("qwen3_moe, no head_dim", config(head_dim=DROPPED), "config.json implies", variant="qwen3_moe"),
    Row(
        "qwen3_moe, a window as long as what is served",
        config(use_sliding_window=True, sliding_window=128),
        variant="qwen3_moe",
    ),
    Row("qwen3_moe, a window that is not used", config(sliding_window=16), variant="qwen3_moe"),
    Row("qwen2", lambda folder: None, variant="qwen2_tied"),
    Row("qwen2, no head_dim", config(head_dim=DROPPED), variant="qwen2_tied"),
    Row("qwen2, head_dim null", config(head_dim=None), "head_dim=None", "qwen2_tied"),
    Row("qwen2, attention_bias", config(attention_bias=False), variant="qwen2_tied"),
    Row("qwen2, without biases", tensors(without_biases), "self_attn.k_proj.bias", "qwen2_tied"),
    Row(
        "qwen2, a window that is used",
        config(use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=None),
        "sliding_window=4",
        "qwen2_tied",
    ),
    Row("smollm3", lambda folder: None, variant="smollm3"),
    Row("smollm3, no no_rope_layers", config(no_rope_layers=DROPPED), variant="smollm3"),
    Row("smollm3, another interval", config(no_rope_layers=None, no_rope_layer_interval=2), variant="smollm3"),
    Row("smollm3, an interval of 0", config(no_rope_layers=None, no_rope_layer_interval=0), "interval=0", "smollm3"),
    Row("smollm3, no_rope_layers of more layers", config(no_rope_layers=[0, 1, 1, 0, 1, 1, 0]), variant="smollm3"),
    Row("smollm3, no_rope_layers of fewer layers", config(no_rope_layers=[0, 1]), "no_rope_layers=[0, 1]", "smollm3"),
    Row("smollm3, no_rope_layers a number", config(no_rope_layers=4), "no_rope_layers=4", "smollm3"),
    Row("smollm3, no rope_theta", config(rope_parameters=DROPPED), variant="smollm3"),
    Row("smollm3, no tie_word_embeddings", config(tie_word_embeddings=DROPPED), variant="smollm3"),
    Row("smollm3, head_dim null", config(head_dim=None), "head_dim=None", "smollm3"),
    Row(
        "smollm3, a window of layers without rope",
        config(use_sliding_window=True, sliding_window=4, layer_types=None),
        "sliding_window=4",
        "smollm3",
    ),
    Row(
        "smollm3, a window and no layer without rope",
        config(use_sliding_window=True, sliding_window=4, layer_types=None, no_rope_layers=[1] * 5),
        variant="smollm3",
    ),
    Row("rope_scaling a string", config(rope_scaling="yarn"), "rope_scaling='yarn'"),
    Row("UTF-16", lambda folder: (folder / "config.json").write_text("{}", encoding="utf-16"), "not valid JSON"),
    Row("a byte order mark", config_text(lambda text: "\ufeff" + text), "not valid JSON"),
    Row("a comment", config_text(lambda text: "// made by hand\n" + text), "not valid JSON"),
    Row("a field twice", config_text(lambda text: text.replace("{", '{"hidden_size": 7,', 1))),
    Row("NaN", config(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    # Which files
    Row("shards", sharded()),
    Row("old shards beside a newer whole", sharded(keep_whole=True, scale=-1.0)),
    Row("a damaged index beside the whole", beside("model.safetensors.index.json", "{")),
    Row("shards that the index does not name", all_of(sharded(), beside("model-00003-of-00003.safetensors", b"x"))),
    Row(
        "an index that names the wrong shard",
        sharded(edit=lambda shards, index: index.update(dict.fromkeys(index, "model-00001-of-00002.safetensors"))),
        "lacks tensors",
    ),
    Row(
        "an index that mixes shards up",
        sharded(
            edit=lambda shards, index: index.update(
                zip(index, reversed(index.values()), strict=True)  # type: ignore[call-overload]
            )
        ),
    ),
    Row(
        "an index that leaves tensors out",
        sharded(edit=lambda shards, index: [index.pop(name) for name in list(index)[1:-1]]),
    ),
    Row(
        "a shard without what the index says",
        sharded(edit=lambda shards, index: shards[index[QUERY]].pop(QUERY)),
        f"lacks tensor {QUERY}",
    ),
    Row(
        "a tensor in two shards",
        sharded(edit=lambda shards, index: [shard.update({QUERY: torch.ones(128, 64)}) for shard in shards.values()]),
        f"'{QUERY}' is in both",
    ),
    Row(
        "a shard in a folder of its own",
        sharded(edit=lambda shards, index: index.update({QUERY: "more/model-00001-of-00002.safetensors"})),
        "outside the folder",
    ),
    Row(
        "a shard that is not there",
        sharded(edit=lambda shards, index: index.update({QUERY: "model-00003-of-00003.safetensors"})),
        "model-00003-of-00003.safetensors",
    ),
    Row("no index", all_of(sharded(), lambda folder: (folder / "model.safetensors.index.json").unlink()), "index"),
    Row("a file of another name", moved("model.safetensors", "weights.safetensors"), "weights.safetensors"),
    Row("a variant only", moved("model.safetensors", "model.fp16.safetensors"), "model.fp16.safetensors"),
    Row("a variant beside", beside("model.fp16.safetensors")),
    Row("a file of macOS beside", beside("._model.safetensors", b"\0\5\26\7")),
    Row("consolidated weights beside", beside("consolidated.safetensors")),
    Row("an adapter's weights beside", beside("adapter_model.safetensors")),
    Row("an adapter beside", beside("adapter_config.json", '{"peft_type": "LORA"}'), "adapter_config.json"),
    Row("pickles beside", beside("pytorch_model.bin", b"x")),
    # Tensors
    Row(
        "saved buffers",
        adding(
            model__rotary_emb__inv_freq=torch.ones(16), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(16)
        ),
    ),
    Row("an extra tensor", adding(extra__weight=torch.ones(3)), warned="extra.weight"),
    Row(
        "a bias that config.json does not have",
        adding(model__layers__0__self_attn__q_proj__bias=torch.ones(128)),
        warned="q_proj.bias",
    ),
    Row("many extra tensors", adding(**{f"extra__{number}": torch.ones(1) for number in range(9)}), warned="6 more"),
    Row("float64", typed(torch.float64)),
    Row("float16", typed(torch.float16)),
    Row("bfloat16", typed(torch.bfloat16)),
    Row("two types", typed(torch.bfloat16, only="model.layers.0.mlp")),
    Row("int8", typed(torch.int8, only=QUERY), "torch.int8"),
    Row("fp8", typed(torch.float8_e4m3fn, only=QUERY), "torch.float8_e4m3fn"),
    Row("no metadata", lambda folder: store(tensors_of(folder), folder / "model.safetensors", {})),
    Row("metadata of MLX", lambda folder: store(tensors_of(folder), folder / "model.safetensors", {"format": "mlx"})),
    Row("an extra tensor of integers", adding(extra=torch.ones(3, dtype=torch.int64)), warned="extra"),
    Row("a transposed tensor", tensors(lambda stored: stored.update({QUERY: stored[QUERY].T})), "shape [64, 128]"),
    Row("names without prefix", named(lambda name: name.removeprefix("model."))),
    Row("names with the prefix twice", named(lambda name: "model." + name)),
    Row("names of a compiled model", named(lambda name: "_orig_mod." + name), "lacks"),
    Row(
        "a tensor by both names",
        adding(embed_tokens__weight=torch.ones(tiny.VOCAB_SIZE, 64)),
        "'embed_tokens.weight'",
    ),
    Row("saved by AutoModel, tied", as_auto_model_saves, variant="gqa1_tied"),
    Row(
        "saved by AutoModel, without its head",
        all_of(tensors(lambda stored: stored.pop(HEAD)), as_auto_model_saves),
        HEAD,
    ),
    # Tied embeddings
    Row("not tied and no head", config(tie_word_embeddings=False), HEAD, variant="gqa1_tied"),
    Row("tied and a head of its own", config(tie_word_embeddings=True), warned="tie_word_embeddings"),
    Row(
        "tied and the same head", tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING]})), variant="gqa1_tied"
    ),
    Row(
        "tied and a head of its own, in shards",
        all_of(sharded(), config(tie_word_embeddings=True)),
        warned="tie_word_embeddings",
    ),
    Row(
        "tied and a head of its own, without prefix",
        all_of(named(lambda name: name.removeprefix("model.")), config(tie_word_embeddings=True)),
        warned="tie_word_embeddings",
    ),
    Row(
        "tied and the same head in another type",
        tensors(lambda stored: stored.update({HEAD: stored[EMBEDDING].bfloat16()})),
        variant="gqa1_tied",
        warned="tie_word_embeddings",
    ),
    Row(
        "tied, both of one value in two types",
        tensors(lambda stored: stored.update({HEAD: (b := stored[EMBEDDING].bfloat16()), EMBEDDING: b.float()})),
        variant="gqa1_tied",
    ),
    Row(
        "tied and stored as the head",
        tensors(lambda stored: stored.update({HEAD: stored.pop(EMBEDDING)})),
        variant="gqa1_tied",
    ),
    Row(
        "tied and a misshapen head",
        adding(lm_head__weight=torch.ones(7, 64)),
        "shape [7, 64]",
        variant="gqa1_tied",
    ),
    Row("tied and neither", tensors(lambda stored: stored.pop(EMBEDDING)), EMBEDDING, variant="gqa1_tied"),
    # Ends of sequences, tokenizers
    Row("no generation_config.json", lambda folder: (folder / "generation_config.json").unlink()),
    Row("ends in generation_config.json", generation(eos_token_id=list(range(0, 211, 2)))),
    Row("ends in config.json", all_of(config(eos_token_id=list(range(0, 211, 2))), generation())),
    Row("ends in both", all_of(config(eos_token_id=list(range(211))), generation(eos_token_id=500))),
    Row("ends that are no list", generation(eos_token_id="2"), "eos_token_id='2'"),
    Row("generation_config.json that samples", generation(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)),
    Row(
        "generation_config.json that punishes repetition",
        generation(repetition_penalty=1.3),
        warned="repetition_penalty",
        why_served="SamplingParams alone say how tokens are chosen; the warning names what is not followed",
        asked={"repetition_penalty": 1.0},
    ),
    Row(
        "generation_config.json that forbids tokens",
        generation(suppress_tokens=list(range(100))),
        warned="suppress_tokens",
        why_served="SamplingParams alone say how tokens are chosen; the warning names what is not followed",
        asked={"suppress_tokens": None},
    ),
    Row(
        "config.json that punishes repetition",
        all_of(lambda folder: (folder / "generation_config.json").unlink(), config(repetition_penalty=1.3)),
        warned="settings in config.json are ignored: repetition_penalty=1.3",
        why_served="SamplingParams alone say how tokens are chosen; the warning names what is not followed",
        asked={"repetition_penalty": 1.0},
    ),
    Row(
        "config.json that punishes repetition beside a generation_config.json",
        config(repetition_penalty=1.3),
    ),
    Row("ends null", generation(eos_token_id=None)),
    Row("ends true", generation(eos_token_id=True), "eos_token_id=True"),
    Row("a length in generation_config.json", generation(max_length=20, max_new_tokens=3)),
    Row("a damaged generation_config.json", beside("generation_config.json", "{"), "generation_config.json"),
    Row("a tokenizer with more tokens", tokenizer(500)),
    Row("a damaged tokenizer", beside("tokenizer.json", "{"), "tokenizer"),
    Row("a tokenizer of sentencepiece alone", beside("tokenizer.model", b"x"), warned="tokenizer.model, but no tokeni"),
    Row("a tokenizer of sentencepiece beside", all_of(tokenizer(211), beside("tokenizer.model", b"x"))),
    # What is no file
    Row("config.json a folder", replaced("config.json", Path.mkdir), "config.json is a folder"),
    Row("config.json a fifo", replaced("config.json", os.mkfifo), "config.json is a fifo"),
    Row("config.json a dangling link", replaced("config.json", dangling), "blobs/0123abcd, which is not there"),
    Row("weights a folder", replaced("model.safetensors", Path.mkdir), "model.safetensors is a folder"),
    Row("weights a fifo", replaced("model.safetensors", os.mkfifo), "model.safetensors is a fifo"),
    Row("weights a dangling link", replaced("model.safetensors", dangling), "half-downloaded"),
    Row("a shard a dangling link", all_of(sharded(), replaced("model-00002-of-00002.safetensors", dangling)), "half-"),
    Row("a shard a fifo", all_of(sharded(), replaced("model-00002-of-00002.safetensors", os.mkfifo)), "is a fifo"),
    Row("an index a dangling link", all_of(sharded(), replaced("model.safetensors.index.json", dangling)), "half-"),
    Row("a tokenizer a dangling link", replaced("tokenizer.json", dangling), "half-downloaded"),
    Row(
        "a tokenizer's settings a dangling link",
        all_of(tokenizer(211), replaced("tokenizer_config.json", dangling)),
        "half-downloaded",
    ),
    Row("ends a dangling link", replaced("generation_config.json", dangling), "half-downloaded"),
    Row("a link to itself", replaced("config.json", lambda path: path.symlink_to(path.name)), "config.json"),
]


@pytest.fixture
def folder(request: pytest.FixtureRequest, checkpoint: Any, tmp_path: Path) -> Path:
    """A copy of the row's checkpoint with its change made."""
    row = request.getfixturevalue("row")
    copy = Path(shutil.copytree(checkpoint(row.variant)[0], tmp_path / "model"))
    row.change(copy)
    return copy


def our_tokens(folder: Path, **options: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    with LLM(str(folder), device="cpu", num_kvcache_blocks=16, max_model_len=128, max_num_seqs=4, **options) as llm:
        answers = llm.generate([list(prompt) for prompt in PROMPTS], params, use_tqdm=False)
    assert [answer["error"] for answer in answers] == [None] * len(PROMPTS)
    return [answer["token_ids"] for answer in answers]


@torch.inference_mode()
def their_tokens(folder: Path, asked: dict[str, Any]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, **asked}
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    outputs = [model.generate(one, attention_mask=torch.ones_like(one), **options) for one in ids]
    return [output[0, len(prompt) :].tolist() for output, prompt in zip(outputs, PROMPTS, strict=True)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "_"))
def test_folder(row: Row, folder: Path, checkpoint: Any, caplog: pytest.LogCaptureFixture) -> None:
    if row.refused:
        with pytest.raises((ModelLoadError, ConfigError), match=re.escape(row.refused)):
            our_tokens(folder)
        return
    ours = our_tokens(folder)
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("nanovllm") and record.levelno >= logging.WARNING
    ]
    assert [row.warned in warning for warning in warnings] == [True] * bool(row.warned), warnings
    if row.why_served and row.asked is None:
        with pytest.raises(Exception, match=r"."):  # transformers raises many types
            their_tokens(folder, {})
        folder = Path(shutil.copytree(checkpoint(row.variant)[0], folder.parent / "plain"))
        config(**(row.meant or {}))(folder)
    assert ours == their_tokens(folder, row.asked or {})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"])
def test_file_that_may_not_be_read(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tiny_copy / name
    path.touch()
    path.chmod(0)
    if os.geteuid() == 0:  # who may read everything
        may_read = os.access
        monkeypatch.setattr(os, "access", lambda one, mode: Path(one) != path and may_read(one, mode))
    with pytest.raises(ModelLoadError, match=rf"{name} may not be read by this user; change its permissions"):
        our_tokens(tiny_copy)


def test_there_are_rows_of_every_kind() -> None:
    assert len(ROWS) >= 60
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert sum(not row.refused for row in ROWS) >= 30
    assert all(row.why_served for row in ROWS if row.asked)


def test_random_weights_need_none_of_the_folder(tiny_copy: Path) -> None:
    config(tie_word_embeddings=True)(tiny_copy)
    (tiny_copy / "model.safetensors").unlink()
    assert our_tokens(tiny_copy, load_format="dummy")


def test_angles_that_do_not_fit_are_refused(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(max_position_embeddings=2**31 - 1)(tiny_copy)
    monkeypatch.setattr(load_model, "host_memory_bytes", lambda: 2**36)
    with pytest.raises(ModelLoadError, match=r"angles of max_model_len=2147483647 256.00 GiB, .* 64.00 GiB free"):
        LLM(str(tiny_copy), device="cpu", num_kvcache_blocks=16, max_model_len=2**31 - 1)


def test_tied_head_of_its_own_on_two_devices_and_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save(tiny.make_reference(vocab_size=212), tmp_path)
    config(tie_word_embeddings=True)(tmp_path)
    adding(extra__weight=torch.ones(3))(tmp_path)
    expected = their_tokens(tmp_path, {})
    for options in ({"enable_two_gpu_pd": True}, {"tensor_parallel_size": 2}):
        caplog.clear()
        assert our_tokens(tmp_path, **options) == expected
        warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert sum("tie_word_embeddings" in warning for warning in warned) == 1
        assert sum("extra.weight" in warning for warning in warned) == 1
