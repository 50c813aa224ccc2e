"""What a checkpoint's model is, as data: everything that the decoder block needs to know of a family.

Knows nothing of layers that compute; a reader of `config.json` for each family fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from nanovllm.errors import ModelLoadError
from nanovllm.layers.experts import ExpertsConfig
from nanovllm.layers.feed_forward import GatedFfnConfig
from nanovllm.layers.rotary_embedding import RopeConfig
from nanovllm.models.config_fields import (
    DEFAULT_ROPE_THETA,
    check_layer_types,
    flag,
    number,
    positive,
    refuse_unsupported,
    rope_config,
)
from nanovllm.models.quantization import has_kv_scales, stored_format
from nanovllm.utils.fp8 import Fp8Format

Description = TypeVar("Description", bound="ModelDescription")


@dataclass(frozen=True)
class ModelDescription:
    """A decoder-only model of pre-norm layers, named as in `config.json` where it is a field there.

    Attributes:
        vocab_size: tokens, rows of embedding and output head.
        hidden_size: width of the hidden states.
        num_hidden_layers: number of layers.
        num_attention_heads, num_key_value_heads: query heads, and key and value heads that groups of them share.
        head_dim: size of each head; `hidden_size / num_attention_heads` in many models, not in all.
        rms_norm_eps: of all norms.
        max_position_embeddings: longest context that the model was made for.
        tie_word_embeddings: whether the output head is the embedding.
        qkv_bias: whether the projections of query, key and value have a bias.
        output_bias: whether the projection after attention has one.
        qk_norm: whether query and key heads are normed before they are rotated.
        rope: the frequencies of the rotary embedding.
        layers_without_rope: layers whose heads are not rotated, by index.
        sliding_window: number of tokens that a layer attends to at most, None if all layers attend to all. Attention
            here is always to all, which is the same for contexts up to the window; longer ones are not served.
        ffn: the feed-forward part of every layer.
        quantization: how the linear layers have their weights; None for the type of the model. Embedding, output head,
            norms and routers are always in that type.
        has_kv_scales: whether the checkpoint has scales of keys and values in FP8, one of each for a layer.
        has_fp8_kv: whether KV is kept in FP8, which is for the engine to say, not for the checkpoint.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    rope: RopeConfig
    layers_without_rope: tuple[int, ...]
    sliding_window: int | None
    ffn: GatedFfnConfig | ExpertsConfig
    quantization: Fp8Format | None = None
    has_kv_scales: bool = False
    has_fp8_kv: bool = False

    @property
    def num_parameters(self) -> int:
        """Weights of the GEMMs that a token passes, the output head included, the embedding look-up not."""
        return self._num_parameters(self.ffn.num_parameters(self.hidden_size))

    def num_read(self, num_tokens: float) -> int:
        """Weights of the GEMMs of one forward pass over so many tokens; of experts, as many as are expected."""
        return self._num_parameters(self.ffn.num_read(self.hidden_size, num_tokens))

    @property
    def num_unquantized(self) -> int:
        """Those of the weights that are in the type of the model in any format: of the output head and of routers."""
        routers = self.num_hidden_layers * self.ffn.num_unquantized(self.hidden_size)
        return self.vocab_size * self.hidden_size + routers

    def _num_parameters(self, in_ffn: int) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        return self.num_hidden_layers * (attention + in_ffn) + self.vocab_size * self.hidden_size

    @property
    def divided(self) -> dict[str, int]:
        """Sizes that `tensor_parallel_size` must divide, by name."""
        return {
            "attention heads": self.num_attention_heads,
            "KV heads": self.num_key_value_heads,
            **self.ffn.divided,
            "tokens of the vocabulary": self.vocab_size,
        }

    @classmethod
    def read(
        cls: type[Description],
        config: dict[str, Any],
        *,
        head_dim: int,
        default_kv_heads: int | None,
        default_max_positions: int,
        default_rope_theta: float = DEFAULT_ROPE_THETA,
        default_rms_norm_eps: float = 1e-6,
        is_tied_by_default: bool = False,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
        ffn_bias: bool = False,
        layers_without_rope: tuple[int, ...] = (),
        sliding_window: int | None = None,
        ffn: ExpertsConfig | None = None,
    ) -> Description:
        """Reads the fields that Llama-like families have in common; a family says what is its own.

        Args:
            config: the object in `config.json`.
            head_dim: of this checkpoint.
            default_kv_heads: of a config without `num_key_value_heads`; None for as many as there are query heads.
            default_max_positions: of a config without `max_position_embeddings`.
            default_rope_theta: of a config without `rope_theta`.
            default_rms_norm_eps: of a config without `rms_norm_eps`.
            is_tied_by_default: of a config without `tie_word_embeddings`.
            ffn_bias: whether gate, up and down have a bias.
            ffn: the experts of a family that has them; None for one gated FFN, of `intermediate_size`.
            qkv_bias, output_bias, qk_norm, layers_without_rope, sliding_window: as in the description.

        Raises:
            ModelLoadError: a field is missing or of the wrong type, or asks for something that is not supported.
        """
        refuse_unsupported(config)
        heads = positive(config, "num_attention_heads")
        # Left out it is transformers' default, null it is as many as there are query heads.
        as_query_heads = config.get("num_key_value_heads", default_kv_heads) is None
        kv_heads = heads if as_query_heads else positive(config, "num_key_value_heads", default_kv_heads)
        if heads % kv_heads:
            raise ModelLoadError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        num_layers = positive(config, "num_hidden_layers")
        check_layer_types(config, num_layers)
        if head_dim % 2:
            raise ModelLoadError(f"head_dim={head_dim} is odd; rotary embedding needs pairs")
        max_positions = positive(config, "max_position_embeddings", default_max_positions)
        own_ffn = GatedFfnConfig(positive(config, "intermediate_size"), ffn_bias, ffn_bias) if ffn is None else ffn
        return cls(
            vocab_size=positive(config, "vocab_size"),
            hidden_size=positive(config, "hidden_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=number(config, "rms_norm_eps", default_rms_norm_eps),
            max_position_embeddings=max_positions,
            tie_word_embeddings=flag(config, "tie_word_embeddings", default=is_tied_by_default),
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            qk_norm=qk_norm,
            rope=rope_config(config, head_dim, max_positions, default_rope_theta),
            layers_without_rope=layers_without_rope,
            sliding_window=sliding_window,
            ffn=own_ffn,
            quantization=stored_format(config, num_layers, own_ffn.linear_layers),
            has_kv_scales=has_kv_scales(config),
        )


@dataclass(frozen=True)
class Family:
    """Checkpoints of one `model_type`.

    Attributes:
        model_type: as `config.json` has it.
        architectures: names that `config.json` may have with it: the causal language model, and the base model alone,
            which holds all weights where embeddings are tied.
        models: well-known models of the family.
        read: describes a checkpoint by the object in its `config.json`; raises ModelLoadError for what is not
            supported.
    """

    model_type: str
    architectures: tuple[str, ...]
    models: str
    read: Callable[[dict[str, Any]], ModelDescription]
