"""Paged attention in Triton: prefill over a cached prefix, whose keys are split among programs where queries are few,
and split-KV decode (flash-decoding), whose splits are here called chunks. float32, float16, bfloat16; of KV also FP8.

On GPUs that have it (sm_90 on), KV of 16 bits or less is read through the tensor memory accelerator, else by pointers.

KV in FP8 (e4m3) is converted to float16, which holds each of its numbers, and so does float16 with every bfloat16 from
6e-5 to 65504: products are in float16 then, unless queries are float32. A conversion to bfloat16 takes an instruction
for each number that runs on few lanes, on Hopper. The scale of keys is part of the softmax scale, that of values
multiplies the result.

The caller makes the tensors' device the current one: Triton launches on the current device.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels import (
    AttentionMetadata,
    BackendRequirements,
    cuda_prefill_attention,
    triton_experts,
    triton_fused,
    triton_rows,
)
from nanovllm.kernels.triton_overlap import begin, overlap
from nanovllm.kernels.triton_overlap import is_sm_90_or_later as _has_tma
from nanovllm.utils.fp8 import E4M3

DEFAULT_BLOCK_SIZE = 64
HEAD_DIMS = (64, 128)
LOG2_E = 1.4426950408889634
DECODE_TILE = 16
"""Tokens of a tile of the decode kernel: so small that many programs fit on an SM, each with loads in flight."""
FEW_REQUESTS = 8
FEW_REQUESTS_TILE = 32
"""Below this many requests an SM has few programs, and larger tiles take fewer iterations."""
FP8_DECODE_TILE = 32
FP8_FEW_REQUESTS_TILE = 64
"""The same for KV in FP8: as many bytes."""
DECODE_STAGES = 3
"""One more than the tiles in flight of a program."""
CHUNK_TOKENS = 1024
"""Tokens of a chunk that is long enough for its start-up not to matter."""
PROGRAMS_PER_SM = 2
"""Programs per SM with chunks of up to CHUNK_TOKENS: enough to keep loads in flight."""
MAX_PROGRAMS_PER_SM = 16
"""Programs per SM with longer chunks: so many that SMs that end early find more work."""
COMBINED_CHUNKS, FEW_COMBINED_CHUNKS = 4, 8
"""Chunks of a context that are combined at a time, in general and where there are few requests: an SM has few programs
then, and registers to spare."""
PREFILL_TILE_M = 64
PREFILL_TILE_N = triton_fused.MAX_TILE_TOKENS
PREFILL_STAGES = 3
PREFILL_PROGRAMS_PER_SM = 2
"""Programs of the prefill kernel that an SM runs at a time: their tiles fill its shared memory."""
MOST_PLANNED_TILES = 64
"""Contexts are divided into pieces in steps that may have at most so many tiles of queries. Larger ones gain nothing by
it, and without pieces the kernel is 3 to 5 % faster."""
MAX_SPLITS = 16
SPLIT_KEYS = 512
"""Fewest keys of a piece: with less, writing and combining what its queries attend to takes longer than it saves."""
MOST_ROUNDS = 4
"""There is room for the results of so many pieces of every program that the GPU runs at a time."""
TILE_COST, PIECE_COST = tl.constexpr(4), tl.constexpr(9)
"""What a program takes besides its keys, as long as so many tiles of them: one for all of a tile's, and one for a
piece."""
ROWS_COST, ROW_KEYS = tl.constexpr(15), tl.constexpr(5600)
"""How long decode rows in the same step, which begin first, keep each SM from taking a second program of the prefill
kernel, in tiles of keys: ROWS_COST, and one more for ROW_KEYS keys of their contexts, counted for each KV head."""
PADDED_ROWS = tl.constexpr(256)
"""Rows whose contexts are added up at a time."""
COMBINE_PERCENT = tl.constexpr(120)
"""What it takes to combine a tile's pieces, for each of them, in percent of a tile of keys."""
WORTH_PERCENT = tl.constexpr(93)
"""Contexts are divided if a step is estimated to take at most so much of the time that it takes otherwise, the time of
decode rows in it left out."""
COMBINE_STAGES = tl.constexpr(2)
PIECE_REQUEST = tl.constexpr(0)
PIECE_FIRST_ROW = tl.constexpr(1)
PIECE_NUM_QUERIES = tl.constexpr(2)
PIECE_END = tl.constexpr(3)
PIECE_NUM_SPLITS = tl.constexpr(4)
PIECE_SPLIT = tl.constexpr(5)
PIECE_FIRST_PART = tl.constexpr(6)
NUM_PIECE_FIELDS = tl.constexpr(7)
"""What a plan says of each piece: its request; of its tile of queries the first row in the step, the number, and the
end of what the last one attends to; into how many pieces the tile's context is split, which of them this is, and where
the partial result of the first one is, if there are several."""


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
    skips_empty_requests = True
    norm_rotate_store = staticmethod(triton_fused.norm_rotate_store)
    linear = staticmethod(triton_fused.linear)
    norm_linear = staticmethod(triton_fused.norm_linear)
    norm_gated_linear = staticmethod(triton_fused.norm_gated_linear)
    norm_experts = staticmethod(triton_experts.norm_experts)
    add_rms_norm = staticmethod(triton_fused.add_rms_norm)
    silu_and_mul = staticmethod(triton_fused.silu_and_mul)
    sample_tokens = staticmethod(triton_fused.sample_tokens)
    gather_rows = staticmethod(triton_rows.gather_rows)
    advance_rows = staticmethod(triton_rows.advance_rows)

    def split_work(self, metadata: AttentionMetadata, num_heads: int, kv_cache: torch.Tensor) -> torch.Tensor:
        if metadata.is_decode:
            num_kv_heads = kv_cache.shape[2]
            tile = _decode_tile(len(metadata.context_lens), has_fp8_kv=kv_cache.dtype == E4M3)
            return _share_out(
                metadata.context_lens,
                None,
                tile,
                num_counters=len(metadata.context_lens) * num_kv_heads,
                num_kv_heads=num_kv_heads,
                num_sms=metadata.num_sms,
            )
        if cuda_prefill_attention.can_serve(metadata, num_heads, kv_cache, _sms_of(metadata)):
            return cuda_prefill_attention.plan(metadata, num_heads, kv_cache, _sms_of(metadata))
        if _most_tiles(metadata) <= MOST_PLANNED_TILES:
            return _plan_pieces(metadata, num_heads, kv_cache)
        return _share_out(metadata.query_starts, metadata.query_starts[1:], PREFILL_TILE_M, num_counters=0)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        out: torch.Tensor | None = None,
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        split = metadata.work_split
        if split is None:
            split = self.split_work(metadata, query.shape[1], kv_cache)
        output = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
        if cuda_prefill_attention.is_plan(split):
            num_sms = _sms_of(metadata)
            cuda_prefill_attention.attend(query, kv_cache, metadata, split, scale, output, num_sms)
            return output
        attend = _decode if metadata.is_decode else _prefill
        attend(query, kv_cache, metadata, split, scale, output, kv_scales)
        return output


