"""Counts and times of requests, for `llm.metrics()`. No torch."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np

from nanovllm.engine.sequence import Sequence

TOKEN_BOUNDS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Histogram bounds, in seconds, of times between tokens and of handoffs."""
REQUEST_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Histogram bounds, in seconds, of times to a request's first token and to its end."""


class Histogram:
    """How many values lie at or below each of some bounds, how many there are, and their sum; values in seconds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self._edges = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    def observe(self, value: float) -> None:
        self.observe_all(np.array([value]))

    def observe_all(self, values: np.ndarray) -> None:
        """Counts [N] float64 values, in a few microseconds for any N up to hundreds."""
        self._counts += np.bincount(self._edges.searchsorted(values), minlength=len(self._counts))
        self.sum += float(values.sum())

    def as_dict(self) -> dict[str, Any]:
        """`count`, `sum`, and `buckets`: (bound, values at or below it) for each bound."""
        at_or_below = self._counts.cumsum().tolist()
        return {"count": self.count, "sum": self.sum, "buckets": list(zip(self.bounds, at_or_below[:-1], strict=True))}


class TokenTimes:
    """When each request got its last token, in an array with an entry for each of those that have one."""

    def __init__(self) -> None:
        self._times = np.zeros(64)
        self._free = list(range(64))

    def take(self, now: float) -> int:
        """The index of an entry for a request that has got its first token."""
        if not self._free:
            self._free = list(range(len(self._times), 2 * len(self._times)))
            self._times = np.concatenate([self._times, np.zeros(len(self._times))])
        index = self._free.pop()
        self._times[index] = now
        return index

    def passed(self, indices: np.ndarray, now: float) -> np.ndarray:
        """Seconds since the last tokens of the requests at [N] indices, which have got another token at `now`."""
        gaps = now - self._times[indices]
        self._times[indices] = now
        return gaps

    def give_back(self, index: int) -> float:
        """Frees an entry; the time of its last token."""
        self._free.append(index)
        return float(self._times[index])


class Metrics:
    """Times of requests and their tokens, and how requests ended."""

    def __init__(self) -> None:
        self.ttft_s = Histogram(REQUEST_BOUNDS_S)
        self.tpot_s = Histogram(TOKEN_BOUNDS_S)
        self.itl_s = Histogram(TOKEN_BOUNDS_S)
        self.latency_s = Histogram(REQUEST_BOUNDS_S)
        self.handoff_s = Histogram(TOKEN_BOUNDS_S)
        self.ended: Counter[str] = Counter()
        self._token_times = TokenTimes()

    def got_token(self, seq: Sequence) -> None:
        """A prefill step has given a request its first token, or its next one after it was recomputed."""
        now = time.perf_counter()
        if seq.token_time_index is None:
            seq.token_time_index = self._token_times.take(now)
            self.ttft_s.observe(now - seq.arrival_s)
        else:
            self.itl_s.observe_all(self._token_times.passed(np.array([seq.token_time_index]), now))

    def got_tokens(self, indices: np.ndarray) -> None:
        """A decode step has given a token to each of the requests at these indices."""
        self.itl_s.observe_all(self._token_times.passed(indices, time.perf_counter()))

    def has_ended(self, seq: Sequence, reason: str) -> None:
        """Counts a request's end; called once for each request."""
        self.ended[reason] += 1
        now = time.perf_counter()
        self.latency_s.observe(now - seq.arrival_s)
        if seq.token_time_index is None:
            return
        last_s, seq.token_time_index = self._token_times.give_back(seq.token_time_index), None
        num_gaps = seq.num_output_tokens - 1
        if num_gaps > 0 and seq.first_token_s is not None:
            self.tpot_s.observe(max(last_s - seq.first_token_s, 0.0) / num_gaps)
