"""Admission: whether the next request in the queue may be prefilled, by what it would do to the decode step time.

Where prefill has a card of its own, it learns from past decode steps how long they take; a card that mixes steps has
a model of its own for that (`step_time.py`). Knows nothing of requests, pools or devices: no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LOOK_AHEAD_STEPS = 128
"""How many steps ahead a step is predicted: contexts grow meanwhile, up to the limits of their requests.

The growth of a burst of requests beyond that is not predicted. Predicting up to `max_tokens` would hold others back
for tokens that are allowed but mostly never come, and would ignore the room that requests make when they end.
"""

PRIOR_ROWS = 64
PRIOR_TOKENS = 32768
"""The prior: this many rows, or this many tokens of context, take as long as the rest of a step."""
PRIOR_WEIGHT = 1.0
"""Weight of the prior, in observations."""

MAX_WEIGHT = 16
"""Maximum weight of a size's mean, in observations; older ones fade."""
RECENT_STEPS = 1000
"""Steps for which the prediction for a size agrees with the mean of its observations, whatever the fit says."""
HALF_LIFE_STEPS = 2000
OLDEST_STEPS = 20 * HALF_LIFE_STEPS
MAX_STEPS_PER_FIT = 32
MIN_STEP_S = 1e-6
"""Lower bound of an observation: steps that are collected together seem to end at the same time."""


@dataclass
class ObservedSize:
    """Running means over steps of about the same size."""

    rows: float
    tokens: float
    seconds: float
    weight: int
    last_step: int


class AdmissionPolicy:
    """Bounds the backlog, and, with a target, the predicted time of a decode step.

    The model of a step's time is a + b rows + c tokens, with no negative coefficient. Observations are kept as running
    means by size (buckets of a quarter octave of rows and half an octave of tokens), so that hours at one load neither
    outweigh what was seen at others nor make the normal equations singular; sizes that were not seen for long fade. The
    coefficients are a least-squares fit over these means and a prior, which decides for as long as rows and tokens have
    not varied, or only together. No step takes exactly that time (graphs are padded, clocks change), so the prediction
    is scaled to agree with the mean of the size asked for, if it was seen lately, else with that of the last step. An
    observation above twice, or below half, of the prediction is clipped to that.

    Args:
        max_backlog: maximum number of requests between the beginning of their prefill and the arrival of their KV.
        itl_target_s: maximum predicted seconds of a decode step; None for no limit. The prediction is of the mean
            step; single steps vary around it.
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
        # A request alone makes the shortest possible steps.
        if self.itl_target_s is None or num_rows == 1:
            return None
        return self.reason_of_time(self.predict(num_rows, num_tokens))

    def reason_of_time(self, predicted_s: float | None) -> str | None:
        """Why a request may not decode that would make steps so long; None if it may, or the time is unknown."""
        if self.itl_target_s is None or predicted_s is None or predicted_s <= self.itl_target_s:
            return None
        return f"itl_target_ms={self.itl_target_s * 1e3:g} would be exceeded"

    def predict(self, num_rows: int, num_tokens: int) -> float | None:
        """Predicted seconds of a decode step with `num_rows` rows and `num_tokens` tokens of context in all.

        None before any step was observed.
        """
        if not self._sizes:
            return None
        if self._num_steps >= self._next_fit or self._coefficients is None:
            self._fit()
        return self.expected_s(num_rows, num_tokens)

    def observe(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A decode step ended `seconds` after the one before it, behind which it was queued. Takes microseconds."""
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
        """The same prediction with the last fitted coefficients; safe to call from any thread."""
        if self._coefficients is None or self._last is None:
            return None
        a, b, c = self._coefficients
        near = self._sizes.get(_size_key(num_rows, num_tokens))
        if near is None or self._num_steps - near.last_step > RECENT_STEPS:
            near = self._last
        return (a + b * num_rows + c * num_tokens) * near.seconds / (a + b * near.rows + c * near.tokens)

    def _fit(self) -> None:
        """Ridge regression of seconds on (1, rows, tokens) by size, weighted by age.

        Minimises sum_i w_i (s_i - x_i . c)^2 + PRIOR_WEIGHT ||P c||^2, where P is the prior: a step without rows or
        tokens takes about as long as PRIOR_ROWS rows, or PRIOR_TOKENS tokens, add to it.
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
        prior = np.array([[-scale[1] / PRIOR_ROWS, 1.0, 0.0], [-scale[2] / PRIOR_TOKENS, 0.0, 1.0]])
        scaled = features / scale
        gram = (scaled.T * weights) @ scaled + PRIOR_WEIGHT * prior.T @ prior
        a, b, c = _non_negative_solution(gram, (scaled.T * weights) @ seconds) / scale
        self._coefficients = float(a), float(b), float(c)
        self._next_fit = self._num_steps + min(max(self._num_steps // 8, 1), MAX_STEPS_PER_FIT)


def _non_negative_solution(gram: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Solves a regular system of normal equations; a coefficient that would be negative is left out."""
    kept = list(range(len(sums)))
    solution = np.zeros(len(sums))
    while kept:
        found = np.linalg.solve(gram[np.ix_(kept, kept)], sums[kept])
        if found.min() >= 0.0:
            solution[kept] = found
            break
        kept.pop(int(found.argmin()))
    return solution


def _size_key(num_rows: int, num_tokens: int) -> tuple[int, int]:
    return int(4 * math.log2(num_rows)), int(2 * math.log2(num_tokens))
