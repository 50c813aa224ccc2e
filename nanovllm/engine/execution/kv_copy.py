"""Ways to copy KV blocks from one runner's pool to another's, and their checksums."""

from __future__ import annotations

from collections import abc
from typing import Any

import torch

from nanovllm.engine.execution.model_inputs import block_list
from nanovllm.engine.scheduling.step import BlockPair
from nanovllm.utils.device import enable_peer_access, wait_event


def _copy_blocks(source: Any, target: Any, pairs: abc.Sequence[BlockPair]) -> None:
    # Across GPUs torch copies on the source's current stream and synchronizes it with the target's current stream.
    for block, target_block in pairs:
        target.kv_pool[target_block].copy_(source.kv_pool[block], non_blocking=True)


def _push_blocks(source: Any, target: Any, pairs: abc.Sequence[BlockPair]) -> None:
    # Imported here: a machine without GPUs may lack triton.
    from nanovllm.kernels.triton_transfer import NUM_PROGRAMS, push_blocks

    enable_peer_access(source.device, target.device)
    blocks = block_list([(*pair, 0, source.block_size) for pair in pairs])
    push_blocks(source.kv_pool, target.kv_pool, source.device.tensor(blocks), NUM_PROGRAMS)


def _stage_blocks(source: Any, target: Any, pairs: abc.Sequence[BlockPair]) -> None:
    for block, target_block in pairs:
        block_of_source = source.kv_pool[block]
        host = torch.empty(block_of_source.shape, dtype=block_of_source.dtype, device="cpu", pin_memory=True)
        host.copy_(block_of_source, non_blocking=True)
        staged = source.record_copy_event()
        with target.on(target.copy_stream):
            wait_event(target.copy_stream, staged)
            target.kv_pool[target_block].copy_(host, non_blocking=True)


COPY_METHODS = {"copy": _copy_blocks, "push": _push_blocks, "staged": _stage_blocks}


def checksum_layers(block: torch.Tensor) -> torch.Tensor:
    """[num_layers] int64 of one block: the sum modulo 2^64 of its 16-bit words, each times an odd number of its own."""
    words = block.flatten(1).view(torch.int16).long()
    return (words * torch.arange(1, 2 * words.shape[1], 2, device=words.device)).sum(dim=1)
