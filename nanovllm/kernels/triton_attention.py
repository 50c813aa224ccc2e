"""Paged attention in Triton: prefill over a cached prefix, split-KV decode. float32, float16, bfloat16.

The caller makes the tensors' device the current one: Triton launches on the current device.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from nanovllm.kernels import AttentionMetadata, BackendRequirements, triton_fused

DEFAULT_BLOCK_SIZE = 64
HEAD_DIMS = (64, 128)
LOG2_E = 1.4426950408889634
MOST_PIECES = 32
"""Pieces of a context beyond which adding them up costs more than cutting it gains."""


def unsupported_reasons(needs: BackendRequirements) -> list[str]:
    reasons = []
    if needs.device_type != "cuda":
        reasons.append(f"Triton kernels run on CUDA, not on {needs.device_type}")
    if needs.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"the Triton kernels take float32, float16 and bfloat16, not {needs.dtype}")
    if needs.head_dim not in HEAD_DIMS:
        reasons.append(f"the Triton kernels take head dims {HEAD_DIMS}, not {needs.head_dim}")
    return reasons


class Backend:
    name = "triton"
    is_capturable = True
    norm_rotate_store = staticmethod(triton_fused.norm_rotate_store)
    linear = staticmethod(triton_fused.linear)
    add_rms_norm = staticmethod(triton_fused.add_rms_norm)
    silu_and_mul = staticmethod(triton_fused.silu_and_mul)
    sample_tokens = staticmethod(triton_fused.sample_tokens)

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        if metadata.is_decode:
            return _decode(query, kv_cache, metadata, scale)
        return _prefill(query, kv_cache, metadata, scale)


def _prefill(query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, scale: float) -> torch.Tensor:
    _, num_heads, head_dim = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    # float32 tiles take twice the shared memory, and their dot products run without tensor cores.
    tile_m, tile_n = (128, 64) if query.element_size() == 2 else (32, 32)
    num_requests = metadata.context_lens.shape[0]
    _prefill_kernel[(triton.cdiv(metadata.max_query_len, tile_m), num_heads, num_requests)](
        query,
        kv_cache,
        output,
        metadata.block_tables,
        metadata.context_lens,
        metadata.query_starts,
        query.stride(0),
        kv_cache.stride(0),
        metadata.block_tables.stride(0),
        scale * LOG2_E,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=kv_cache.shape[2],
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv_cache.shape[3],
        TILE_M=tile_m,
        TILE_N=tile_n,
        num_warps=8 if query.element_size() == 2 and head_dim == 128 else 4,
    )
    return output


def _decode(query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, scale: float) -> torch.Tensor:
    num_requests, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[2]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    piece = _piece_tokens(num_requests * num_kv_heads, metadata.max_context_len, query.device)
    num_pieces = triton.cdiv(metadata.max_context_len, piece)
    partial = torch.empty(num_requests, num_heads, num_pieces, head_dim, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(num_requests, num_heads, num_pieces, dtype=torch.float32, device=query.device)
    group = num_heads // num_kv_heads
    _decode_kernel[(num_requests, num_kv_heads, num_pieces)](
        query,
        kv_cache,
        partial,
        log_sums,
        metadata.block_tables,
        metadata.context_lens,
        query.stride(0),
        kv_cache.stride(0),
        metadata.block_tables.stride(0),
        scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        PADDED_GROUP=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv_cache.shape[3],
        PIECE=piece,
        NUM_PIECES=num_pieces,
        TILE_N=64 if query.element_size() == 2 else 32,
        num_warps=2,
        num_stages=3,
    )
    _combine_pieces_kernel[(num_requests, num_heads)](
        partial,
        log_sums,
        output,
        metadata.context_lens,
        PIECE=piece,
        NUM_PIECES=num_pieces,
        PADDED_PIECES=triton.next_power_of_2(num_pieces),
        HEAD_DIM=head_dim,
        num_warps=2,
    )
    return output


def _piece_tokens(num_programs: int, max_context_len: int, device: torch.device) -> int:
    """Tokens of a piece: every context is cut at the same places, so that long ones do not finish last.

    The fewer programs there are without cutting, the smaller the pieces; never more than `MOST_PIECES`.
    """
    num_processors = _num_processors(device)
    piece = 128 if num_programs < num_processors else 256 if num_programs < 8 * num_processors else 512
    return max(piece, triton.next_power_of_2(triton.cdiv(max_context_len, MOST_PIECES)))


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@triton.jit
def _prefill_kernel(
    query,
    kv_cache,
    output,
    block_tables,
    context_lens,
    query_starts,
    query_stride,
    block_stride,
    table_stride,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """One program computes TILE_M queries of one head of one request (online softmax, base 2)."""
    row = tl.program_id(2)
    head = tl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    start = tl.load(query_starts + row)
    query_len = tl.load(query_starts + row + 1) - start
    context_len = tl.load(context_lens + row)
    first = tl.program_id(0) * TILE_M
    if first >= query_len:
        return

    queries = first + tl.arange(0, TILE_M)
    positions = context_len - query_len + queries
    dims = tl.arange(0, HEAD_DIM)
    there = (queries < query_len)[:, None]
    offsets = (start + queries).to(tl.int64)[:, None] * query_stride + head * HEAD_DIM + dims[None, :]
    q = tl.load(query + offsets, mask=there, other=0.0)

    maximum = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, HEAD_DIM], tl.float32)
    end = tl.minimum(context_len, context_len - query_len + first + TILE_M)
    for tile in range(0, end, TILE_N):
        tokens = tile + tl.arange(0, TILE_N)
        in_context = tokens < end
        blocks = tl.load(block_tables + row * table_stride + tokens // BLOCK_SIZE, mask=in_context, other=0)
        places = kv_head * BLOCK_SIZE + tokens % BLOCK_SIZE
        cached = blocks.to(tl.int64)[:, None] * block_stride + places[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(kv_cache + cached, mask=in_context[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        correction = tl.exp2(maximum - new_maximum)
        p = tl.exp2(scores - new_maximum[:, None])
        total = total * correction + tl.sum(p, 1)
        value_offset = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
        v = tl.load(kv_cache + cached + value_offset, mask=in_context[:, None], other=0.0)
        accumulator = accumulator * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum

    result = accumulator / total[:, None]
    target = (start + queries).to(tl.int64)[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    tl.store(output + target, result.to(output.dtype.element_ty), mask=there)


@triton.jit
def _decode_kernel(
    query,
    kv_cache,
    partial,
    log_sums,
    block_tables,
    context_lens,
    query_stride,
    block_stride,
    table_stride,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """One program attends all query heads of one KV head to one piece of one request's context."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    piece = tl.program_id(2)
    context_len = tl.load(context_lens + row)
    low = piece * PIECE
    high = tl.minimum(low + PIECE, context_len)
    if low >= context_len:
        return

    group = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, HEAD_DIM)
    there = group < GROUP
    heads = kv_head * GROUP + group
    offsets = row.to(tl.int64) * query_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(query + offsets, mask=there[:, None], other=0.0)

    maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    accumulator = tl.zeros([PADDED_GROUP, HEAD_DIM], tl.float32)
    for tile in range(low, high, TILE_N):
        tokens = tile + tl.arange(0, TILE_N)
        in_context = tokens < high
        blocks = tl.load(block_tables + row * table_stride + tokens // BLOCK_SIZE, mask=in_context, other=0)
        places = kv_head * BLOCK_SIZE + tokens % BLOCK_SIZE
        cached = blocks.to(tl.int64)[:, None] * block_stride + places[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(kv_cache + cached, mask=in_context[:, None], other=0.0)
        value_offset = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
        v = tl.load(kv_cache + cached + value_offset, mask=in_context[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(in_context[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        correction = tl.exp2(maximum - new_maximum)
        p = tl.exp2(scores - new_maximum[:, None])
        total = total * correction + tl.sum(p, 1)
        accumulator = accumulator * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum

    rows = ((row * NUM_KV_HEADS * GROUP + heads) * NUM_PIECES + piece).to(tl.int64)
    result = accumulator / total[:, None]
    tl.store(partial + rows[:, None] * HEAD_DIM + dims[None, :], result, mask=there[:, None])
    tl.store(log_sums + rows, maximum + tl.log2(total), mask=there)


@triton.jit
def _combine_pieces_kernel(
    partial,
    log_sums,
    output,
    context_lens,
    PIECE: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    PADDED_PIECES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One program weighs the pieces of one head of one request by their share of the softmax."""
    row = tl.program_id(0)
    head = (row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    pieces = tl.arange(0, PADDED_PIECES)
    dims = tl.arange(0, HEAD_DIM)
    there = pieces < tl.cdiv(tl.load(context_lens + row), PIECE)
    logs = tl.load(log_sums + head * NUM_PIECES + pieces, mask=there, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    rows = (head * NUM_PIECES + pieces)[:, None] * HEAD_DIM + dims[None, :]
    values = tl.load(partial + rows, mask=there[:, None], other=0.0)
    result = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(output + head * HEAD_DIM + dims, result.to(output.dtype.element_ty))
