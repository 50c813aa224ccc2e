"""Reads the `config.json` of Mixtral, a Mistral with experts: `model_type` mixtral."""

from __future__ import annotations

from typing import Any

from nanovllm.layers.experts import ExpertNames, ExpertsConfig
from nanovllm.models.config_fields import (
    experts_per_token,
    head_dim_or_share,
    number_of_experts,
    positive,
    refuse_shared_experts,
    window_of_all_layers,
)
from nanovllm.models.description import Family, ModelDescription

NAMES = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")


def read(config: dict[str, Any]) -> ModelDescription:
    """A Mixtral: no biases; the probabilities of a token's experts are divided by their sum.

    Raises:
        ModelLoadError: a field is missing or of the wrong type, or asks for something that is not supported.
    """
    refuse_shared_experts(config)
    num_experts = number_of_experts(config, "num_local_experts", "num_experts", default=8)
    return ModelDescription.read(
        config,
        head_dim=head_dim_or_share(config, may_be_null=True),
        default_kv_heads=8,
        default_max_positions=4096 * 32,
        default_rope_theta=1e6,
        default_rms_norm_eps=1e-5,
        sliding_window=window_of_all_layers(config, default=None),
        ffn=ExpertsConfig(
            num_experts=num_experts,
            num_per_token=experts_per_token(config, num_experts, default=2),
            intermediate_size=positive(config, "intermediate_size", 14336),
            renormalizes=True,
            names=NAMES,
        ),
    )


FAMILY = Family("mixtral", ("MixtralForCausalLM", "MixtralModel"), "Mixtral 8x7B, 8x22B", read)
