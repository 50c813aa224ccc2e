"""Tiny random checkpoints of every family on disk, and what transformers answers with them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 211
STACKED_NAMES = ("gate_proj", "up_proj", "down_proj")

BASE = {
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa1_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa2": {},
    "gqa4_bias": {"num_key_value_heads": 1, "attention_bias": True},
    "gqa8_three_layers": {"num_attention_heads": 8, "num_key_value_heads": 1, "num_hidden_layers": 3, "head_dim": 16},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn_tied": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
}

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NINE_HEADS = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}

# Each with a vocabulary that two and three ranks divide, and what its family or its rope asks for.
FAMILY_VARIANTS: dict[str, dict[str, Any]] = {
    name: {"vocab_size": 216, **changes}
    for name, changes in {
        "llama": {"model_type": "llama", "num_key_value_heads": 4, "head_dim": 16},
        "llama_llama3_tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        "llama_attention_bias_linear": {
            "model_type": "llama",
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
        "llama_mlp_bias_yarn": {"model_type": "llama", "mlp_bias": True, "rope_parameters": YARN},
        "llama_nine_heads_tied": {"model_type": "llama", "tie_word_embeddings": True, **NINE_HEADS},
        "mistral": {"model_type": "mistral", "sliding_window": None},
        "mixtral_odd_tied": {
            "model_type": "mixtral",
            "tie_word_embeddings": True,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
        },
        "mistral_window_yarn": {"model_type": "mistral", "sliding_window": 256, "rope_parameters": YARN},
        "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 16},
        "qwen2_seven_to_one": {"model_type": "qwen2", "num_attention_heads": 14, "rope_parameters": YARN},
        "qwen3_bias_llama3": {"attention_bias": True, "rope_parameters": LLAMA3},
        "qwen3_nine_heads": NINE_HEADS,
        "qwen3_moe": {
            "model_type": "qwen3_moe",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
        "qwen3_moe_odd_bias": {
            "model_type": "qwen3_moe",
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 36,
            "attention_bias": True,
            "rope_parameters": LLAMA3,
        },
        "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True, "num_hidden_layers": 5},
        "smollm3_biases_listed": {
            "model_type": "smollm3",
            "num_hidden_layers": 3,
            "no_rope_layers": [0, 1, 0],
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3,
        },
    }.items()
}


def fixed_roles(two_devices: bool) -> dict[str, Any]:
    """Options for one device, or for one that prefills and one that decodes."""
    return {"enable_two_gpu_pd": True, "card_roles": "fixed"} if two_devices else {}


def make_reference(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model with weights large enough that its greedy tokens vary and its logits do not tie."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**BASE, **changes})).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    return model


def stored_shapes(model: PreTrainedModel) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of a checkpoint's tensors: of each expert its own, which transformers stacks in memory."""
    is_mixtral = model.config.model_type == "mixtral"
    block, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2") if is_mixtral else ("mlp", *STACKED_NAMES)
    for name, parameter in model.named_parameters():
        layer, _, stacked = name.partition(".mlp.experts.")
        if not stacked:
            yield name.replace(".mlp.gate.", f".{block}.gate."), parameter.shape
            continue
        num_experts, rows, columns = parameter.shape
        for expert in range(num_experts):
            prefix = f"{layer}.{block}.experts.{expert}"
            if stacked == "gate_up_proj":
                yield f"{prefix}.{gate}.weight", torch.Size((rows // 2, columns))
                yield f"{prefix}.{up}.weight", torch.Size((rows // 2, columns))
            else:
                yield f"{prefix}.{down}.weight", torch.Size((rows, columns))


def save(model: PreTrainedModel, folder: Path, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


@torch.inference_mode()
def reference_tokens(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers' own greedy `generate` answers."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, use_cache=True
    )
    return output[0, len(prompt) :].tolist()


def random_prompts(count: int, seed: int = 0, longest: int = 90, shared: int = 0) -> list[list[int]]:
    """Prompts of random lengths; the first `shared` tokens are the same in all."""
    rng = random.Random(seed)
    beginning = [rng.randrange(VOCAB_SIZE) for _ in range(shared)]
    return [beginning + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))] for _ in range(count)]
