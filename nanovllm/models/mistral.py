"""Reads the `config.json` of Mistral 7B, Nemo and other dense ones: `model_type` mistral."""

from __future__ import annotations

from typing import Any

from nanovllm.models.config_fields import head_dim_or_share, window_of_all_layers
from nanovllm.models.description import Family, ModelDescription


def read(config: dict[str, Any]) -> ModelDescription:
    """A Mistral: no biases; one window for all layers, unless `sliding_window` is null.

    Raises:
        ModelLoadError: a field is missing or of the wrong type, or asks for something that is not supported.
    """
    return ModelDescription.read(
        config,
        head_dim=head_dim_or_share(config, may_be_null=True),
        default_kv_heads=8,
        default_max_positions=4096 * 32,
        sliding_window=window_of_all_layers(config, default=4096),
    )


FAMILY = Family("mistral", ("MistralForCausalLM", "MistralModel"), "Mistral 7B, Mistral Nemo", read)
