"""Attention in plain torch: the definition of right, on any device. Slow on purpose: one request at a time."""

from __future__ import annotations

import torch

from nanovllm.kernels import AttentionMetadata, BackendRequirements

DEFAULT_BLOCK_SIZE = 16


def unsupported_reasons(needs: BackendRequirements) -> list[str]:
    return []


class Backend:
    name = "torch"

    def store_kv(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        block_size = kv_cache.shape[3]
        blocks, places = metadata.slot_mapping // block_size, metadata.slot_mapping % block_size
        kv_cache[blocks, 0, :, places] = key
        kv_cache[blocks, 1, :, places] = value

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        starts = metadata.query_starts.tolist()
        for row, context_len in enumerate(metadata.context_lens.tolist()):
            rows = slice(starts[row], starts[row + 1])
            key, value = gather_context(kv_cache, metadata.block_tables[row], context_len)
            output[rows] = _attend_one(query[rows], key, value, scale)
        return output


def gather_context(
    kv_cache: torch.Tensor, block_table: torch.Tensor, context_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one request, each [num_kv_heads, context_len, head_dim]."""
    block_size = kv_cache.shape[3]
    blocks = block_table[: -(-context_len // block_size)].long()
    context = kv_cache[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context_len]
    return context[0], context[1]


def _attend_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The last `query.shape[0]` positions attend to all before them and themselves; softmax in float32."""
    query_len, num_heads, _ = query.shape
    num_kv_heads, context_len, _ = key.shape
    key = key.repeat_interleave(num_heads // num_kv_heads, dim=0).float()
    value = value.repeat_interleave(num_heads // num_kv_heads, dim=0).float()
    scores = torch.matmul(query.transpose(0, 1).float(), key.transpose(1, 2)) * scale
    query_positions = torch.arange(context_len - query_len, context_len, device=query.device)
    hidden = torch.arange(context_len, device=query.device)[None, :] > query_positions[:, None]
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.matmul(probabilities, value).transpose(0, 1).to(query.dtype)
