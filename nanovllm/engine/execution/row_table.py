"""Which row of the batch on the device each decoding request has, and what of it a step is to be sent. No device."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from nanovllm.engine.execution.token_counts import CountedTokens, count_tokens
from nanovllm.engine.scheduling.decode_batch import DecodeRow, DecodeRows
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.kernels import NUM_ROW_FIELDS

NUM_UPLOADED_FIELDS = 1 + NUM_ROW_FIELDS
"""Columns before the block table in an upload: row, then the row's fields."""


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


class DecodeRowTable:
    """The host's side of `DeviceDecodeBatch`: `max_num_rows` rows for requests, and a padding row behind them.

    A request keeps its row for as long as its lease lasts, and block tables have room for `max_blocks` blocks.
    """

    def __init__(self, max_num_rows: int, max_blocks: int) -> None:
        self.max_num_rows = max_num_rows
        self.padding_row = max_num_rows
        self._max_blocks = max_blocks
        self._batch_sent: list[Lease] | None = None
        self._row_of: dict[Lease, int] = {}
        self._num_blocks_sent = [0] * (max_num_rows + 1)
        self._sampled_after: dict[Lease, int] = {}
        """The requests whose first tokens the last step keeps on the device, by index there."""

    def changes(self, rows: DecodeRows) -> RowChanges:
        """The changes that make the batch of `rows` the one to run: new requests and blocks, and the order if changed.

        They count as sent: a caller that cannot apply them calls `forget`.
        """
        leases = rows.batch.leases
        if leases is self._batch_sent:
            grown = self._grown((self._row_of[leases[index]], leases[index]) for index in rows.grown)
            return RowChanges(grown=grown)
        new = [row for row in rows if row.lease not in self._row_of]
        joined, temperatures = self._joined(new, leases)
        counted = count_tokens((self._row_of[row.lease], row.seq) for row in new)
        order = [self._row_of[lease] for lease in leases]
        grown = self._grown(zip(order, leases, strict=True))
        padding = [self.padding_row] * (self.max_num_rows + 1 - len(order))
        self._batch_sent = leases
        return RowChanges(joined, temperatures, counted, grown, np.array(order + padding, dtype=np.int64))

    def forget(self) -> None:
        """Discards all rows, whose state is unknown: every request is sent again, with its last token on the host."""
        self._batch_sent = None
        self._row_of = {}
        self._sampled_after = {}

    def expect_tokens(self, leases: Iterable[Lease]) -> None:
        """Notes the requests that a step samples a first token for, which the device keeps."""
        self._sampled_after = {lease: index for index, lease in enumerate(leases)}

    def batch_changed(self) -> None:
        """Notes that the device has another batch than the one last sent, of the same rows."""
        self._batch_sent = None

    def _joined(self, joined: list[DecodeRow], batch: Collection[Lease]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Assigns a row to each new request of a batch; `joined` and `temperatures` of the changes."""
        if not joined:
            return None, None
        kept = set(batch)  # some of which may have ended since the batch was formed
        self._row_of = {lease: index for lease, index in self._row_of.items() if not lease.ended or lease in kept}
        free = sorted(set(range(self.max_num_rows)).difference(self._row_of.values()))[: len(joined)]
        uploads = np.zeros((len(joined), NUM_UPLOADED_FIELDS + self._max_blocks), dtype=np.int64)
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
