"""Fused kernels for the work beside attention and large GEMMs: float32, float16, bfloat16.

The caller makes the tensors' device the current one: Triton launches on the current device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.nn import functional

from nanovllm.kernels import NO_FINITE_TOKEN, cuda_gemm, triton_fp8, triton_one_token
from nanovllm.kernels.triton_overlap import begin, overlap
from nanovllm.utils.fp8 import LARGEST, ScaledTokens, ScaledWeight

VOCAB_TILE = 4096
ELEMENT_TILE = 1024
VECTOR_TILE_ROWS = 4
MAX_TILE_TOKENS = 64
"""Attention reads keys and values in tiles of this many tokens, or of a fraction of them."""
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_E4M3 = tl.constexpr(LARGEST)


def linear(
    x: torch.Tensor | ScaledTokens,
    weight: torch.Tensor | ScaledWeight,
    bias: torch.Tensor | None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """x W^T + b of [T, in] and [out, in]: a GEMV kernel for one token, torch's GEMM for more. FP8 has its own kernels.

    cuBLAS takes 5 to 12 us for a single token where reading the weights takes 1 to 3. It always picks tiles for the
    whole GPU, so on an SM partition `cuda_gemm` serves many tokens.
    """
    if isinstance(weight, ScaledWeight):
        if isinstance(x, torch.Tensor) and triton_one_token.can_serve(*x.shape):
            return triton_one_token.linear(x, None, None, weight, bias, num_sms)[0]
        return triton_fp8.linear(x, weight, bias, num_sms)
    assert isinstance(x, torch.Tensor), "only layers with scaled weights take quantized tokens"
    if num_sms is not None and bias is None and cuda_gemm.can_serve(x, weight):
        return cuda_gemm.shared_linear(x, weight, num_sms)
    if x.shape[0] > 1:
        return functional.linear(x, weight, bias)
    return _vector_linear(x, None, None, weight, bias)[0]


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float],
    weight: torch.Tensor | ScaledWeight,
    bias: torch.Tensor | None,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear` of the RMSNorm of `x + residual`, and the sum."""
    if isinstance(weight, ScaledWeight):
        if triton_one_token.can_serve(*x.shape):
            return triton_one_token.linear(x, residual, norm, weight, bias, num_sms)
        return triton_fp8.norm_linear(x, residual, norm, weight, bias, num_sms)
    if x.shape[0] > 1:
        normed, total = add_rms_norm(x, residual, *norm)
        return linear(normed, weight, bias, num_sms), total
    return _vector_linear(x, residual, norm, weight, bias)


def norm_gated_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float],
    weight: torch.Tensor | ScaledWeight,
    bias: torch.Tensor | None,
    num_sms: int | None = None,
) -> tuple[torch.Tensor | ScaledTokens, torch.Tensor]:
    """silu(gate) * up of what `norm_linear` gives, gate first, and the sum."""
    if isinstance(weight, ScaledWeight):
        if triton_one_token.can_serve(*x.shape):
            return triton_one_token.linear(x, residual, norm, weight, bias, num_sms, is_gated=True)
        return triton_fp8.norm_gated_linear(x, residual, norm, weight, bias, num_sms)
    if num_sms is not None and bias is None and cuda_gemm.can_serve(x, weight):
        normed, total = add_rms_norm(x, residual, *norm)
        return cuda_gemm.shared_linear(normed, weight, num_sms, is_gated=True), total
    if x.shape[0] > 1:
        gate_up, total = norm_linear(x, residual, norm, weight, bias)
        return silu_and_mul(gate_up), total
    return _vector_linear(x, residual, norm, weight, bias, is_gated=True)


