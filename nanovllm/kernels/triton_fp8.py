"""Linear layers whose weights are FP8 with scales: float32, float16 and bfloat16 outside, e4m3 products inside.

Inputs are quantized by the kernel that makes them, with the norm or the gate where there is one. A GEMM of few tokens
must read the weights at the rate of the memory: its programs all run at once and read disjoint parts of the weights.
A single token whose inputs are not quantized yet is for `triton_one_token`.

The caller makes the tensors' device the current one: Triton launches on the current device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional

from nanovllm.kernels.triton_overlap import begin, overlap
from nanovllm.utils.fp8 import E4M3, SCALE_OF_ONE, SMALLEST_SCALE, ScaledTokens, ScaledWeight

MAX_FEW_TOKENS = 64
"""Most tokens of a GEMM that the memory bounds, so that torch's is slower."""
NUM_COUNTERS = 512
"""Most output tiles, over all tokens, whose inputs are split among programs."""
SPLIT_INPUTS = 16
"""Inputs of a split are at least so many times the tokens: the bytes of partial results stay below the weights'."""
FEW_TOKENS_TILE = 64
"""Outputs of a tile for few tokens: as many as a tensor core instruction has rows."""
MOST_PER_SM = 3
HOPPER_SHARED_BYTES = 224 * 1024
"""Shared memory of an SM of sm_90 that the tiles of all programs running on it may take."""
OTHER_SHARED_BYTES = 4 * 1024
"""Shared memory of an SM that is left for all else: what the system takes for each program, and sums."""
FAST_ACCUMULATION = False
"""Whether torch's GEMM may sum up in the tensor cores alone, which keep 14 bits of a sum on Hopper."""
COMBINED = tl.constexpr(4)
"""Partial results of a tile that are read at a time."""
FETCHED = 512
"""Bytes of each row of weights that a program fetches ahead of its first tile."""
LINE = tl.constexpr(128)
"""Bytes of a line of the L2 cache."""


@dataclass(frozen=True)
class GemmPlan:
    """How a GEMM is divided: tiles of outputs, tokens and inputs, and how many programs share the inputs of a tile.

    Attributes:
        tile_n, tile_t, tile_k: outputs, tokens and inputs of a tile.
        splits: programs of an output tile, each with a part of the inputs.
        stages: tiles of a program that are in flight or in use.
        num_warps: of a program.
    """

    tile_n: int
    tile_t: int
    tile_k: int
    splits: int
    stages: int
    num_warps: int


def linear(
    x: torch.Tensor | ScaledTokens, weight: ScaledWeight, bias: torch.Tensor | None, num_sms: int | None = None
) -> torch.Tensor:
    """x W^T + b, [T, out], of [T, in], which is quantized here if it is not yet.

    GEMMs of many tokens are torch's where it has them for the format, in bfloat16 and on all of the GPU.
    """
    tokens = quantize_tokens(x, weight) if isinstance(x, torch.Tensor) else x
    if len(tokens.values) > MAX_FEW_TOKENS and num_sms is None and _is_for_torch(tokens, weight, bias):
        return _torch_linear(tokens, weight, bias)
    return _scaled_linear(tokens, weight, bias, num_sms)


def quantize_tokens(x: torch.Tensor, weight: ScaledWeight) -> ScaledTokens:
    """x, [T, in], as inputs of a layer with such weights."""
    return _quantize(x, weight.block)[0]


