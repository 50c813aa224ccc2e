"""The decode batch as it lives on the device: a row for every decoding request, of which the host sends only changes.

Tokens sampled by one step feed the next one here, so a step can be launched before the host has seen the tokens of
the step before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.scheduling.decode_batch import DecodeRow, DecodeRows
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.kernels import NUM_ROW_FIELDS, AttentionMetadata, Kernels, RowField
from nanovllm.layers.sampler import SamplingInputs
from nanovllm.utils.device import Device

NUM_SCALARS = 1 + NUM_ROW_FIELDS
"""Columns before the block table in an uploaded row: slot, then the slot's numbers."""


@dataclass(frozen=True)
class DecodeInputs:
    """One decode step over B rows, gathered from the slots; [B] int64 each where not said otherwise."""

    slots: torch.Tensor
    numbers: torch.Tensor
    """[NUM_ROW_FIELDS, B]: those of the slots."""
    metadata: AttentionMetadata
    sampling: SamplingInputs

    @property
    def input_ids(self) -> torch.Tensor:
        return self.numbers[RowField.LAST_TOKEN]

    @property
    def positions(self) -> torch.Tensor:
        return self.numbers[RowField.POSITION]


@dataclass(frozen=True)
class RowChanges:
    """What a step changes of the batch on the device; None where nothing.

    Attributes:
        joined: [N, ...] int64, of each request that is new: slot, the slot's numbers, block table.
        temperatures: [N] float32, theirs.
        grown: [3, N] int64, blocks that requests got: slot, place in the table, block.
        order: [max_num_rows + 1] int64, the slots of the batch.
    """

    joined: np.ndarray | None = None
    temperatures: np.ndarray | None = None
    grown: np.ndarray | None = None
    order: np.ndarray | None = None


