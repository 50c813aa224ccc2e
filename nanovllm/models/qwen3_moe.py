"""Reads the `config.json` of Qwen3 with experts in all layers: `model_type` qwen3_moe."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import ModelLoadError, short_repr
from nanovllm.layers.experts import ExpertsConfig
from nanovllm.models.config_fields import (
    experts_per_token,
    flag,
    head_dim_or_share,
    number_of_experts,
    positive,
    refuse_shared_experts,
    window_of_all_layers,
)
from nanovllm.models.description import Family, ModelDescription


def read(config: dict[str, Any]) -> ModelDescription:
    """A Qwen3 whose layers have experts instead of one FFN: query and key heads are normed.

    Raises:
        ModelLoadError: a field is missing or of the wrong type, or asks for something that is not supported.
    """
    refuse_shared_experts(config)
    _refuse_layers_without_experts(config, positive(config, "num_hidden_layers"))
    num_experts = number_of_experts(config, "num_experts", "num_local_experts", default=128)
    attention_bias = flag(config, "attention_bias")
    return ModelDescription.read(
        config,
        head_dim=head_dim_or_share(config),
        default_kv_heads=4,
        default_max_positions=32768,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
        sliding_window=window_of_all_layers(config, default=4096) if flag(config, "use_sliding_window") else None,
        ffn=ExpertsConfig(
            num_experts=num_experts,
            num_per_token=experts_per_token(config, num_experts, default=8),
            intermediate_size=positive(config, "moe_intermediate_size", 768),
            renormalizes=flag(config, "norm_topk_prob"),
        ),
    )


def _refuse_layers_without_experts(config: dict[str, Any], num_layers: int) -> None:
    # Every layer whose number, counted from 1, is a multiple has experts.
    step = positive(config, "decoder_sparse_step", 1)
    if step != 1:
        raise ModelLoadError(f"decoder_sparse_step={step} is not supported; only layers that all have experts are (1)")
    plain = config.get("mlp_only_layers")
    if plain is None:
        return
    if not isinstance(plain, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in plain):
        raise ModelLoadError(f"config.json: mlp_only_layers={short_repr(plain)} is not a list of integers")
    if any(0 <= layer < num_layers for layer in plain):
        raise ModelLoadError(
            f"mlp_only_layers={short_repr(plain)} is not supported; only layers that all have experts are ([])"
        )


FAMILY = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    "Qwen3 with experts: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B",
    read,
)