def _share_out(
    lengths: torch.Tensor,
    ends: torch.Tensor | None,
    tile: int,
    *,
    num_counters: int,
    num_kv_heads: int | None = None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """[B + 1 + num_counters] int32: units of work before each request, and in all, and zeros.

    A unit is a tile of a prompt, or, if `num_kv_heads` is given, a chunk of a KV head's context. In the counters
    `attend` counts what is done of work that several programs share, and leaves them 0. `lengths` are starts if `ends`
    are given.
    """
    num_requests = len(lengths) if ends is None else len(ends)
    starts = torch.empty(num_requests + 1 + num_counters, dtype=torch.int32, device=lengths.device)
    _share_out_kernel[(1,)](
        lengths,
        ends,
        starts,
        num_requests,
        num_counters,
        num_sms or _num_sms(lengths.device),
        NUM_KV_HEADS=num_kv_heads,
        TILE=tile,
        CHUNK_TILES=CHUNK_TOKENS // tile,
        PROGRAMS_PER_SM=PROGRAMS_PER_SM,
        MAX_PROGRAMS_PER_SM=MAX_PROGRAMS_PER_SM,
        PADDED_REQUESTS=_padded(num_requests),
        **overlap(lengths.device),
    )
    return starts


def _plan_pieces(metadata: AttentionMetadata, num_heads: int, kv_cache: torch.Tensor) -> torch.Tensor:
    """Divides the contexts of a step of prompts into pieces, each computed by a program for each head.

    A program for each tile of queries and head is too few for a GPU where a short chunk attends to a long prefix, and
    one with all keys of a long context is what all others wait for. All pieces have about the same length, that with
    which the step is estimated to end first; long ones begin first.

    Returns:
        int32: the number of pieces; NUM_PIECE_FIELDS rows of what there is to know of each; counters of what is done of
        work that several programs share, which `attend` leaves 0.
    """
    num_requests, most_parts = len(metadata.context_lens), _most_parts(metadata, num_heads)
    most_pieces = _most_tiles(metadata) + most_parts
    context_of_rows = None if metadata.decode is None else metadata.decode.context_lens
    size = 1 + NUM_PIECE_FIELDS.value * most_pieces + most_parts * num_heads
    plan = torch.empty(size, dtype=torch.int32, device=metadata.context_lens.device)
    _plan_pieces_kernel[(1,)](
        metadata.context_lens,
        metadata.query_starts,
        plan,
        num_requests,
        most_pieces,
        most_parts,
        _sms_of(metadata),
        context_of_rows,
        0 if context_of_rows is None else len(context_of_rows),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=kv_cache.shape[2],
        TILE_M=PREFILL_TILE_M,
        TILE_N=PREFILL_TILE_N,
        LEAST=SPLIT_KEYS // PREFILL_TILE_N,
        MAX_SPLITS=MAX_SPLITS,
        PROGRAMS_PER_SM=PREFILL_PROGRAMS_PER_SM,
        PADDED_REQUESTS=_padded(num_requests),
        PADDED_TILES=MOST_PLANNED_TILES,
        **overlap(plan.device),
    )
    return plan


def _prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    plan: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    kv_scales: torch.Tensor | None,
) -> None:
    _, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    num_requests = metadata.context_lens.shape[0]
    # float32 tiles take twice the shared memory, and their dot products run without tensor cores.
    is_wide = query.element_size() == 4
    tile_n = 16 if is_wide else PREFILL_TILE_N
    use_tma = not is_wide and block_size % tile_n == 0 and _has_rows_for_tma(kv_cache)
    most_pieces = _most_tiles(metadata)
    has_pieces = most_pieces <= MOST_PLANNED_TILES
    partial = log_sums = None
    if has_pieces:
        most_parts = _most_parts(metadata, num_heads)
        most_pieces += most_parts
        shape = (most_parts, num_heads, PREFILL_TILE_M)
        partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=query.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=query.device)
    _prefill_kernel[(num_heads, most_pieces)](
        query,
        _rows_descriptor(kv_cache, tile_n) if use_tma else kv_cache,
        kv_cache,
        kv_scales,
        output,
        partial,
        log_sums,
        metadata.block_tables,
        metadata.context_lens,
        metadata.query_starts,
        plan,
        num_requests,
        most_pieces,
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
        KEYS=PREFILL_TILE_N,
        HAS_PIECES=has_pieces,
        HAS_SPLIT=metadata.work_split is not None,
        USE_TMA=use_tma,
        STAGES=1 if is_wide else PREFILL_STAGES,
        num_warps=8 if is_wide else PREFILL_TILE_M // 16,
        **overlap(query.device),
    )


