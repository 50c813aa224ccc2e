"""The decode batch as it lives on the device: a row for every decoding request, of which the host sends only changes.

Tokens sampled by one step feed the next one here, so a step can be launched before the host has seen the tokens of
the step before it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.scheduler import DecodeRow
from nanovllm.engine.sequence import Lease
from nanovllm.kernels import AttentionMetadata
from nanovllm.layers.sampler import SamplingInputs
from nanovllm.utils.device import Device

NUM_SCALARS = 5
"""Columns before the block table in an uploaded row: slot, last token, position, seed, output index."""


@dataclass(frozen=True)
class DecodeInputs:
    """One decode step over B rows, gathered from the slots; [B] int64 each where not said otherwise."""

    slots: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sampling: SamplingInputs


class DecodeRows:
    """Slots for `max_num_rows` requests and a spare one, which pads a batch to a bucket.

    A request keeps its slot for as long as its lease lasts. The spare slot's tokens go to block `spare_block`.
    """

    def __init__(
        self, device: Device, max_num_rows: int, max_model_len: int, block_size: int, spare_block: int
    ) -> None:
        self.device = device
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.max_num_rows = max_num_rows
        self.spare_slot = max_num_rows
        num_slots, where = max_num_rows + 1, device.torch_device
        max_blocks = -(-max_model_len // block_size)
        self._last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=where)
        self._positions = torch.zeros(num_slots, dtype=torch.int64, device=where)
        self._seeds = torch.zeros(num_slots, dtype=torch.int64, device=where)
        self._output_indices = torch.zeros(num_slots, dtype=torch.int64, device=where)
        self._temperatures = torch.zeros(num_slots, dtype=torch.float32, device=where)
        self._block_tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=where)
        self._block_tables[self.spare_slot] = spare_block
        self._query_starts = torch.arange(num_slots + 1, dtype=torch.int32, device=where)
        self._batch = torch.full((num_slots,), self.spare_slot, dtype=torch.int64, device=where)
        self._batch_on_host: list[int] = []
        self._slot_of: dict[Lease, int] = {}
        self._num_blocks_sent = [0] * num_slots
        self._free_slots = list(range(max_num_rows))

    def update(self, rows: SequenceOf[DecodeRow], size: int) -> None:
        """Makes `rows` the batch, padded to `size`: sends new requests, new blocks and, if it changed, who is in it."""
        slot_of, sent = self._slot_of, self._num_blocks_sent
        joined = [row for row in rows if row.lease not in slot_of]
        if joined:
            self._give_slots(joined)
        batch = [slot_of[row.lease] for row in rows]
        grown = [
            (slot, index, row.lease.decode_table[index])
            for slot, row in zip(batch, rows, strict=True)
            if len(row.lease.decode_table) != sent[slot]
            for index in range(sent[slot], len(row.lease.decode_table))
        ]
        if grown:
            slots, indices, blocks = self.device.tensor(np.array(grown, dtype=np.int64).T.copy())
            self._block_tables.index_put_((slots, indices), blocks.int())
            for slot, index, _ in grown:
                sent[slot] = index + 1
        batch += [self.spare_slot] * (size - len(batch))
        if batch != self._batch_on_host:
            self._batch_on_host = batch
            self._batch[:size] = self.device.tensor(np.array(batch, dtype=np.int64))

    def pad(self, size: int) -> None:
        """Makes `size` spare rows the batch: for warm-up and capture."""
        self._batch_on_host = []
        self._batch[:size] = self.spare_slot

    def gather(self, size: int) -> DecodeInputs:
        """The inputs of the next step; runs on the device alone, so that it can be captured."""
        slots = self._batch[:size]
        positions = self._positions[slots]
        tables = self._block_tables[slots]
        blocks = tables.gather(1, (positions // self.block_size).unsqueeze(1)).squeeze(1)
        metadata = AttentionMetadata(
            slot_mapping=blocks.long() * self.block_size + positions % self.block_size,
            block_tables=tables,
            context_lens=(positions + 1).int(),
            query_starts=self._query_starts[: size + 1],
            max_query_len=1,
            max_context_len=self.max_model_len,
        )
        sampling = SamplingInputs(self._temperatures[slots], self._seeds[slots], self._output_indices[slots])
        return DecodeInputs(slots, self._last_tokens[slots], positions, metadata, sampling)

    def advance(self, inputs: DecodeInputs, token_ids: torch.Tensor) -> None:
        """The sampled tokens are what the next step is fed; on the device alone."""
        self._last_tokens[inputs.slots] = token_ids
        self._positions[inputs.slots] = inputs.positions + 1
        self._output_indices[inputs.slots] = inputs.sampling.output_indices + 1
        self._positions[self.spare_slot :].zero_()

    def _give_slots(self, joined: list[DecodeRow]) -> None:
        for lease in [lease for lease in self._slot_of if lease.ended]:
            self._free_slots.append(self._slot_of.pop(lease))
        max_blocks = self._block_tables.shape[1]
        rows = np.zeros((len(joined), NUM_SCALARS + max_blocks), dtype=np.int64)
        temperatures = np.empty(len(joined), dtype=np.float32)
        for place, row in enumerate(joined):
            seq, table = row.seq, row.lease.decode_table
            slot = self._slot_of[row.lease] = self._free_slots.pop()
            self._num_blocks_sent[slot] = len(table)
            rows[place, :NUM_SCALARS] = slot, seq.token_ids[-1], row.position, seq.seed, row.output_index
            rows[place, NUM_SCALARS : NUM_SCALARS + len(table)] = table
            temperatures[place] = seq.params.float32_temperature
        sent = self.device.tensor(rows)
        slots = sent[:, 0]
        self._last_tokens[slots] = sent[:, 1]
        self._positions[slots] = sent[:, 2]
        self._seeds[slots] = sent[:, 3]
        self._output_indices[slots] = sent[:, 4]
        self._block_tables[slots] = sent[:, NUM_SCALARS:].int()
        self._temperatures[slots] = self.device.tensor(temperatures)
