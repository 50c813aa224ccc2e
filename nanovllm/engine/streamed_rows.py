"""The streamed requests of a decode batch, prepared once so that a step's outputs are made without Python per row.

The batch is the same for many steps. Most tokens of most requests are a piece of text by themselves and end nothing:
these are looked up and emitted here, all at once; `OutputProcessor` does the others one by one.
"""

from __future__ import annotations

import itertools
from collections import abc, deque
from dataclasses import dataclass

import numpy as np

from nanovllm.engine.callers import Inbox
from nanovllm.engine.output_rows import OutputRows
from nanovllm.engine.scheduling.decode_batch import MAX_STOP_IDS, HostDecodeBatch
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.text.request_text import NoText, RequestText
from nanovllm.outputs import RequestOutput


class StreamedRows:
    """Emits tokens of the streamed requests of one batch, without Python per row.

    Args:
        batch: the decode batch.
        texts, inboxes: by request id, of all requests that have not ended.
    """

    def __init__(
        self, batch: HostDecodeBatch, texts: abc.Mapping[int, RequestText], inboxes: abc.Mapping[int, Inbox]
    ) -> None:
        self.batch = batch
        # Requests that have ended since the launch have neither; nothing more is emitted for them.
        nothing, nobody = NoText(), Inbox()
        self._texts = [texts.get(seq.request_id, nothing) for seq in batch.seqs]
        self._inboxes = [inboxes.get(seq.request_id, nobody) for seq in batch.seqs]
        lookups = [
            text.token_texts if seq.request_id in texts else None
            for seq, text in zip(batch.seqs, self._texts, strict=True)
        ]
        self._lookups = [{} if lookup is None else lookup for lookup in lookups]
        self._ttfts_s = [None if seq.first_token_s is None else seq.first_token_s - seq.arrival_s for seq in batch.seqs]
        self._request_ids = [seq.request_id for seq in batch.seqs]
        self.are_simple = np.array(
            [
                lookup is not None
                and seq.is_streamed
                and seq.params.logprobs is None
                and len(seq.stop_token_ids) <= MAX_STOP_IDS
                for seq, lookup in zip(batch.seqs, lookups, strict=True)
            ],
            dtype=bool,
        )
        """[B] bool: rows of streamed requests that may be emitted here, token by token."""
        self._have_no_text = all(type(text) is NoText for text in self._texts)
        self._columns = _Columns(
            self._request_ids,
            self._ttfts_s,
            batch.seqs,
            batch.token_lists,
            [inbox.outputs for inbox in self._inboxes],
            set(self._inboxes),
        )

    def emit(self, indices: list[int], token_ids: list[int]) -> list[int]:
        """Appends the next tokens to rows and emits them.

        Args:
            indices: rows of the batch that are simple, whose tokens end nothing.
            token_ids: sampled tokens of all rows of the batch.

        Returns:
            The rows that were left out, since the text of their token depends on other tokens.
        """
        if self._have_no_text:
            self._commit(indices, None, token_ids)
            return []
        rows, deltas, left = [], [], []
        for index in indices:
            text = self._texts[index]
            delta = None if text.has_open_text else self._lookups[index][token_ids[index]]
            if delta is None:
                left.append(index)
            else:
                rows.append(index)
                deltas.append(delta)
        self._commit(rows, deltas, token_ids)
        return left

    def _commit(self, rows: list[int], deltas: list[str] | None, token_ids: list[int]) -> None:
        columns, chosen = self._columns, token_ids
        if len(rows) < len(self.batch):
            columns = columns.of(rows, self._inboxes)
            chosen = [token_ids[index] for index in rows]
        new = OutputRows(columns.request_ids, chosen, deltas, columns.ttfts_s)
        # Of rows with one inbox, whoever takes them makes single outputs, or need not.
        outputs = [new] if len(columns.inboxes) == 1 < len(rows) else list(new.outputs())
        # One operation of the interpreter: an interrupt finds all of it done, or nothing.
        deque(
            itertools.chain(
                map(list.append, columns.token_lists, chosen),
                map(deque.append, columns.queues, outputs),
                # By then the tokens above are among them.
                map(setattr, columns.seqs, itertools.repeat("num_emitted_tokens"), map(len, columns.token_lists)),
            ),
            maxlen=0,
        )
        for inbox in columns.inboxes:
            inbox.ring()


@dataclass(frozen=True)
class _Columns:
    """What outputs of rows are made of and where they go, each a list over the rows; `inboxes` has each once."""

    request_ids: list[int]
    ttfts_s: list[float | None]
    seqs: list[Sequence]
    token_lists: list[list[int]]
    queues: list[deque[RequestOutput | OutputRows]]
    inboxes: set[Inbox]

    def of(self, rows: list[int], inboxes: list[Inbox]) -> _Columns:
        """These columns for some of the rows; `inboxes` has those of all rows."""
        return _Columns(
            [self.request_ids[index] for index in rows],
            [self.ttfts_s[index] for index in rows],
            [self.seqs[index] for index in rows],
            [self.token_lists[index] for index in rows],
            [self.queues[index] for index in rows],
            {inboxes[index] for index in rows},
        )
