"""How many KV blocks a device has room for, and the tensor that holds them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from nanovllm.engine.execution.cuda_graph import MAX_PREFILL_GRAPH_TOKENS
from nanovllm.engine.execution.runner_spec import RunnerSpec
from nanovllm.errors import OutOfKVCacheError
from nanovllm.layers.ranks import Ranks
from nanovllm.utils.device import Device

logger = logging.getLogger(__name__)

GIB = 1024**3
CPU_POOL_BYTES = 512 * 1024**2


def make_kv_pool(spec: RunnerSpec, device: Device, num_blocks: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], zeroed; of the spec's type for KV if None.

    Raises:
        OutOfKVCacheError: the device refuses the memory.
    """
    config = spec.model_config
    shape = (
        num_blocks,
        config.num_hidden_layers,
        2,
        spec.num_kv_heads,
        spec.attention.block_size,
        config.head_dim,
    )
    try:
        return torch.zeros(shape, dtype=dtype or spec.kv_dtype, device=device.torch_device)
    except RuntimeError as error:
        raise OutOfKVCacheError(
            f"{device} refused {num_blocks * spec.block_bytes / GIB:.2f} GiB for the KV pool ({error}); "
            "lower num_kvcache_blocks or gpu_memory_utilization"
        ) from error


def num_kv_blocks(
    spec: RunnerSpec,
    device: Device,
    ranks: Ranks,
    max_step_tokens: int,
    run_step: Callable[[torch.Tensor, int], None],
) -> int:
    """Number of KV blocks to allocate on a device, the padding block not counted; the same on all ranks.

    Args:
        spec: model and sizes.
        device: has the weights already.
        ranks: agree on the smallest number.
        max_step_tokens: tokens of the largest step.
        run_step: runs a step of so many tokens over a pool of one block.

    Raises:
        OutOfKVCacheError: the pool, or the largest step, does not fit.
    """
    block_size = spec.attention.block_size
    if device.is_cuda:
        available = _gpu_bytes_for_pool(spec, device, max_step_tokens, run_step)
        where = f"{device} at gpu_memory_utilization={spec.gpu_memory_utilization}"
        remedy = "lower num_kvcache_blocks, max_num_batched_tokens or max_num_seqs, or raise gpu_memory_utilization"
        default = available // spec.block_bytes - 1
    else:
        available, where = host_memory_bytes(), "this machine's memory"
        remedy = "lower num_kvcache_blocks, kvcache_block_size or max_model_len"
        one_request = -(-spec.max_model_len // block_size)
        default = max(CPU_POOL_BYTES // spec.block_bytes, one_request)
    num_blocks = max(spec.num_kvcache_blocks or default, 1)
    needed = (num_blocks + 1) * spec.block_bytes
    if needed > available:
        raise OutOfKVCacheError(
            f"a KV pool of {num_blocks} blocks and a padding block takes {needed / GIB:.2f} GiB, but {where} leaves "
            f"{max(available, 0) / GIB:.2f} GiB for it; {remedy}"
        )
    num_blocks = ranks.all_reduce_min(num_blocks)
    gib = (num_blocks + 1) * spec.block_bytes / GIB
    dtype = str(spec.kv_dtype).removeprefix("torch.")
    logger.info("%s: KV pool of %d blocks of %d tokens in %s, %.2f GiB", device, num_blocks, block_size, dtype, gib)
    return num_blocks


def host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu_bytes_for_pool(
    spec: RunnerSpec, device: Device, max_step_tokens: int, run_step: Callable[[torch.Tensor, int], None]
) -> int:
    """Bytes that `gpu_memory_utilization` leaves after weights, workspaces of steps and other processes."""
    workspace = _workspace(spec, device, max_step_tokens, run_step)
    if spec.uses_graphs(device):  # they keep one of their own
        largest_graph = max(MAX_PREFILL_GRAPH_TOKENS, spec.max_num_seqs)
        workspace += _workspace(spec, device, min(max_step_tokens, largest_graph), run_step)
    free, total = device.memory_info()
    return int(total * spec.gpu_memory_utilization) - (total - free) - workspace


def _workspace(spec: RunnerSpec, device: Device, num_tokens: int, run_step: Callable[[torch.Tensor, int], None]) -> int:
    """Bytes that a step of so many tokens takes while it runs."""
    torch.cuda.reset_peak_memory_stats(device.index)
    before = torch.cuda.memory_allocated(device.index)
    try:
        run_step(make_kv_pool(spec, device, 1), num_tokens)
    except torch.OutOfMemoryError as error:
        raise OutOfKVCacheError(
            f"{device} has no room for a step of {num_tokens} tokens ({error}); "
            "lower max_num_batched_tokens or max_num_seqs"
        ) from error
    torch.cuda.synchronize(device.index)
    return torch.cuda.max_memory_allocated(device.index) - before
