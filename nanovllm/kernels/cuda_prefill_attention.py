"""Attention of prompts to the paged pool, in CUDA C++ for Hopper (sm_90a): float16 and bfloat16, head dims 64 and 128.

The kernel is `cuda_prefill_attention.cu`. It is for steps with work for all SMs: its tiles of queries are large, and
their contexts are not divided among thread blocks, as the Triton kernel's are.

The caller makes the tensors' device the current one.
"""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path

import torch

from nanovllm.errors import BackendUnavailableError
from nanovllm.kernels import AttentionMetadata
from nanovllm.kernels.cuda_hopper import accumulators, compile_for_hopper, instruction, is_hopper, product
from nanovllm.utils.nvrtc import Kernel, tensor_map

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128)
TILE_M = 128
"""Queries of a tile."""
TILE_KEYS = 128
BOX_COLUMNS = 64
BOX_TOKENS = 64
"""Most tokens that are fetched at once: as many as the clearing of unused values in a block reaches."""
STAGES = 2
"""Tiles of keys, and of values, on their way to a thread block."""
NUM_THREADS = 384
PLAN_THREADS = 1024
PLAN_BYTES = 64 * 1024
"""Shared memory of the kernel that makes the plan: a word for each request, and for each tile."""
HEADER_ROWS = 1
FIELDS = 4
CACHED_BYTES = 32 * 2**20
"""Keys and values, in bytes, of the heads that are computed at a time: they stay in the L2 cache of 50 MB."""
LEAST_TILES_PER_SM = 1
"""Full tiles of queries, of a head each, for each SM: in steps with fewer, the Triton kernel divides contexts."""
LEAST_ROUNDS = 4
"""Fewest tiles for each SM that are computed at a time, so that all SMs have work to the end."""
LOG2_E = math.log2(math.e)


def can_serve(metadata: AttentionMetadata, num_heads: int, kv_cache: torch.Tensor, num_sms: int) -> bool:
    """Whether `plan` and `attend` are for this step, on `num_sms` SMs: by the rule in attention_backends.md."""
    is_half = kv_cache.dtype in (torch.bfloat16, torch.float16)
    if not (is_half and kv_cache.shape[-1] in HEAD_DIMS and is_hopper(kv_cache.device)):
        return False
    words_of_plan = _most_tiles(metadata) + len(metadata.context_lens) + 1
    has_room = words_of_plan * 4 <= PLAN_BYTES and _num_rows(kv_cache) < 2**31
    # A mixed step may have as many decode rows as there is room for: what is left are tokens of prompts.
    num_rows = 0 if metadata.decode is None else len(metadata.decode.context_lens)
    num_tokens = len(metadata.slot_mapping) - num_rows
    is_large = num_tokens * num_heads >= LEAST_TILES_PER_SM * TILE_M * num_sms
    return is_large and has_room and _can_load(*_variant(kv_cache))


def plan(metadata: AttentionMetadata, num_heads: int, kv_cache: torch.Tensor, num_sms: int) -> torch.Tensor:
    """Which tiles of queries a step has, those that attend to most first, and how many heads to compute at a time.

    Returns:
        [HEADER_ROWS + tiles, FIELDS] int32, as the kernel reads it, with a counter that `attend` leaves 0.
    """
    made = torch.empty(HEADER_ROWS + _most_tiles(metadata), FIELDS, dtype=torch.int32, device=kv_cache.device)
    num_requests = len(metadata.context_lens)
    _kernels(*_variant(kv_cache))[1].launch(
        1,
        PLAN_THREADS,
        [
            metadata.context_lens,
            metadata.query_starts,
            made,
            num_requests,
            num_heads,
            kv_cache.shape[2],
            CACHED_BYTES,
            LEAST_ROUNDS * num_sms,
        ],
    )
    return made


