"""The decode batch's rows, before and after a step, in one kernel each: torch would take twenty.

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
    slots: torch.Tensor, numbers: torch.Tensor, temperatures: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of these slots, with where their tokens go; of the block tables as much as is in use."""
    num_rows, max_blocks = len(slots), block_tables.shape[1]
    row_numbers = numbers.new_empty(NUM_ROW_FIELDS, num_rows)
    row_temperatures = temperatures.new_empty(num_rows)
    row_tables = block_tables.new_empty(num_rows, max_blocks)
    slot_mapping = numbers.new_empty(num_rows)
    context_lens = block_tables.new_empty(num_rows)
    _gather_rows_kernel[(num_rows,)](
        slots,
        numbers,
        temperatures,
        block_tables,
        row_numbers,
        row_temperatures,
        row_tables,
        slot_mapping,
        context_lens,
        numbers.shape[1],
        max_blocks,
        NUM_NUMBERS=NUM_ROW_FIELDS,
        POSITION=RowField.POSITION.value,
        BLOCK_SIZE=block_size,
        TILE=TILE_BLOCKS,
        num_warps=1,
        **overlap(slots.device),
    )
    return row_numbers, row_temperatures, row_tables, slot_mapping, context_lens


def advance_rows(
    slots: torch.Tensor, row_numbers: torch.Tensor, token_ids: torch.Tensor, numbers: torch.Tensor, spare_slot: int
) -> None:
    """What the next step is fed: the sampled tokens, 0 for a negative one, a place further.

    The spare slot stays at its first place.
    """
    num_rows = len(slots)
    _advance_rows_kernel[(triton.cdiv(num_rows, TILE_ROWS),)](
        slots,
        row_numbers,
        token_ids,
        numbers,
        num_rows,
        numbers.shape[1],
        spare_slot,
        LAST_TOKEN=RowField.LAST_TOKEN.value,
        POSITION=RowField.POSITION.value,
        OUTPUT_INDEX=RowField.OUTPUT_INDEX.value,
        TILE=TILE_ROWS,
        **overlap(slots.device),
    )


@triton.jit
def _gather_rows_kernel(
    slots,
    numbers,
    temperatures,
    block_tables,
    row_numbers,
    row_temperatures,
    row_tables,
    slot_mapping,
    context_lens,
    num_slots,
    max_blocks,
    NUM_NUMBERS: tl.constexpr,
    POSITION: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program for one row."""
    begin(OVERLAPS)
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    slot = tl.load(slots + row)
    position = tl.load(numbers + POSITION * num_slots + slot)
    for number in tl.static_range(NUM_NUMBERS):
        tl.store(row_numbers + number * num_rows + row, tl.load(numbers + number * num_slots + slot))
    tl.store(row_temperatures + row, tl.load(temperatures + slot))
    table = block_tables + slot * max_blocks
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
    slots,
    row_numbers,
    token_ids,
    numbers,
    num_rows,
    num_slots,
    spare_slot,
    LAST_TOKEN: tl.constexpr,
    POSITION: tl.constexpr,
    OUTPUT_INDEX: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    begin(OVERLAPS)
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = rows < num_rows
    slot = tl.load(slots + rows, mask=there, other=0)
    position = tl.load(row_numbers + POSITION * num_rows + rows, mask=there, other=0) + 1
    output_index = tl.load(row_numbers + OUTPUT_INDEX * num_rows + rows, mask=there, other=0) + 1
    token = tl.load(token_ids + rows, mask=there, other=0)
    tl.store(numbers + LAST_TOKEN * num_slots + slot, tl.maximum(token, 0), mask=there)
    tl.store(numbers + POSITION * num_slots + slot, tl.where(slot == spare_slot, 0, position), mask=there)
    tl.store(numbers + OUTPUT_INDEX * num_slots + slot, output_index, mask=there)
