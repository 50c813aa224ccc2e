"""One token: linear layers with FP8 weights, and experts, with all that lies between the GEMVs inside them.

At a single token a kernel takes longer to start, wait and end than to norm or quantize an input. So each program does
that for itself, while the first of its weights are on their way, and few programs do it: as many as run at once, each
of which computes one tile of outputs after another. The experts are three kernels: the router's outputs; gate and up,
whose programs choose the experts from these; down, with the weighted sum.

Results are those of the kernels for many tokens but for the order of sums. The caller makes the tensors' device the
current one: Triton launches on the current device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.kernels import AttentionMetadata, ExpertWeights
from nanovllm.kernels.triton_fp8 import LINE, fetch, num_sms_of, quantized_groups
from nanovllm.kernels.triton_overlap import begin, overlap
from nanovllm.utils.fp8 import SCALE_OF_ONE, SMALLEST_SCALE, ScaledWeight, parts_of

MAX_INPUTS = 16384
"""Inputs, each token's filled up to a power of two, that the registers of a program hold."""
MAX_EXPERTS = 256
TILE_BYTES = 16384
"""Weights of a tile: so many that a program has enough in flight, so few that all SMs get about equally many."""
MOST_ROWS = 16
STAGES = 3
WARPS_PER_SM = 16
"""Warps of all programs on an SM at once: few enough that some of the next kernel's programs can load their first
weights before this one ends."""
LARGEST_FINITE = tl.constexpr(3e38)
LEAST_KEY = tl.constexpr(-(2**31))


def can_serve(num_tokens: int, num_inputs: int) -> bool:
    """Whether `linear` takes so many tokens and inputs: a single token."""
    return num_tokens == 1 and triton.next_power_of_2(num_inputs) <= MAX_INPUTS


def can_serve_experts(num_tokens: int, experts: ExpertWeights) -> bool:
    """Whether `norm_experts` takes so many tokens of these experts: a single token."""
    assignments = triton.next_power_of_2(experts.top_k) * triton.next_power_of_2(_size_of(experts.down)[1])
    return (
        can_serve(num_tokens, _size_of(experts.gate_up)[1])
        and assignments <= MAX_INPUTS
        and experts.num_experts <= MAX_EXPERTS
    )


def linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None,
    weight: ScaledWeight,
    bias: torch.Tensor | None,
    num_sms: int | None = None,
    *,
    is_gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T + b of one token, [1, in], or of the RMSNorm of `x + residual` if there is a norm; and that sum.

    `is_gated`: silu(gate) * up of the result, whose first half is gate.
    """
    output = x.new_empty(1, len(weight.values) // (2 if is_gated else 1))
    total = _launch(x, residual, norm, weight, bias, None, output, num_sms, is_gated=is_gated)
    return output, total


def norm_experts(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float],
    experts: ExpertWeights,
    metadata: AttentionMetadata | None = None,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of the RMSNorm of `x + residual`, one token, and the sum; [1, hidden_size] each."""
    logits, total = _route(x, residual, norm, experts)
    between = _size_of(experts.down)[1]
    gated = x.new_empty(experts.top_k, between)
    _launch(total, None, norm, experts.gate_up, None, (logits, experts), gated, num_sms, is_gated=True)
    return _sum_of_experts(gated, logits, experts, metadata, num_sms), total


def _size_of(weight: torch.Tensor | ScaledWeight) -> tuple[int, int]:
    rows, columns = parts_of(weight)[0].shape
    return rows, columns