def is_plan(split: torch.Tensor) -> bool:
    """Whether the result of a backend's `split_work` comes from `plan`."""
    return split.ndim == 2


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    planned: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    num_sms: int,
) -> None:
    """`Kernels.attend` for a step whose `plan` this is, by persistent thread blocks, one on each of `num_sms` SMs."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[2]
    rows_of_queries = query.as_strided((num_tokens, num_heads * head_dim), (query.stride(0), 1))
    rows_of_pool = kv_cache.as_strided((_num_rows(kv_cache), head_dim), (head_dim, 1))
    _kernels(*_variant(kv_cache))[0].launch(
        min(num_sms, (len(planned) - HEADER_ROWS) * num_heads),
        NUM_THREADS,
        [
            tensor_map(rows_of_queries, (TILE_M, BOX_COLUMNS)),
            tensor_map(rows_of_pool, (_box_tokens(kv_cache.shape[3]), BOX_COLUMNS)),
            output,
            metadata.block_tables,
            planned,
            metadata.block_tables.stride(0),
            kv_cache.stride(0) // head_dim,
            num_heads,
            num_kv_heads,
            scale * LOG2_E,
        ],
    )


def _most_tiles(metadata: AttentionMetadata) -> int:
    """Tiles of queries that a step may have: every request but one may end in one that is not full."""
    num_tokens, num_requests = len(metadata.slot_mapping), len(metadata.context_lens)
    return min(-(-num_tokens // TILE_M) + num_requests - 1, num_tokens)


def _num_rows(kv_cache: torch.Tensor) -> int:
    """Rows of one token and head each, from a layer's first one in the pool to its last, those of other layers too."""
    num_blocks, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    return (num_blocks - 1) * kv_cache.stride(0) // head_dim + 2 * num_kv_heads * block_size


def _variant(kv_cache: torch.Tensor) -> tuple[torch.device, torch.dtype, int, int]:
    return kv_cache.device, kv_cache.dtype, kv_cache.shape[4], kv_cache.shape[3]


def _box_tokens(block_size: int) -> int:
    return math.gcd(block_size, BOX_TOKENS)


@functools.cache
def _can_load(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    try:
        _kernels(device, dtype, head_dim, block_size)
    except BackendUnavailableError as error:
        logger.warning("the attention of prompts runs in Triton: %s", error)
        return False
    return True


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> tuple[Kernel, Kernel]:
    """The kernel of attention and that of plans, loaded for the device, which is the current one."""
    compiled = _compiled(dtype, head_dim, block_size)
    return (
        Kernel(compiled, "prefill_attention", shared_bytes(head_dim)),
        Kernel(compiled, "plan_prefill_attention", PLAN_BYTES),
    )


def shared_bytes(head_dim: int) -> int:
    """Dynamic shared memory of a thread block: queries, stages of keys and values, and what aligns them."""
    return 1024 + (TILE_M + 2 * STAGES * TILE_KEYS) * head_dim * 2


@functools.cache
def _compiled(dtype: torch.dtype, head_dim: int, block_size: int) -> bytes:
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "BOX": _box_tokens(block_size),
        "TILE_M": TILE_M,
        "KEYS": TILE_KEYS,
        "STAGES": STAGES,
    }
    macros = product("QK", TILE_KEYS, dtype) + _product_of_values(head_dim, dtype)
    return compile_for_hopper(Path(__file__).with_suffix(".cu"), dtype, constants, macros)


def _product_of_values(head_dim: int, dtype: torch.dtype) -> str:
    """The macro of the instruction that multiplies probabilities, in registers, and values."""
    number = head_dim // 2
    probabilities = ", ".join(f"%{number + place}" for place in range(4))
    return (
        f'#define PV(d, a0, a1, a2, a3, b) asm volatile("{instruction(head_dim, dtype)}, {{{probabilities}}}, '
        f'%{number + 4}, 1, 1, 1, 1;" : {accumulators(head_dim)} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))\n'
    )
