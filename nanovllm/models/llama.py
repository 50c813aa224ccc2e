"""Reads the `config.json` of Llama 2 and 3 and of the many models that are Llamas by name: `model_type` llama."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import ModelLoadError
from nanovllm.models.config_fields import flag, head_dim_or_share, positive, window_of_all_layers
from nanovllm.models.description import Family, ModelDescription


def read(config: dict[str, Any]) -> ModelDescription:
    """A Llama: no norm of query and key heads; biases only where the config asks for them.

    Raises:
        ModelLoadError: a field is missing or of the wrong type, or asks for something that is not supported.
    """
    hidden_size, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    if hidden_size % heads:
        raise ModelLoadError(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={heads}")
    attention_bias = flag(config, "attention_bias")
    return ModelDescription.read(
        config,
        head_dim=head_dim_or_share(config, may_be_null=True),
        default_kv_heads=None,
        default_max_positions=2048,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        ffn_bias=flag(config, "mlp_bias"),
        # No Llama has one, but transformers' cache would take it from the config.
        sliding_window=window_of_all_layers(config, default=None),
    )


FAMILY = Family(
    "llama", ("LlamaForCausalLM", "LlamaModel"), "Llama 2, Llama 3, 3.1, 3.2, 3.3; SmolLM2; TinyLlama", read
)