class DeviceDecodeBatch:
    """Slots for `max_num_rows` requests and a spare one, which pads a batch to a bucket.

    A request keeps its slot for as long as its lease lasts. The spare slot's tokens go to block `spare_block`.
    """

    def __init__(
        self,
        device: Device,
        backend: Kernels,
        max_num_rows: int,
        max_model_len: int,
        block_size: int,
        spare_block: int,
    ) -> None:
        self.device = device
        self.backend = backend
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.max_num_rows = max_num_rows
        self.spare_slot = max_num_rows
        self._spare_block = spare_block
        num_slots, where = max_num_rows + 1, device.torch_device
        max_blocks = -(-max_model_len // block_size)
        self._numbers = torch.zeros(NUM_ROW_FIELDS, num_slots, dtype=torch.int64, device=where)
        self._temperatures = torch.zeros(num_slots, dtype=torch.float32, device=where)
        self._block_tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=where)
        self._block_tables[self.spare_slot] = spare_block
        self._query_starts = torch.arange(num_slots + 1, dtype=torch.int32, device=where)
        self._order = torch.full((num_slots,), self.spare_slot, dtype=torch.int64, device=where)
        self._batch_sent: list[Lease] | None = None
        self._slot_of: dict[Lease, int] = {}
        self._num_blocks_sent = [0] * num_slots

    def changes(self, rows: DecodeRows) -> RowChanges:
        """What the device is to be told so that the rows' batch is the one to run: new requests, new blocks and, if it
        changed, who is in it. Whoever cannot tell it calls `forget`."""
        leases = rows.batch.leases
        if leases is self._batch_sent:
            grown = self._grown((self._slot_of[leases[place]], leases[place]) for place in rows.grown)
            return RowChanges(grown=grown)
        joined, temperatures = self._joined([row for row in rows if row.lease not in self._slot_of])
        slots = [self._slot_of[lease] for lease in leases]
        grown = self._grown(zip(slots, leases, strict=True))
        order = np.array(slots + [self.spare_slot] * (len(self._order) - len(slots)), dtype=np.int64)
        self._batch_sent = leases
        return RowChanges(joined, temperatures, grown, order)

    def apply(self, changes: RowChanges) -> None:
        """Tells the device, here or on another rank."""
        if changes.joined is not None and changes.temperatures is not None:
            sent = self.device.tensor(changes.joined)
            at = sent[:, 0]
            self._numbers[:, at] = sent[:, 1:NUM_SCALARS].T
            self._block_tables[at] = sent[:, NUM_SCALARS:].int()
            self._temperatures[at] = self.device.tensor(changes.temperatures)
        if changes.grown is not None:
            at, indices, blocks = self.device.tensor(changes.grown)
            self._block_tables.index_put_((at, indices), blocks.int())
        if changes.order is not None:
            self._order.copy_(self.device.tensor(changes.order))

    def forget(self) -> None:
        """Nobody knows what the slots hold: all requests are sent anew, by the last of the tokens that the host has."""
        self._batch_sent = None
        self._slot_of = {}

    def pad(self, size: int) -> None:
        """Makes `size` spare rows the batch: for warm-up and capture."""
        self._batch_sent = None
        self._order[:size] = self.spare_slot

    def pretend(self, size: int, context: int) -> None:
        """Makes `size` requests of `context` tokens in blocks at random places the batch: to time a step of them."""
        self.forget()
        where = self._block_tables.device
        self._order[:size] = torch.arange(size, device=where)
        self._numbers[RowField.POSITION, :size] = context - 1
        self._block_tables[:size] = torch.randint(self._spare_block, self._block_tables[:size].shape, device=where)

    def gather(self, size: int) -> DecodeInputs:
        """The inputs of the next step; runs on the device alone, so that it can be captured."""
        slots = self._order[:size]
        numbers, temperatures, tables, slot_mapping, context_lens = self.backend.gather_rows(
            slots, self._numbers, self._temperatures, self._block_tables, self.block_size
        )
        metadata = AttentionMetadata(
            slot_mapping=slot_mapping,
            block_tables=tables,
            context_lens=context_lens,
            query_starts=self._query_starts[: size + 1],
            max_query_len=1,
            max_context_len=self.max_model_len,
        )
        sampling = SamplingInputs(temperatures, numbers[RowField.SEED], numbers[RowField.OUTPUT_INDEX])
        return DecodeInputs(slots, numbers, metadata, sampling)

    def advance(self, inputs: DecodeInputs, token_ids: torch.Tensor) -> None:
        """The sampled tokens are what the next step is fed; on the device alone."""
        self.backend.advance_rows(inputs.slots, inputs.numbers, token_ids, self._numbers, self.spare_slot)

    def correct(self, token_ids: torch.Tensor) -> None:
        """The first rows of the batch have sampled these, [N] int64, instead of what `advance` was told."""
        self._numbers[RowField.LAST_TOKEN].index_copy_(0, self._order[: len(token_ids)], token_ids.clamp(min=0))

    def _joined(self, joined: list[DecodeRow]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Gives each a slot; what fills it."""
        if not joined:
            return None, None
        self._slot_of = {lease: slot for lease, slot in self._slot_of.items() if not lease.ended}
        slots = sorted(set(range(self.max_num_rows)).difference(self._slot_of.values()))[: len(joined)]
        numbers = np.zeros((len(joined), NUM_SCALARS + self._block_tables.shape[1]), dtype=np.int64)
        temperatures = np.empty(len(joined), dtype=np.float32)
        for place, (slot, row) in enumerate(zip(slots, joined, strict=True)):
            seq, table = row.seq, row.lease.decode.blocks
            numbers[place, :NUM_SCALARS] = slot, seq.token_ids[-1], row.position, seq.seed, row.output_index
            numbers[place, NUM_SCALARS : NUM_SCALARS + len(table)] = table
            temperatures[place] = seq.params.float32_temperature
            self._slot_of[row.lease] = slot
            self._num_blocks_sent[slot] = len(table)
        return numbers, temperatures

    def _grown(self, held: Iterable[tuple[int, Lease]]) -> np.ndarray | None:
        """The blocks that the leases of these slots got since: [3, N], slot, place in the table, block."""
        sent = self._num_blocks_sent
        grown = [
            (slot, index, lease.decode.blocks[index])
            for slot, lease in held
            if len(lease.decode.blocks) != sent[slot]
            for index in range(sent[slot], len(lease.decode.blocks))
        ]
        for slot, index, _ in grown:
            sent[slot] = index + 1
        return np.array(grown, dtype=np.int64).T.copy() if grown else None
