"""The experts of a layer: norm, router, grouped GEMMs and weighted sum, in float32, float16, bfloat16, or with FP8
weights.

All of it runs on the device, in a CUDA graph too: a token and one of its experts are an *assignment*; the router's
kernel writes each expert's assignments to a row of a table and counts them, and the GEMMs' programs look up in the
counts which tile of which expert is theirs. There are programs for the most tiles that there may be; the others end at
once. In which order an expert's assignments come is left to chance, but each is computed by itself: results are not.

Kernels: norm (and quantization), router, gate and up, (quantization,) down, sum; for a single token those of
`triton_one_token`. The caller makes the tensors' device the current one: Triton launches on the current device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanovllm.kernels import AttentionMetadata, ExpertWeights, triton_one_token
from nanovllm.kernels.triton_fp8 import (
    COMBINED,
    FETCHED,
    LINE,
    empty_tokens,
    fetch,
    load_tile,
    num_sms_of,
    prepare,
    quantize_tokens,
)
from nanovllm.kernels.triton_overlap import begin, overlap
from nanovllm.utils.fp8 import ScaledTokens, ScaledWeight, parts_of

LEAST_EXPERTS = 16
"""Tensor cores multiply by tiles at least that wide: fewer experts are filled up."""
FEW_ASSIGNMENTS = 64
"""Up to so many, tiles of outputs are narrow, so that there are programs for all SMs."""
MAX_ROUTE_SPLITS, MAX_SPLIT_TILES = 8, 32
"""Programs that share the router's inputs for a tile of tokens, and tiles of a step whose programs do."""
SUM_TILE = 1024
LARGEST_FINITE = tl.constexpr(3e38)


@dataclass(frozen=True)
class ExpertPlan:
    """How a grouped GEMM is divided.

    Attributes:
        tile_n, tile_t, tile_k: outputs (of gate and of up each), assignments and inputs of a tile.
        stages: tiles of a program that are in flight or in use.
        num_warps: of a program.
    """

    tile_n: int
    tile_t: int
    tile_k: int
    stages: int
    num_warps: int


@dataclass(frozen=True)
class Routing:
    """Which experts each token of a step passes.

    Attributes:
        chosen: [T, top_k] int32, the experts in the order of their weights; -1 for padding.
        weights: [T, top_k] float32.
        counts: [E, filled up with zeros] int32, the assignments of each expert.
        table: [E, T] int32, the assignments, token * top_k + place, of each expert: the first `counts` of a row.
    """

    chosen: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    table: torch.Tensor


