"""The decoder block, model and causal language model of all families: this file is the specification of the model.

It knows neither requests nor scheduling; what sets one family apart from another comes from a `ModelDescription`.

A layer is five pieces, `project_qkv`, `store_kv`, `attend`, `project_out` and `feed_forward`; all but the last are its
attention stage, the last is its FFN stage, and `forward` is their composition.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from nanovllm.kernels import AttentionMetadata, Kernels
from nanovllm.layers.attention import KV_SCALE_NAMES, PagedAttention
from nanovllm.layers.embed_head import TokenEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear
from nanovllm.layers.ranks import OneRank, Ranks, part_of
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.description import ModelDescription
from nanovllm.utils.weight import Weight

QKV_NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BIASES_OF_SUMS = ("self_attn.o_proj.bias", "mlp.down_proj.bias")
"""Biases that are added to an all-reduced output; only rank 0 has them."""


class DecoderLayer(nn.Module):
    """One layer. Hidden states and residual are passed separately: the norms add them.

    `rotary` is None for a layer whose heads are not rotated.
    """

    def __init__(
        self,
        config: ModelDescription,
        rotary: RotaryEmbedding | None,
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
        quantization = config.quantization
        linear = partial(Linear, backend=backend, dtype=dtype, device=device, quantization=quantization)
        self.qkv_proj = linear(hidden, [query_size, kv_size, kv_size], bias=config.qkv_bias)
        # Only on rank 0, since the all-reduce must add the bias once.
        output_bias = config.output_bias and ranks.rank == 0
        self.o_proj = linear(query_size, [hidden], bias=output_bias)
        kv_scales = torch.ones(2, kv_size // dim, dtype=torch.float32, device=device) if config.has_fp8_kv else None
        self.attention = PagedAttention(
            dim,
            eps,
            rotary,
            backend,
            qk_norm=config.qk_norm,
            dtype=dtype,
            device=device,
            kv_scales=kv_scales,
            loads_kv_scales=config.has_kv_scales,
        )
        self.ffn = config.ffn.make(hidden, backend, ranks, dtype=dtype, device=device, quantization=quantization)
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
        """Norms and rotates the heads, if the model does, and stores their KV. Returns the query heads, [T, num_heads,
        head_dim]."""
        return self.attention.store_kv(qkv, positions, kv_cache, metadata)

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """[T, num_heads, head_dim] -> the same."""
        return self.attention.attend(query, kv_cache, metadata)

    def project_out(self, attended: torch.Tensor, num_sms: int | None = None) -> torch.Tensor:
        """[T, num_heads, head_dim] -> [T, hidden_size]."""
        return self.ranks.all_reduce(self.o_proj(attended.flatten(1), num_sms))

    def feed_forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        num_sms: int | None = None,
        metadata: AttentionMetadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden_size] twice -> the same. `metadata`, here and below: says which tokens are padding, so that they
        pass no expert; None if none is."""
        return self.ffn(hidden, residual, self.post_attention_layernorm, num_sms, metadata)

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

    def forward_ffn_stage(
        self, hidden: torch.Tensor, residual: torch.Tensor, metadata: AttentionMetadata | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`feed_forward`."""
        return self.feed_forward(hidden, residual, metadata=metadata)

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self.forward_attention_stage(hidden, residual, positions, kv_cache, metadata)
        return self.forward_ffn_stage(hidden, residual, metadata)

    def checkpoint_tensors(self) -> dict[str, Weight]:
        """The layer's weights by their Hugging Face names within the layer."""
        norms = {"input_layernorm": self.input_layernorm, "post_attention_layernorm": self.post_attention_layernorm}
        return {
            **self.qkv_proj.checkpoint_tensors(QKV_NAMES, part_of(self.ranks, 0)),
            **self.o_proj.checkpoint_tensors(["self_attn.o_proj"], part_of(self.ranks, 1)),
            **{f"self_attn.{name}": weight for name, weight in self.attention.checkpoint_tensors().items()},
            **self.ffn.checkpoint_tensors(),
            **{f"{name}.weight": Weight(norm.weight) for name, norm in norms.items()},
        }


class DecoderModel(nn.Module):
    """Embedding, layers and final norm, with one rotary table for all layers that rotate."""

    def __init__(
        self,
        config: ModelDescription,
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
            DecoderLayer(
                config,
                None if index in config.layers_without_rope else rotary,
                backend,
                ranks,
                dtype=dtype,
                device=device,
            )
            for index in range(config.num_hidden_layers)
        ]
        self.layers: list[DecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment] # it is not generic
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
        self, layer: int, hidden: torch.Tensor, residual: torch.Tensor, metadata: AttentionMetadata | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The FFN stage of layer `layer` alone."""
        return self.layers[layer].forward_ffn_stage(hidden, residual, metadata)


class CausalLM(nn.Module):
    """The model and its output head.

    Args:
        config: describes the checkpoint.
        backend: attends to the KV pool.
        max_positions: length of the rotary table.
        dtype, device: of all weights; linear layers may have theirs quantized.
        ranks: all ranks that compute the model together, each with its part of heads, FFN and vocabulary.
    """

    tied_tensors = ("model.embed_tokens.weight", "lm_head.weight")
    """The tensors that are one if `tie_word_embeddings` is set; a checkpoint then has one of them, or both, equal."""

    def __init__(
        self,
        config: ModelDescription,
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
        self.model = DecoderModel(config, backend, max_positions, self.ranks, dtype=dtype, device=device)
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
        """[N, hidden_size] -> [N, vocab_size / ranks], this rank's part of the vocabulary, in `out` if given."""
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
        self, layer: int, hidden: torch.Tensor, residual: torch.Tensor, metadata: AttentionMetadata | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The FFN stage of layer `layer` alone."""
        return self.model.forward_ffn_stage(layer, hidden, residual, metadata)

    def checkpoint_tensors(self) -> dict[str, Weight]:
        """The weights, or this rank's parts, by the tensor names that a checkpoint must have."""
        tensors = {
            "model.embed_tokens.weight": self.model.embed_tokens.checkpoint_tensor(),
            "model.norm.weight": Weight(self.model.norm.weight),
        }
        for index, layer in enumerate(self.model.layers):
            tensors |= {f"model.layers.{index}.{name}": weight for name, weight in layer.checkpoint_tensors().items()}
        if not self.config.tie_word_embeddings:
            tensors["lm_head.weight"] = self.lm_head.checkpoint_tensor()
        return tensors

    def kv_scales(self) -> list[torch.Tensor]:
        """The scales of each layer's keys and values, [2, num_kv_heads] float32; none if KV is not in FP8."""
        scales = (layer.attention.kv_scales for layer in self.model.layers)
        return [of_layer for of_layer in scales if of_layer is not None]

    def substitute_checkpoint_tensors(self) -> dict[str, str]:
        """Names that a checkpoint may lack, and the names of the equal tensors to take instead."""
        return dict([self.tied_tensors]) if self.config.tie_word_embeddings else {}

    def ignored_checkpoint_tensors(self) -> set[str]:
        """Names that a checkpoint may have and that are not loaded: a tied head is the embedding, and scales of KV are
        for a pool in FP8."""
        ignored = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        in_layers: set[str] = set()
        if self.ranks.rank:
            in_layers |= {*BIASES_OF_SUMS}
        if self.config.has_kv_scales and not self.config.has_fp8_kv:
            in_layers |= {f"self_attn.{name}" for name in KV_SCALE_NAMES}
        layers = range(len(self.model.layers))
        return ignored | {f"model.layers.{index}.{name}" for index in layers for name in in_layers}
