"""The requests that decode on one card: which join, which leave, and which rows are in flight. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.decode_batch import DecodeRow, DecodeRows, HostDecodeBatch
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.scheduling.step_time import StepSize
from nanovllm.engine.sequence import SequenceStatus

LOOK_AHEAD_STEPS = 128
"""How many steps ahead a step is predicted: contexts grow meanwhile, up to the limits of their requests.

The growth of a burst of requests beyond that is not predicted. Predicting up to `max_tokens` would hold others back
for tokens that are allowed but mostly never come, and would ignore the room that requests make when they end.
"""

GROW_AHEAD_TOKENS = 16
"""When a request needs a block, others that will need one within this many tokens get theirs, too, if there are plenty:
the device is then sent new blocks only once in several steps."""


class DecodeSet:
    """Forms the decode part of a card's steps.

    Decode rows in flight count as work on a lease (`in_flight`) only after the lease has ended.
    """

    def __init__(self, card: Card) -> None:
        self._block_manager = card.block_manager
        self._batch = HostDecodeBatch.of((), self._block_manager.block_size)
        self._has_ended_leases = False
        self._joining: list[DecodeRow] = []
        """Requests that are to join the batch: new ones, and those that wait for a block."""
        self._in_flight: list[DecodeRows] = []
        self.waits_for_blocks = False
        """Whether a request waits for blocks of leases that have ended: no new lease may take them first."""

    @property
    def leases(self) -> list[Lease]:
        """The leases of the batch."""
        return self._batch.leases

    @property
    def has_streamed(self) -> bool:
        """Whether a request that decodes, or is to join the batch, is streamed."""
        seqs = itertools.chain(self._batch.seqs, (row.seq for row in self._joining))
        return any(seq.is_streamed and seq.status is SequenceStatus.DECODING for seq in seqs)

    @property
    def size(self) -> StepSize:
        """The size of a step of those that decode now."""
        return StepSize(len(self._batch), int(self._batch.positions.sum()) + len(self._batch))

    def num_tokens_ahead(self) -> int:
        """Context tokens of all requests, LOOK_AHEAD_STEPS from now."""
        joining = sum(row.seq.num_tokens_ahead(LOOK_AHEAD_STEPS) for row in self._joining)
        return self._batch.num_tokens_ahead(LOOK_AHEAD_STEPS) + joining

    def join(self, row: DecodeRow) -> None:
        """A request decodes from the next step on."""
        self._joining.append(row)

    def lease_ended(self, lease: Lease) -> int:
        """Notes that a lease has ended. Returns how many steps in flight still touch its blocks."""
        touching = [rows for rows in self._in_flight if lease in rows.batch.leases]
        for rows in touching:
            rows.ended_leases.append(lease)
        if lease in self._batch.leases:
            self._has_ended_leases = True
        return len(touching)

    def next_rows(self, grow: Callable[[DecodeRow], bool]) -> DecodeRows | None:
        """The rows of the next step: every request with tokens left to decode that gets the block that it needs.

        Args:
            grow: makes room for the KV of a row's next token; returns False if the row sits this step out. May end
                leases, that of the row included.

        Returns:
            The rows, in flight from now on; None if there are none.
        """
        self.waits_for_blocks = False
        grown = self._update_batch(grow)
        if not self._batch:
            return None
        rows = DecodeRows(self._batch, self._batch.positions.copy(), grown)
        self._batch.positions += 1
        self._in_flight.append(rows)
        return rows

    def rows_ended(self, rows: DecodeRows) -> None:
        """Notes that rows are no longer in flight."""
        self._in_flight.remove(rows)

    def rows_halved(self, rows: DecodeRows, parts: list[DecodeRows]) -> None:
        """Replaces rows in flight by the parts that are launched instead."""
        self._in_flight.remove(rows)
        self._in_flight += parts

    def _update_batch(self, grow: Callable[[DecodeRow], bool]) -> list[int]:
        """Updates the batch to the requests that decode next. Returns rows that got blocks in the same batch.

        The oldest request is served first, and younger ones may lose their lease to it.
        """
        batch = self._batch
        index_of = {batch.leases[index]: index for index in batch.due()}
        candidates = [*map(batch.row, index_of.values()), *self._joining]
        self._joining = []
        leaving: set[Lease] = set()
        joined: list[DecodeRow] = []
        grown: list[int] = []
        for row in sorted(candidates, key=lambda row: row.seq.request_id):
            index = index_of.get(row.lease)
            if row.lease.ended:
                continue
            if row.position > row.seq.last_fed_position:
                leaving.add(row.lease)
            elif not grow(row):
                if index is not None:
                    leaving.add(row.lease)
                if not row.lease.ended:
                    self._joining.append(row)
            elif index is None:
                joined.append(row)
            else:
                self._note_growth(index)
                grown.append(index)
        if grown:
            grown += self._grow_ahead()
        if leaving or self._has_ended_leases:
            stays = [not (lease.ended or lease in leaving) for lease in batch.leases]
            self._batch = self._batch.select([index for index, stay in enumerate(stays) if stay])
            self._has_ended_leases = False
        if joined:
            for row in joined:
                row.seq.timeline.mark("decodes")
            self._batch = self._batch.joined_by(HostDecodeBatch.of(joined, self._block_manager.block_size))
        return grown if self._batch is batch else []

    def _grow_ahead(self) -> list[int]:
        """Gives a block to each row that will need one soon, if there is one for every row. Returns those rows."""
        batch, grown = self._batch, []
        is_near = (batch.capacities - batch.positions < GROW_AHEAD_TOKENS) & (batch.capacities <= batch.last_positions)
        for index in is_near.nonzero()[0].tolist():
            if self._block_manager.num_free_blocks > len(batch) and not batch.leases[index].ended:
                batch.leases[index].decode.blocks += self._block_manager.allocate((), 1)
                self._note_growth(index)
                grown.append(index)
        return grown

    def _note_growth(self, index: int) -> None:
        self._batch.capacities[index] = len(self._batch.leases[index].decode.blocks) * self._block_manager.block_size