def norm_experts(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float],
    experts: ExpertWeights,
    metadata: AttentionMetadata | None = None,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of the RMSNorm of `x + residual`, and the sum; [T, hidden_size] each."""
    if triton_one_token.can_serve_experts(len(x), experts):
        return triton_one_token.norm_experts(x, residual, norm, experts, metadata, num_sms)
    sms = num_sms or num_sms_of(x.device)
    normed, total, tokens, counters = norm_inputs(x, residual, norm, experts)
    routing = route(normed, experts, counters, metadata, sms)
    gated = expert_linear(normed if tokens is None else tokens, experts, routing, is_gated=True)
    between = quantize_tokens(gated, experts.down) if isinstance(experts.down, ScaledWeight) else gated
    results = expert_linear(between, experts, routing, is_gated=False)
    return _weighted_sum(results, routing), total


def plan(
    num_tokens: int, top_k: int, num_experts: int, *, is_gated: bool, itemsize: int, block: int | None
) -> ExpertPlan:
    """The division of a grouped GEMM; `itemsize` is the bytes of a weight.

    Few assignments are bound by the weights' bytes: tiles are as wide as leaves enough programs in flight. Many are
    bound by the tensor cores: tiles are square.
    """
    num_assignments = num_tokens * top_k
    # Twice the mean, since experts do not get equally many. Of the next power of two of tokens: large graphs are
    # captured with kernels that have run for powers of two alone, and another one could not be loaded then.
    mean = triton.cdiv(top_k * triton.next_power_of_2(num_tokens), num_experts)
    tile_t = min(max(16, triton.next_power_of_2(2 * mean)), 128)
    if itemsize == 4:  # on no tensor cores
        return ExpertPlan(32, min(tile_t, 32), 32, 2, 4)
    if tile_t >= 64:
        # As wide as leaves the sums in registers, of gate and up those of both.
        is_wide = tile_t == 64 or not (is_gated or itemsize == 1)
        return ExpertPlan(128 if is_wide else 64, tile_t, 128 if itemsize == 1 else 64, 3 if is_wide else 4, 8)
    tile_n = 32 if is_gated and num_assignments <= FEW_ASSIGNMENTS else 64
    if itemsize == 1:
        return ExpertPlan(tile_n, tile_t, 256, 3, 4) if block is None else ExpertPlan(tile_n, tile_t, 128, 5, 4)
    return ExpertPlan(tile_n, tile_t, 128, 3, 4)


def most_tiles(num_assignments: int, num_experts: int, tile_t: int) -> int:
    """The most tiles that so many assignments may take: each expert that has one may have a tile that is not full."""
    with_one = min(num_assignments, num_experts)
    return (num_assignments + with_one * (tile_t - 1)) // tile_t


def _padded_experts(num_experts: int) -> int:
    return max(triton.next_power_of_2(num_experts), LEAST_EXPERTS)


def norm_inputs(
    x: torch.Tensor, residual: torch.Tensor | None, norm: tuple[torch.Tensor, float], experts: ExpertWeights
) -> tuple[torch.Tensor, torch.Tensor, ScaledTokens | None, torch.Tensor]:
    """The norm of `x + residual`, the sum, the norm quantized (None where weights are not), and counters at zero.

    The counters are those of the experts, filled up, and then as many for the router's tiles.
    """
    normed = torch.empty_like(x)
    num_counters = 2 * _padded_experts(experts.num_experts)
    block, tokens = None, None
    if isinstance(experts.gate_up, ScaledWeight):
        block = experts.gate_up.block
        tokens = empty_tokens(x, x.shape[1], block, num_counters)
        counters = tokens.counters
    else:
        counters = torch.empty(num_counters, dtype=torch.int32, device=x.device)
    total = prepare(x, residual, norm, counters, tokens=tokens, block=block, normed=normed)
    return normed, total, tokens, counters


def route(
    normed: torch.Tensor,
    experts: ExpertWeights,
    counters: torch.Tensor,
    metadata: AttentionMetadata | None,
    num_sms: int,
) -> Routing:
    """The routing of [T, hidden_size] tokens, whose counters, as of `norm_inputs`, are zero and become its counts."""
    (num_tokens, num_inputs), device = normed.shape, normed.device
    num_experts, top_k, padded_experts = experts.num_experts, experts.top_k, len(counters) // 2
    tile_t = 16 if num_tokens <= 512 or normed.dtype == torch.float32 else 64
    tile_k = 32 if normed.dtype == torch.float32 else 128 if padded_experts <= 128 else 64
    num_tiles = triton.cdiv(num_tokens, tile_t)
    # There is a counter for each of so many tiles. By the number of tokens alone: kernels are compiled before graphs.
    is_split = num_tiles <= min(padded_experts, MAX_SPLIT_TILES)
    splits = max(1, min(num_sms // num_tiles, num_inputs // (2 * tile_k), MAX_ROUTE_SPLITS)) if is_split else 1
    num_partial = num_tiles * splits * tile_t * padded_experts if is_split else 0
    partial = torch.empty(num_partial, dtype=torch.float32, device=device)
    chosen = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    table = torch.empty(num_experts, num_tokens, dtype=torch.int32, device=device)
    has_padding = metadata is not None and metadata.padding_slot is not None
    _route_kernel[(num_tiles, splits)](
        normed,
        experts.router,
        metadata.slot_mapping if metadata is not None and has_padding else None,
        partial,
        counters,
        table,
        chosen,
        weights,
        num_tokens,
        num_inputs,
        splits,
        metadata.padding_slot if metadata is not None and has_padding else 0,
        NUM_EXPERTS=num_experts,
        PADDED_EXPERTS=padded_experts,
        TOP_K=top_k,
        PADDED_TOP_K=triton.next_power_of_2(top_k),
        RENORMALIZES=experts.renormalizes,
        IS_SPLIT=is_split,
        TILE_T=tile_t,
        TILE_K=tile_k,
        num_warps=4,
        **overlap(device),
    )
    return Routing(chosen, weights, counters[:padded_experts], table)


def expert_linear(
    x: torch.Tensor | ScaledTokens, experts: ExpertWeights, routing: Routing, *, is_gated: bool
) -> torch.Tensor:
    """silu(gate) * up of the tokens, or down of what that gives: [T * top_k, size], a row for each assignment.

    Rows of padding are left as they are.
    """
    weight = experts.gate_up if is_gated else experts.down
    values, w_scales, block = parts_of(weight)
    inputs, x_scales = (x.values, x.scales) if isinstance(x, ScaledTokens) else (x, None)
    num_assignments, num_experts = routing.chosen.numel(), experts.num_experts
    num_inputs = inputs.shape[1]
    num_outputs = len(values) // num_experts // (2 if is_gated else 1)
    num_tokens, top_k = routing.chosen.shape
    division = plan(num_tokens, top_k, num_experts, is_gated=is_gated, itemsize=values.itemsize, block=block)
    output = torch.empty(num_assignments, num_outputs, dtype=x.dtype, device=inputs.device)
    grid = (triton.cdiv(num_outputs, division.tile_n), most_tiles(num_assignments, num_experts, division.tile_t))
    _expert_linear_kernel[grid](
        inputs,
        x_scales,
        values,
        w_scales,
        output,
        routing.counts,
        routing.table,
        len(inputs),
        routing.table.shape[1],
        num_outputs,
        num_inputs,
        IS_GATED=is_gated,
        TOP_K=experts.top_k,
        BLOCK=block,
        PADDED_EXPERTS=len(routing.counts),
        TILE_N=division.tile_n,
        TILE_T=division.tile_t,
        TILE_K=division.tile_k,
        STAGES=division.stages,
        FETCHED=FETCHED,
        IS_EVEN=num_inputs % division.tile_k == 0,
        num_warps=division.num_warps,
        **overlap(inputs.device),
    )
    return output


def _weighted_sum(results: torch.Tensor, routing: Routing) -> torch.Tensor:
    """[T * top_k, size] -> [T, size]: the sums of the tokens' assignments, weighted, in their order; 0 for padding."""
    (num_tokens, top_k), size = routing.chosen.shape, results.shape[1]
    output = torch.empty(num_tokens, size, dtype=results.dtype, device=results.device)
    _weighted_sum_kernel[(num_tokens, triton.cdiv(size, SUM_TILE))](
        results,
        routing.chosen,
        routing.weights,
        output,
        size,
        TOP_K=top_k,
        TILE=SUM_TILE,
        **overlap(results.device),
    )
    return output


