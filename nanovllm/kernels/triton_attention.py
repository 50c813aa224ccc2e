"""Paged attention in Triton: prefill over a cached prefix, decode in even shares. float32, float16, bfloat16.

On GPUs that have it (sm_90 on), 16-bit KV is read through the tensor memory accelerator, else by pointers.

The caller makes the tensors' device the current one: Triton launches on the current device.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels import AttentionMetadata, BackendRequirements, triton_fused
from nanovllm.kernels.triton_overlap import begin, overlap

DEFAULT_BLOCK_SIZE = 64
HEAD_DIMS = (64, 128)
LOG2_E = 1.4426950408889634
DECODE_TILE = 32
"""Tokens of a tile of the decode kernel: one warp holds a tile's scores and products in registers."""
DECODE_STAGES = 4
"""One more than the tiles on their way to a program."""
PROGRAMS_PER_SM = 4
PREFILL_TILE_M = 64
PREFILL_TILE_N = 64
PREFILL_STAGES = 2


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
    norm_linear = staticmethod(triton_fused.norm_linear)
    norm_gated_linear = staticmethod(triton_fused.norm_gated_linear)
    add_rms_norm = staticmethod(triton_fused.add_rms_norm)
    silu_and_mul = staticmethod(triton_fused.silu_and_mul)
    sample_tokens = staticmethod(triton_fused.sample_tokens)

    def plan(self, metadata: AttentionMetadata) -> torch.Tensor:
        if metadata.is_decode:
            return _count_tiles(metadata.context_lens, None, DECODE_TILE)
        return _count_tiles(metadata.query_starts, metadata.query_starts[1:], PREFILL_TILE_M)

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        tile_starts = self.plan(metadata) if metadata.plan is None else metadata.plan
        attend = _decode if metadata.is_decode else _prefill
        return attend(query, kv_cache, metadata, tile_starts, scale)


def _count_tiles(lengths: torch.Tensor, ends: torch.Tensor | None, tile: int) -> torch.Tensor:
    """[B + 1] int32: tiles before each request, and of all. `lengths` are starts if `ends` are given."""
    num_requests = len(lengths) if ends is None else len(ends)
    tile_starts = torch.empty(num_requests + 1, dtype=torch.int32, device=lengths.device)
    _count_tiles_kernel[(1,)](
        lengths,
        ends,
        tile_starts,
        num_requests,
        TILE=tile,
        HAS_ENDS=ends is not None,
        PADDED_REQUESTS=_padded(num_requests),
        **overlap(lengths.device),
    )
    return tile_starts


