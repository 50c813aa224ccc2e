"""Random inputs of kernels, on the GPU."""

from __future__ import annotations

import torch

from nanovllm.kernels import AttentionMetadata
from nanovllm.utils.fp8 import E4M3


def random_normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def decode_problem(
    context_lens: list[int], num_heads: int, num_kv_heads: int, block_size: int, *, has_fp8_kv: bool = False
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Query, one layer's pool and metadata of a decode step in random blocks; head dim 128, bfloat16, the pool in it or
    in FP8."""
    counts = [-(-length // block_size) for length in context_lens]
    blocks = torch.randperm(sum(counts), dtype=torch.int32)
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = blocks[first : first + count]
        first += count
    pool = random_normal(first, 2, num_kv_heads, block_size, 128)
    pool = pool.to(E4M3) if has_fp8_kv else pool
    query = random_normal(len(counts), num_heads, 128)
    metadata = AttentionMetadata(
        slot_mapping=torch.zeros(len(counts), dtype=torch.int64, device="cuda"),
        block_tables=tables.cuda(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device="cuda"),
        query_starts=torch.arange(len(counts) + 1, dtype=torch.int32, device="cuda"),
        max_query_len=1,
        max_context_len=max(context_lens),
    )
    return query, pool, metadata
