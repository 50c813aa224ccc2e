"""The requests that decode together, as arrays with a row for each, so that a step costs little Python per request.

Knows nothing of pools, devices or scheduling decisions. No torch.
"""

from __future__ import annotations

import itertools
from collections import abc
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.sequence import Sequence

NO_TOKEN = -1
MAX_STOP_IDS = 8
"""Stop tokens that a row of `stop_ids` holds; the tokens of a request with more are checked one by one."""


class DecodeRow(NamedTuple):
    """The last token of a request, which a step runs through the model to sample the next one.

    Its KV goes to `position`. With steps in flight the host knows the position but not yet the token.
    """

    seq: Sequence
    lease: Lease
    position: int

    @property
    def output_index(self) -> int:
        """How many output tokens the request has before the one that this step samples."""
        return self.position + 1 - self.seq.num_prompt_tokens


def _integers(values: abc.Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _checks_every_token(seq: Sequence) -> bool:
    return seq.is_streamed or seq.params.logprobs is not None or len(seq.stop_token_ids) > MAX_STOP_IDS


@dataclass(eq=False)
class HostDecodeBatch:
    """Requests that decode together, step after step. When one joins or leaves, a new batch is made.

    Attributes:
        seqs, leases: of the B rows.
        positions: [B] int64, where the KV of the next token fed goes; moves on with every step.
        capacities: [B] int64, tokens that the leased blocks hold; grows with them.
        last_positions: [B] int64, each request's `last_fed_position`.
        in_graph_positions: [B] int64, each request's `in_graph_position`.
        checks_every_token: [B] bool, whether every token is checked one by one: the request is streamed, may end by a
            stop string, has log-probabilities, or has more stop tokens than `stop_ids` holds.
        stop_ids: [B, MAX_STOP_IDS] int64, tokens that end the request, padded with NO_TOKEN.
    """

    seqs: list[Sequence]
    leases: list[Lease]
    positions: np.ndarray
    capacities: np.ndarray
    last_positions: np.ndarray
    in_graph_positions: np.ndarray
    checks_every_token: np.ndarray
    stop_ids: np.ndarray

    @classmethod
    def of(cls, rows: abc.Sequence[DecodeRow], block_size: int) -> HostDecodeBatch:
        seqs = [row.seq for row in rows]
        stop_ids = np.full((len(rows), MAX_STOP_IDS), NO_TOKEN, dtype=np.int64)
        for index, seq in enumerate(seqs):
            if len(seq.stop_token_ids) <= MAX_STOP_IDS:
                stop_ids[index, : len(seq.stop_token_ids)] = sorted(seq.stop_token_ids)
        return cls(
            seqs,
            [row.lease for row in rows],
            positions=_integers(row.position for row in rows),
            capacities=_integers(len(row.lease.decode.blocks) * block_size for row in rows),
            last_positions=_integers(seq.last_fed_position for seq in seqs),
            in_graph_positions=_integers(seq.in_graph_position for seq in seqs),
            checks_every_token=np.array([_checks_every_token(seq) for seq in seqs], dtype=bool),
            stop_ids=stop_ids,
        )

    def __len__(self) -> int:
        return len(self.seqs)

    @cached_property
    def token_lists(self) -> list[list[int]]:
        """Each request's `token_ids`."""
        return [seq.token_ids for seq in self.seqs]

    @cached_property
    def are_all_checked(self) -> bool:
        """Whether every token of all requests is checked one by one."""
        return bool(self.checks_every_token.all())

    @cached_property
    def are_some_checked(self) -> bool:
        """Whether every token of some request is checked one by one."""
        return bool(self.checks_every_token.any())

    @cached_property
    def token_time_indices(self) -> np.ndarray:
        """[B] int64, indices into `TokenTimes`: asked for when a step has ended, since every row has a token then."""
        return _integers(seq.token_time_index or 0 for seq in self.seqs)

    @cached_property
    def used_stop_ids(self) -> np.ndarray:
        """[B, N] int64: the columns of `stop_ids` that some row needs, few or none."""
        return self.stop_ids[:, (self.stop_ids != NO_TOKEN).any(axis=0)]

    def row(self, index: int) -> DecodeRow:
        return DecodeRow(self.seqs[index], self.leases[index], int(self.positions[index]))

    def due(self) -> list[int]:
        """Indices of rows that need a block, or whose last token is in flight already."""
        is_due = (self.positions >= self.capacities) | (self.positions > self.last_positions)
        indices: list[int] = is_due.nonzero()[0].tolist()
        return indices

    def num_tokens_ahead(self, num_steps: int) -> int:
        """Tokens of all contexts `num_steps` after the next step; one that would have ended counts as at its end."""
        return int(np.minimum(self.positions + num_steps, self.last_positions).sum()) + len(self)

    def select(self, indices: abc.Sequence[int]) -> HostDecodeBatch:
        """The batch of these rows."""
        chosen = np.array(indices, dtype=np.int64)
        arrays = (array[chosen] for array in self._arrays())
        return HostDecodeBatch(
            [self.seqs[index] for index in indices], [self.leases[index] for index in indices], *arrays
        )

    def joined_by(self, other: HostDecodeBatch) -> HostDecodeBatch:
        arrays = (np.concatenate(pair) for pair in zip(self._arrays(), other._arrays(), strict=True))
        return HostDecodeBatch(self.seqs + other.seqs, self.leases + other.leases, *arrays)

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self.positions,
            self.capacities,
            self.last_positions,
            self.in_graph_positions,
            self.checks_every_token,
            self.stop_ids,
        )


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """The decode part of a step: one token for every request of a batch.

    Attributes:
        batch: the requests.
        positions: [B] int64, where the KV of the token fed goes.
        grown: indices of rows that got blocks since the batch's last step; not used in the first step of a batch.
        ended_leases: leases of the batch that were given up since the step was launched; it still touches their blocks.
    """

    batch: HostDecodeBatch
    positions: np.ndarray
    grown: list[int] = field(default_factory=list)
    ended_leases: list[Lease] = field(default_factory=list)

    def __iter__(self) -> abc.Iterator[DecodeRow]:
        columns = zip(self.batch.seqs, self.batch.leases, self.positions.tolist(), strict=True)
        return itertools.starmap(DecodeRow, columns)

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def num_live(self) -> int:
        """Number of requests whose lease has not ended since the launch."""
        return len(self.batch) - len(self.ended_leases)

    def halves(self) -> tuple[DecodeRows, DecodeRows]:
        """The first half of the requests, and the others."""
        indices = list(range(len(self)))
        middle = len(indices) // 2
        return self._part(indices[:middle]), self._part(indices[middle:])

    @property
    def num_tokens(self) -> int:
        """Sum of all context lengths, the token fed included."""
        return int(self.positions.sum()) + len(self.batch)

    @property
    def samples_in_graph(self) -> bool:
        """Whether sampling needs no more than each request's temperature, seed and output index."""
        return not (self.positions < self.batch.in_graph_positions).any()

    def are_last(self, token_ids: np.ndarray) -> np.ndarray:
        """[B] bool: whether the sampled token, of [B] int64, ends its request: by length, stop token or negative id.

        Not considered are stop strings, and the stop tokens of requests with more than MAX_STOP_IDS.
        """
        batch = self.batch
        is_end = (self.positions >= batch.last_positions) | (token_ids < 0)
        for column in batch.used_stop_ids.T:
            is_end |= column == token_ids
        return np.asarray(is_end)

    def complete_blocks(self, block_size: int) -> np.ndarray:
        """[B] bool: whether the KV of the token fed completes a block."""
        return np.asarray((self.positions + 1) % block_size == 0)

    def _part(self, indices: list[int]) -> DecodeRows:
        batch = self.batch.select(indices)
        ended = [lease for lease in self.ended_leases if lease in batch.leases]
        return DecodeRows(batch, self.positions[indices], ended_leases=ended)


NO_DECODE_ROWS = DecodeRows(HostDecodeBatch.of((), block_size=1), np.empty(0, dtype=np.int64))
"""The decode part of a step that has none."""
