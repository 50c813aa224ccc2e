"""Pushes KV blocks into another GPU's pool: one launch for any number of blocks.

The caller has enabled peer access from the source's device to the target's and made the source's device current.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_PROGRAMS = 64
"""Enough to fill the link between two GPUs (measured on NVLink: 32 reach 80 %, 64 all of it), few enough to leave
the device to the prefill that is running."""
NUM_PROGRAMS_BESIDE = 16
"""For a layer's KV, which is pushed while the layer attends: few, so that they take little from attention."""
WORDS_PER_PIECE = 4096


def push_blocks(source: torch.Tensor, target: torch.Tensor, blocks: torch.Tensor, num_programs: int) -> None:
    """Copies blocks of `source`, or parts of them, to blocks of `target`.

    Args:
        source: a pool, or one layer's view of it, [num_blocks, ..., block_size, head_dim], each block contiguous; on
            the current device.
        target: the same of another pool, on a device that this one may write to.
        blocks: [1 + 4 N or more] int64 on the source's device: N, then for each of N parts the block of the source, the
            block of the target, the first place in both that is copied and the one behind the last.
        num_programs: number of thread blocks.
    """
    words_per = 4 // source.element_size()
    _push_kernel[(num_programs,)](
        source.view(torch.int32),
        target.view(torch.int32),
        blocks,
        source.stride(0) // words_per,
        target.stride(0) // words_per,
        source[0].numel() // words_per,
        ROW_WORDS=source.shape[-1] // words_per,
        BLOCK_SIZE=source.shape[-2],
        PIECE=WORDS_PER_PIECE,
        num_warps=8,
    )


@triton.jit
def _push_kernel(
    source,
    target,
    blocks,
    source_stride,
    target_stride,
    words,
    ROW_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Programs take pieces of blocks in turn."""
    pieces_per_block = tl.cdiv(words, PIECE)
    num_pieces = tl.load(blocks).to(tl.int32) * pieces_per_block
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        part = blocks + 1 + 4 * (piece // pieces_per_block)
        place = (piece % pieces_per_block) * PIECE + tl.arange(0, PIECE)
        token = place // ROW_WORDS % BLOCK_SIZE
        there = (place < words) & (token >= tl.load(part + 2)) & (token < tl.load(part + 3))
        origin, goal = tl.load(part) * source_stride, tl.load(part + 1) * target_stride
        tl.store(target + goal + place, tl.load(source + origin + place, mask=there), mask=there)