def _vector_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    is_gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything from the residual to the gate for a single token, in one kernel."""
    num_inputs = x.shape[1]
    num_outputs = weight.shape[0] // 2 if is_gated else weight.shape[0]
    output = x.new_empty(1, num_outputs)
    total = x if residual is None else torch.empty_like(x)
    norm_weight, eps = (x, 0.0) if norm is None else norm
    tile_rows = VECTOR_TILE_ROWS // 2 if is_gated else VECTOR_TILE_ROWS
    _vector_linear_kernel[(triton.cdiv(num_outputs, tile_rows),)](
        x,
        x if residual is None else residual,
        norm_weight,
        weight,
        weight if bias is None else bias,
        output,
        total,
        eps,
        num_inputs,
        num_outputs,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        IS_GATED=is_gated,
        TILE_N=tile_rows,
        TILE_K=ELEMENT_TILE,
        PADDED_INPUTS=triton.next_power_of_2(num_inputs),
        **overlap(x.device),
    )
    return output, total


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of `x + residual`, [T, size], and the sum."""
    num_tokens, size = x.shape
    output = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    _add_rms_norm_kernel[(num_tokens,)](
        x,
        x if residual is None else residual,
        weight,
        output,
        total,
        eps,
        size,
        HAS_RESIDUAL=residual is not None,
        PADDED_SIZE=triton.next_power_of_2(size),
        num_warps=4 if size <= 2048 else 8,
        **overlap(x.device),
    )
    return output, total


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [T, 2 * size], gate first."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(num_tokens, size)
    _silu_and_mul_kernel[(num_tokens, triton.cdiv(size, ELEMENT_TILE))](
        gate_up, output, size, TILE=ELEMENT_TILE, **overlap(gate_up.device)
    )
    return output


def norm_rotate_store(
    qkv: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norms and rotates query and key heads, or does one of the two or neither, stores keys and values in the pool,
    returns the query heads.

    Arguments that are None are left out at compile time: each choice is a kernel of its own. What follows a request's
    last value in its tile of the pool is set to 0, since the attention kernels read whole tiles.
    """
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    num_tokens = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    query = qkv.new_empty(num_tokens, num_heads, head_dim)
    _norm_rotate_store_kernel[(num_tokens,)](
        qkv,
        query,
        query_weight,
        key_weight,
        positions,
        cos,
        sin,
        kv_cache,
        slot_mapping,
        kv_scales,
        eps,
        kv_cache.stride(0),
        NUM_HEADS=num_heads,
        PADDED_HEADS=triton.next_power_of_2(num_heads),
        NUM_KV_HEADS=num_kv_heads,
        PADDED_KV_HEADS=triton.next_power_of_2(num_kv_heads),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        KV_TILE=math.gcd(block_size, MAX_TILE_TOKENS),
        **overlap(qkv.device),
    )
    return query


def sample_tokens(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    output_indices: torch.Tensor,
    first_token: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of [B, n]: the largest logit, or of logits / temperature + Gumbel noise; and that score.

    The random numbers are those of `nanovllm.kernels.torch_reference.gumbel_noise`.
    """
    num_rows, num_tokens = logits.shape
    num_tiles = triton.cdiv(num_tokens, VOCAB_TILE)
    best = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    places = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=logits.device)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    scores = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _best_of_tile_kernel[(num_rows, num_tiles)](
        logits,
        temperatures,
        seeds,
        output_indices,
        best,
        places,
        num_tokens,
        first_token,
        TILE=VOCAB_TILE,
        IS_CUDA=logits.is_cuda,
        **overlap(logits.device),
    )
    padded = triton.next_power_of_2(num_tiles)
    _best_of_tiles_kernel[(num_rows,)](
        best,
        places,
        token_ids,
        scores,
        num_tiles,
        NO_TOKEN=NO_FINITE_TOKEN,
        PADDED_TILES=padded,
        num_warps=1,
        **overlap(logits.device),
    )
    return token_ids, scores


@triton.jit
def _load_rows(weight, outputs, inputs, num_outputs, num_inputs):
    offsets = outputs.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    there = (outputs < num_outputs)[:, None] & (inputs < num_inputs)[None, :]
    return tl.load(weight + offsets, mask=there, other=0.0)