def _prefill(
    query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, tile_starts: torch.Tensor, scale: float
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    num_requests = metadata.context_lens.shape[0]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    # float32 tiles take twice the shared memory, and their dot products run without tensor cores.
    is_wide = query.element_size() == 4
    tile_n = 16 if is_wide else PREFILL_TILE_N
    use_tma = _has_tma(query.device) and not is_wide and block_size % tile_n == 0
    # Every request but one may end in a tile that is not full.
    num_tiles = triton.cdiv(num_tokens, PREFILL_TILE_M) + num_requests - 1
    _prefill_kernel[(num_heads, num_tiles)](
        query,
        _rows_descriptor(kv_cache, tile_n) if use_tma else kv_cache,
        kv_cache,
        output,
        metadata.block_tables,
        metadata.context_lens,
        metadata.query_starts,
        tile_starts,
        num_requests,
        query.stride(0),
        kv_cache.stride(0),
        metadata.block_tables.stride(0),
        scale * LOG2_E,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        PADDED_REQUESTS=_padded(num_requests),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE_M=PREFILL_TILE_M,
        TILE_N=tile_n,
        USE_TMA=use_tma,
        STAGES=1 if is_wide else PREFILL_STAGES,
        num_warps=8 if is_wide else PREFILL_TILE_M // 16,
        **overlap(query.device),
    )
    return output


def _decode(
    query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, tile_starts: torch.Tensor, scale: float
) -> torch.Tensor:
    num_requests, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    group = num_heads // num_kv_heads
    num_programs = PROGRAMS_PER_SM * (metadata.num_sms or _num_sms(query.device))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    # What programs leave unfinished of a head: two places for each, for the beginning and the end of its share.
    partial = torch.empty(2 * num_programs, group, head_dim, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(2 * num_programs, group, dtype=torch.float32, device=query.device)
    is_wide = query.element_size() == 4
    use_tma = _has_tma(query.device) and not is_wide and block_size % DECODE_TILE == 0
    _decode_kernel[(num_programs,)](
        query,
        _rows_descriptor(kv_cache, DECODE_TILE) if use_tma else kv_cache,
        kv_cache,
        output,
        partial,
        log_sums,
        metadata.block_tables,
        metadata.context_lens,
        tile_starts,
        num_requests,
        query.stride(0),
        kv_cache.stride(0),
        metadata.block_tables.stride(0),
        scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        PADDED_GROUP=max(16, triton.next_power_of_2(group)),
        PADDED_REQUESTS=_padded(num_requests),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=DECODE_TILE,
        USE_TMA=use_tma,
        STAGES=2 if is_wide else DECODE_STAGES,
        num_warps=4 if is_wide else 1,
        **overlap(query.device),
    )
    _combine_kernel[(num_requests, num_heads)](
        partial,
        log_sums,
        output,
        tile_starts,
        num_requests,
        num_programs,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PIECES=16,
        num_warps=1,
        **overlap(query.device),
    )
    return output


def _padded(num_requests: int) -> int:
    """Few different ones: each is a variant of the kernel to compile."""
    return max(64, triton.next_power_of_2(num_requests))


def _rows_descriptor(kv_cache: torch.Tensor, tile: int) -> TensorDescriptor:
    """One layer's view of the pool as rows of one token and head each, to be loaded `tile` rows at a time.

    The rows run on through the other layers: a block's next block is `block stride / head_dim` rows further.
    """
    num_blocks, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_rows = (num_blocks - 1) * kv_cache.stride(0) // head_dim + 2 * num_kv_heads * block_size
    return TensorDescriptor(kv_cache, [num_rows, head_dim], [head_dim, 1], [tile, head_dim])


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit(do_not_specialize=["num_requests"])
def _count_tiles_kernel(
    lengths,
    ends,
    tile_starts,
    num_requests,
    TILE: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    PADDED_REQUESTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Tiles before each request, and all of them; a request's length is given, or where it ends and begins."""
    begin(OVERLAPS)
    requests = tl.arange(0, PADDED_REQUESTS)
    there = requests < num_requests
    length = tl.load(lengths + requests, mask=there, other=0)
    if HAS_ENDS:
        length = tl.load(ends + requests, mask=there, other=0) - length
    tl.store(tile_starts, 0)
    tl.store(tile_starts + 1 + requests, tl.cumsum(tl.cdiv(length, TILE), 0), mask=there)


@triton.jit
def _row_of(tile, tile_starts, num_requests, TIMES: tl.constexpr, PADDED_REQUESTS: tl.constexpr):
    """The request whose tiles, each counted TIMES times, have this one among them."""
    requests = tl.arange(0, PADDED_REQUESTS)
    starts = tl.load(tile_starts + requests, mask=requests < num_requests, other=0x7FFFFFFF // TIMES)
    return tl.sum((starts * TIMES <= tile).to(tl.int32), 0) - 1


@triton.jit
def _places(
    table,
    tile,
    end,
    kv_head,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Offsets of a tile's keys, [TILE, HEAD_DIM]; what lies beyond `end` is in no block, and must not be loaded."""
    tokens = tile * TILE + tl.arange(0, TILE)
    blocks = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0).to(tl.int64)
    places = kv_head * BLOCK_SIZE + tokens % BLOCK_SIZE
    return blocks[:, None] * block_stride + places[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def _attend_tile(q, k, v, maximum, total, accumulator, scale_log2, visible=None):
    """One tile more of an online softmax, base 2; `visible` says which keys a query attends to, all if it is None."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    correction = tl.exp2(maximum - new_maximum)
    p = tl.exp2(scores - new_maximum[:, None])
    total = total * correction + tl.sum(p, 1)
    accumulator = accumulator * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return new_maximum, total, accumulator


@triton.jit(do_not_specialize=["num_requests"])
def _prefill_kernel(
    query,
    kv_rows,
    kv_cache,
    output,
    block_tables,
    context_lens,
    query_starts,
    tile_starts,
    num_requests,
    query_stride,
    block_stride,
    table_stride,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PADDED_REQUESTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program computes TILE_M queries of one head of one request."""
    begin(OVERLAPS)
    head = tl.program_id(0)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    # The last tiles of a prompt attend to most: they begin first.
    tile_m = tl.num_programs(1) - 1 - tl.program_id(1)
    if tile_m >= tl.load(tile_starts + num_requests):
        return
    row = _row_of(tile_m, tile_starts, num_requests, 1, PADDED_REQUESTS)
    start = tl.load(query_starts + row)
    query_len = tl.load(query_starts + row + 1) - start
    context_len = tl.load(context_lens + row)
    first = (tile_m - tl.load(tile_starts + row)) * TILE_M

    queries = first + tl.arange(0, TILE_M)
    positions = context_len - query_len + queries
    dims = tl.arange(0, HEAD_DIM)
    there = (queries < query_len)[:, None]
    offsets = (start + queries).to(tl.int64)[:, None] * query_stride + head * HEAD_DIM + dims[None, :]
    q = tl.load(query + offsets, mask=there, other=0.0)
    table = block_tables + row * table_stride
    value_offset = NUM_KV_HEADS * BLOCK_SIZE
    block_rows = (block_stride // HEAD_DIM).to(tl.int32)

    maximum = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, HEAD_DIM], tl.float32)
    # Tiles that the first query attends to as a whole, and so all queries do.
    num_full = (context_len - query_len + first + 1) // TILE_N
    block = tl.load(table)
    for tile in tl.range(0, num_full, num_stages=STAGES):
        if USE_TMA:
            place = block * block_rows + kv_head * BLOCK_SIZE + tile * TILE_N % BLOCK_SIZE
            k = kv_rows.load([place, 0])
            v = kv_rows.load([place + value_offset, 0])
            # A turn before its tile, whose own loads then wait for nothing; that of the next tile, or of this one's.
            block = tl.load(table + tl.minimum((tile + 1) * TILE_N, context_len - 1) // BLOCK_SIZE)
        else:
            cached = _places(table, tile, context_len, kv_head, block_stride, BLOCK_SIZE, HEAD_DIM, TILE_N)
            k = tl.load(kv_cache + cached)
            v = tl.load(kv_cache + cached + value_offset * HEAD_DIM)
        maximum, total, accumulator = _attend_tile(q, k, v, maximum, total, accumulator, scale_log2)
    end = tl.minimum(context_len, context_len - query_len + first + TILE_M)
    for tile in tl.range(num_full, tl.cdiv(end, TILE_N), num_stages=1):
        tokens = tile * TILE_N + tl.arange(0, TILE_N)
        in_context = (tokens < end)[:, None]
        cached = _places(table, tile, end, kv_head, block_stride, BLOCK_SIZE, HEAD_DIM, TILE_N)
        k = tl.load(kv_cache + cached, mask=in_context, other=0.0)
        v = tl.load(kv_cache + cached + value_offset * HEAD_DIM, mask=in_context, other=0.0)
        visible = tokens[None, :] <= positions[:, None]
        maximum, total, accumulator = _attend_tile(q, k, v, maximum, total, accumulator, scale_log2, visible)

    result = accumulator / total[:, None]
    target = (start + queries).to(tl.int64)[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    tl.store(output + target, result.to(output.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_requests"])
def _decode_kernel(
    query,
    kv_rows,
    kv_cache,
    output,
    partial,
    log_sums,
    block_tables,
    context_lens,
    tile_starts,
    num_requests,
    query_stride,
    block_stride,
    table_stride,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_REQUESTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    USE_TMA: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """All tiles of all KV heads of all requests, in this order, shared out evenly: a program computes one run of them.

    A program writes the heads that lie wholly in its run; of those at its two ends it leaves what it has.
    """
    begin(OVERLAPS)
    program = tl.program_id(0)
    num_tiles = tl.load(tile_starts + num_requests) * NUM_KV_HEADS
    share = tl.cdiv(num_tiles, tl.num_programs(0))
    first = program * share
    end = tl.minimum(first + share, num_tiles)
    row = _row_of(first, tile_starts, num_requests, NUM_KV_HEADS, PADDED_REQUESTS)

    group = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, HEAD_DIM)
    there = group < GROUP
    value_offset = NUM_KV_HEADS * BLOCK_SIZE
    block_rows = (block_stride // HEAD_DIM).to(tl.int32)
    here = first
    while here < end:
        row_start = tl.load(tile_starts + row)
        row_tiles = tl.load(tile_starts + row + 1) - row_start
        context_len = tl.load(context_lens + row)
        kv_head = (here - row_start * NUM_KV_HEADS) // row_tiles
        low = (here - row_start * NUM_KV_HEADS) % row_tiles
        high = tl.minimum(row_tiles, low + end - here)
        heads = kv_head * GROUP + group
        offsets = row.to(tl.int64) * query_stride + heads[:, None] * HEAD_DIM + dims[None, :]
        q = tl.load(query + offsets, mask=there[:, None], other=0.0)
        table = block_tables + row * table_stride

        maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([PADDED_GROUP], tl.float32)
        accumulator = tl.zeros([PADDED_GROUP, HEAD_DIM], tl.float32)
        block = tl.load(table + low * TILE // BLOCK_SIZE)
        for tile in tl.range(low, tl.minimum(high, context_len // TILE), num_stages=STAGES):
            if USE_TMA:
                place = block * block_rows + kv_head * BLOCK_SIZE + tile * TILE % BLOCK_SIZE
                k = kv_rows.load([place, 0])
                v = kv_rows.load([place + value_offset, 0])
                # A turn before its tile, whose own loads then wait for nothing.
                block = tl.load(table + tl.minimum(tile + 1, row_tiles - 1) * TILE // BLOCK_SIZE)
            else:
                cached = _places(table, tile, context_len, kv_head, block_stride, BLOCK_SIZE, HEAD_DIM, TILE)
                k = tl.load(kv_cache + cached)
                v = tl.load(kv_cache + cached + value_offset * HEAD_DIM)
            maximum, total, accumulator = _attend_tile(q, k, v, maximum, total, accumulator, scale_log2)
        if high * TILE > context_len:
            # The last tile is not full. What lies beyond the context may be anything, infinite values included.
            in_context = (high - 1) * TILE + tl.arange(0, TILE) < context_len
            cached = _places(table, high - 1, context_len, kv_head, block_stride, BLOCK_SIZE, HEAD_DIM, TILE)
            k = tl.load(kv_cache + cached, mask=in_context[:, None], other=0.0)
            v = tl.load(kv_cache + cached + value_offset * HEAD_DIM, mask=in_context[:, None], other=0.0)
            maximum, total, accumulator = _attend_tile(
                q, k, v, maximum, total, accumulator, scale_log2, in_context[None, :]
            )

        result = accumulator / total[:, None]
        if (low == 0) & (high == row_tiles):
            target = (row.to(tl.int64) * NUM_KV_HEADS * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(output + target, result.to(output.dtype.element_ty), mask=there[:, None])
        else:
            places = (2 * program + (here > first).to(tl.int32)) * GROUP + group
            tl.store(partial + places[:, None] * HEAD_DIM + dims[None, :], result, mask=there[:, None])
            tl.store(log_sums + places, maximum + tl.log2(total), mask=there)
        here += high - low
        if here >= (row_start + row_tiles) * NUM_KV_HEADS:
            row += 1


@triton.jit(do_not_specialize=["num_requests"])
def _combine_kernel(
    partial,
    log_sums,
    output,
    tile_starts,
    num_requests,
    num_programs,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program weighs what several programs left of one head of one request by their share of the softmax."""
    begin(OVERLAPS)
    row = tl.program_id(0)
    head = tl.program_id(1)
    share = tl.cdiv(tl.load(tile_starts + num_requests) * NUM_KV_HEADS, num_programs)
    row_start = tl.load(tile_starts + row)
    row_tiles = tl.load(tile_starts + row + 1) - row_start
    low = row_start * NUM_KV_HEADS + head // GROUP * row_tiles
    first_program = low // share
    last_program = (low + row_tiles - 1) // share
    if first_program == last_program:
        return

    dims = tl.arange(0, HEAD_DIM)
    maximum = float("-inf")
    total = 0.0
    accumulator = tl.zeros([HEAD_DIM], tl.float32)
    for some in range(first_program, last_program + 1, PIECES):
        programs = some + tl.arange(0, PIECES)
        there = programs <= last_program
        # A program that began before this head left it second.
        is_second = (programs == first_program) & (low > first_program * share)
        places = (2 * programs + is_second.to(tl.int32)) * GROUP + head % GROUP
        logs = tl.load(log_sums + places, mask=there, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logs, 0))
        correction = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(logs - new_maximum)
        values = tl.load(partial + places[:, None] * HEAD_DIM + dims[None, :], mask=there[:, None], other=0.0)
        total = total * correction + tl.sum(weights, 0)
        accumulator = accumulator * correction + tl.sum(values * weights[:, None], 0)
        maximum = new_maximum
    target = (row * tl.num_programs(1) + head).to(tl.int64) * HEAD_DIM + dims
    tl.store(output + target, (accumulator / total).to(output.dtype.element_ty))