def _rows_of_tile(row_bytes: int, num_parts: int) -> int:
    """Outputs of a tile, of each part of it, a power of two."""
    return min(max(TILE_BYTES // (num_parts * triton.next_power_of_2(row_bytes)), 1), MOST_ROWS)


def _num_warps(padded_inputs: int) -> int:
    return 4 if padded_inputs <= 4096 else 8


def _route(
    x: torch.Tensor, residual: torch.Tensor | None, norm: tuple[torch.Tensor, float], experts: ExpertWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """[E] float32 outputs of the router for the norm of `x + residual`, and the sum."""
    num_inputs = x.shape[1]
    logits = torch.empty(experts.num_experts, dtype=torch.float32, device=x.device)
    total = x if residual is None else torch.empty_like(x)
    padded_inputs = triton.next_power_of_2(num_inputs)
    _router_kernel[(experts.num_experts,)](
        x,
        x if residual is None else residual,
        norm[0],
        experts.router,
        logits,
        total,
        norm[1],
        num_inputs,
        HAS_RESIDUAL=residual is not None,
        PADDED_INPUTS=padded_inputs,
        num_warps=_num_warps(padded_inputs),
        **overlap(x.device),
    )
    return logits, total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None,
    weight: torch.Tensor | ScaledWeight,
    bias: torch.Tensor | None,
    routed: tuple[torch.Tensor, ExpertWeights] | None,
    output: torch.Tensor,
    num_sms: int | None,
    *,
    is_gated: bool,
) -> torch.Tensor:
    """Writes a linear layer's outputs, or those of each of a token's experts; returns `x + residual`."""
    values, scales, block = parts_of(weight)
    num_inputs = x.shape[1]
    padded_inputs = max(triton.next_power_of_2(num_inputs), block or 1)
    logits, top_k, num_experts = (None, 1, 1) if routed is None else (routed[0], len(output), routed[1].num_experts)
    num_outputs = output.shape[1]
    total = x if residual is None else torch.empty_like(x)
    tile_n = _rows_of_tile(num_inputs * values.itemsize, 2 if is_gated else 1)
    num_warps = _num_warps(padded_inputs)
    at_once = WARPS_PER_SM // num_warps * (num_sms or num_sms_of(x.device))
    programs = min(max(at_once // top_k, 1), triton.cdiv(num_outputs, tile_n))
    norm_weight, eps = (None, 0.0) if norm is None else norm
    _vector_kernel[(programs, top_k)](
        x,
        residual,
        norm_weight,
        values,
        scales,
        bias,
        logits,
        output,
        total,
        eps,
        num_inputs,
        num_outputs,
        IS_GATED=is_gated,
        NUM_EXPERTS=num_experts,
        PADDED_EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK=block,
        GROUP=padded_inputs if block is None else block,
        TILE_N=tile_n,
        PADDED_INPUTS=padded_inputs,
        TILE_LINES=triton.next_power_of_2(triton.cdiv(tile_n * num_inputs * values.itemsize, LINE.value)),
        STAGES=STAGES,
        SCALE_OF_ONE=SCALE_OF_ONE,
        MIN_SCALE=SMALLEST_SCALE,
        NUM_WARPS=num_warps,
        num_warps=num_warps,
        **overlap(x.device),
    )
    return total


def _sum_of_experts(
    gated: torch.Tensor,
    logits: torch.Tensor,
    experts: ExpertWeights,
    metadata: AttentionMetadata | None,
    num_sms: int | None,
) -> torch.Tensor:
    """[1, hidden_size]: down of the token's experts, [top_k, size], weighted and summed up; 0 for padding."""
    values, scales, block = parts_of(experts.down)
    top_k, num_inputs = gated.shape
    num_outputs = len(values) // experts.num_experts
    output = gated.new_empty(1, num_outputs)
    padded_inputs = max(triton.next_power_of_2(num_inputs), block or 1)
    padded_top_k = triton.next_power_of_2(top_k)
    tile_n = _rows_of_tile(num_inputs * top_k * values.itemsize, 1)
    num_warps = _num_warps(padded_top_k * padded_inputs)
    at_once = WARPS_PER_SM // num_warps * (num_sms or num_sms_of(gated.device))
    programs = min(at_once, triton.cdiv(num_outputs, tile_n))
    has_padding = metadata is not None and metadata.padding_slot is not None
    _sum_of_experts_kernel[(programs,)](
        gated,
        logits,
        metadata.slot_mapping if metadata is not None and has_padding else None,
        values,
        scales,
        output,
        num_inputs,
        num_outputs,
        metadata.padding_slot if metadata is not None and has_padding else 0,
        NUM_EXPERTS=experts.num_experts,
        PADDED_EXPERTS=triton.next_power_of_2(experts.num_experts),
        TOP_K=top_k,
        PADDED_TOP_K=padded_top_k,
        RENORMALIZES=experts.renormalizes,
        BLOCK=block,
        GROUP=padded_inputs if block is None else block,
        TILE_N=tile_n,
        PADDED_INPUTS=padded_inputs,
        ROW_LINES=triton.cdiv(padded_inputs * values.itemsize, LINE.value),
        STAGES=STAGES,
        SCALE_OF_ONE=SCALE_OF_ONE,
        MIN_SCALE=SMALLEST_SCALE,
        NUM_WARPS=num_warps,
        num_warps=num_warps,
        **overlap(gated.device),
    )
    return output


@triton.jit
def _normed(row, norm_weights, eps, size):
    wide = row.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    return wide.to(row.dtype) * norm_weights


@triton.jit
def _router_kernel(
    x,
    residual,
    norm_weight,
    router,
    logits,
    total,
    eps,
    num_inputs,
    HAS_RESIDUAL: tl.constexpr,
    PADDED_INPUTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program for one expert, whose weights are loaded before the kernel ahead of this one has ended."""
    expert = tl.program_id(0)
    inputs = tl.arange(0, PADDED_INPUTS)
    there = inputs < num_inputs
    weights = tl.load(router + expert * num_inputs + inputs, mask=there, other=0.0)
    norm_weights = tl.load(norm_weight + inputs, mask=there, other=0.0)
    begin(OVERLAPS)
    row = tl.load(x + inputs, mask=there, other=0.0)
    if HAS_RESIDUAL:
        row += tl.load(residual + inputs, mask=there, other=0.0)
        if expert == 0:
            tl.store(total + inputs, row, mask=there)
    row = _normed(row, norm_weights, eps, num_inputs)
    tl.store(logits + expert, tl.sum(row.to(tl.float32) * weights.to(tl.float32), 0))


@triton.jit
def _load_logits(logits, NUM_EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, NUM_WARPS: tl.constexpr):
    """The router's outputs, once for each warp, so that none waits for others: as they are, and as integers.

    The integers are in the order of the outputs; what is not finite is among them, so that no expert is chosen twice.
    """
    experts = tl.arange(0, PADDED_EXPERTS)[None, :]
    there = (tl.arange(0, NUM_WARPS)[:, None] >= 0) & (experts < NUM_EXPERTS)
    found = tl.load(logits + tl.zeros([NUM_WARPS, 1], tl.int32) + experts, mask=there, other=float("-inf"))
    finite = tl.where(found == found, tl.clamp(found, -LARGEST_FINITE, LARGEST_FINITE), -LARGEST_FINITE)
    bits = (finite + 0.0).to(tl.int32, bitcast=True)  # -0.0 is 0.0 then
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return found, tl.where(there, keys, LEAST_KEY)


@triton.jit
def _choose(keys, PADDED_EXPERTS: tl.constexpr):
    """The first expert with the largest key, for each warp, and the keys without it. Integers: a warp has an
    instruction for their maximum."""
    experts = tl.arange(0, PADDED_EXPERTS)[None, :]
    expert = tl.min(tl.where(keys == tl.max(keys, 1)[:, None], experts, PADDED_EXPERTS), 1)
    return expert, tl.where(experts == expert[:, None], LEAST_KEY, keys)


@triton.jit
def _as_quantized(x, GROUP: tl.constexpr, BLOCK: tl.constexpr, SCALE_OF_ONE: tl.constexpr, MIN_SCALE: tl.constexpr):
    """Inputs as FP8 holds them, in float32, and the scale of each group; of blocks, times their scales already."""
    groups = tl.reshape(x, [x.numel // GROUP, GROUP])
    values, scales = quantized_groups(groups, SCALE_OF_ONE, MIN_SCALE)
    wide = values.to(tl.float32)
    if BLOCK is not None:
        wide *= scales[:, None]
    return tl.reshape(wide, x.shape), scales


@triton.jit
def _fetch_rows(weight, tile, num_outputs, num_inputs, TILE_N: tl.constexpr, TILE_LINES: tl.constexpr):
    """Has a tile of whole rows, which is contiguous, read into the L2 cache."""
    width: tl.constexpr = LINE // (weight.dtype.element_ty.primitive_bitwidth // 8)
    lines = (tile * TILE_N).to(tl.int64) * num_inputs + tl.arange(0, TILE_LINES) * width
    end = tl.minimum((tile + 1) * TILE_N, num_outputs).to(tl.int64) * num_inputs
    fetch(weight + lines, lines < end)


@triton.jit
def _load_rows(weight, tile, num_outputs, num_inputs, TILE_N: tl.constexpr, PADDED_INPUTS: tl.constexpr):
    """A tile of rows; 0 beyond the last row or input."""
    rows, inputs = tile * TILE_N + tl.arange(0, TILE_N), tl.arange(0, PADDED_INPUTS)
    there = (rows < num_outputs)[:, None] & (inputs < num_inputs)[None, :]
    return tl.load(weight + rows.to(tl.int64)[:, None] * num_inputs + inputs[None, :], mask=there, other=0.0)


@triton.jit
def _load_scales(
    w_scales, tile, num_outputs, num_inputs, BLOCK: tl.constexpr, TILE_N: tl.constexpr, PADDED_INPUTS: tl.constexpr
):
    """The scales of a tile of rows, [TILE_N], or of its blocks, [PADDED_INPUTS / BLOCK]; or 1."""
    if w_scales is None:
        scales = tl.full([TILE_N], 1.0, tl.float32)
    elif BLOCK is None:
        rows = tile * TILE_N + tl.arange(0, TILE_N)
        scales = tl.load(w_scales + rows, mask=rows < num_outputs, other=0.0)
    else:
        num_blocks, blocks = tl.cdiv(num_inputs, BLOCK), tl.arange(0, PADDED_INPUTS // BLOCK)
        there = (blocks < num_blocks) & (tile * TILE_N < num_outputs)
        scales = tl.load(w_scales + tile * TILE_N // BLOCK * num_blocks + blocks, mask=there, other=0.0)
    return scales


@triton.jit
def _products(weights, values, scales, x_scale, BLOCK: tl.constexpr):
    """[N, K] and [K] -> [N], the sums of products, in float32, with the scales of rows and x, or of blocks."""
    products = weights.to(tl.float32) * values[None, :]
    if BLOCK is None:
        sums = tl.sum(products, 1) * (scales * x_scale)
    else:
        blocks = tl.reshape(products, [products.shape[0], products.shape[1] // BLOCK, BLOCK])
        sums = tl.sum(tl.sum(blocks, 2) * scales[None, :], 1)
    return sums


@triton.jit
def _store_outputs(
    output,
    tile,
    weights,
    scales,
    up_weights,
    up_scales,
    values,
    x_scale,
    bias,
    num_outputs,
    IS_GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Stores the outputs of a tile of rows. Rounds where kernels of their own would round."""
    dtype = output.dtype.element_ty
    rows = tile * TILE_N + tl.arange(0, TILE_N)
    there = rows < num_outputs
    result = _products(weights, values, scales, x_scale, BLOCK)
    if bias is not None:
        result += tl.load(bias + rows, mask=there, other=0.0).to(tl.float32)
    stored = result.to(dtype)
    if IS_GATED:
        up = _products(up_weights, values, up_scales, x_scale, BLOCK)
        if bias is not None:
            up += tl.load(bias + num_outputs + rows, mask=there, other=0.0).to(tl.float32)
        gate = stored.to(tl.float32)
        stored = (gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)
    tl.store(output + rows, stored, mask=there)


@triton.jit
def _vector_kernel(
    x,
    residual,
    norm_weight,
    weight,
    w_scales,
    bias,
    logits,
    output,
    total,
    eps,
    num_inputs,
    num_outputs,
    IS_GATED: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_LINES: tl.constexpr,
    PADDED_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALE_OF_ONE: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program computes every `programs`-th tile of outputs, from its own number on: of a layer, or of one of
    the token's experts.

    With logits there is a row of programs for each expert that is chosen. Without them the weights do not depend on the
    kernel ahead of this one: the first tile is loaded, and the second fetched, before that has ended.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    inputs = tl.arange(0, PADDED_INPUTS)
    there = inputs < num_inputs
    up = weight + num_outputs.to(tl.int64) * num_inputs
    up_scales = w_scales
    if w_scales is not None:
        up_scales += num_outputs if BLOCK is None else tl.cdiv(num_outputs, BLOCK) * tl.cdiv(num_inputs, BLOCK)
    if norm_weight is not None:
        norm_weights = tl.load(norm_weight + inputs, mask=there, other=0.0)
    if logits is not None:
        begin(OVERLAPS)
        _, keys = _load_logits(logits, NUM_EXPERTS, PADDED_EXPERTS, NUM_WARPS)
        of_warps, keys = _choose(keys, PADDED_EXPERTS)
        for _ in range(tl.program_id(1)):
            of_warps, keys = _choose(keys, PADDED_EXPERTS)
        expert = tl.max(of_warps, 0)
        parts: tl.constexpr = 2 if IS_GATED else 1
        weight += expert.to(tl.int64) * parts * num_outputs * num_inputs
        up += expert.to(tl.int64) * parts * num_outputs * num_inputs
        if w_scales is not None:
            num_scales = num_outputs if BLOCK is None else tl.cdiv(num_outputs, BLOCK) * tl.cdiv(num_inputs, BLOCK)
            w_scales += expert * parts * num_scales
            up_scales += expert * parts * num_scales
        output += tl.program_id(1) * num_outputs

    w = _load_rows(weight, program, num_outputs, num_inputs, TILE_N, PADDED_INPUTS)
    scales = _load_scales(w_scales, program, num_outputs, num_inputs, BLOCK, TILE_N, PADDED_INPUTS)
    up_w, of_up = w, scales
    if IS_GATED:
        up_w = _load_rows(up, program, num_outputs, num_inputs, TILE_N, PADDED_INPUTS)
        of_up = _load_scales(up_scales, program, num_outputs, num_inputs, BLOCK, TILE_N, PADDED_INPUTS)
    if OVERLAPS:
        _fetch_rows(weight, program + programs, num_outputs, num_inputs, TILE_N, TILE_LINES)
        if IS_GATED:
            _fetch_rows(up, program + programs, num_outputs, num_inputs, TILE_N, TILE_LINES)
    if logits is None:
        begin(OVERLAPS)

    row = tl.load(x + inputs, mask=there, other=0.0)
    if residual is not None:
        row += tl.load(residual + inputs, mask=there, other=0.0)
        if program == 0:
            tl.store(total + inputs, row, mask=there)
    if norm_weight is not None:
        row = _normed(row, norm_weights, eps, num_inputs)
    values, x_scale = row.to(tl.float32), 1.0
    if w_scales is not None:
        values, x_scales = _as_quantized(values, GROUP, BLOCK, SCALE_OF_ONE, MIN_SCALE)
        if BLOCK is None:
            x_scale = tl.max(x_scales, 0)  # there is one

    _store_outputs(output, program, w, scales, up_w, of_up, values, x_scale, bias, num_outputs, IS_GATED, BLOCK, TILE_N)
    first = program + programs
    scales = _load_scales(w_scales, first, num_outputs, num_inputs, BLOCK, TILE_N, PADDED_INPUTS)
    of_up = scales
    if IS_GATED:
        of_up = _load_scales(up_scales, first, num_outputs, num_inputs, BLOCK, TILE_N, PADDED_INPUTS)
    for tile in tl.range(first, tl.cdiv(num_outputs, TILE_N), programs, num_stages=STAGES):
        w = _load_rows(weight, tile, num_outputs, num_inputs, TILE_N, PADDED_INPUTS)
        # Scales that a tile would wait for are loaded a tile ahead.
        following = tile + programs
        next_scales = _load_scales(w_scales, following, num_outputs, num_inputs, BLOCK, TILE_N, PADDED_INPUTS)
        up_w, next_of_up = w, next_scales
        if IS_GATED:
            up_w = _load_rows(up, tile, num_outputs, num_inputs, TILE_N, PADDED_INPUTS)
            next_of_up = _load_scales(up_scales, following, num_outputs, num_inputs, BLOCK, TILE_N, PADDED_INPUTS)
        _store_outputs(
            output, tile, w, scales, up_w, of_up, values, x_scale, bias, num_outputs, IS_GATED, BLOCK, TILE_N
        )
        scales, of_up = next_scales, next_of_up


@triton.jit
def _load_rows_of_experts(
    weight, first_rows, tile, num_outputs, num_inputs, TOP_K: tl.constexpr, TILE_N: tl.constexpr, PADDED: tl.constexpr
):
    """The same rows of each expert whose first row is given: [TILE_N, experts, PADDED]."""
    rows, inputs = tile * TILE_N + tl.arange(0, TILE_N), tl.arange(0, PADDED)
    places = (first_rows[None, :] + rows[:, None])[:, :, None] * num_inputs + inputs[None, None, :]
    is_place = tl.arange(0, first_rows.shape[0]) < TOP_K
    there = ((rows < num_outputs)[:, None] & is_place[None, :])[:, :, None] & (inputs < num_inputs)[None, None, :]
    return tl.load(weight + places, mask=there, other=0.0)


@triton.jit
def _load_scales_of_experts(
    w_scales,
    chosen,
    tile,
    num_outputs,
    num_inputs,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The scales of these rows, [TILE_N, experts], or of their blocks, [experts, PADDED / BLOCK]; or 1."""
    rows = tile * TILE_N + tl.arange(0, TILE_N)
    if w_scales is None:
        scales = tl.full([TILE_N, chosen.shape[0]], 1.0, tl.float32)
    elif BLOCK is None:
        there = (rows < num_outputs)[:, None] & (chosen >= 0)[None, :]
        scales = tl.load(w_scales + (chosen * num_outputs)[None, :] + rows[:, None], mask=there, other=0.0)
    else:
        num_blocks, blocks = tl.cdiv(num_inputs, BLOCK), tl.arange(0, PADDED // BLOCK)
        block_rows = chosen * tl.cdiv(num_outputs, BLOCK) + tile * TILE_N // BLOCK
        there = (blocks < num_blocks)[None, :] & ((chosen >= 0) & (tile * TILE_N < num_outputs))[:, None]
        scales = tl.load(w_scales + block_rows[:, None] * num_blocks + blocks[None, :], mask=there, other=0.0)
    return scales


@triton.jit
def _store_sums(
    output,
    tile,
    w,
    scales,
    values,
    x_scales,
    weights,
    is_padding,
    num_outputs,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Stores the weighted sums over the experts of a tile of rows, each expert's rounded as if it were stored."""
    dtype = output.dtype.element_ty
    rows = tile * TILE_N + tl.arange(0, TILE_N)
    products = w.to(tl.float32) * values[None, :, :]
    if BLOCK is None:
        results = tl.sum(products, 2) * (scales * x_scales[None, :])
    else:
        num_blocks: tl.constexpr = products.shape[2] // BLOCK
        products = tl.reshape(products, [products.shape[0], products.shape[1], num_blocks, BLOCK])
        results = tl.sum(tl.sum(products, 3) * scales[None, :, :], 2)
    summed = tl.sum(weights[None, :] * results.to(dtype).to(tl.float32), 1)
    tl.store(output + rows, tl.where(is_padding, 0.0, summed).to(dtype), mask=rows < num_outputs)


@triton.jit(do_not_specialize=["padding_slot"])
def _sum_of_experts_kernel(
    x,
    logits,
    slots,
    weight,
    w_scales,
    output,
    num_inputs,
    num_outputs,
    padding_slot,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_N: tl.constexpr,
    PADDED_INPUTS: tl.constexpr,
    ROW_LINES: tl.constexpr,
    STAGES: tl.constexpr,
    SCALE_OF_ONE: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program computes every `programs`-th tile of outputs, from its own number on, each of all chosen experts.

    The router's kernel is the second one ahead, so it has ended: the experts are chosen, and the first of their weights
    loaded, before the kernel ahead of this one has ended.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    inputs, places = tl.arange(0, PADDED_INPUTS), tl.arange(0, PADDED_TOP_K)
    found, keys = _load_logits(logits, NUM_EXPERTS, PADDED_EXPERTS, NUM_WARPS)
    largest = tl.max(found, 1)
    total = tl.sum(tl.exp(found - largest[:, None]), 1)
    chosen_of_warps = tl.full([NUM_WARPS, PADDED_TOP_K], -1, tl.int32)
    for place in tl.static_range(TOP_K):
        expert, keys = _choose(keys, PADDED_EXPERTS)
        chosen_of_warps = tl.where((places == place)[None, :], expert[:, None], chosen_of_warps)
    chosen = tl.max(chosen_of_warps, 0)
    weights = tl.exp(tl.load(logits + chosen, mask=chosen >= 0, other=float("-inf")) - tl.max(largest, 0))
    weights /= tl.max(total, 0)
    if RENORMALIZES:
        weights /= tl.sum(weights, 0)
    is_padding = False
    if slots is not None:
        is_padding = tl.load(slots) >= padding_slot
    first_rows = chosen.to(tl.int64) * num_outputs
    w = _load_rows_of_experts(weight, first_rows, program, num_outputs, num_inputs, TOP_K, TILE_N, PADDED_INPUTS)
    scales = _load_scales_of_experts(w_scales, chosen, program, num_outputs, num_inputs, BLOCK, TILE_N, PADDED_INPUTS)
    if OVERLAPS:
        width: tl.constexpr = LINE // (weight.dtype.element_ty.primitive_bitwidth // 8)
        lines = tl.arange(0, ROW_LINES) * width
        rows = (program + programs) * TILE_N + tl.arange(0, TILE_N)
        there = ((rows < num_outputs)[:, None] & (chosen >= 0)[None, :])[:, :, None] & (lines < num_inputs)[
            None, None, :
        ]
        fetch(weight + (first_rows[None, :] + rows[:, None])[:, :, None] * num_inputs + lines[None, None, :], there)
    begin(OVERLAPS)

    there = (places < TOP_K)[:, None] & (inputs < num_inputs)[None, :]
    values = tl.load(x + places[:, None] * num_inputs + inputs[None, :], mask=there, other=0.0).to(tl.float32)
    x_scales = tl.full([PADDED_TOP_K], 1.0, tl.float32)
    if w_scales is not None:
        values, of_groups = _as_quantized(values, GROUP, BLOCK, SCALE_OF_ONE, MIN_SCALE)
        if BLOCK is None:
            x_scales = of_groups
    _store_sums(output, program, w, scales, values, x_scales, weights, is_padding, num_outputs, BLOCK, TILE_N)
    first = program + programs
    scales = _load_scales_of_experts(w_scales, chosen, first, num_outputs, num_inputs, BLOCK, TILE_N, PADDED_INPUTS)
    for tile in tl.range(first, tl.cdiv(num_outputs, TILE_N), programs, num_stages=STAGES):
        w = _load_rows_of_experts(weight, first_rows, tile, num_outputs, num_inputs, TOP_K, TILE_N, PADDED_INPUTS)
        # Scales that a tile would wait for are loaded a tile ahead.
        following = tile + programs
        next_scales = _load_scales_of_experts(
            w_scales, chosen, following, num_outputs, num_inputs, BLOCK, TILE_N, PADDED_INPUTS
        )
        _store_sums(output, tile, w, scales, values, x_scales, weights, is_padding, num_outputs, BLOCK, TILE_N)
        scales = next_scales
