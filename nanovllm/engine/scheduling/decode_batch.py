"""The requests that decode together, as arrays with a row for each, so that a step costs little Python per request.

Knows nothing of pools, devices or what is decided: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nanovllm.engine.sequence import Lease, Sequence

NO_TOKEN = -1
MOST_STOP_IDS = 8
"""Stop tokens that a row of the array holds; a request with more is looked at token by token."""


class DecodeRow(NamedTuple):
    """The last token of a request, to run through the model and sample after.

    Its KV goes to `position`. With steps in flight the token itself is not known yet, its place is.
    """

    seq: Sequence
    lease: Lease
    position: int

    @property
    def output_index(self) -> int:
        """How many tokens the request will have sampled before this step's."""
        return self.position + 1 - self.seq.num_prompt_tokens


@dataclass(eq=False)
class HostDecodeBatch:
    """Requests that decode together, step after step, until one joins or leaves: then there is another batch.

    Attributes:
        seqs, leases: of its B rows.
        positions: [B] int64, where the KV of the next token fed goes; moves on with every step.
        capacities: [B] int64, tokens that the leased blocks hold; grows with them.
        last_positions: [B] int64, each request's `last_fed_position`.
        first_plain_positions: [B] int64, from where on a step needs no more parameters than the device has.
        checks_every_token: [B] bool, whether every token is looked at: it is streamed, may end by a stop string, has
            log-probabilities, or more stop tokens than `stop_ids` holds.
        stop_ids: [B, MOST_STOP_IDS] int64, tokens that end the request, padded with NO_TOKEN.
        token_time_places: [B] int64, where the times of the requests' last tokens are kept.
    """

    seqs: list[Sequence]
    leases: list[Lease]
    positions: np.ndarray
    capacities: np.ndarray
    last_positions: np.ndarray
    first_plain_positions: np.ndarray
    checks_every_token: np.ndarray
    stop_ids: np.ndarray
    token_time_places: np.ndarray

    @classmethod
    def of(cls, rows: SequenceOf[DecodeRow], block_size: int) -> HostDecodeBatch:
        seqs = [row.seq for row in rows]
        stop_ids = np.full((len(rows), MOST_STOP_IDS), NO_TOKEN, dtype=np.int64)
        for place, seq in enumerate(seqs):
            if len(seq.stop_token_ids) <= MOST_STOP_IDS:
                stop_ids[place, : len(seq.stop_token_ids)] = sorted(seq.stop_token_ids)
        return cls(
            seqs,
            [row.lease for row in rows],
            positions=_integers(row.position for row in rows),
            capacities=_integers(len(row.lease.decode_table) * block_size for row in rows),
            last_positions=_integers(seq.last_fed_position for seq in seqs),
            first_plain_positions=_integers(seq.first_plain_position for seq in seqs),
            checks_every_token=np.array([_checks_every_token(seq) for seq in seqs], dtype=bool),
            stop_ids=stop_ids,
            token_time_places=_integers(seq.token_time_place or 0 for seq in seqs),
        )

    def __len__(self) -> int:
        return len(self.seqs)

    @cached_property
    def token_lists(self) -> list[list[int]]:
        """Each request's `token_ids`."""
        return [seq.token_ids for seq in self.seqs]

    def row(self, place: int) -> DecodeRow:
        return DecodeRow(self.seqs[place], self.leases[place], int(self.positions[place]))

    def due(self) -> list[int]:
        """Places of rows that cannot just go on: they need a block, or have all their tokens under way."""
        is_due = (self.positions >= self.capacities) | (self.positions > self.last_positions)
        places: list[int] = is_due.nonzero()[0].tolist()
        return places

    def num_tokens_ahead(self, num_steps: int) -> int:
        """Tokens of all contexts so many steps after the next one; one that would have ended counts as at its end."""
        return int(np.minimum(self.positions + num_steps, self.last_positions).sum()) + len(self)

    def select(self, places: SequenceOf[int]) -> HostDecodeBatch:
        """The batch of these rows."""
        chosen = np.array(places, dtype=np.int64)
        arrays = (array[chosen] for array in self._arrays())
        return HostDecodeBatch(
            [self.seqs[place] for place in places], [self.leases[place] for place in places], *arrays
        )

    def joined_by(self, other: HostDecodeBatch) -> HostDecodeBatch:
        arrays = (np.concatenate(pair) for pair in zip(self._arrays(), other._arrays(), strict=True))
        return HostDecodeBatch(self.seqs + other.seqs, self.leases + other.leases, *arrays)

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self.positions,
            self.capacities,
            self.last_positions,
            self.first_plain_positions,
            self.checks_every_token,
            self.stop_ids,
            self.token_time_places,
        )


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """A token of every request of a batch.

    Attributes:
        batch: who is in it.
        positions: [B] int64, where the KV of the token fed goes.
        grown: places of rows that got blocks since the batch's last step; of a new batch, any row may have.
        ended_leases: leases of the batch that were given up since the step was launched; it still touches their blocks.
    """

    batch: HostDecodeBatch
    positions: np.ndarray
    grown: list[int] = field(default_factory=list)
    ended_leases: list[Lease] = field(default_factory=list)

    @property
    def rows(self) -> list[DecodeRow]:
        places = zip(self.batch.seqs, self.batch.leases, self.positions.tolist(), strict=True)
        return [DecodeRow(*place) for place in places]

    def halves(self) -> tuple[DecodeStep, DecodeStep] | None:
        """The step as two smaller ones, None if one request is all it has."""
        places = list(range(len(self.batch)))
        middle = len(places) // 2
        return (self._part(places[:middle]), self._part(places[middle:])) if middle else None

    @property
    def num_tokens(self) -> int:
        """Sum of all context lengths, the token fed included."""
        return int(self.positions.sum()) + len(self.batch)

    @property
    def is_plain(self) -> bool:
        """Whether sampling takes no more than each request's temperature, seed and index."""
        return not (self.positions < self.batch.first_plain_positions).any()

    def needs_host_check(self, token_ids: np.ndarray, block_size: int) -> np.ndarray:
        """[B] bool: whether a row's sampled token, of [B] int64, may be more than one more to keep.

        It ends the request, completes a block's KV, is none (negative), or is looked at as every token of its request.
        """
        batch = self.batch
        is_end = (self.positions >= batch.last_positions) | (batch.stop_ids == token_ids[:, None]).any(axis=1)
        is_end |= token_ids < 0
        completes_block = (self.positions + 1) % block_size == 0
        return np.asarray(is_end | completes_block | batch.checks_every_token)

    def _part(self, places: list[int]) -> DecodeStep:
        batch = self.batch.select(places)
        ended = [lease for lease in self.ended_leases if lease in batch.leases]
        return DecodeStep(batch, self.positions[places], ended_leases=ended)


def _integers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _checks_every_token(seq: Sequence) -> bool:
    return seq.is_streamed or seq.params.logprobs is not None or len(seq.stop_token_ids) > MOST_STOP_IDS
