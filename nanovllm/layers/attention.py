"""The attention of one layer: norms and rotates its heads, stores their KV in the pool and attends to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from nanovllm.kernels import AttentionMetadata, Kernels
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.fp8 import E4M3
from nanovllm.utils.weight import SharedScale, Weight

KV_SCALE_NAMES = ("k_scale", "v_scale")
"""What checkpoints call the scales of a layer's keys and values."""


class PagedAttention(nn.Module):
    """QK-norm, rotary embedding (either may be left out) and paged attention.

    The KV of a step's tokens is stored before any of them attends.

    Args:
        head_dim: of query, key and value heads.
        eps: of the RMSNorm over each query and key head.
        rotary: the angles of positions, None for a layer whose heads are not rotated.
        backend: stores and attends.
        qk_norm: whether query and key heads are normed.
        dtype, device: of the norms' weights.
        kv_scales: of a pool in FP8, [2, num_kv_heads] float32, for keys and for values; None if the pool is never FP8.
            Those of a pool in a wide type are not looked at.
        loads_kv_scales: whether the checkpoint has them, one for all keys of the layer, one for all values.
    """

    def __init__(
        self,
        head_dim: int,
        eps: float,
        rotary: RotaryEmbedding | None,
        backend: Kernels,
        *,
        qk_norm: bool,
        dtype: torch.dtype,
        device: torch.device,
        kv_scales: torch.Tensor | None = None,
        loads_kv_scales: bool = False,
    ) -> None:
        super().__init__()
        self.kv_scales = kv_scales
        self.loads_kv_scales = loads_kv_scales
        self.eps = eps
        self.scale = head_dim**-0.5
        self.rotary = rotary
        self.backend = backend
        self.query_weight, self.key_weight = (
            nn.Parameter(torch.empty(head_dim, dtype=dtype, device=device), requires_grad=False) if qk_norm else None
            for _ in range(2)
        )

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
            None if self.rotary is None else self.rotary.cos,
            None if self.rotary is None else self.rotary.sin,
            kv_cache,
            metadata.slot_mapping,
            self._scales_of(kv_cache),
        )
        if metadata.hooks.after_store is not None:
            metadata.hooks.after_store(kv_cache)
        return query

    def checkpoint_tensors(self) -> dict[str, Weight]:
        """The norms' weights and the scales of KV, whole on every rank: heads of all ranks share them."""
        weights = {"q_norm.weight": self.query_weight, "k_norm.weight": self.key_weight}
        tensors = {name: Weight(weight) for name, weight in weights.items() if weight is not None}
        if self.kv_scales is not None and self.loads_kv_scales:
            scales = (SharedScale(of_heads) for of_heads in self.kv_scales)
            tensors |= zip(KV_SCALE_NAMES, scales, strict=True)
        return tensors

    def _scales_of(self, kv_cache: torch.Tensor) -> torch.Tensor | None:
        return self.kv_scales if kv_cache.dtype == E4M3 else None

    def attend(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """[T, num_heads, head_dim] -> the same."""
        before_attend, scales = metadata.hooks.before_attend, self._scales_of(kv_cache)
        if metadata.decode is None:
            if before_attend is not None:
                before_attend()
            return self.backend.attend(query, kv_cache, metadata, self.scale, None, scales)
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        # The rows first: those without context are tokens of chunks, whose place they may write to.
        num_rows = len(metadata.decode.context_lens)
        with _beside(metadata.decode_stream) as on_it:
            with on_it:
                rows = query[:num_rows], kv_cache, metadata.decode
                self.backend.attend(*rows, self.scale, attended[:num_rows], scales)
            if before_attend is not None:
                before_attend()
            self.backend.attend(query, kv_cache, metadata, self.scale, attended, scales)
        return attended


@contextlib.contextmanager
def _beside(stream: torch.cuda.Stream | None) -> Iterator[AbstractContextManager[Any]]:
    """Yields a block for what is to run on the stream, beside the rest of this block; None for the current stream.

    The current stream waits for both, after an error too: their tensors are freed in its order.
    """
    if stream is None:
        yield contextlib.nullcontext()
        return
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        yield torch.cuda.stream(stream)
    finally:
        current.wait_stream(stream)
