"""The decode batch on the device: a row for every decoding request. The host sends only what changes.

Tokens sampled by one step feed the next one here, so a step can be launched before the host has seen the tokens of
the step before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.execution.token_counts import CountedTokens, count_tokens
from nanovllm.engine.scheduling.decode_batch import DecodeRow, DecodeRows
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.scheduling.step import MAX_CHUNKS
from nanovllm.kernels import NUM_ROW_FIELDS, AttentionMetadata, Kernels, RowField
from nanovllm.layers.sampler import SamplingInputs
from nanovllm.utils.device import Device

NUM_UPLOADED_FIELDS = 1 + NUM_ROW_FIELDS
"""Columns before the block table in an upload: row, then the row's fields."""


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


@dataclass(frozen=True)
class RowChanges:
    """What a step changes in the batch on the device; None for no change.

    Attributes:
        joined: [N, NUM_UPLOADED_FIELDS + max_blocks] int64, one for each new request: its row, fields and block table.
            A negative token t is the one that the step before has sampled after its last chunk -1 - t.
        temperatures: [N] float32, of the new requests.
        counted: token counts of the new requests that have penalties.
        grown: [3, N] int64, new blocks of requests that grew: row, index in the block table, block.
        order: [max_num_rows + 1] int64, the rows that make up the batch, in order.
    """

    joined: np.ndarray | None = None
    temperatures: np.ndarray | None = None
    counted: CountedTokens | None = None
    grown: np.ndarray | None = None
    order: np.ndarray | None = None


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
        self._fields = torch.zeros(NUM_ROW_FIELDS, num_rows, dtype=torch.int64, device=where)
        self._temperatures = torch.zeros(num_rows, dtype=torch.float32, device=where)
        self._block_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=where)
        self._block_tables[self.padding_row] = padding_block
        self._query_starts = torch.arange(num_rows + 1, dtype=torch.int32, device=where)
        self._order = torch.full((num_rows,), self.padding_row, dtype=torch.int64, device=where)
        self._batch_sent: list[Lease] | None = None
        self._row_of: dict[Lease, int] = {}
        self._num_blocks_sent = [0] * num_rows
        self._tokens_after_chunks = torch.zeros(MAX_CHUNKS, dtype=torch.int64, device=where)
        self._sampled_after: dict[Lease, int] = {}
        """The requests whose first tokens those are, by index."""

    def changes(self, rows: DecodeRows) -> RowChanges:
        """The changes that make the batch of `rows` the one to run: new requests and blocks, and the order if changed.

        They count as sent: a caller that cannot apply them calls `forget`.
        """
        leases = rows.batch.leases
        if leases is self._batch_sent:
            grown = self._grown((self._row_of[leases[index]], leases[index]) for index in rows.grown)
            return RowChanges(grown=grown)
        new = [row for row in rows if row.lease not in self._row_of]
        joined, temperatures = self._joined(new)
        counted = count_tokens((self._row_of[row.lease], row.seq) for row in new)
        order = [self._row_of[lease] for lease in leases]
        grown = self._grown(zip(order, leases, strict=True))
        padding = [self.padding_row] * (len(self._order) - len(order))
        self._batch_sent = leases
        return RowChanges(joined, temperatures, counted, grown, np.array(order + padding, dtype=np.int64))

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
        self._batch_sent = None
        self._row_of = {}
        self._sampled_after = {}

    def expect_tokens(self, leases: Iterable[Lease]) -> None:
        """Notes the requests that a step samples a first token for: `keep_tokens` is called with these."""
        self._sampled_after = {lease: index for index, lease in enumerate(leases)}

    def keep_tokens(self, token_ids: torch.Tensor) -> None:
        """Keeps the [N] first tokens of requests for the next step, which they may join before the host has them."""
        self._tokens_after_chunks[: len(token_ids)] = token_ids.clamp(min=0)

    def pad(self, size: int) -> None:
        """Makes the batch `size` times the padding row: for warm-up and capture."""
        self._batch_sent = None
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

    def _joined(self, joined: list[DecodeRow]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Assigns a row to each new request; `joined` and `temperatures` of the changes."""
        if not joined:
            return None, None
        self._row_of = {lease: index for lease, index in self._row_of.items() if not lease.ended}
        free = sorted(set(range(self.max_num_rows)).difference(self._row_of.values()))[: len(joined)]
        uploads = np.zeros((len(joined), NUM_UPLOADED_FIELDS + self._block_tables.shape[1]), dtype=np.int64)
        temperatures = np.empty(len(joined), dtype=np.float32)
        for number, (index, row) in enumerate(zip(free, joined, strict=True)):
            seq, table = row.seq, row.lease.decode.blocks
            # A token that the step before samples is on the device alone: its index there, as a negative number.
            # Whose lease has ended in a step that is launched in parts may be known nowhere, and matters no more.
            is_known = row.lease.ended or row.position < seq.num_tokens
            token = seq.token_ids[-1] if is_known else -1 - self._sampled_after[row.lease]
            fields = (index, token, row.position, seq.seed, row.output_index)
            uploads[number, :NUM_UPLOADED_FIELDS] = fields
            uploads[number, NUM_UPLOADED_FIELDS : NUM_UPLOADED_FIELDS + len(table)] = table
            temperatures[number] = seq.params.float32_temperature
            self._row_of[row.lease] = index
            self._num_blocks_sent[index] = len(table)
        return uploads, temperatures

    def _grown(self, held: Iterable[tuple[int, Lease]]) -> np.ndarray | None:
        """Blocks that the leases of these rows got since they were last sent: `grown` of the changes."""
        sent = self._num_blocks_sent
        grown = [
            (row, index, lease.decode.blocks[index])
            for row, lease in held
            if len(lease.decode.blocks) != sent[row]
            for index in range(sent[row], len(lease.decode.blocks))
        ]
        for row, index, _ in grown:
            sent[row] = index + 1
        return np.array(grown, dtype=np.int64).T.copy() if grown else None
