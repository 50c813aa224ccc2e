"""Tiny random Qwen3 checkpoints on disk, and what transformers answers with them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 211

BASE = {
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


def make_reference(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """A random model with weights large enough that its greedy tokens vary and its logits do not tie."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**{**BASE, **changes})).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    return model


def save(model: Qwen3ForCausalLM, folder: Path, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


@torch.inference_mode()
def reference_tokens(model: Qwen3ForCausalLM, prompt: list[int], max_tokens: int) -> list[int]:
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
