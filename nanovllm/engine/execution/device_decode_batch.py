"""The decode batch on the device: a row for every decoding request. The host sends only what changes.

Tokens sampled by one step feed the next one here, so a step can be launched before the host has seen the tokens of
the step before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.engine.execution.row_table import NUM_UPLOADED_FIELDS, DecodeRowTable, RowChanges
from nanovllm.engine.scheduling.step import MAX_CHUNKS
from nanovllm.kernels import NUM_ROW_FIELDS, AttentionMetadata, Kernels, RowField
from nanovllm.layers.sampler import SamplingInputs
from nanovllm.utils.device import Device


@dataclass(frozen=True)
class DecodeInputs:
    """One decode step over B rows of the batch; [B] int64 each where not said otherwise."""

    rows: torch.Tensor
    fields: torch.Tensor
    """[NUM_ROW_FIELDS, B]: those of the rows."""
    metadata: AttentionMetadata
    sampling: SamplingInputs

    @property
    def input_ids(self) -> torch.Tensor:
        return self.fields[RowField.LAST_TOKEN]

    @property
    def positions(self) -> torch.Tensor:
        return self.fields[RowField.POSITION]


class DeviceDecodeBatch:
    """Rows for `max_num_rows` requests and a padding row, which fills a batch up to a bucket.

    A request keeps its row for as long as its lease lasts. The padding row's KV goes to block `padding_block`.
    """

    def __init__(
        self,
        device: Device,
        backend: Kernels,
        max_num_rows: int,
        max_model_len: int,
        block_size: int,
        padding_block: int,
    ) -> None:
        self.device = device
        self.backend = backend
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.max_num_rows = max_num_rows
        self.padding_row = max_num_rows
        self._padding_block = padding_block
        num_rows, where = max_num_rows + 1, device.torch_device
        max_blocks = -(-max_model_len // block_size)
        self.table = DecodeRowTable(max_num_rows, max_blocks)
        self._fields = torch.zeros(NUM_ROW_FIELDS, num_rows, dtype=torch.int64, device=where)
        self._temperatures = torch.zeros(num_rows, dtype=torch.float32, device=where)
        self._block_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=where)
        self._block_tables[self.padding_row] = padding_block
        self._query_starts = torch.arange(num_rows + 1, dtype=torch.int32, device=where)
        self._order = torch.full((num_rows,), self.padding_row, dtype=torch.int64, device=where)
        self._tokens_after_chunks = torch.zeros(MAX_CHUNKS, dtype=torch.int64, device=where)

    def apply(self, changes: RowChanges) -> None:
        """Sends changes to the device; on each rank."""
        if changes.joined is not None and changes.temperatures is not None:
            sent = self.device.tensor(changes.joined)
            at, fields = sent[:, 0], sent[:, 1:NUM_UPLOADED_FIELDS].T
            self._fields[:, at] = fields
            tokens = fields[RowField.LAST_TOKEN]
            of_chunks = self._tokens_after_chunks[(-1 - tokens).clamp(min=0)]
            self._fields[RowField.LAST_TOKEN, at] = torch.where(tokens < 0, of_chunks, tokens)
            self._block_tables[at] = sent[:, NUM_UPLOADED_FIELDS:].int()
            self._temperatures[at] = self.device.tensor(changes.temperatures)
        if changes.grown is not None:
            at, indices, blocks = self.device.tensor(changes.grown)
            self._block_tables.index_put_((at, indices), blocks.int())
        if changes.order is not None:
            self._order.copy_(self.device.tensor(changes.order))

    def forget(self) -> None:
        """Discards all rows, whose state is unknown: every request is sent again, with its last token on the host."""
        self.table.forget()

    def keep_tokens(self, token_ids: torch.Tensor) -> None:
        """Keeps the [N] first tokens of requests for the next step, which they may join before the host has them."""
        self._tokens_after_chunks[: len(token_ids)] = token_ids.clamp(min=0)

    def pad(self, size: int) -> None:
        """Makes the batch `size` times the padding row: for warm-up and capture."""
        self.table.batch_changed()
        self._order[:size] = self.padding_row

    def fill_with_dummies(self, size: int, context: int) -> None:
        """Fills the batch with `size` dummy requests of `context` tokens in random blocks, to time a step.

        They sample different tokens, so that from the second step on these pass different experts.
        """
        self.forget()
        where = self._block_tables.device
        self._order[:size] = torch.arange(size, device=where)
        self._fields[RowField.POSITION, :size] = context - 1
        self._fields[RowField.SEED, :size] = torch.arange(size, device=where)
        self._temperatures[:size] = 1.0
        self._block_tables[:size] = torch.randint(self._padding_block, self._block_tables[:size].shape, device=where)

    def gather(self, size: int) -> DecodeInputs:
        """The inputs of the next step; runs on the device alone, so that it can be captured."""
        rows = self._order[:size]
        fields, temperatures, tables, slot_mapping, context_lens = self.backend.gather_rows(
            rows, self._fields, self._temperatures, self._block_tables, self.block_size
        )
        metadata = AttentionMetadata(
            slot_mapping=slot_mapping,
            block_tables=tables,
            context_lens=context_lens,
            query_starts=self._query_starts[: size + 1],
            max_query_len=1,
            max_context_len=self.max_model_len,
            padding_slot=self._padding_block * self.block_size,
        )
        sampling = SamplingInputs(temperatures, fields[RowField.SEED], fields[RowField.OUTPUT_INDEX])
        return DecodeInputs(rows, fields, metadata, sampling)

    def advance(self, inputs: DecodeInputs, token_ids: torch.Tensor) -> None:
        """Makes the sampled [B] tokens the input of the next step; runs on the device alone."""
        self.backend.advance_rows(inputs.rows, inputs.fields, token_ids, self._fields, self.padding_row)

    def first(self, num_rows: int) -> torch.Tensor:
        """[num_rows] int64: the first rows of the batch."""
        return self._order[:num_rows]

    def correct(self, token_ids: torch.Tensor) -> None:
        """Replaces the tokens that `advance` took for the first N rows of the batch by these, [N] int64."""
        self._fields[RowField.LAST_TOKEN].index_copy_(0, self._order[: len(token_ids)], token_ids.clamp(min=0))
