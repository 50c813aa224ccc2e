"""Reads the `config.json` of SmolLM3: `model_type` smollm3."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import ModelLoadError, short_repr
from nanovllm.models.config_fields import flag, head_dim_or_share, positive, refuse_window
from nanovllm.models.description import Family, ModelDescription


def read(config: dict[str, Any]) -> ModelDescription:
    """A SmolLM3: a Llama some of whose layers do not rotate their heads, every fourth if the config does not say which.

    Raises:
        ModelLoadError: a field is missing or of the wrong type, or asks for something that is not supported.
    """
    layers_without_rope = _layers_without_rope(config, positive(config, "num_hidden_layers"))
    # Only these layers would have the window.
    if layers_without_rope:
        refuse_window(config, default=None)
    attention_bias = flag(config, "attention_bias")
    return ModelDescription.read(
        config,
        head_dim=head_dim_or_share(config),
        default_kv_heads=4,
        default_max_positions=32768,
        default_rope_theta=2e6,
        is_tied_by_default=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        ffn_bias=flag(config, "mlp_bias"),
        layers_without_rope=layers_without_rope,
    )


def _layers_without_rope(config: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """Where `no_rope_layers` has a 0, or else the last of every `no_rope_layer_interval` layers."""
    has_rope = config.get("no_rope_layers")
    if has_rope is None:
        interval = positive(config, "no_rope_layer_interval", 4)
        return tuple(range(interval - 1, num_layers, interval))
    is_list = isinstance(has_rope, list) and all(type(value) is int and value in (0, 1) for value in has_rope)
    if not is_list or len(has_rope) < num_layers:
        raise ModelLoadError(
            f"config.json: no_rope_layers={short_repr(has_rope)} is not a list of 0 (without rope) and 1 (with it) for "
            f"each of num_hidden_layers={num_layers}"
        )
    return tuple(layer for layer in range(num_layers) if not has_rope[layer])


FAMILY = Family("smollm3", ("SmolLM3ForCausalLM", "SmolLM3Model"), "SmolLM3", read)
