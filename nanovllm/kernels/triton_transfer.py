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
WORDS_PER_PIECE = 4096


def push_blocks(source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copies blocks `pairs[:, 0]` of `source` to blocks `pairs[:, 1]` of `target`.

    Args:
        source: a pool, contiguous [num_blocks, ...], on the current device.
        target: a pool of the same block shape, on a device that this one may write to.
        pairs: [N, 2] int64 on the source's device.
    """
    words = source[0].nbytes // 4
    _push_kernel[(NUM_PROGRAMS,)](
        source.view(-1).view(torch.int32),
        target.view(-1).view(torch.int32),
        pairs,
        pairs.shape[0] * triton.cdiv(words, WORDS_PER_PIECE),
        words,
        PIECE=WORDS_PER_PIECE,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["num_pieces"])
def _push_kernel(source, target, pairs, num_pieces, words, PIECE: tl.constexpr):
    """Programs take pieces of blocks in turn."""
    pieces_per_block = tl.cdiv(words, PIECE)
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        pair = piece // pieces_per_block
        place = (piece % pieces_per_block) * PIECE + tl.arange(0, PIECE)
        there = place < words
        origin = tl.load(pairs + 2 * pair) * words
        goal = tl.load(pairs + 2 * pair + 1) * words
        tl.store(target + goal + place, tl.load(source + origin + place, mask=there), mask=there)