def empty_tokens(x: torch.Tensor, size: int, block: int | None, num_counters: int = NUM_COUNTERS) -> ScaledTokens:
    """Room for `size` quantized inputs of as many tokens as x has, and counters that the kernel must set to 0."""
    values = torch.empty(len(x), size, dtype=E4M3, device=x.device)
    groups = triton.cdiv(size, size if block is None else block)
    scales = torch.empty(groups, len(x), dtype=torch.float32, device=x.device).T
    counters = torch.empty(num_counters, dtype=torch.int32, device=x.device)
    return ScaledTokens(values, scales, counters, x.dtype)


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float],
    weight: ScaledWeight,
    bias: torch.Tensor | None,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear` of the RMSNorm of `x + residual`, and the sum."""
    tokens, total = _quantize(x, weight.block, residual=residual, norm=norm)
    return linear(tokens, weight, bias, num_sms), total


def norm_gated_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float],
    weight: ScaledWeight,
    bias: torch.Tensor | None,
    num_sms: int | None = None,
) -> tuple[ScaledTokens, torch.Tensor]:
    """silu(gate) * up of what `norm_linear` gives, gate first, quantized as inputs of such weights; and the sum."""
    gate_up, total = norm_linear(x, residual, norm, weight, bias, num_sms)
    return _quantize(gate_up, weight.block, is_gated=True)[0], total


def plan(
    num_tokens: int,
    num_outputs: int,
    num_inputs: int,
    num_sms: int,
    block: int | None,
    sm_bytes: int = HOPPER_SHARED_BYTES,
) -> GemmPlan:
    """The division of a GEMM of so many tokens, on so many SMs with `sm_bytes` of shared memory for tiles.

    All programs of few tokens should run at once, on all SMs equally many, since an SM that ends early does not help
    the others. Writing and reading partial sums bounds the splits, so as few programs as fill the SMs, with as much of
    their shared memory as fits.
    """
    tile_t = min(max(16, triton.next_power_of_2(num_tokens)), 128)
    most_splits = max(min(triton.cdiv(num_inputs, 128) // 2, num_inputs // (SPLIT_INPUTS * tile_t)), 1)
    if tile_t > MAX_FEW_TOKENS:
        num_tiles = triton.cdiv(num_outputs, 128) * triton.cdiv(num_tokens, tile_t)
        splits = min(num_sms // num_tiles, most_splits) if num_tiles <= NUM_COUNTERS else 1
        return GemmPlan(128, tile_t, 128, max(splits, 1), min(sm_bytes // (128 * (128 + tile_t)), 4), 8)
    num_tiles = triton.cdiv(num_outputs, FEW_TOKENS_TILE)
    per_sm, splits = _programs_per_sm(
        num_tiles, num_sms, most_splits, least=2 if block or tile_t == MAX_FEW_TOKENS else 1
    )
    shared_bytes, tile_k = sm_bytes // per_sm, 128
    while (
        block is None
        and tile_k < 512
        and num_inputs % (2 * tile_k) == 0
        and num_inputs // (2 * tile_k) >= 2 * splits
        and 3 * 2 * tile_k * (FEW_TOKENS_TILE + tile_t) <= shared_bytes
    ):
        tile_k *= 2
    stages = min(shared_bytes // (tile_k * (FEW_TOKENS_TILE + tile_t)), 1536 // tile_k, 6)
    return GemmPlan(FEW_TOKENS_TILE, tile_t, tile_k, splits, stages, 4)


def _programs_per_sm(num_tiles: int, num_sms: int, most_splits: int, *, least: int) -> tuple[int, int]:
    """How many programs an SM should run at a time, and how many should share a tile: the fewest that fill the SMs."""
    best, best_share = (MOST_PER_SM, 1), 0.0
    for per_sm in range(least, MOST_PER_SM + 1):
        splits = min(num_sms * per_sm // num_tiles, most_splits) if num_tiles <= NUM_COUNTERS else 1
        share = num_tiles * splits / (num_sms * per_sm)
        if best_share * 1.05 < share <= 1:
            best, best_share = (per_sm, splits), share
    return best


@functools.cache
def num_sms_of(device: torch.device) -> int:
    """The SMs of a GPU; of a CPU, whose kernels are interpreted, some."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _sm_bytes_of(device: torch.device) -> int:
    """Shared memory of an SM for the tiles of all its programs."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - OTHER_SHARED_BYTES


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def _has_cublas_of_blocks() -> bool:
    return tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) >= (12, 9)


def _is_for_torch(tokens: ScaledTokens, weight: ScaledWeight, bias: torch.Tensor | None) -> bool:
    """Whether `_torch_linear` takes these: GPUs from Hopper on, or for blocks Hopper alone, and even sizes."""
    if tokens.dtype != torch.bfloat16:
        return False
    capability, (num_outputs, num_inputs) = _capability(tokens.values.device), weight.values.shape
    if weight.block is None:
        return capability >= (9, 0) and num_outputs % 16 == 0 and num_inputs % 16 == 0
    # cuBLAS reads scales by fours.
    is_even = num_outputs % 128 == 0 and num_inputs % 512 == 0 and len(tokens.values) % 4 == 0
    return capability == (9, 0) and weight.block == 128 and bias is None and is_even and _has_cublas_of_blocks()


def _torch_linear(tokens: ScaledTokens, weight: ScaledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.block is None:
        return torch._scaled_mm(
            tokens.values,
            weight.values.T,
            scale_a=tokens.scales.flatten().unsqueeze(1),  # whose strides torch looks at
            scale_b=weight.scales.T,
            bias=bias,
            out_dtype=tokens.dtype,
            use_fast_accum=FAST_ACCUMULATION,
        )
    return functional.scaled_mm(
        tokens.values,
        weight.values.T,
        tokens.scales,
        functional.ScalingType.BlockWise1x128,
        weight.scales.T,
        functional.ScalingType.BlockWise128x128,
        output_dtype=tokens.dtype,
    )


def _quantize(
    x: torch.Tensor,
    block: int | None,
    *,
    residual: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    is_gated: bool = False,
) -> tuple[ScaledTokens, torch.Tensor]:
    """Quantizes x, or the norm of `x + residual`, or the gate and up that x is; and the sum."""
    tokens = empty_tokens(x, x.shape[1] // 2 if is_gated else x.shape[1], block)
    total = prepare(x, residual, norm, tokens.counters, tokens=tokens, block=block, is_gated=is_gated)
    return tokens, total


def prepare(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None,
    counters: torch.Tensor,
    *,
    tokens: ScaledTokens | None,
    block: int | None,
    normed: torch.Tensor | None = None,
    is_gated: bool = False,
) -> torch.Tensor:
    """Writes the inputs of linear layers: the norm of `x + residual` if there is one, or the gate and up that x is.

    They are written quantized to `tokens`, as they are to `normed`, or both; counters become 0.

    Returns:
        `x + residual`.
    """
    num_tokens = x.shape[0]
    size = x.shape[1] // 2 if is_gated else x.shape[1]
    padded_size = max(triton.next_power_of_2(size), block or 1)
    total = x if residual is None else torch.empty_like(x)
    norm_weight, eps = (None, 0.0) if norm is None else norm
    _prepare_kernel[(num_tokens,)](
        x,
        residual,
        norm_weight,
        normed,
        None if tokens is None else tokens.values,
        None if tokens is None else tokens.scales,
        total,
        counters,
        eps,
        size,
        IS_GATED=is_gated,
        GROUP=padded_size if block is None else block,
        PADDED_SIZE=padded_size,
        NUM_COUNTERS=len(counters),
        SCALE_OF_ONE=SCALE_OF_ONE,
        MIN_SCALE=SMALLEST_SCALE,
        num_warps=4 if padded_size <= 2048 else 8 if padded_size <= 8192 else 16,
        **overlap(x.device),
    )
    return total


def _scaled_linear(
    tokens: ScaledTokens, weight: ScaledWeight, bias: torch.Tensor | None, num_sms: int | None
) -> torch.Tensor:
    x = tokens.values
    num_tokens, num_inputs = x.shape
    num_outputs = len(weight.values)
    sm_bytes = _sm_bytes_of(x.device)
    division = plan(num_tokens, num_outputs, num_inputs, num_sms or num_sms_of(x.device), weight.block, sm_bytes)
    grid = (triton.cdiv(num_tokens, division.tile_t), triton.cdiv(num_outputs, division.tile_n), division.splits)
    output = torch.empty(num_tokens, num_outputs, dtype=tokens.dtype, device=x.device)
    num_partial = grid[0] * grid[1] * grid[2] * division.tile_n * division.tile_t if division.splits > 1 else 0
    partial = torch.empty(num_partial, dtype=torch.float32, device=x.device)
    _scaled_linear_kernel[grid](
        x,
        tokens.scales,
        weight.values,
        weight.scales,
        output if bias is None else bias,
        output,
        partial,
        tokens.counters,
        num_tokens,
        num_outputs,
        num_inputs,
        division.splits,
        HAS_BIAS=bias is not None,
        BLOCK=weight.block,
        IS_SPLIT=division.splits > 1,
        TILE_N=division.tile_n,
        TILE_T=division.tile_t,
        TILE_K=division.tile_k,
        STAGES=division.stages,
        FETCHED=FETCHED,
        IS_EVEN=num_inputs % division.tile_k == 0,
        num_warps=division.num_warps,
        **overlap(x.device),
    )
    return output


@triton.jit
def quantized_groups(groups, SCALE_OF_ONE: tl.constexpr, MIN_SCALE: tl.constexpr):
    """[N, GROUP] inputs in e4m3, and the scales of the groups, [N]."""
    wide = groups.to(tl.float32)
    scales = tl.maximum(tl.max(tl.abs(wide), 1) * SCALE_OF_ONE, MIN_SCALE)
    inverses = tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)
    # Rounded as a division rounds (Markstein, 1990), in three instructions in place of a dozen. What is beyond the
    # largest number is so near it that it is rounded to it.
    quotients = wide * inverses[:, None]
    left = tl.fma(-quotients, tl.broadcast_to(scales[:, None], wide.shape), wide)
    quotients = tl.fma(left, tl.broadcast_to(inverses[:, None], wide.shape), quotients)
    return quotients.to(tl.float8e4nv), scales


@triton.jit
def _prepare_kernel(
    x,
    residual,
    norm_weight,
    normed,
    values,
    scales,
    total,
    counters,
    eps,
    size,
    IS_GATED: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    NUM_COUNTERS: tl.constexpr,
    SCALE_OF_ONE: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program for one token. Rounds where kernels of their own would round. What is None is left out."""
    begin(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    if token == 0:
        tl.store(counters + tl.arange(0, NUM_COUNTERS), tl.zeros([NUM_COUNTERS], tl.int32))
    places = tl.arange(0, PADDED_SIZE)
    there = places < size
    if IS_GATED:
        gate = tl.load(x + token * 2 * size + places, mask=there, other=0.0)
        up = tl.load(x + token * 2 * size + size + places, mask=there, other=0.0)
        wide = gate.to(tl.float32)
        row = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype) * up
    else:
        row = tl.load(x + token * size + places, mask=there, other=0.0)
        if residual is not None:
            row += tl.load(residual + token * size + places, mask=there, other=0.0)
            tl.store(total + token * size + places, row, mask=there)
        if norm_weight is not None:
            wide = row.to(tl.float32)
            wide *= tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
            row = wide.to(row.dtype) * tl.load(norm_weight + places, mask=there, other=0.0)
    if normed is not None:
        tl.store(normed + token * size + places, row, mask=there)
    if values is not None:
        groups = tl.reshape(row, [PADDED_SIZE // GROUP, GROUP])
        quantized, of_groups = quantized_groups(groups, SCALE_OF_ONE, MIN_SCALE)
        tl.store(values + token * size + places, tl.reshape(quantized, [PADDED_SIZE]), mask=there)
        group = tl.arange(0, PADDED_SIZE // GROUP)
        tl.store(scales + group * tl.num_programs(0) + token, of_groups, mask=group < tl.cdiv(size, GROUP))


@triton.jit
def load_tile(pointers, start, num_inputs, TILE_K: tl.constexpr, IS_EVEN: tl.constexpr):
    """A tile of rows, from input `start` on; 0 beyond the last input, unless all tiles are full."""
    if IS_EVEN:
        return tl.load(pointers + start)
    there = start + tl.arange(0, TILE_K) < num_inputs
    return tl.load(pointers + start, mask=there[None, :], other=0.0)


@triton.jit
def fetch(pointers, mask):
    """Has the lines of these addresses, where the mask is set, read into the L2 cache; waits for none."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred p;
            setp.ne.s32 p, $2, 0;
            @p prefetch.global.L2 [$1];
            mov.b32 $0, 0;
        }
        """,
        "=r,l,r",
        [pointers.to(tl.uint64), tl.broadcast_to(mask, pointers.shape).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def _scaled_linear_kernel(
    x,
    x_scales,
    weight,
    w_scales,
    bias,
    output,
    partial,
    counters,
    num_tokens,
    num_outputs,
    num_inputs,
    splits,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    FETCHED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program sums up a part of the inputs for a tile of outputs and tokens; the last of a tile adds up the parts.

    Weights come first in the products: their tiles fill the tensor cores' rows, while tokens may be few. They do not
    depend on the kernel before this one: the first of them are fetched into the L2 cache before that has ended.
    """
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    split = tl.program_id(2)
    rows = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    tokens = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    # What lies beyond the last row or token is the last one, whose results are not stored twice.
    row_places = tl.minimum(rows, num_outputs - 1).to(tl.int64)
    token_places = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
    inputs = tl.arange(0, TILE_K)
    w_tile = weight + row_places[:, None] * num_inputs + inputs[None, :]
    x_tile = x + token_places[:, None] * num_inputs + inputs[None, :]
    num_tiles = tl.cdiv(num_inputs, TILE_K)
    low, high = split * num_tiles // splits, (split + 1) * num_tiles // splits
    w_block_scales = w_scales
    if BLOCK is not None:
        w_block_scales += (tl.program_id(1) * TILE_N // BLOCK).to(tl.int64) * tl.cdiv(num_inputs, BLOCK)

    if OVERLAPS:
        lines = low * TILE_K + tl.arange(0, FETCHED // LINE) * LINE
        fetch(weight + row_places[:, None] * num_inputs + lines[None, :], (lines < num_inputs)[None, :])
    begin(OVERLAPS)
    result = tl.zeros([TILE_N, TILE_T], tl.float32)
    for k in tl.range(low, high, num_stages=STAGES):
        w = load_tile(w_tile, k * TILE_K, num_inputs, TILE_K, IS_EVEN)
        tokens_of_tile = load_tile(x_tile, k * TILE_K, num_inputs, TILE_K, IS_EVEN)
        # The tensor cores keep fewer bits of a sum than float32 has: theirs end with the tile.
        products = tl.dot(w, tl.trans(tokens_of_tile), max_num_imprecise_acc=TILE_K)
        if BLOCK is not None:
            block = k * TILE_K // BLOCK
            of_tokens = tl.load(x_scales + block * num_tokens + token_places)
            products *= tl.load(w_block_scales + block) * of_tokens[None, :]
        result += products

    if IS_SPLIT:
        places = tl.arange(0, TILE_N)[:, None] * TILE_T + tl.arange(0, TILE_T)[None, :]
        of_tile = partial + tile.to(tl.int64) * splits * (TILE_N * TILE_T) + places
        tl.store(of_tile + split * (TILE_N * TILE_T), result)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") != splits - 1:
            return
        tl.debug_barrier()
        result = tl.zeros([TILE_N, TILE_T], tl.float32)
        for first in range(0, splits, COMBINED):  # always in the same order, whichever is the last
            for other in tl.static_range(COMBINED):
                # Not through the L1 cache, which another SM's stores do not reach.
                place = of_tile + (first + other) * (TILE_N * TILE_T)
                result += tl.load(place, mask=first + other < splits, other=0.0, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    if BLOCK is None:
        result *= tl.load(w_scales + row_places)[:, None] * tl.load(x_scales + token_places)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + row_places).to(tl.float32)[:, None]
    there = (rows < num_outputs)[:, None] & (tokens < num_tokens)[None, :]
    offsets = tokens.to(tl.int64)[None, :] * num_outputs + rows[:, None]
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=there)
