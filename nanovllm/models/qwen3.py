"""Reads the `config.json` of dense Qwen3: `model_type` qwen3. The model itself is in `nanovllm.models.decoder`."""

from __future__ import annotations

from typing import Any

from nanovllm.models.config_fields import flag, positive, refuse_window_from_layer
from nanovllm.models.decoder import CausalLM
from nanovllm.models.description import Family, ModelDescription

Qwen3ForCausalLM = CausalLM
"""The name by which other programs make a Qwen3."""


class Qwen3Config(ModelDescription):
    """A Qwen3: query and key heads are normed; one field says whether all four projections of attention have a bias."""

    @property
    def attention_bias(self) -> bool:
        return self.qkv_bias

    @property
    def intermediate_size(self) -> int:
        return self.ffn.intermediate_size

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Qwen3Config:
        """Reads `config.json`. A field that is left out is as in transformers, or refused.

        Raises:
            ModelLoadError: a field is missing or of the wrong type, or asks for something that is not supported.
        """
        refuse_window_from_layer(config)
        attention_bias = flag(config, "attention_bias")
        return cls.read(
            config,
            head_dim=positive(config, "head_dim", 128),
            default_kv_heads=32,
            default_max_positions=32768,
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            qk_norm=True,
        )


FAMILY = Family("qwen3", ("Qwen3ForCausalLM", "Qwen3Model"), "Qwen3, dense", Qwen3Config.from_dict)
