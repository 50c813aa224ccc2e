"""The attention of one layer: stores its keys and values in the pool and attends through a backend."""

from __future__ import annotations

import torch

from nanovllm.kernels import AttentionBackend, AttentionMetadata


class PagedAttention:
    """Holds no state but its scale; the KV of a step's tokens is stored before any of them attends."""

    def __init__(self, backend: AttentionBackend, head_dim: int) -> None:
        self.backend = backend
        self.scale = head_dim**-0.5

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """[T, num_heads, head_dim] query, [T, num_kv_heads, head_dim] key and value; gives the query's shape."""
        self.backend.store_kv(key, value, kv_cache, metadata)
        return self.backend.attend(query, kv_cache, metadata, self.scale)
