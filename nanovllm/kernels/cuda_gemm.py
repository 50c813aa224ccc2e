"""GEMMs for a part of a GPU's SMs, in CUDA C++ for Hopper (sm_90a): float16 and bfloat16.

Beside a lane that streams KV, such a GEMM needs tiles whose number is a whole number of waves over its SMs, few reads
of the L2 cache (thread blocks of a cluster share the weights that they fetch), and enough tiles in flight to cover the
latency of memory. The kernel is `cuda_gemm.cu`.

The caller makes the tensors' device the current one.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from nanovllm.kernels.cuda_hopper import compile_for_hopper, is_hopper, product
from nanovllm.utils.nvrtc import Kernel, tensor_map

TILE_M = 128
TILE_K = 64
WIDEST = 256
NARROWEST = 96
"""Weight rows of a tile; a multiple of what any cluster needs."""
CLUSTERS = (4, 2)
"""Thread blocks that fetch weights together, the best first."""
MIN_TOKENS = 128
"""Fewest tokens for these kernels: with fewer, half of each tile or more would be padding."""
NUM_THREADS = 384
SHARED_BYTES = 227 * 1024 - 256
"""Shared memory of an SM in bytes, less what the kernel's barriers take."""
OTHER_BYTES = 1024 + 8 * 16 * 144
"""Bytes of shared memory for aligning tiles and for outputs in flight."""


def can_serve(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `shared_linear` is for this GEMM: not for few tokens, float32, other GPUs than Hopper's, odd sizes."""
    is_half = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == x.dtype
    is_even = x.shape[1] % 8 == 0 and weight.shape[0] % 16 == 0
    return is_half and is_even and x.shape[0] >= MIN_TOKENS and is_hopper(x.device)


def shared_linear(x: torch.Tensor, weight: torch.Tensor, num_sms: int, *, is_gated: bool = False) -> torch.Tensor:
    """x W^T of [T, in] and [out, in], by `num_sms` persistent thread blocks, one on each SM.

    If it is gated, silu of the first half of that times the second half, [T, out / 2].

    Raises:
        BackendUnavailableError: the kernel cannot be compiled or loaded.
    """
    num_tokens, num_inputs = x.shape
    num_outputs = weight.shape[0] // 2 if is_gated else weight.shape[0]
    output = x.new_empty(num_tokens, num_outputs)
    tiles_down = -(-num_tokens // TILE_M)
    cluster, num_clusters = _clusters(tiles_down, num_sms, x.dtype, x.device)
    at_a_time = max(num_clusters // (tiles_down // cluster), 1)
    width = tile_width(weight.shape[0], at_a_time, 8 * _boxes(cluster))
    kernel = _kernel(width, cluster, is_gated, x.dtype, x.device)
    kernel.launch(
        num_clusters * cluster,
        NUM_THREADS,
        [
            tensor_map(x, (TILE_M, TILE_K)),
            tensor_map(weight, (width // _boxes(cluster), TILE_K)),
            output,
            num_tokens,
            -(-num_inputs // TILE_K),
            num_outputs,
            num_outputs if is_gated else width // 2,
        ],
        cluster=cluster,
    )
    return output


def _clusters(tiles_down: int, num_sms: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Thread blocks of a cluster, and how many clusters: the largest ones that use nearly all SMs of the stream.

    Those of a cluster have tiles below each other, of the same weights, so that their number divides `tiles_down`. A
    cluster's SMs must lie together, which on some partitions leaves many SMs for none of them.
    """
    for cluster in CLUSTERS:
        if tiles_down % cluster == 0:
            num_clusters = _kernel(NARROWEST, cluster, False, dtype, device).max_clusters(NUM_THREADS, cluster)
            num_clusters = min(num_clusters, num_sms // cluster)
            if num_clusters and num_clusters * cluster > num_sms - 4:
                return cluster, num_clusters
    return 1, num_sms


@functools.cache
def tile_width(num_weights: int, at_a_time: int, step: int) -> int:
    """How many weight rows a tile has, of `num_weights`, if `at_a_time` tiles side by side are computed at a time.

    It is the multiple of `step` with the least time in all: a wave of tiles takes as long as they are wide, and a
    little for its beginning and end.
    """

    def cost(width: int) -> int:
        num_tiles = -(-num_weights // width)
        return -(-num_tiles // at_a_time) * (width + 16)

    return min(range(WIDEST // step * step, NARROWEST - 1, -step), key=cost)


def _boxes(cluster: int) -> int:
    """Number of boxes in which the weights of a tile are fetched; the kernel computes the same."""
    return max(cluster, 2)


@functools.cache
def _kernel(width: int, cluster: int, is_gated: bool, dtype: torch.dtype, device: torch.device) -> Kernel:
    stages = num_stages(width)
    shared_bytes = OTHER_BYTES + stages * _stage_bytes(width)
    return Kernel(_compiled(width, cluster, stages, is_gated, dtype), "shared_linear", shared_bytes)


def num_stages(width: int) -> int:
    """Pipeline stages: tiles in flight that fit into shared memory, alignment included."""
    return (SHARED_BYTES - OTHER_BYTES) // _stage_bytes(width)


def _stage_bytes(width: int) -> int:
    return (TILE_M + width) * TILE_K * 2


@functools.cache
def _compiled(width: int, cluster: int, stages: int, is_gated: bool, dtype: torch.dtype) -> bytes:
    constants = {"WIDTH": width, "CLUSTER": cluster, "STAGES": stages, "GATED": int(is_gated)}
    return compile_for_hopper(Path(__file__).with_suffix(".cu"), dtype, constants, product("WGMMA", width, dtype))
