"""The attention of one layer: norms and rotates its heads, stores their KV in the pool and attends to it."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.kernels import AttentionMetadata, Kernels
from nanovllm.layers.rotary_embedding import RotaryEmbedding


class PagedAttention(nn.Module):
    """QK-norm, rotary embedding and paged attention; the KV of a step's tokens is stored before any of them attends."""

    def __init__(
        self,
        head_dim: int,
        eps: float,
        rotary: RotaryEmbedding,
        backend: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.scale = head_dim**-0.5
        self.rotary = rotary
        self.backend = backend
        self.query_weight = nn.Parameter(torch.empty(head_dim, dtype=dtype, device=device), requires_grad=False)
        self.key_weight = nn.Parameter(torch.empty(head_dim, dtype=dtype, device=device), requires_grad=False)

    def store_kv(
        self, qkv: torch.Tensor, positions: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """[T, (num_heads + 2 * num_kv_heads) * head_dim] -> query heads, [T, num_heads, head_dim]."""
        query = self.backend.norm_rotate_store(
            qkv,
            self.query_weight,
            self.key_weight,
            self.eps,
            positions,
            self.rotary.cos,
            self.rotary.sin,
            kv_cache,
            metadata.slot_mapping,
        )
        if metadata.after_store is not None:
            metadata.after_store(kv_cache)
        return query

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """[T, num_heads, head_dim] -> the same."""
        return self.backend.attend(query, kv_cache, metadata, self.scale)
