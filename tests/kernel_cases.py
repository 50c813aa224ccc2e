"""Random paged-attention problems and their answers by the torch reference in float64-like care (float32)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels import AttentionBackend, AttentionMetadata, torch_reference

# (query length, context length) of each request: decode, whole prompts, chunks behind a cached prefix, odd borders.
DECODE = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 700), (1, 63)]
PREFILL = [(5, 5), (1, 40), (33, 33), (16, 100), (70, 135), (1, 1)]


@dataclass(frozen=True)
class Case:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    metadata: AttentionMetadata


def make_case(
    spans: list[tuple[int, int]],
    *,
    device: str,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    seed: int = 0,
) -> Case:
    """A layer's view of a pool of three layers, whose blocks are given out in random order; unused places are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    counts = [-(-context // block_size) for _, context in spans]
    order = torch.randperm(sum(counts) + 3, generator=generator)
    pool = torch.full((len(order), 3, 2, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype, device=device)
    tables = torch.full((len(spans), max(counts)), 10**6, dtype=torch.int32)
    slots, first = [], 0
    for row, ((query_len, context_len), count) in enumerate(zip(spans, counts, strict=True)):
        blocks = order[first : first + count]
        first += count
        tables[row, :count] = blocks
        places = torch.arange(context_len)
        all_slots = blocks[places // block_size] * block_size + places % block_size
        cached = all_slots[: context_len - query_len]
        for side in (0, 1):
            pool[cached // block_size, 1, side, :, cached % block_size] = normal(len(cached), num_kv_heads, head_dim)
        slots.append(all_slots[context_len - query_len :])
    lengths = torch.tensor([query_len for query_len, _ in spans])
    contexts = torch.tensor([context_len for _, context_len in spans], dtype=torch.int32)
    metadata = AttentionMetadata(
        slot_mapping=torch.cat(slots).to(device),
        block_tables=tables.to(device),
        context_lens=contexts.to(device),
        query_starts=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device),
        max_query_len=int(lengths.max()),
        max_context_len=int(contexts.max()),
    )
    total = int(lengths.sum())
    # Keys and values are slices of a wider tensor, as they are behind the stacked projection.
    packed = normal(total, num_heads + 2 * num_kv_heads, head_dim)
    query, key, value = packed.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return Case(query, key, value, pool[:, 1], metadata)


def relative_error(backend: AttentionBackend, case: Case) -> float:
    """Stores and attends with `backend`; ||out - ref|| / ||ref|| against the reference, which stores for itself."""
    expected_cache = case.kv_cache.clone()
    reference = torch_reference.Backend()
    reference.store_kv(case.key, case.value, expected_cache, case.metadata)
    scale = case.query.shape[-1] ** -0.5
    expected = reference.attend(case.query.float(), expected_cache.float(), case.metadata, scale)
    backend.store_kv(case.key, case.value, case.kv_cache, case.metadata)
    assert torch.equal(case.kv_cache.nan_to_num(nan=1e4), expected_cache.nan_to_num(nan=1e4)), "KV is stored elsewhere"
    output = backend.attend(case.query, case.kv_cache, case.metadata, scale).float()
    assert not output.isnan().any(), "reads beyond a request's context"
    return ((output - expected).norm() / expected.norm()).item()
