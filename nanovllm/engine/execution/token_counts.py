"""How often requests have sampled each token, on the device: for penalties, which steps launched ahead need as well."""

from __future__ import annotations

from collections import Counter, abc
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.sequence import Sequence
from nanovllm.layers.ranks import Ranks
from nanovllm.layers.sampler import IN_PROMPT
from nanovllm.utils.device import Device


@dataclass(frozen=True)
class CountedTokens:
    """What the host knows of some rows' tokens; all else of these rows is 0.

    Attributes:
        cleared: [N] int64, the rows.
        rows, token_ids: [K] int64 each, no pair twice.
        counts: [K] int16, how often the row has sampled the token, plus IN_PROMPT if its prompt has it.
    """

    cleared: np.ndarray
    rows: np.ndarray
    token_ids: np.ndarray
    counts: np.ndarray


def count_tokens(seqs: abc.Iterable[tuple[int, Sequence]]) -> CountedTokens | None:
    """The tokens of requests, by the row of each, of those that have penalties; None if there are none."""
    cleared: list[int] = []
    counted: list[tuple[int, int, int]] = []
    for row, seq in seqs:
        if not seq.params.needs_counts:
            continue
        cleared.append(row)
        counts = {token_id: min(count, IN_PROMPT - 1) for token_id, count in Counter(seq.output_token_ids).items()}
        for token_id in set(seq.prompt_token_ids):
            counts[token_id] = counts.get(token_id, 0) + IN_PROMPT
        counted += [(row, token_id, count) for token_id, count in counts.items()]
    if not cleared:
        return None
    rows, token_ids, numbers = np.array(counted, dtype=np.int64).T.copy()
    return CountedTokens(np.array(cleared, dtype=np.int64), rows, token_ids, numbers.astype(np.int16))


class TokenCounts:
    """[max_num_rows, vocab_size / ranks] int16, made when a request first has penalties.

    Args:
        device: where they are.
        max_num_rows: rows that requests can have.
        vocab_size: tokens of all ranks.
        ranks: each of which counts its part of the vocabulary.
    """

    def __init__(self, device: Device, max_num_rows: int, vocab_size: int, ranks: Ranks) -> None:
        self._device = device
        self._shape = (max_num_rows, vocab_size // ranks.size)
        self._first_token = ranks.rank * self._shape[1]
        self._counts: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int16, device=self._device.torch_device)
        return self._counts

    def set(self, counted: CountedTokens) -> None:
        """Makes the counts of some rows what the host knows."""
        self.tensor[self._device.tensor(counted.cleared)] = 0
        columns = counted.token_ids - self._first_token
        here = (columns >= 0) & (columns < self._shape[1])
        at = (self._device.tensor(counted.rows[here]), self._device.tensor(columns[here]))
        self.tensor[at] = self._device.tensor(counted.counts[here])

    def add(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Each of [B] different rows has sampled its one of [B] tokens, or none where that is negative."""
        token_ids = token_ids - self._first_token
        here = (token_ids >= 0) & (token_ids < self._shape[1])
        at = (rows, token_ids.clamp(0, self._shape[1] - 1))
        before = self.tensor[at]
        may_grow = (before & (IN_PROMPT - 1)) < IN_PROMPT - 1
        self.tensor[at] = before + (here & may_grow).to(torch.int16)
