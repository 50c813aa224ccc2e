"""Reads the `config.json` of Qwen2 and Qwen2.5: `model_type` qwen2."""

from __future__ import annotations

from typing import Any

from nanovllm.models.config_fields import head_dim_or_share, refuse_window_from_layer
from nanovllm.models.description import Family, ModelDescription


def read(config: dict[str, Any]) -> ModelDescription:
    """A Qwen2: query, key and value have a bias, whatever the config says, and nothing else has one.

    Raises:
        ModelLoadError: a field is missing or of the wrong type, or asks for something that is not supported.
    """
    refuse_window_from_layer(config)
    return ModelDescription.read(
        config,
        head_dim=head_dim_or_share(config),
        default_kv_heads=32,
        default_max_positions=32768,
        qkv_bias=True,
    )


FAMILY = Family("qwen2", ("Qwen2ForCausalLM", "Qwen2Model"), "Qwen2, Qwen2.5", read)
