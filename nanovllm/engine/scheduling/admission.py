"""Whether the next request in the queue may be prefilled on a card of its own, by what it would do to decode.

Learns how long decode steps take from those that have run. Knows nothing of requests, pools or devices: no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LOOK_AHEAD_STEPS = 128
"""How far ahead a step is predicted: contexts grow meanwhile, as far as their requests may. What those of a burst,
which grow together, grow by later on is not seen. To look to the ends would hold others back for tokens that are
allowed and mostly never come, and forget that requests that end make room."""

ROWS_LIKE_WEIGHTS = 64
TOKENS_LIKE_WEIGHTS = 32768
"""Where nothing better is known, so many rows, or tokens of context, cost what a step costs without them."""
BELIEF = 1.0
"""Observations that contradict this until they count for as much."""

MAX_WEIGHT = 16
"""Observations of one size that are averaged; older ones fade."""
RECENT_STEPS = 1000
"""For so many steps a size is believed to take what was observed of it, whatever the rest says."""
HALF_LIFE_STEPS = 2000
OLDEST_STEPS = 20 * HALF_LIFE_STEPS
MAX_STEPS_PER_FIT = 32
MIN_STEP_S = 1e-6
"""Two ends of steps that are collected at once are no further apart than the host is fast."""


@dataclass
class ObservedSize:
    """Means over the steps of about one size."""

    rows: float
    tokens: float
    seconds: float
    weight: int
    last_step: int


class AdmissionPolicy:
    """Bounds what is under way, and with a target, what a decode step is predicted to take.

    A step is held to take a + b rows + c tokens, all of them at least 0. Observations are kept as means by size
    (quarters of an octave of rows, halves of one of tokens), so that hours at one load neither drown what was seen at
    others nor make the sums singular; sizes that were not seen for long fade. The coefficients are least squares over
    these means and over two pseudo-observations, of rows and of tokens that cost a little: they decide as long as rows
    and tokens have not varied, or only together. No step takes exactly that (graphs are padded, clocks change), so the
    line is moved to go through the mean of the size asked for, if it was seen lately, else of the last step. An
    observation far from what was expected counts as twice, or half, of that.

    Args:
        max_backlog: most requests between the beginning of their prefill and the arrival of their KV.
        itl_target_s: most seconds that a step may be predicted to take; None for no such limit. It is of the mean:
            single steps vary around it.
    """

    def __init__(self, max_backlog: int, itl_target_s: float | None = None) -> None:
        self.max_backlog = max_backlog
        self.itl_target_s = itl_target_s
        self._sizes: dict[tuple[int, int], ObservedSize] = {}
        self._last: ObservedSize | None = None
        self._num_steps = 0
        self._next_fit = 1
        self._coefficients: tuple[float, float, float] | None = None

    def reason_to_wait(self, num_under_way: int, num_rows: int, num_tokens: int) -> str | None:
        """Why the next request may not be prefilled yet; None if it may.

        Args:
            num_under_way: requests between the beginning of their prefill and the arrival of their KV.
            num_rows: rows of the decode step with all that decode or are under way, and this one.
            num_tokens: tokens of their contexts, LOOK_AHEAD_STEPS from now.
        """
        if num_under_way >= self.max_backlog:
            return f"max_handoff_backlog={self.max_backlog} are under way"
        # Alone it makes steps as short as they can be.
        if self.itl_target_s is None or num_rows == 1:
            return None
        predicted_s = self.predict(num_rows, num_tokens)
        if predicted_s is not None and predicted_s > self.itl_target_s:
            return f"itl_target_ms={self.itl_target_s * 1e3:g} would be exceeded"
        return None

    def predict(self, num_rows: int, num_tokens: int) -> float | None:
        """Seconds of a decode step of so many rows and tokens of context; None before any was observed."""
        if not self._sizes:
            return None
        if self._num_steps >= self._next_fit or self._coefficients is None:
            self._fit()
        return self.expected_s(num_rows, num_tokens)

    def observe(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A decode step ended so long after the one before it, which it was queued behind. Takes microseconds."""
        seconds = max(seconds, MIN_STEP_S)
        expected_s = self.expected_s(num_rows, num_tokens)
        if expected_s is not None:
            seconds = min(max(seconds, expected_s / 2), expected_s * 2)
        self._num_steps += 1
        key = _size_key(num_rows, num_tokens)
        size = self._sizes.get(key)
        if size is None:
            size = self._sizes[key] = ObservedSize(num_rows, num_tokens, seconds, 0, 0)
        size.weight = min(size.weight + 1, MAX_WEIGHT)
        size.rows += (num_rows - size.rows) / size.weight
        size.tokens += (num_tokens - size.tokens) / size.weight
        size.seconds += (seconds - size.seconds) / size.weight
        size.last_step = self._num_steps
        self._last = size

    def expected_s(self, num_rows: int, num_tokens: int) -> float | None:
        """Predicts as `predict` does, with the last fitted coefficients: safe to call from another thread."""
        if self._coefficients is None or self._last is None:
            return None
        a, b, c = self._coefficients
        near = self._sizes.get(_size_key(num_rows, num_tokens))
        if near is None or self._num_steps - near.last_step > RECENT_STEPS:
            near = self._last
        return (a + b * num_rows + c * num_tokens) * near.seconds / (a + b * near.rows + c * near.tokens)

    def _fit(self) -> None:
        """Ridge regression of seconds on (1, rows, tokens) by size, weighted by age.

        Minimises sum_i w_i (s_i - x_i . c)^2 + BELIEF ||P c||^2, where P says that a step without rows or tokens takes
        about as long as ROWS_LIKE_WEIGHTS rows, or TOKENS_LIKE_WEIGHTS tokens, add to it.
        """
        oldest = self._num_steps - OLDEST_STEPS
        self._sizes = {key: size for key, size in self._sizes.items() if size.last_step > oldest}
        sizes = list(self._sizes.values())
        features = np.array([(1.0, size.rows, size.tokens) for size in sizes])
        seconds = np.array([size.seconds for size in sizes])
        ages = self._num_steps - np.array([size.last_step for size in sizes])
        weights = np.array([size.weight for size in sizes]) * 0.5 ** (ages / HALF_LIFE_STEPS)
        # With every mean feature at 1 the sums are of one magnitude.
        scale = np.average(features, axis=0, weights=weights)
        believed = np.array([[-scale[1] / ROWS_LIKE_WEIGHTS, 1.0, 0.0], [-scale[2] / TOKENS_LIKE_WEIGHTS, 0.0, 1.0]])
        scaled = features / scale
        gram = (scaled.T * weights) @ scaled + BELIEF * believed.T @ believed
        a, b, c = _non_negative_solution(gram, (scaled.T * weights) @ seconds) / scale
        self._coefficients = float(a), float(b), float(c)
        self._next_fit = self._num_steps + min(max(self._num_steps // 8, 1), MAX_STEPS_PER_FIT)


def _non_negative_solution(gram: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Solves a regular system of normal equations; a coefficient that would be negative is left out."""
    kept = list(range(len(moments)))
    solution = np.zeros(len(moments))
    while kept:
        found = np.linalg.solve(gram[np.ix_(kept, kept)], moments[kept])
        if found.min() >= 0.0:
            solution[kept] = found
            break
        kept.pop(int(found.argmin()))
    return solution


def _size_key(num_rows: int, num_tokens: int) -> tuple[int, int]:
    return int(4 * math.log2(num_rows)), int(2 * math.log2(num_tokens))