def _decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    chunk_starts: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    kv_scales: torch.Tensor | None,
) -> None:
    num_requests, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    if kv_scales is not None:
        kv_cache = kv_cache.view(torch.int16)  # words of two numbers: see `_numbers_of`
    group = num_heads // num_kv_heads
    # The chunks of an even share, and for each head of each request one that is shorter.
    num_programs = MAX_PROGRAMS_PER_SM * (metadata.num_sms or _num_sms(query.device)) + num_requests * num_kv_heads
    partial = torch.empty(num_programs, group, head_dim, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(num_programs, group, dtype=torch.float32, device=query.device)
    is_wide = query.element_size() == 4
    tile = _decode_tile(num_requests, has_fp8_kv=kv_scales is not None)
    use_tma = not is_wide and block_size % tile == 0 and _has_rows_for_tma(kv_cache)
    _decode_kernel[(num_programs,)](
        query,
        _rows_descriptor(kv_cache, tile) if use_tma else kv_cache,
        kv_cache,
        kv_scales,
        output,
        partial,
        log_sums,
        metadata.block_tables,
        metadata.context_lens,
        chunk_starts,
        num_requests,
        query.stride(0),
        kv_cache.stride(0),
        metadata.block_tables.stride(0),
        scale * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        PADDED_GROUP=max(8, triton.next_power_of_2(group)),
        PADDED_REQUESTS=_padded(num_requests),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=tile,
        USE_TMA=use_tma,
        STAGES=2 if is_wide else DECODE_STAGES,
        COMBINED=FEW_COMBINED_CHUNKS if num_requests < FEW_REQUESTS else COMBINED_CHUNKS,
        HAS_SPLIT=metadata.work_split is not None,
        IS_CUDA=query.is_cuda,
        num_warps=4 if is_wide else 1,
        **overlap(query.device),
    )


def _most_tiles(metadata: AttentionMetadata) -> int:
    """Tiles of queries that a step of prompts may have: every request but one may end in one that is not full."""
    num_tokens, num_requests = len(metadata.slot_mapping), len(metadata.context_lens)
    return min(triton.cdiv(num_tokens, PREFILL_TILE_M) + num_requests - 1, num_tokens)


def _most_parts(metadata: AttentionMetadata, num_heads: int) -> int:
    """Pieces of tiles with more than one for whose results there is room."""
    return triton.cdiv(MOST_ROUNDS * PREFILL_PROGRAMS_PER_SM * _sms_of(metadata), num_heads)


def _sms_of(metadata: AttentionMetadata) -> int:
    return metadata.num_sms or _num_sms(metadata.slot_mapping.device)


def _decode_tile(num_requests: int, *, has_fp8_kv: bool) -> int:
    if has_fp8_kv:
        return FP8_DECODE_TILE if num_requests >= FEW_REQUESTS else FP8_FEW_REQUESTS_TILE
    return DECODE_TILE if num_requests >= FEW_REQUESTS else FEW_REQUESTS_TILE


def _padded(num_requests: int) -> int:
    """A power of two, 64 or more: each different value compiles a variant of the kernel."""
    return max(64, triton.next_power_of_2(num_requests))


def _rows_descriptor(kv_cache: torch.Tensor, tile: int) -> TensorDescriptor:
    """One layer's view of the pool as rows of one token and head each, to be loaded `tile` rows at a time.

    The rows run on through the other layers: a block's next block is `block stride / head_dim` rows further, both in
    elements of the view.
    """
    head_dim = kv_cache.shape[-1]
    return TensorDescriptor(kv_cache, [_num_rows(kv_cache), head_dim], [head_dim, 1], [tile, head_dim])


def _num_rows(kv_cache: torch.Tensor) -> int:
    num_blocks, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    return (num_blocks - 1) * kv_cache.stride(0) // head_dim + 2 * num_kv_heads * block_size


def _has_rows_for_tma(kv_cache: torch.Tensor) -> bool:
    """Whether there is a tensor memory accelerator, which counts rows in 32 bits: of 64 bytes, they are 128 GiB."""
    return _has_tma(kv_cache.device) and _num_rows(kv_cache) < 2**31


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit(do_not_specialize=["num_requests", "num_counters"])
def _share_out_kernel(
    lengths,
    ends,
    starts,
    num_requests,
    num_counters,
    num_sms,
    NUM_KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    PROGRAMS_PER_SM: tl.constexpr,
    MAX_PROGRAMS_PER_SM: tl.constexpr,
    PADDED_REQUESTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Units of work before each request, and in all; a request's length is given, or where it ends and begins."""
    begin(OVERLAPS)
    requests = tl.arange(0, PADDED_REQUESTS)
    there = requests < num_requests
    length = tl.load(lengths + requests, mask=there, other=0)
    if ends is not None:
        length = tl.load(ends + requests, mask=there, other=0) - length
    units = tl.cdiv(length, TILE)
    if NUM_KV_HEADS is not None:
        num_tiles = tl.sum(units, 0) * NUM_KV_HEADS
        chunk = tl.minimum(tl.cdiv(num_tiles, PROGRAMS_PER_SM * num_sms), CHUNK_TILES)
        chunk = tl.maximum(chunk, tl.cdiv(num_tiles, MAX_PROGRAMS_PER_SM * num_sms))
        units = tl.cdiv(units, chunk)
    for first in range(0, num_counters, PADDED_REQUESTS):
        counters = first + requests
        tl.store(starts + num_requests + 1 + counters, 0, mask=counters < num_counters)
    tl.store(starts, 0)
    tl.store(starts + 1 + requests, tl.cumsum(units, 0), mask=there)


@triton.jit(do_not_specialize=["num_requests", "most_pieces", "most_parts", "num_sms", "num_rows"])
def _plan_pieces_kernel(
    context_lens,
    query_starts,
    plan,
    num_requests,
    most_pieces,
    most_parts,
    num_sms,
    context_of_rows,
    num_rows,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    LEAST: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PROGRAMS_PER_SM: tl.constexpr,
    PADDED_REQUESTS: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """What `_plan_pieces` returns; `context_of_rows` are the context lengths of decode rows in the same step."""
    begin(OVERLAPS)
    at_a_time = PROGRAMS_PER_SM * num_sms
    requests, tiles = tl.arange(0, PADDED_REQUESTS), tl.arange(0, PADDED_TILES)
    there = requests < num_requests
    query_len = tl.load(query_starts + 1 + requests, mask=there, other=0)
    query_len -= tl.load(query_starts + requests, mask=there, other=0)
    tile_ends = tl.cumsum(tl.cdiv(query_len, TILE_M), 0)
    is_tile = tiles < tl.sum(tl.cdiv(query_len, TILE_M), 0)

    # Of each tile of queries.
    is_before = (tile_ends[None, :] <= tiles[:, None]) & there[None, :]
    request = tl.sum(is_before.to(tl.int32), 1)
    first = (tiles - tl.max(tl.where(is_before, tile_ends[None, :], 0), 1)) * TILE_M
    start = tl.load(query_starts + request, mask=is_tile, other=0)
    query_len = tl.load(query_starts + request + 1, mask=is_tile, other=0) - start
    num_queries = tl.minimum(query_len - first, TILE_M)
    end = tl.load(context_lens + request, mask=is_tile, other=0) - query_len + first + num_queries
    num_keys = tl.where(is_tile, tl.cdiv(end, TILE_N), 0)

    # What the step is estimated to take, in tiles of keys, by the longest piece: as many rounds as its long pieces
    # come to, and no less than the programs have to do on average. Beside decode rows, programs beyond one for each SM
    # run only once the rows are done.
    longest = tl.max(num_keys, 0)
    choices = tl.arange(0, MAX_SPLITS)
    length = tl.maximum(tl.maximum(tl.cdiv(longest, choices + 1), tl.minimum(longest, LEAST)), 1)
    num_splits = tl.cdiv(num_keys[None, :], length[:, None])
    piece = tl.cdiv(num_keys[None, :], tl.maximum(num_splits, 1))
    num_long = tl.sum(tl.where(piece * 2 > length[:, None], num_splits, 0), 1)
    rounds = tl.cdiv(num_long * NUM_HEADS, at_a_time)
    cost = tl.where(length < longest, PIECE_COST, TILE_COST)
    each = piece + tl.where(num_splits > 1, PIECE_COST, TILE_COST)
    average = tl.cdiv(tl.sum(num_splits * each, 1) * NUM_HEADS, at_a_time)
    estimate = tl.maximum(rounds * (length + cost), average)
    estimate = 100 * estimate + tl.where(length < longest, tl.cdiv(longest, length) * COMBINE_PERCENT, 0)
    estimate = tl.where(length < longest, estimate, estimate * WORTH_PERCENT // 100)
    if context_of_rows is not None:
        keys = tl.zeros([PADDED_ROWS], tl.int32)
        for some in range(0, num_rows, PADDED_ROWS):
            rows = some + tl.arange(0, PADDED_ROWS)
            keys += tl.load(context_of_rows + rows, mask=rows < num_rows, other=0)
        of_rows = ROWS_COST + tl.sum(keys, 0) // (ROW_KEYS // NUM_KV_HEADS)
        estimate += tl.where(num_long * NUM_HEADS > num_sms, 100 * of_rows, 0)
    num_parts = tl.sum(tl.where(num_splits > 1, num_splits, 0), 1)
    estimate = tl.where(num_parts <= most_parts, estimate, 0x7FFFFFFF)
    length = tl.sum(tl.where(choices == tl.argmin(estimate, 0), length, 0), 0)

    num_splits = tl.cdiv(num_keys, length)
    piece = tl.cdiv(num_keys, tl.maximum(num_splits, 1))
    is_earlier = (piece[None, :] > piece[:, None]) | (
        (piece[None, :] == piece[:, None]) & (tiles[None, :] < tiles[:, None])
    )
    first_piece = tl.sum(tl.where(is_earlier, num_splits[None, :], 0), 1)
    first_part = tl.sum(tl.where(is_earlier & (num_splits[None, :] > 1), num_splits[None, :], 0), 1)
    tl.store(plan, tl.sum(num_splits, 0))
    for split in range(tl.max(num_splits, 0)):
        fields, is_piece = plan + 1 + first_piece + split, split < num_splits
        tl.store(fields + PIECE_REQUEST * most_pieces, request, mask=is_piece)
        tl.store(fields + PIECE_FIRST_ROW * most_pieces, start + first, mask=is_piece)
        tl.store(fields + PIECE_NUM_QUERIES * most_pieces, num_queries, mask=is_piece)
        tl.store(fields + PIECE_END * most_pieces, end, mask=is_piece)
        tl.store(fields + PIECE_NUM_SPLITS * most_pieces, num_splits, mask=is_piece)
        tl.store(fields + PIECE_SPLIT * most_pieces, tl.full([PADDED_TILES], 0, tl.int32) + split, mask=is_piece)
        tl.store(fields + PIECE_FIRST_PART * most_pieces, first_part, mask=is_piece)
    counters = plan + 1 + NUM_PIECE_FIELDS * most_pieces
    for some in range(0, most_parts * NUM_HEADS, PADDED_TILES):
        tl.store(counters + some + tiles, 0, mask=some + tiles < most_parts * NUM_HEADS)


@triton.jit
def _request_of(unit, starts, num_requests, TIMES: tl.constexpr, PADDED_REQUESTS: tl.constexpr):
    """The request that a unit belongs to, if each of its units counts TIMES times."""
    requests = tl.arange(0, PADDED_REQUESTS)
    firsts = tl.load(starts + requests, mask=requests < num_requests, other=0x7FFFFFFF // TIMES)
    return tl.sum((firsts * TIMES <= unit).to(tl.int32), 0) - 1


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
def _numbers_of(words, DTYPE: tl.constexpr, IS_CUDA: tl.constexpr):
    """The first and the second of two e4m3 numbers in each int16 word, as DTYPE.

    Words, not bytes, are what tensor cores' operands can be transposed by on their way out of shared memory.
    """
    if IS_CUDA and DTYPE == tl.float16:  # noqa: SIM300 - it is an argument, whatever its name looks like
        # Of two words at a time: both first numbers, both second ones.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 first, second;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {first, second}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $1, second;
            }""",
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    first = (words & 0xFF).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    second = (words >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    return first.to(DTYPE), second.to(DTYPE)


@triton.jit
def _attend_tile(q, k, v, maximum, total, accumulator, scale_log2, visible=None):
    """Adds a tile to an online softmax, base 2; `visible` says which keys a query attends to, None for all."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    # Maxima are kept unscaled: scaling and subtracting is then one instruction for each score.
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    correction = tl.exp2((maximum - new_maximum) * scale_log2)
    p = tl.exp2(scores * scale_log2 - (new_maximum * scale_log2)[:, None])
    total = total * correction + tl.sum(p, 1)
    accumulator = accumulator * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return new_maximum, total, accumulator


@triton.jit(do_not_specialize=["num_requests", "most_pieces"])
def _prefill_kernel(
    query,
    kv_rows,
    kv_cache,
    kv_scales,
    output,
    partial,
    log_sums,
    block_tables,
    context_lens,
    query_starts,
    plan,
    num_requests,
    most_pieces,
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
    KEYS: tl.constexpr,
    HAS_PIECES: tl.constexpr,
    HAS_SPLIT: tl.constexpr,
    USE_TMA: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program computes TILE_M queries of one head of one request, over all of their context or over a piece of it.

    Pieces are those of `_plan_pieces`; whichever program is the last of a tile's to end combines them. Without pieces,
    `plan` has the tiles of queries before each request, and in all.
    """
    if not HAS_SPLIT:
        begin(OVERLAPS)
    head = tl.program_id(0)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    if tl.program_id(1) >= tl.load(plan if HAS_PIECES else plan + num_requests):
        return
    if HAS_PIECES:
        piece = plan + 1 + tl.program_id(1)
        request = tl.load(piece + PIECE_REQUEST * most_pieces)
        first_row = tl.load(piece + PIECE_FIRST_ROW * most_pieces)
        num_queries = tl.load(piece + PIECE_NUM_QUERIES * most_pieces)
        end = tl.load(piece + PIECE_END * most_pieces)
        num_splits = tl.load(piece + PIECE_NUM_SPLITS * most_pieces)
        split = tl.load(piece + PIECE_SPLIT * most_pieces)
        first_part = tl.load(piece + PIECE_FIRST_PART * most_pieces)
        num_keys = tl.cdiv(end, KEYS)
        low = split * num_keys // num_splits * (KEYS // TILE_N)
        high = tl.minimum((split + 1) * num_keys // num_splits * (KEYS // TILE_N), tl.cdiv(end, TILE_N))
    else:
        # The last tiles of a prompt attend to most: they begin first.
        tile_m = tl.load(plan + num_requests) - 1 - tl.program_id(1)
        request = _request_of(tile_m, plan, num_requests, 1, PADDED_REQUESTS)
        start = tl.load(query_starts + request)
        query_len = tl.load(query_starts + request + 1) - start
        first = (tile_m - tl.load(plan + request)) * TILE_M
        first_row = start + first
        num_queries = tl.minimum(query_len - first, TILE_M)
        end = tl.load(context_lens + request) - query_len + first + num_queries
        low, high = 0, tl.cdiv(end, TILE_N)

    rows, dims = tl.arange(0, TILE_M), tl.arange(0, HEAD_DIM)
    first_position = end - num_queries
    positions = first_position + rows
    # Tiles that the first query attends to as a whole, and so all queries do; then those that any query attends to.
    num_full = (first_position + 1) // TILE_N
    there = (rows < num_queries)[:, None]
    table = block_tables + request * table_stride
    value_offset = NUM_KV_HEADS * BLOCK_SIZE
    block_rows = (block_stride // HEAD_DIM).to(tl.int32)
    block = tl.load(table + low * TILE_N // BLOCK_SIZE)
    if HAS_SPLIT:  # at the beginning of the step: only now is something needed of the kernel before
        begin(OVERLAPS)
    offsets = (first_row + rows).to(tl.int64)[:, None] * query_stride + head * HEAD_DIM + dims[None, :]
    q = tl.load(query + offsets, mask=there, other=0.0)
    if kv_scales is not None:
        if q.dtype != tl.float32:
            q = q.to(tl.float16)
        scale_log2 *= tl.load(kv_scales + kv_head)

    maximum = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, HEAD_DIM], tl.float32)
    for tile in tl.range(low, tl.minimum(num_full, high), num_stages=STAGES):
        if USE_TMA:
            place = block * block_rows + kv_head * BLOCK_SIZE + tile * TILE_N % BLOCK_SIZE
            k = kv_rows.load([place, 0])
            v = kv_rows.load([place + value_offset, 0])
            # One iteration before its tile, so that the loads of the tile need not wait for it.
            block = tl.load(table + tl.minimum((tile + 1) * TILE_N, end - 1) // BLOCK_SIZE)
        else:
            cached = _places(table, tile, end, kv_head, block_stride, BLOCK_SIZE, HEAD_DIM, TILE_N)
            k = tl.load(kv_cache + cached)
            v = tl.load(kv_cache + cached + value_offset * HEAD_DIM)
        if kv_scales is not None:
            k, v = k.to(q.dtype), v.to(q.dtype)
        maximum, total, accumulator = _attend_tile(q, k, v, maximum, total, accumulator, scale_log2)
    for tile in tl.range(tl.maximum(num_full, low), high, num_stages=STAGES):
        tokens = tile * TILE_N + tl.arange(0, TILE_N)
        if USE_TMA:
            place = tl.load(table + tile * TILE_N // BLOCK_SIZE) * block_rows
            place += kv_head * BLOCK_SIZE + tile * TILE_N % BLOCK_SIZE
            k = kv_rows.load([place, 0])
            v = kv_rows.load([place + value_offset, 0])
        else:
            in_context = (tokens < end)[:, None]
            cached = _places(table, tile, end, kv_head, block_stride, BLOCK_SIZE, HEAD_DIM, TILE_N)
            k = tl.load(kv_cache + cached, mask=in_context, other=0.0)
            v = tl.load(kv_cache + cached + value_offset * HEAD_DIM, mask=in_context, other=0.0)
        if kv_scales is not None:
            k, v = k.to(q.dtype), v.to(q.dtype)
        visible = tokens[None, :] <= positions[:, None]
        maximum, total, accumulator = _attend_tile(q, k, v, maximum, total, accumulator, scale_log2, visible)

    result = accumulator / total[:, None]
    if kv_scales is not None:
        result *= tl.load(kv_scales + NUM_KV_HEADS + kv_head)
    target = (first_row + rows).to(tl.int64)[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    if HAS_PIECES:  # noqa: SIM102 - the only one of both conditions that is known when this is compiled
        if num_splits > 1:
            part_rows = ((first_part + split) * NUM_HEADS + head) * TILE_M + rows
            tl.store(partial + part_rows[:, None] * HEAD_DIM + dims[None, :], result)
            tl.store(log_sums + part_rows, maximum * scale_log2 + tl.log2(total))
            num_done = plan + 1 + NUM_PIECE_FIELDS * most_pieces + first_part * NUM_HEADS + head
            tl.debug_barrier()  # all threads have stored before one of them says so
            if tl.atomic_add(num_done, 1, sem="acq_rel") < num_splits - 1:
                return
            tl.debug_barrier()
            first_rows = (first_part * NUM_HEADS + head) * TILE_M + rows
            result = _combine_pieces(partial, log_sums, first_rows, num_splits, NUM_HEADS, HEAD_DIM, TILE_M)
            tl.store(num_done, 0)  # for the next layer
    tl.store(output + target, result.to(output.dtype.element_ty), mask=there)


@triton.jit
def _combine_pieces(
    partial,
    log_sums,
    first_rows,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """[TILE_M, HEAD_DIM]: what a tile's queries attend to in all pieces, by their share of the softmax."""
    dims = tl.arange(0, HEAD_DIM)
    maximum = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    accumulator = tl.zeros([TILE_M, HEAD_DIM], tl.float32)
    for split in tl.range(0, num_splits, num_stages=COMBINE_STAGES):
        part_rows = first_rows + split * (NUM_HEADS * TILE_M)
        # Not through the L1 cache, which another SM's stores do not reach.
        log_sum = tl.load(log_sums + part_rows, cache_modifier=".cg")
        value = tl.load(partial + part_rows[:, None] * HEAD_DIM + dims[None, :], cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, log_sum)
        correction, weight = tl.exp2(maximum - new_maximum), tl.exp2(log_sum - new_maximum)
        total = total * correction + weight
        accumulator = accumulator * correction[:, None] + value * weight[:, None]
        maximum = new_maximum
    return accumulator / total[:, None]


@triton.jit(do_not_specialize=["num_requests"])
def _decode_kernel(
    query,
    kv_rows,
    kv_cache,
    kv_scales,
    output,
    partial,
    log_sums,
    block_tables,
    context_lens,
    chunk_starts,
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
    COMBINED: tl.constexpr,
    HAS_SPLIT: tl.constexpr,
    IS_CUDA: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program computes a chunk of one KV head's context, the output itself where this is all of the context.

    KV in FP8 comes as words of two numbers: the products are of the even dimensions, then of the odd ones.
    """
    if not HAS_SPLIT:
        begin(OVERLAPS)
    program = tl.program_id(0)
    if program >= tl.load(chunk_starts + num_requests) * NUM_KV_HEADS:
        return
    request = _request_of(program, chunk_starts, num_requests, NUM_KV_HEADS, PADDED_REQUESTS)
    first_chunk = tl.load(chunk_starts + request)
    num_chunks = tl.load(chunk_starts + request + 1) - first_chunk
    context_len = tl.load(context_lens + request)
    kv_head = (program - first_chunk * NUM_KV_HEADS) // num_chunks
    chunk = (program - first_chunk * NUM_KV_HEADS) % num_chunks
    num_tiles = tl.cdiv(context_len, TILE)
    low, high = chunk * num_tiles // num_chunks, (chunk + 1) * num_tiles // num_chunks

    group = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, HEAD_DIM)
    there = group < GROUP
    heads = kv_head * GROUP + group
    offsets_of_heads = request.to(tl.int64) * query_stride + heads[:, None] * HEAD_DIM
    offsets = offsets_of_heads + dims[None, :]
    table = block_tables + request * table_stride
    value_offset = NUM_KV_HEADS * BLOCK_SIZE
    ROW: tl.constexpr = HEAD_DIM if kv_scales is None else HEAD_DIM // 2
    block_rows = (block_stride // ROW).to(tl.int32)
    block = tl.load(table + low * TILE // BLOCK_SIZE)
    if HAS_SPLIT:  # at the beginning of the step: only now is something needed of the kernel before
        begin(OVERLAPS)
    # Keys and values come first in both products, transposed: their tiles fill the tensor cores' 16 rows, while few
    # queries share a KV head, and 8 columns are enough for most.
    if kv_scales is None:
        q = tl.trans(tl.load(query + offsets, mask=there[:, None], other=0.0))
    else:
        DTYPE: tl.constexpr = tl.float32 if query.dtype.element_ty == tl.float32 else tl.float16
        evens = offsets_of_heads + 2 * tl.arange(0, ROW)[None, :]
        q = tl.trans(tl.load(query + evens, mask=there[:, None], other=0.0).to(DTYPE))
        q_odd = tl.trans(tl.load(query + evens + 1, mask=there[:, None], other=0.0).to(DTYPE))
        accumulator_odd = tl.zeros([ROW, PADDED_GROUP], tl.float32)
        scale_log2 *= tl.load(kv_scales + kv_head)

    maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    accumulator = tl.zeros([ROW, PADDED_GROUP], tl.float32)
    for tile in tl.range(low, high, num_stages=STAGES):
        in_context = (tile * TILE + tl.arange(0, TILE) < context_len)[:, None]
        if USE_TMA:
            place = block * block_rows + kv_head * BLOCK_SIZE + tile * TILE % BLOCK_SIZE
            k = kv_rows.load([place, 0])
            v = kv_rows.load([place + value_offset, 0])
            # One iteration before its tile, so that the loads of the tile need not wait for it.
            block = tl.load(table + tl.minimum(tile + 1, num_tiles - 1) * TILE // BLOCK_SIZE)
        else:
            cached = _places(table, tile, context_len, kv_head, block_stride, BLOCK_SIZE, ROW, TILE)
            k = tl.load(kv_cache + cached, mask=in_context, other=0)
            v = tl.load(kv_cache + cached + value_offset * ROW, mask=in_context, other=0)
        if kv_scales is None:
            scores = tl.dot(k, q, input_precision="ieee")
        else:
            k, k_odd = _numbers_of(k, DTYPE, IS_CUDA)
            v, v_odd = _numbers_of(v, DTYPE, IS_CUDA)
            scores = tl.dot(k_odd, q_odd, tl.dot(k, q, input_precision="ieee"), input_precision="ieee")
        scores = tl.where(in_context, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        correction = tl.exp2((maximum - new_maximum) * scale_log2)
        p = tl.exp2(scores * scale_log2 - (new_maximum * scale_log2)[None, :])
        total = total * correction + tl.sum(p, 0)
        products = tl.dot(tl.trans(v), p.to(v.dtype), input_precision="ieee")
        accumulator = accumulator * correction[None, :] + products
        if kv_scales is not None:
            products = tl.dot(tl.trans(v_odd), p.to(DTYPE), input_precision="ieee")
            accumulator_odd = accumulator_odd * correction[None, :] + products
        maximum = new_maximum

    if kv_scales is None:
        result = tl.trans(accumulator / total[None, :])
    else:
        numbers = tl.permute(tl.join(accumulator, accumulator_odd), (1, 0, 2))
        result = tl.reshape(numbers, [PADDED_GROUP, HEAD_DIM]) / total[:, None]
        result *= tl.load(kv_scales + NUM_KV_HEADS + kv_head)
    head_offsets = (request.to(tl.int64) * NUM_KV_HEADS + kv_head) * GROUP + group
    if num_chunks == 1:
        target = head_offsets[:, None] * HEAD_DIM + dims[None, :]
        tl.store(output + target, result.to(output.dtype.element_ty), mask=there[:, None])
        return
    places = program.to(tl.int64) * GROUP + group
    tl.store(partial + places[:, None] * HEAD_DIM + dims[None, :], result, mask=there[:, None])
    tl.store(log_sums + places, maximum * scale_log2 + tl.log2(total), mask=there)
    num_done = chunk_starts + num_requests + 1 + request * NUM_KV_HEADS + kv_head
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(num_done, 1, sem="acq_rel") == num_chunks - 1:
        tl.debug_barrier()
        _combine(
            partial,
            log_sums,
            output,
            program - chunk,
            num_chunks,
            request * NUM_KV_HEADS + kv_head,
            GROUP,
            HEAD_DIM,
            COMBINED,
        )
        tl.store(num_done, 0)  # for the next layer


@triton.jit
def _combine(
    partial,
    log_sums,
    output,
    first_program,
    num_chunks,
    kv_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Combines a KV head's chunks by their share of the softmax, CHUNKS at a time."""
    group = tl.arange(0, triton.next_power_of_2(GROUP))
    dims = tl.arange(0, HEAD_DIM)
    there = group < GROUP
    maximum = tl.full([triton.next_power_of_2(GROUP)], float("-inf"), tl.float32)
    total = tl.zeros([triton.next_power_of_2(GROUP)], tl.float32)
    accumulator = tl.zeros([triton.next_power_of_2(GROUP), HEAD_DIM], tl.float32)
    for some in range(0, num_chunks, CHUNKS):
        chunks = some + tl.arange(0, CHUNKS)
        is_chunk = (chunks < num_chunks)[:, None] & there[None, :]
        places = (first_program + chunks).to(tl.int64)[:, None] * GROUP + group[None, :]
        # Not through the L1 cache, which another SM's stores do not reach.
        logs = tl.load(log_sums + places, mask=is_chunk, other=float("-inf"), cache_modifier=".cg")
        logs = tl.where(there[None, :], logs, 0.0)
        there_3d = is_chunk[:, :, None]
        values = tl.load(
            partial + places[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=there_3d,
            other=0.0,
            cache_modifier=".cg",
        )
        new_maximum = tl.maximum(maximum, tl.max(logs, 0))
        correction = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(logs - new_maximum[None, :])
        total = total * correction + tl.sum(weights, 0)
        accumulator = accumulator * correction[:, None] + tl.sum(values * weights[:, :, None], 0)
        maximum = new_maximum
    target = (kv_head.to(tl.int64) * GROUP + group)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(output + target, (accumulator / total[:, None]).to(output.dtype.element_ty), mask=there[:, None])