@triton.jit(do_not_specialize=["num_tokens", "splits", "padding_slot"])
def _route_kernel(
    x,
    router,
    slots,
    partial,
    counters,
    table,
    chosen,
    weights,
    num_tokens,
    num_inputs,
    splits,
    padding_slot,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program sums up a part of the router's inputs for a tile of tokens; the last of a tile chooses the experts.

    Counters are those of the experts, then one for each tile.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    tokens = tile * TILE_T + tl.arange(0, TILE_T)
    token_places = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
    experts = tl.arange(0, PADDED_EXPERTS)
    inputs = tl.arange(0, TILE_K)
    x_tile = x + token_places[:, None] * num_inputs + inputs[None, :]
    rows = tl.minimum(experts, NUM_EXPERTS - 1)
    router_tile = router + rows[:, None] * num_inputs + inputs[None, :]
    num_tiles = tl.cdiv(num_inputs, TILE_K)
    low, high = split * num_tiles // splits, (split + 1) * num_tiles // splits
    if OVERLAPS:
        lines = low * TILE_K + tl.arange(0, 2) * (TILE_K // 2)
        fetch(router + rows[:, None] * num_inputs + lines[None, :], (lines < num_inputs)[None, :])
    begin(OVERLAPS)
    logits = tl.zeros([TILE_T, PADDED_EXPERTS], tl.float32)
    for k in tl.range(low, high):
        x_values = load_tile(x_tile, k * TILE_K, num_inputs, TILE_K, False)
        router_values = load_tile(router_tile, k * TILE_K, num_inputs, TILE_K, False)
        logits = tl.dot(x_values, tl.trans(router_values), logits, input_precision="ieee")

    if IS_SPLIT:
        places = tl.arange(0, TILE_T)[:, None] * PADDED_EXPERTS + experts[None, :]
        of_tile = partial + tile.to(tl.int64) * splits * (TILE_T * PADDED_EXPERTS) + places
        tl.store(of_tile + split * (TILE_T * PADDED_EXPERTS), logits)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(counters + PADDED_EXPERTS + tile, 1, sem="acq_rel") != splits - 1:
            return
        tl.debug_barrier()
        logits = tl.zeros([TILE_T, PADDED_EXPERTS], tl.float32)
        for first in range(0, splits, COMBINED):  # always in the same order, whichever is the last
            for other in tl.static_range(COMBINED):
                # Not through the L1 cache, which another SM's stores do not reach.
                place = of_tile + (first + other) * (TILE_T * PADDED_EXPERTS)
                logits += tl.load(place, mask=first + other < splits, other=0.0, cache_modifier=".cg")

    is_expert = (experts < NUM_EXPERTS)[None, :]
    largest = tl.max(tl.where(is_expert, logits, float("-inf")), 1)
    # What is not finite spoils the weights, not the choice: no expert may be chosen twice.
    total = tl.sum(tl.where(is_expert, tl.exp(logits - largest[:, None]), 0.0), 1)
    left = tl.where(logits == logits, tl.clamp(logits, -LARGEST_FINITE, LARGEST_FINITE), -LARGEST_FINITE)
    left = tl.where(is_expert, left, float("-inf"))
    token_experts = tl.zeros([TILE_T, PADDED_TOP_K], tl.int32)
    token_weights = tl.zeros([TILE_T, PADDED_TOP_K], tl.float32)
    places = tl.arange(0, PADDED_TOP_K)
    for place in tl.static_range(TOP_K):
        logit, expert = tl.max(left, 1, return_indices=True)
        is_place = (places == place)[None, :]
        token_experts = tl.where(is_place, expert[:, None], token_experts)
        token_weights = tl.where(is_place, (tl.exp(logit - largest) / total)[:, None], token_weights)
        left = tl.where(experts[None, :] == expert[:, None], float("-inf"), left)
    if RENORMALIZES:
        token_weights /= tl.sum(token_weights, 1)[:, None]

    in_step = (tokens < num_tokens)[:, None] & (places < TOP_K)[None, :]
    is_routed = in_step
    if slots is not None:
        is_routed &= (tl.load(slots + token_places) < padding_slot)[:, None]
    assignments = tokens[:, None] * TOP_K + places[None, :]
    row_places = tl.atomic_add(counters + token_experts, 1, mask=is_routed, sem="relaxed")
    tl.store(table + token_experts.to(tl.int64) * num_tokens + row_places, assignments, mask=is_routed)
    tl.store(chosen + assignments, tl.where(is_routed, token_experts, -1), mask=in_step)
    tl.store(weights + assignments, token_weights, mask=in_step)


@triton.jit
def _scaled_products(w, x, w_scale, x_scales, TILE_K: tl.constexpr, BLOCK: tl.constexpr):
    """Products of a tile of FP8; times scales, if these are of blocks."""
    # The tensor cores keep fewer bits of a sum than float32 has: theirs end with the tile.
    products = tl.dot(w, x, max_num_imprecise_acc=TILE_K)
    if BLOCK is not None:
        products *= w_scale * x_scales[None, :]
    return products


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _expert_linear_kernel(
    x,
    x_scales,
    weight,
    w_scales,
    output,
    counters,
    table,
    num_rows,
    num_tokens,
    num_outputs,
    num_inputs,
    IS_GATED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    FETCHED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program computes a tile of outputs of a tile of one expert's assignments; with gate and up, both of these.

    Inputs are tokens for gate and up, assignments for down. Weights come first in the products: their tiles fill the
    tensor cores' rows, while assignments may be few.
    """
    # What the router's kernel wrote is there for down before it begins, as that is the second one after it.
    if IS_GATED:
        begin(OVERLAPS)
    experts = tl.arange(0, PADDED_EXPERTS)
    counts = tl.load(counters + experts)
    tiles = tl.cdiv(counts, TILE_T)
    ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(1)
    num_tiles = tl.sum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    is_expert = experts == expert
    first = (tile - tl.sum(tl.where(is_expert, ends - tiles, 0), 0)) * TILE_T
    count = tl.sum(tl.where(is_expert, counts, 0), 0)
    rows = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    row_places = tl.minimum(rows, num_outputs - 1).to(tl.int64)
    inputs = tl.arange(0, TILE_K)
    parts = 2 if IS_GATED else 1
    of_expert = weight + expert.to(tl.int64) * parts * num_outputs * num_inputs
    if not IS_GATED:
        if OVERLAPS and tile < num_tiles:
            line = LINE // (weight.dtype.element_ty.primitive_bitwidth // 8)
            lines = tl.arange(0, FETCHED // LINE) * line
            fetch(of_expert + row_places[:, None] * num_inputs + lines[None, :], (lines < num_inputs)[None, :])
        begin(OVERLAPS)
    if tile >= num_tiles:
        return

    # What lies beyond the last assignment or row is the last one, whose results are not stored twice.
    places = first + tl.arange(0, TILE_T)
    of_table = table + expert.to(tl.int64) * num_tokens
    assignments = tl.load(of_table + tl.minimum(places, count - 1))
    x_rows = (assignments // TOP_K if IS_GATED else assignments).to(tl.int64)
    x_tile = x + x_rows[:, None] * num_inputs + inputs[None, :]
    w_tile = of_expert + row_places[:, None] * num_inputs + inputs[None, :]
    up_tile = w_tile + num_outputs.to(tl.int64) * num_inputs
    w_block_scales, up_block_scales = w_scales, w_scales
    if BLOCK is not None:
        num_blocks, block_rows = tl.cdiv(num_inputs, BLOCK), num_outputs // BLOCK
        block_row = expert.to(tl.int64) * parts * block_rows + tl.program_id(0) * TILE_N // BLOCK
        w_block_scales += block_row * num_blocks
        up_block_scales = w_block_scales + block_rows * num_blocks

    result = tl.zeros([TILE_N, TILE_T], tl.float32)
    up_result = tl.zeros([TILE_N, TILE_T], tl.float32)
    for k in tl.range(0, tl.cdiv(num_inputs, TILE_K), num_stages=STAGES):
        x_values = tl.trans(load_tile(x_tile, k * TILE_K, num_inputs, TILE_K, IS_EVEN))
        w = load_tile(w_tile, k * TILE_K, num_inputs, TILE_K, IS_EVEN)
        if IS_GATED:
            up = load_tile(up_tile, k * TILE_K, num_inputs, TILE_K, IS_EVEN)
        if w_scales is None:
            result = tl.dot(w, x_values, result, input_precision="ieee")
            if IS_GATED:
                up_result = tl.dot(up, x_values, up_result, input_precision="ieee")
        else:
            w_scale, up_scale, of_rows = 1.0, 1.0, x_rows
            if BLOCK is not None:
                block = k * TILE_K // BLOCK
                of_rows = tl.load(x_scales + block * num_rows + x_rows)
                w_scale = tl.load(w_block_scales + block)
                if IS_GATED:
                    up_scale = tl.load(up_block_scales + block)
            result += _scaled_products(w, x_values, w_scale, of_rows, TILE_K, BLOCK)
            if IS_GATED:
                up_result += _scaled_products(up, x_values, up_scale, of_rows, TILE_K, BLOCK)

    if (w_scales is not None) and (BLOCK is None):
        of_rows = tl.load(x_scales + x_rows)[None, :]
        row_scales = w_scales + expert.to(tl.int64) * parts * num_outputs + row_places
        result *= tl.load(row_scales)[:, None] * of_rows
        if IS_GATED:
            up_result *= tl.load(row_scales + num_outputs)[:, None] * of_rows
    dtype = output.dtype.element_ty
    if IS_GATED:
        # Rounded where kernels of their own would round.
        gate = result.to(dtype).to(tl.float32)
        stored = (gate / (1.0 + tl.exp(-gate))).to(dtype) * up_result.to(dtype)
    else:
        stored = result.to(dtype)
    there = (rows < num_outputs)[:, None] & (places < count)[None, :]
    tl.store(output + assignments.to(tl.int64)[None, :] * num_outputs + rows[:, None], stored, mask=there)


@triton.jit
def _weighted_sum_kernel(
    results,
    chosen,
    weights,
    output,
    size,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program for a tile of a token's outputs; of padding no result is read, as none was written."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = places < size
    begin(OVERLAPS)
    total = tl.zeros([TILE], tl.float32)
    for place in tl.static_range(TOP_K):
        assignment = token * TOP_K + place
        is_routed = tl.load(chosen + assignment) >= 0
        row = tl.load(results + assignment * size + places, mask=there & is_routed, other=0.0)
        weight = tl.where(is_routed, tl.load(weights + assignment), 0.0)
        total += weight * row.to(tl.float32)
    tl.store(output + token * size + places, total.to(output.dtype.element_ty), mask=there)
