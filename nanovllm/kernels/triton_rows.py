"""Gathers the decode batch's rows before a step and advances them after it, in one kernel each instead of twenty.

The caller makes the tensors' device the current one: Triton launches on the current device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm.kernels import NUM_ROW_FIELDS, RowField
from nanovllm.kernels.triton_overlap import begin, overlap

TILE_BLOCKS = 128
TILE_ROWS = 128


def gather_rows(
    indices: torch.Tensor, fields: torch.Tensor, temperatures: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows at these indices, with slot mapping and context lengths; copies only the used part of block tables."""
    num_rows, max_blocks = len(indices), block_tables.shape[1]
    gathered = fields.new_empty(NUM_ROW_FIELDS, num_rows)
    row_temperatures = temperatures.new_empty(num_rows)
    row_tables = block_tables.new_empty(num_rows, max_blocks)
    slot_mapping = fields.new_empty(num_rows)
    context_lens = block_tables.new_empty(num_rows)
    _gather_rows_kernel[(num_rows,)](
        indices,
        fields,
        temperatures,
        block_tables,
        gathered,
        row_temperatures,
        row_tables,
        slot_mapping,
        context_lens,
        fields.shape[1],
        max_blocks,
        NUM_FIELDS=NUM_ROW_FIELDS,
        POSITION=RowField.POSITION.value,
        BLOCK_SIZE=block_size,
        TILE=TILE_BLOCKS,
        num_warps=1,
        **overlap(indices.device),
    )
    return gathered, row_temperatures, row_tables, slot_mapping, context_lens


def advance_rows(
    indices: torch.Tensor, gathered: torch.Tensor, token_ids: torch.Tensor, fields: torch.Tensor, padding_row: int
) -> None:
    """Makes `fields` the input of the next step: the sampled tokens (0 for a negative one), one position further.

    The padding row stays at its first position.
    """
    num_rows = len(indices)
    _advance_rows_kernel[(triton.cdiv(num_rows, TILE_ROWS),)](
        indices,
        gathered,
        token_ids,
        fields,
        num_rows,
        fields.shape[1],
        padding_row,
        LAST_TOKEN=RowField.LAST_TOKEN.value,
        POSITION=RowField.POSITION.value,
        OUTPUT_INDEX=RowField.OUTPUT_INDEX.value,
        TILE=TILE_ROWS,
        **overlap(indices.device),
    )


@triton.jit
def _gather_rows_kernel(
    indices,
    fields,
    temperatures,
    block_tables,
    gathered,
    row_temperatures,
    row_tables,
    slot_mapping,
    context_lens,
    num_stored,
    max_blocks,
    NUM_FIELDS: tl.constexpr,
    POSITION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program for one row."""
    begin(OVERLAPS)
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    index = tl.load(indices + row)
    position = tl.load(fields + POSITION * num_stored + index)
    for field in tl.static_range(NUM_FIELDS):
        tl.store(gathered + field * num_rows + row, tl.load(fields + field * num_stored + index))
    tl.store(row_temperatures + row, tl.load(temperatures + index))
    table = block_tables + index * max_blocks
    last = (position // BLOCK_SIZE).to(tl.int32)
    block = tl.load(table + last).to(tl.int64)
    tl.store(slot_mapping + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
    tl.store(context_lens + row, (position + 1).to(tl.int32))
    for first in range(0, last + 1, TILE):
        blocks = first + tl.arange(0, TILE)
        values = tl.load(table + blocks, mask=blocks <= last, other=0)
        tl.store(row_tables + row.to(tl.int64) * max_blocks + blocks, values, mask=blocks <= last)


@triton.jit(do_not_specialize=["num_rows"])
def _advance_rows_kernel(
    indices,
    gathered,
    token_ids,
    fields,
    num_rows,
    num_stored,
    padding_row,
    LAST_TOKEN: tl.constexpr,
    POSITION: tl.constexpr,
    OUTPUT_INDEX: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = rows < num_rows
    index = tl.load(indices + rows, mask=there, other=0)
    position = tl.load(gathered + POSITION * num_rows + rows, mask=there, other=0) + 1
    output_index = tl.load(gathered + OUTPUT_INDEX * num_rows + rows, mask=there, other=0) + 1
    token = tl.load(token_ids + rows, mask=there, other=0)
    tl.store(fields + LAST_TOKEN * num_stored + index, tl.maximum(token, 0), mask=there)
    tl.store(fields + POSITION * num_stored + index, tl.where(index == padding_row, 0, position), mask=there)
    tl.store(fields + OUTPUT_INDEX * num_stored + index, output_index, mask=there)
