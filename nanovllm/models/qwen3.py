"""Dense Qwen3: this file is the specification of the model. It knows nothing about requests or scheduling.

A layer is five pieces, `project_qkv`, `store_kv`, `attend`, `project_out` and `feed_forward`; all but the last are its
attention stage, the last is its FFN stage, and `forward` is their composition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.errors import ModelLoadError
from nanovllm.kernels import AttentionMetadata, Kernels
from nanovllm.layers.attention import PagedAttention
from nanovllm.layers.embed_head import TokenEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear
from nanovllm.layers.ranks import OneRank, Part, Ranks
from nanovllm.layers.rotary_embedding import RopeConfig, RotaryEmbedding
from nanovllm.models.config_fields import check_layer_types, flag, number, positive, refuse_unsupported, rope_config


@dataclass(frozen=True)
class Qwen3Config:
    """The fields of a Qwen3 `config.json` that its inference needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    rope: RopeConfig

    @property
    def num_parameters(self) -> int:
        """Weights of the GEMMs of one forward pass, the output head included, the embedding look-up not."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Qwen3Config:
        """Reads `config.json`. A field that is left out is as in transformers, or refused.

        Raises:
            ModelLoadError: a field is missing or of the wrong type, or asks for something that is not supported.
        """
        refuse_unsupported(config)
        heads = positive(config, "num_attention_heads")
        # Left out it is transformers' default, null it is as many as there are query heads.
        as_query_heads = config.get("num_key_value_heads", 32) is None
        kv_heads = heads if as_query_heads else positive(config, "num_key_value_heads", 32)
        if heads % kv_heads:
            raise ModelLoadError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        num_layers = positive(config, "num_hidden_layers")
        check_layer_types(config, num_layers)
        head_dim = positive(config, "head_dim", 128)
        if head_dim % 2:
            raise ModelLoadError(f"head_dim={head_dim} is odd; rotary embedding needs pairs")
        max_positions = positive(config, "max_position_embeddings", 32768)
        return cls(
            vocab_size=positive(config, "vocab_size"),
            hidden_size=positive(config, "hidden_size"),
            intermediate_size=positive(config, "intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            attention_bias=flag(config, "attention_bias"),
            rope=rope_config(config, head_dim, max_positions),
        )


QKV_NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP_NAMES = ("mlp.gate_proj", "mlp.up_proj")


class Qwen3DecoderLayer(nn.Module):
    """One layer. Hidden states and residual travel apart: the norms add them."""

    def __init__(
        self,
        config: Qwen3Config,
        rotary: RotaryEmbedding,
        backend: Kernels,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.ranks = ranks
        hidden, dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        query_size, kv_size = (
            num_heads // ranks.size * dim for num_heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        bias = config.attention_bias
        self.qkv_proj = Linear(hidden, [query_size, kv_size, kv_size], backend, bias=bias, dtype=dtype, device=device)
        # What it adds is to be in the sum over the ranks once.
        out_bias = bias and ranks.rank == 0
        self.o_proj = Linear(query_size, [hidden], backend, bias=out_bias, dtype=dtype, device=device)
        ffn = config.intermediate_size // ranks.size
        self.gate_up_proj = Linear(hidden, [ffn, ffn], backend, bias=False, dtype=dtype, device=device)
        self.down_proj = Linear(ffn, [hidden], backend, bias=False, dtype=dtype, device=device)
        self.attention = PagedAttention(dim, eps, rotary, backend, dtype=dtype, device=device)
        self.input_layernorm = RMSNorm(hidden, eps, backend, dtype=dtype, device=device)
        self.post_attention_layernorm = RMSNorm(hidden, eps, backend, dtype=dtype, device=device)

    def project_qkv(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, num_sms: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden_size] -> query, key and value heads side by side, [T, (num_heads + 2 * num_kv_heads) * head_dim],
        and the residual. `num_sms`, here and below: the SMs of the current stream, None for all of the GPU."""
        return self.qkv_proj.forward_normed(hidden, residual, self.input_layernorm, num_sms)

    def store_kv(
        self, qkv: torch.Tensor, positions: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Norms and rotates the heads and stores their KV; the query heads, [T, num_heads, head_dim]."""
        return self.attention.store_kv(qkv, positions, kv_cache, metadata)

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """[T, num_heads, head_dim] -> the same."""
        return self.attention.attend(query, kv_cache, metadata)

    def project_out(self, attended: torch.Tensor, num_sms: int | None = None) -> torch.Tensor:
        """[T, num_heads, head_dim] -> [T, hidden_size]."""
        return self.ranks.all_reduce(self.o_proj(attended.flatten(1), num_sms))

    def feed_forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, num_sms: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden_size] twice -> the same."""
        activated, residual = self.gate_up_proj.forward_gated(hidden, residual, self.post_attention_layernorm, num_sms)
        return self.ranks.all_reduce(self.down_proj(activated, num_sms)), residual

    def forward_attention_stage(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`project_qkv`, `store_kv`, `attend`, `project_out`."""
        qkv, residual = self.project_qkv(hidden, residual)
        query = self.store_kv(qkv, positions, kv_cache, metadata)
        return self.project_out(self.attend(query, kv_cache, metadata)), residual

    def forward_ffn_stage(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`feed_forward`."""
        return self.feed_forward(hidden, residual)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self.forward_attention_stage(hidden, residual, positions, kv_cache, metadata)
        return self.forward_ffn_stage(hidden, residual)

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """Names within the layer, as Hugging Face has them, and the views they are loaded into."""
        return {
            **self.qkv_proj.parts(QKV_NAMES),
            **self.o_proj.parts(["self_attn.o_proj"]),
            **self.gate_up_proj.parts(GATE_UP_NAMES),
            **self.down_proj.parts(["mlp.down_proj"]),
            "self_attn.q_norm.weight": self.attention.query_weight,
            "self_attn.k_norm.weight": self.attention.key_weight,
            "input_layernorm.weight": self.input_layernorm.weight,
            "post_attention_layernorm.weight": self.post_attention_layernorm.weight,
        }

    def part_dims(self) -> dict[str, int]:
        """Sharding dimension by tensor; tensors that are not listed are replicated."""
        of_outputs = {**self.qkv_proj.parts(QKV_NAMES), **self.gate_up_proj.parts(GATE_UP_NAMES)}
        return {**dict.fromkeys(of_outputs, 0), "self_attn.o_proj.weight": 1, "mlp.down_proj.weight": 1}


class Qwen3Model(nn.Module):
    """Embedding, layers and final norm, with one rotary table for all layers."""

    def __init__(
        self,
        config: Qwen3Config,
        backend: Kernels,
        max_positions: int,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, ranks, dtype=dtype, device=device)
        rotary = RotaryEmbedding(config.rope, max_positions, device)
        layers = [
            Qwen3DecoderLayer(config, rotary, backend, ranks, dtype=dtype, device=device)
            for _ in range(config.num_hidden_layers)
        ]
        self.layers: list[Qwen3DecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment] # it is not generic
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend, dtype=dtype, device=device)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_pool: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        hidden, residual = self.embed_tokens(input_ids), None
        for index, layer in enumerate(self.layers):
            hidden, residual = layer(hidden, residual, positions, kv_pool[:, index], metadata)
        return self.norm(hidden, residual)[0]

    def forward_attention_stage(
        self,
        layer: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv_pool: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention stage of layer `layer` alone."""
        stage = self.layers[layer].forward_attention_stage
        return stage(hidden, residual, positions, kv_pool[:, layer], metadata)

    def forward_ffn_stage(
        self, layer: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The FFN stage of layer `layer` alone."""
        return self.layers[layer].forward_ffn_stage(hidden, residual)


class Qwen3ForCausalLM(nn.Module):
    """The model and its output head.

    Args:
        config: the checkpoint's.
        backend: attends to the KV pool.
        max_positions: length of the rotary table.
        dtype, device: of all weights.
        ranks: those that compute it together, each with its part of the heads, of the FFN and of the vocabulary.
    """

    tied_tensors = ("model.embed_tokens.weight", "lm_head.weight")
    """The two that are one where `tie_word_embeddings` is set; a checkpoint then has either, or both alike."""

    def __init__(
        self,
        config: Qwen3Config,
        backend: Kernels,
        max_positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.ranks = OneRank() if ranks is None else ranks
        self.model = Qwen3Model(config, backend, max_positions, self.ranks, dtype=dtype, device=device)
        self.lm_head = (
            self.model.embed_tokens
            if config.tie_word_embeddings
            else TokenEmbedding(config.vocab_size, config.hidden_size, self.ranks, dtype=dtype, device=device)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_pool: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Runs T tokens of B requests.

        Args:
            input_ids: [T] int64.
            positions: [T] int64, each token's place in its request.
            kv_pool: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]; the tokens' KV is stored in it.
            metadata: which tokens and blocks belong to which request.

        Returns:
            Hidden states [T, hidden_size] after the final norm.
        """
        return self.model(input_ids, positions, kv_pool, metadata)

    def compute_logits(self, hidden: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """[N, hidden_size] -> [N, vocab_size / ranks], those of this rank's tokens, in `out` if given."""
        return self.lm_head.project(hidden, out=out)

    def forward_attention_stage(
        self,
        layer: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv_pool: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention stage of layer `layer` alone."""
        return self.model.forward_attention_stage(layer, hidden, residual, positions, kv_pool, metadata)

    def forward_ffn_stage(
        self, layer: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The FFN stage of layer `layer` alone."""
        return self.model.forward_ffn_stage(layer, hidden, residual)

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor name that a checkpoint must have, and the view it is loaded into."""
        views: dict[str, torch.Tensor] = {
            "model.embed_tokens.weight": self.model.embed_tokens.weight,
            "model.norm.weight": self.model.norm.weight,
        }
        for index, layer in enumerate(self.model.layers):
            views |= {f"model.layers.{index}.{name}": view for name, view in layer.checkpoint_tensors().items()}
        if not self.config.tie_word_embeddings:
            views["lm_head.weight"] = self.lm_head.weight
        return views

    def checkpoint_parts(self) -> dict[str, Part]:
        """The part of each sharded tensor that this rank takes, by name; empty for one rank."""
        if self.ranks.size == 1:
            return {}
        dims = {"model.embed_tokens.weight": 0, "lm_head.weight": 0}
        for index, layer in enumerate(self.model.layers):
            dims |= {f"model.layers.{index}.{name}": dim for name, dim in layer.part_dims().items()}
        return {name: Part(dim, self.ranks.rank, self.ranks.size) for name, dim in dims.items()}

    def substitute_checkpoint_tensors(self) -> dict[str, str]:
        """Names that a checkpoint may lack, and the tensors that are the same."""
        return dict([self.tied_tensors]) if self.config.tie_word_embeddings else {}

    def ignored_checkpoint_tensors(self) -> set[str]:
        """Names that a checkpoint may have and that are not loaded: a tied head is the embedding."""
        ignored = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        if self.ranks.rank:
            ignored |= {f"model.layers.{index}.self_attn.o_proj.bias" for index in range(len(self.model.layers))}
        return ignored