@triton.jit
def _vector_linear_kernel(
    x,
    residual,
    norm_weight,
    weight,
    bias,
    output,
    total,
    eps,
    num_inputs,
    num_outputs,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PADDED_INPUTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program computes TILE_N outputs of one token; products are summed up once, at the end.

    The weights do not depend on the kernel before this one: the first of them are loaded before it has ended. The
    norm is computed by every program anew, from the cache.
    """
    outputs = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    columns = tl.arange(0, TILE_K)
    up = weight + num_outputs.to(tl.int64) * num_inputs
    tile = _load_rows(weight, outputs, columns, num_outputs, num_inputs)
    if IS_GATED:
        up_tile = _load_rows(up, outputs, columns, num_outputs, num_inputs)
    begin(OVERLAPS)

    scale = 1.0
    if HAS_NORM:
        places = tl.arange(0, PADDED_INPUTS)
        is_place = places < num_inputs
        whole = tl.load(x + places, mask=is_place, other=0.0)
        if HAS_RESIDUAL:
            whole += tl.load(residual + places, mask=is_place, other=0.0)
            if tl.program_id(0) == 0:
                tl.store(total + places, whole, mask=is_place)
        squares = whole.to(tl.float32) * whole.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, 0) / num_inputs + eps)

    products = tl.zeros([TILE_N, TILE_K], tl.float32)
    up_products = tl.zeros([TILE_N, TILE_K], tl.float32)
    for start in range(0, num_inputs, TILE_K):
        inputs = start + columns
        is_input = inputs < num_inputs
        values = tl.load(x + inputs, mask=is_input, other=0.0)
        if HAS_RESIDUAL:
            values += tl.load(residual + inputs, mask=is_input, other=0.0)
        if HAS_NORM:
            weights = tl.load(norm_weight + inputs, mask=is_input, other=0.0)
            values = (values.to(tl.float32) * scale).to(values.dtype) * weights
        wide = values.to(tl.float32)[None, :]
        products += wide * tile.to(tl.float32)
        # The next tile's weights, or nothing after the last.
        tile = _load_rows(weight, outputs, inputs + TILE_K, num_outputs, num_inputs)
        if IS_GATED:
            up_products += wide * up_tile.to(tl.float32)
            up_tile = _load_rows(up, outputs, inputs + TILE_K, num_outputs, num_inputs)
    result = tl.sum(products, 1)
    there = outputs < num_outputs
    if HAS_BIAS:
        result += tl.load(bias + outputs, mask=there, other=0.0).to(tl.float32)
    if IS_GATED:
        # Rounded where kernels of their own would round.
        gate = result.to(output.dtype.element_ty).to(tl.float32)
        activated = (gate / (1.0 + tl.exp(-gate))).to(output.dtype.element_ty)
        target = output + outputs
        gated = tl.sum(up_products, 1)
        if HAS_BIAS:
            gated += tl.load(bias + num_outputs + outputs, mask=there, other=0.0).to(tl.float32)
        tl.store(target, activated * gated.to(output.dtype.element_ty), mask=there)
    else:
        tl.store(output + outputs, result.to(output.dtype.element_ty), mask=there)


@triton.jit
def _add_rms_norm_kernel(
    x,
    residual,
    weight,
    output,
    total,
    eps,
    size,
    HAS_RESIDUAL: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program for one token."""
    begin(OVERLAPS)
    start = tl.program_id(0).to(tl.int64) * size
    places = tl.arange(0, PADDED_SIZE)
    there = places < size
    values = tl.load(x + start + places, mask=there, other=0.0)
    if HAS_RESIDUAL:
        values += tl.load(residual + start + places, mask=there, other=0.0)
        tl.store(total + start + places, values, mask=there)
    wide = values.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    scaled = wide.to(values.dtype) * tl.load(weight + places, mask=there, other=0.0)
    tl.store(output + start + places, scaled, mask=there)


@triton.jit
def _silu_and_mul_kernel(gate_up, output, size, TILE: tl.constexpr, OVERLAPS: tl.constexpr):
    begin(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = places < size
    gate = tl.load(gate_up + token * 2 * size + places, mask=there, other=0.0)
    up = tl.load(gate_up + token * 2 * size + size + places, mask=there, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(output + token * size + places, activated * up, mask=there)


@triton.jit
def _norm_rotate(first, second, weight, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """Both halves of [heads, HEAD_DIM], normed if there is a weight, rotated if there are angles, in their own type."""
    if weight is not None:
        half = tl.arange(0, HEAD_DIM // 2)[None, :]
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        squares = tl.sum(wide_first * wide_first, 1) + tl.sum(wide_second * wide_second, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first = (wide_first * scale).to(first.dtype) * tl.load(weight + half)
        second = (wide_second * scale).to(second.dtype) * tl.load(weight + HEAD_DIM // 2 + half)
    if cos is not None:
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        rotated_first = wide_first * cos - wide_second * sin
        rotated_second = wide_second * cos + wide_first * sin
        first, second = rotated_first.to(first.dtype), rotated_second.to(second.dtype)
    return first, second


@triton.jit
def _to_e4m3(x, scales):
    """x / scales as e4m3: what is too large becomes the largest number, what is not finite NaN."""
    wide = x.to(tl.float32)
    quotients = tl.clamp(tl.div_rn(wide, tl.broadcast_to(scales, wide.shape)), -LARGEST_E4M3, LARGEST_E4M3)
    return tl.where(tl.abs(wide) < float("inf"), quotients, float("nan")).to(tl.float8e4nv)


@triton.jit
def _norm_rotate_store_kernel(
    qkv,
    query,
    query_weight,
    key_weight,
    positions,
    cos,
    sin,
    kv_cache,
    slot_mapping,
    kv_scales,
    eps,
    block_stride,
    NUM_HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PADDED_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program for all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HEAD_DIM // 2)[None, :]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    heads = tl.arange(0, PADDED_HEADS)[:, None]
    there = heads < NUM_HEADS
    kv_heads = tl.arange(0, PADDED_KV_HEADS)[:, None]
    kv_there = kv_heads < NUM_KV_HEADS
    position = tl.load(positions + token)
    slot = tl.load(slot_mapping + token)
    previous = tl.load(slot_mapping + token - 1, mask=token > 0, other=-1)
    following = tl.load(slot_mapping + token + 1, mask=token + 1 < tl.num_programs(0), other=-1)
    cos_row, sin_row = None, None
    if cos is not None:
        cos_row = tl.load(cos + position * (HEAD_DIM // 2) + half)
        sin_row = tl.load(sin + position * (HEAD_DIM // 2) + half)
    if kv_scales is not None:
        key_scales = tl.load(kv_scales + kv_heads, mask=kv_there, other=1.0)
        value_scales = tl.load(kv_scales + NUM_KV_HEADS + kv_heads, mask=kv_there, other=1.0)
    begin(OVERLAPS)

    # All loads before all stores: what waits for memory waits once.
    row = qkv + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    queries = row + heads * HEAD_DIM + half
    keys = row + (NUM_HEADS + kv_heads) * HEAD_DIM
    query_first = tl.load(queries, mask=there, other=0.0)
    query_second = tl.load(queries + HEAD_DIM // 2, mask=there, other=0.0)
    key_first = tl.load(keys + half, mask=kv_there, other=0.0)
    key_second = tl.load(keys + HEAD_DIM // 2 + half, mask=kv_there, other=0.0)
    values = tl.load(keys + NUM_KV_HEADS * HEAD_DIM + dims, mask=kv_there, other=0.0)

    first, second = _norm_rotate(query_first, query_second, query_weight, cos_row, sin_row, eps, HEAD_DIM)
    target = query + (token * NUM_HEADS + heads) * HEAD_DIM
    tl.store(target + half, first, mask=there)
    tl.store(target + HEAD_DIM // 2 + half, second, mask=there)
    first, second = _norm_rotate(key_first, key_second, key_weight, cos_row, sin_row, eps, HEAD_DIM)
    if kv_scales is not None:
        first, second = _to_e4m3(first, key_scales), _to_e4m3(second, key_scales)
        values = _to_e4m3(values, value_scales)
    place = kv_cache + (slot // BLOCK_SIZE) * block_stride + (kv_heads * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
    tl.store(place + half, first, mask=kv_there)
    tl.store(place + HEAD_DIM // 2 + half, second, mask=kv_there)
    place += NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    tl.store(place + dims, values, mask=kv_there)

    # The values that follow in the tile are zero until there are tokens: attention reads whole tiles. The last token of
    # a request clears them, unless an earlier step has reached the tile and done so.
    if (following != slot + 1) & ((slot % KV_TILE == 0) | (previous == slot - 1)):
        nothing = tl.zeros([PADDED_KV_HEADS, HEAD_DIM], tl.float32).to(kv_cache.dtype.element_ty)
        for ahead in range(1, KV_TILE - (slot % KV_TILE).to(tl.int32)):
            tl.store(place + ahead * HEAD_DIM + dims, nothing, mask=kv_there)


@triton.jit
def _mix(x):
    """The hash of `nanovllm.kernels.torch_reference`, on unsigned 32-bit integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _log2(x, IS_CUDA: tl.constexpr):
    """The GPU's own approximate logarithm, one instruction; Triton's takes twenty."""
    if IS_CUDA:
        x = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        x = tl.log2(x)
    return x


@triton.jit
def _best_of_tile_kernel(
    logits,
    temperatures,
    seeds,
    output_indices,
    best,
    places,
    num_tokens,
    first_token,
    TILE: tl.constexpr,
    IS_CUDA: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    row = tl.program_id(0)
    tile = tl.program_id(1)
    tokens = tile * TILE + tl.arange(0, TILE)
    there = tokens < num_tokens
    scores = tl.load(logits + row.to(tl.int64) * num_tokens + tokens, mask=there, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    if temperature != 0.0:
        seed = tl.load(seeds + row)
        key = _mix(seed.to(tl.uint32) ^ 0x9E3779B9)
        key = _mix(key ^ (seed >> 32).to(tl.uint32))
        key = _mix(key + tl.load(output_indices + row).to(tl.uint32))
        bits = _mix(_mix(((first_token + tokens).to(tl.uint32) * 0x9E3779B1) ^ key) ^ _mix(key ^ 0x85EBCA6B))
        uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
        # -log(1 - u): of small u by its series, as 1 - u rounds; those are the ones that win.
        series = uniform * (1.0 + uniform * (0.5 + uniform * (0.33333333 + uniform * 0.25)))
        exponential = tl.where(uniform < 0.015625, series, _log2(1.0 - uniform, IS_CUDA) * -LN_2)
        scores = scores * (1.0 / temperature) - _log2(exponential, IS_CUDA) * LN_2
    # A NaN would make the place anything, one beyond the vocabulary included; as infinity it shows in the score.
    scores = tl.where(scores == scores, scores, float("inf"))
    num_tiles = tl.num_programs(1)
    score, place = tl.max(scores, 0, return_indices=True)
    tl.store(best + row * num_tiles + tile, score)
    tl.store(places + row * num_tiles + tile, first_token + tile * TILE + place)


@triton.jit
def _best_of_tiles_kernel(
    best,
    places,
    token_ids,
    scores,
    num_tiles,
    NO_TOKEN: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    row = tl.program_id(0)
    tiles = tl.arange(0, PADDED_TILES)
    of_tiles = tl.load(best + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    score, tile = tl.max(of_tiles, 0, return_indices=True)
    token = tl.load(places + row * num_tiles + tile).to(tl.int64)
    is_finite = tl.abs(score) < float("inf")
    tl.store(token_ids + row, tl.where(is_finite, token, NO_TOKEN))
    tl.store(scores + row, score)
