"""Predicts how long a step takes, by its tokens, the context of its decode rows, and the attention of its chunks.

Learns from the steps that have ended, starting from what any GPU has in common. No torch, no requests.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

KNOTS = np.array(
    [
        1,
        *range(16, 512, 16),
        *range(512, 1024, 64),
        *range(1024, 2048, 256),
        2048,
        2560,
        3072,
        *(2**n for n in range(12, 16)),
    ],
    dtype=np.float64,
)
"""Tokens of a step between which its time is taken to be linear; one for each size that small steps are padded to,
since GEMMs of 288 tokens may take longer than of 304."""
_KNOTS: list[float] = KNOTS.tolist()
BALANCED_TOKENS = 200
"""Prior: with so many tokens the GEMMs take as long to compute as to read the weights. H100 255, H200 175."""
ATTENTION_RATE = 0.65
"""Prior: the rate of attention over that of GEMMs."""
CORRELATION_OCTAVES = 2.0
"""Prior: over so many doublings of a step's tokens, what is learned of one size says little of the other. Closer ones
change smoothly (a Matern kernel, 3/2): a card whose steps have little time left finds out that more tokens fit."""
TILE_SHARE = 0.02
"""Prior: share of their variance that sizes have to themselves, since GEMMs are computed in tiles."""
SCALE_DEVIATION, KNOT_DEVIATION = 0.5, 0.3
"""Prior: relative standard deviations of what all times have in common, and of single ones."""
NOISE = 0.02
"""Prior: relative standard deviation of single steps of one size. Clocks go up and down with the power that steps take;
of H100s and H200s that run chunks it is 0.02 to 0.04, of decode steps a tenth of that."""
NOISE_MARGIN = 2.5
"""Standard deviations of single steps for which a step with chunks leaves time: one in a hundred or so takes longer.
Few gaps may exceed what was asked for, since a request is judged by the slowest of its hundred or two."""
NOISE_CHANGE = 0.02
"""How much of the noise each step teaches."""
DRIFT = 6e-4
"""Share of the prior, and of its uncertainty, that comes back with each step: clocks change, and a size that was once
seen too long would not be tried again. After thousands of decode steps without prompts, the first prompts are taken in
smaller chunks again."""
MAX_DEVIATIONS = 4.0
"""Standard deviations from its prediction beyond which a step teaches nothing: a hitch is no slow card."""
MOST_NOISE = 0.1
"""Relative error of a prediction that counts as noise; what is beyond it was a hitch."""
LONG_GAP_SHARE, EXCESS_CHANGE_S = 0.01, 0.1e-3
"""Share of gaps with a chunk in them that may exceed what a step with a chunk leaves time for, and by how much that
changes after one that has."""
MOST_EXCESS = 0.15
"""Share of a step's time that is left for such an excess at most."""
CAREFUL_TOKENS = 64
"""Prompt tokens that are taken to fit before any step has been seen: no card computes so few slower than it reads."""
TOKEN_MULTIPLE = 16
"""Steps are filled up to multiples of this: graphs of mixed steps are padded to it, those above 512 tokens to more."""
MOST_PADDED_TOKENS = 512
"""Up to so many tokens a step takes as long as one of the next multiple."""
MOST_LAUNCH_SHARE = 0.5
"""Share of a step's time up to which it teaches something if it began while it was being launched. On a card that is
idle each time a prompt comes, no step begins otherwise."""
MIN_STEP_S = 2e-5
"""Shorter times are no step's."""
FAR = 4.0
FEW_STEPS = 4
MAX_RESTARTS = 2
"""A step FAR from its prediction among the first FEW_STEPS may mean that the scale was taken from a step that hung. Or
that the card is unlike the prior: so it is taken anew MAX_RESTARTS times at the most."""
SURPRISES_IN_A_ROW, MOST_CLOCK_CHANGE = 6, 1.6
"""Steps in a row, all far too short or all far too long, after which another scale is taken: clocks have changed. They
do not change by more than MOST_CLOCK_CHANGE: then what was learned was taught by something else."""
NUM_JUDGED, MOST_MISSED = 32, 16
"""The last steps by which the model is judged. If so many of them are beyond MAX_DEVIATIONS it begins anew: other work
on the card, such as another engine that starts, had taught it times that do not hold."""
UNIT_CHANGE = 0.02
"""The power of a step's predicted time over the prior's by which each step changes the unit. Predictions stay as they
are, and those of sizes that are not known drift towards the prior in a unit by which it is right for recent steps."""
NUM_RECENT = 1024


@dataclass(frozen=True)
class StepSize:
    """What a step's time goes by.

    Attributes:
        num_tokens: tokens of chunks and decode rows.
        context: tokens whose KV the decode rows read, over all rows.
        num_pairs: pairs of a chunk's token and one that it attends to, over all chunks.
    """

    num_tokens: int
    context: int = 0
    num_pairs: float = 0.0

    def with_row(self, context: int) -> StepSize:
        """The size with another decode row of so many context tokens."""
        return StepSize(self.num_tokens + 1, self.context + context, self.num_pairs)

    def with_chunk(self, start: int, num_tokens: int) -> StepSize:
        """The size with `num_tokens` more prompt tokens, behind `start` others of their request."""
        pairs = num_tokens * (start + num_tokens / 2)
        return StepSize(self.num_tokens + num_tokens, self.context, self.num_pairs + pairs)


@dataclass(frozen=True)
class ModelCosts:
    """What attention costs, relative to the rest of a model.

    The defaults are those of an 8B model with 8 KV heads, for what is only estimated.

    Attributes:
        context_token: bytes of a token's KV over those of the weights.
        pair: FLOPs of attention of a token to another, in all layers, over those of a token's GEMMs.
        expert_share: of the weights that one token passes, those of experts; weights are those that one token passes.
        num_experts, experts_per_token: of a layer.
    """

    context_token: float = 9e-6
    pair: float = 3.6e-5
    expert_share: float = 0.0
    num_experts: int = 1
    experts_per_token: int = 1

    def weights_read(self, num_tokens: np.ndarray) -> np.ndarray:
        """Weights that steps of so many tokens read over those that one token passes, if experts are chosen evenly."""
        share_unread = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        distinct = self.num_experts / self.experts_per_token * (1 - share_unread)
        return 1 + self.expert_share * (distinct - 1)


def _knot_above(num_tokens: int) -> tuple[int, float]:
    """Index of the knot that ends the interval of a padded number of tokens, and how far on it is in that interval."""
    if TOKEN_MULTIPLE < num_tokens <= MOST_PADDED_TOKENS:
        num_tokens += -num_tokens % TOKEN_MULTIPLE
    above = min(max(bisect.bisect_left(_KNOTS, num_tokens), 1), len(_KNOTS) - 1)
    low, high = _KNOTS[above - 1 : above + 1]
    return above, max((num_tokens - low) / (high - low), 0.0)  # above 1 beyond the last knot


_ABOVE, _SHARE = map(
    np.array, zip(*(_knot_above(n) for n in range(TOKEN_MULTIPLE, 2**17, TOKEN_MULTIPLE)), strict=True)
)
"""`_knot_above` of the multiples of TOKEN_MULTIPLE."""


class StepTimeModel:
    """A Bayesian linear model: seconds of a step = g(tokens) + c * context + p * pairs, with g linear between KNOTS
    and small steps padded.

    The coefficients are kept relative to the prior's, with their covariance (a Kalman filter whose state drifts). So a
    prediction comes with its uncertainty: small near what was seen, large far from it.

    Args:
        costs: of the model that is served.
    """

    def __init__(self, costs: ModelCosts | None = None) -> None:
        costs = ModelCosts() if costs is None else costs
        gemms = (costs.weights_read(KNOTS) ** 4 + (KNOTS / BALANCED_TOKENS) ** 4) ** 0.25
        pair = costs.pair / (BALANCED_TOKENS * ATTENTION_RATE)
        self._prior = np.concatenate([gemms, [costs.context_token, pair]])
        octaves = np.log2(KNOTS)
        covariance = np.zeros((len(self._prior), len(self._prior)))
        num_knots = len(KNOTS)
        distances = np.abs(octaves[:, None] - octaves[None, :])
        distances *= math.sqrt(3) / CORRELATION_OCTAVES
        smooth = (1 + distances) * np.exp(-distances)
        tiles = np.eye(num_knots)
        covariance[:num_knots, :num_knots] = KNOT_DEVIATION**2 * ((1 - TILE_SHARE) * smooth + TILE_SHARE * tiles)
        covariance[num_knots:, num_knots:] = np.eye(2) * KNOT_DEVIATION**2
        self._prior_covariance = covariance + SCALE_DEVIATION**2
        self._covariance = self._prior_covariance.copy()
        self._coefficients = np.ones(len(self._prior))
        self._unit_s: float | None = None
        """Seconds of the prior's unit, the time of a step of one token; None before any step was seen."""
        self._num_observed = 0
        """Steps since the unit was set."""
        self._num_restarts_left = MAX_RESTARTS
        self._noise_squared, self._decode_noise_squared = NOISE**2, NOISE**2
        """The noise of steps with chunks, and of steps without."""
        self._excess_s = 0.0
        """Seconds by which hardly any gap with a chunk in it exceeds the prediction of its step."""
        self._surprises: list[float] = []
        """Seen over predicted times of the last steps, if these were surprisingly long, or short, in a row."""
        self._judged: deque[tuple[float, bool]] = deque(maxlen=NUM_JUDGED)
        """The unit by which the prior is right for each of the last steps, and whether it was too far off to learn
        from."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=NUM_RECENT)
        """Predicted and seen seconds of the last steps."""

    def observe(self, size: StepSize, seconds: float, launch_s: float = 0.0) -> None:
        """A step took so long on the device, of which up to `launch_s` may have been its launch. Takes microseconds."""
        if seconds < MIN_STEP_S or launch_s > MOST_LAUNCH_SHARE * seconds:
            return
        is_exact = launch_s <= NOISE * seconds
        seconds -= launch_s / 2
        features = self._features(size)
        own_unit_s = seconds / float(features.sum())
        unit_s = self._begin(own_unit_s) if self._unit_s is None else self._unit_s
        expected_s = float(features @ self._coefficients) * unit_s
        if is_exact:
            self._recent.append((expected_s, seconds))
        if not 1 / FAR < seconds / expected_s < FAR and self._num_observed < FEW_STEPS and self._num_restarts_left:
            self._num_restarts_left -= 1
            unit_s = self._begin(own_unit_s)  # the steps before it, or this one, were no measure
        if is_exact:
            error = min(abs(seconds / expected_s - 1), MOST_NOISE)
            if size.num_pairs:
                self._noise_squared += NOISE_CHANGE * (error**2 - self._noise_squared)
            else:
                self._decode_noise_squared += NOISE_CHANGE * (error**2 - self._decode_noise_squared)
        is_missed = self._learn(features, seconds / unit_s, launch_s / math.sqrt(12) / unit_s)
        self._judged.append((own_unit_s, is_missed))
        if len(self._surprises) == SURPRISES_IN_A_ROW:
            scale = float(np.median(self._surprises))
            if 1 / MOST_CLOCK_CHANGE < scale < MOST_CLOCK_CHANGE:
                self._change_scale(unit_s * scale)
            else:
                self._begin(self._median_unit_s(SURPRISES_IN_A_ROW))
        elif sum(is_missed for _, is_missed in self._judged) >= MOST_MISSED:
            self._begin(self._median_unit_s(NUM_JUDGED))
        elif not is_missed:
            # The covariance is relative to the unit, and stays: what is known is known to a share of the time.
            change = (float(features @ self._coefficients) / float(features.sum())) ** UNIT_CHANGE
            self._unit_s = unit_s * change
            self._coefficients /= change

    def _median_unit_s(self, count: int) -> float:
        """The unit by which the prior is right for the last steps, so many of those that are judged."""
        units = sorted(unit_s for unit_s, _ in list(self._judged)[-count:])
        return units[len(units) // 2]

    def _change_scale(self, unit_s: float) -> None:
        """Takes another unit, and keeps the shape."""
        self._unit_s = unit_s
        self._surprises.clear()
        self._judged.clear()
        self._covariance += SCALE_DEVIATION**2

    def observe_gap(self, size: StepSize, gap_s: float) -> None:
        """The tokens of a step came so long after those of the step before it.

        Beside the step, a gap has in it how much later the device began, waited for another card, and the host took the
        tokens in. Chunks leave time for that, too, but no more than MOST_EXCESS: a host that is slower still would
        leave none for prompts.
        """
        expected_s = self.predict(size) if size.num_pairs else None
        if expected_s is None:
            return
        if gap_s - expected_s <= self._excess_s:
            self._excess_s = max(self._excess_s - EXCESS_CHANGE_S * LONG_GAP_SHARE, 0.0)
        elif self._excess_s < MOST_EXCESS * expected_s:
            self._excess_s += EXCESS_CHANGE_S * (1 - LONG_GAP_SHARE)

    def _begin(self, unit_s: float) -> float:
        """Begins anew, with this unit, which it returns."""
        self._unit_s, self._num_observed = unit_s, 0
        self._surprises.clear()
        self._judged.clear()
        self._coefficients = np.ones(len(self._prior))
        self._covariance = self._prior_covariance.copy()
        return unit_s

    def _learn(self, features: np.ndarray, took: float, deviation: float) -> bool:
        """One step of the filter. Returns whether it was too far off to learn from.

        Args:
            features: of the step.
            took: what it took, in units.
            deviation: standard deviation of that, in units, beside the noise of all steps.
        """
        self._covariance += DRIFT * (self._prior_covariance - self._covariance)
        self._coefficients += DRIFT / 2 * (1 - self._coefficients)
        expected = float(features @ self._coefficients)
        weighted = self._covariance @ features
        known = float(features @ weighted)
        if known < deviation**2:
            # How much of a launch is in a step's time is much the same each time, and does not average out.
            return False
        noise_squared = max(self._noise_squared if features[-1] else self._decode_noise_squared, NOISE**2)
        variance = known + noise_squared * expected**2 + deviation**2
        surprise = took - expected
        if abs(surprise) > MAX_DEVIATIONS * math.sqrt(variance):
            if self._surprises and (self._surprises[-1] > 1) != (surprise > 0):
                self._surprises.clear()  # in a row are those of one sign
            self._surprises.append(took / expected)
            return True
        self._surprises.clear()
        self._coefficients += weighted * (surprise / variance)
        self._covariance -= np.outer(weighted, weighted) / variance
        np.maximum(self._coefficients, 1e-3, out=self._coefficients)
        self._num_observed += 1
        return False

    def predict(self, size: StepSize) -> float | None:
        """Expected seconds of a step; None before any was seen. Any thread may call it, and may mix two states for a
        moment."""
        if self._unit_s is None:
            return None
        # As the product of `_features` and the coefficients: a scheduler asks dozens of times a step, and with an array
        # it would take ten times as long.
        above, share = _knot_above(size.num_tokens)
        prior, learned = self._prior, self._coefficients
        units = (
            (1 - share) * prior[above - 1] * learned[above - 1]
            + share * prior[above] * learned[above]
            + size.context * prior[-2] * learned[-2]
            + size.num_pairs * prior[-1] * learned[-1]
        )
        return float(units) * self._unit_s

    def may_exceed(self, limit_s: float, size: StepSize) -> bool:
        """Whether a step may take longer, by what has to fit in `tokens_that_fit`.

        False before any step was seen. Safe to call from any thread.
        """
        if self._unit_s is None:
            return False
        above, share = _knot_above(size.num_tokens)
        return float(self._bounds(self._unit_s, above, share, size.context, size.num_pairs)) > limit_s

    def tokens_that_fit(self, limit_s: float, size: StepSize, start: int, most: int) -> int:
        """How many prompt tokens a step of this size has room for, that it may take `limit_s` with them.

        More than expected has to fit: a standard deviation of what is known of such steps, and NOISE_MARGIN of single
        ones, or what gaps have exceeded their steps by, if that is more.

        Args:
            limit_s: maximum seconds of the step.
            size: what the step has already.
            start: tokens of the request that are computed.
            most: tokens of the request that are left, or fewer.
        """
        if self._unit_s is None:
            return min(most, CAREFUL_TOKENS)
        if not self.may_exceed(limit_s, size.with_chunk(start, most)):
            return most
        first = -size.num_tokens % TOKEN_MULTIPLE or TOKEN_MULTIPLE
        counts = np.arange(first, most, TOKEN_MULTIPLE, dtype=np.float64)
        begin = (size.num_tokens + first) // TOKEN_MULTIPLE - 1
        aboves, shares = (column[begin : begin + len(counts)] for column in (_ABOVE, _SHARE))
        counts = counts[: len(aboves)]  # 131,056 tokens at most are looked at
        pairs = size.num_pairs + counts * (start + counts / 2)
        fitting = (self._bounds(self._unit_s, aboves, shares, size.context, pairs) <= limit_s).nonzero()[0]
        return int(counts[fitting[-1]]) if len(fitting) else 0

    def _bounds(self, unit_s: float, above: Any, share: Any, context: float, pairs: Any) -> Any:
        """Seconds that steps of these sizes hardly exceed: of one, or [N] of N.

        Args:
            unit_s: seconds of the prior's unit.
            above, share: as of `_knot_above`, of their tokens.
            context, pairs: as in `StepSize`.
        """
        prior, learned, known, below = self._prior, self._coefficients, self._covariance, above - 1
        # The features that are not 0. A product with all of them would take five times as long, and arrays of many
        # sizes would wake the threads of the linear algebra library.
        a, b = (1 - share) * prior[below], share * prior[above]
        c, d = context * prior[-2], pairs * prior[-1]
        expected = a * learned[below] + b * learned[above] + c * learned[-2] + d * learned[-1]
        variance = a * (a * known[below, below] + 2 * (b * known[below, above] + c * known[below, -2]))
        variance += b * (b * known[above, above] + 2 * c * known[above, -2])
        variance += d * (d * known[-1, -1] + 2 * (a * known[below, -1] + b * known[above, -1] + c * known[-2, -1]))
        variance += c * c * known[-2, -2]
        noise = NOISE_MARGIN * math.sqrt(self._noise_squared) * expected
        excess = np.minimum(self._excess_s / unit_s, MOST_EXCESS * expected)
        margin = np.maximum(noise, excess) * (np.asarray(pairs) > 0)  # hardly any without chunks
        return unit_s * (expected + np.sqrt(np.maximum(variance, 0.0) + margin * margin))

    def state(self) -> dict[str, Any]:
        """What was learned, as JSON takes it, for `restore`."""
        return {
            "unit_s": self._unit_s,
            "coefficients": self._coefficients.tolist(),
            "covariance": self._covariance.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what another model had learned.

        Raises:
            KeyError, TypeError, ValueError: it is not the state of such a model.
        """
        unit_s = float(state["unit_s"])
        coefficients, covariance = np.array(state["coefficients"], float), np.array(state["covariance"], float)
        if coefficients.shape != self._coefficients.shape or covariance.shape != self._covariance.shape:
            raise ValueError("it has other knots")
        if not (0 < unit_s < math.inf and np.isfinite(coefficients).all() and (coefficients > 0).all()):
            raise ValueError("its coefficients are not all times")
        if (
            not np.isfinite(covariance).all()
            or not np.allclose(covariance, covariance.T)
            or np.linalg.eigvalsh(covariance).min() < -1e-6
        ):
            raise ValueError("its covariance is none")
        self._unit_s, self._coefficients, self._covariance = unit_s, coefficients, covariance
        self._num_observed = FEW_STEPS

    @property
    def has_learned(self) -> bool:
        """Whether a step was observed, here or by the model that was restored."""
        return self._unit_s is not None

    def statistics(self) -> dict[str, float | int | None]:
        """Means of what the last steps took and were predicted to take, and relative errors of their predictions; None
        without steps. And by how much gaps exceed the predictions."""
        recent = np.array(self._recent)
        if not len(recent):
            names = ("predicted_s", "seen_s", "error_p50", "error_p95")
            return {"steps": 0, **dict.fromkeys(names), "gap_excess_s": self._excess_s}
        predicted, seen = recent.T
        errors = np.abs(predicted / np.maximum(seen, 1e-9) - 1)
        return {
            "steps": len(recent),
            "predicted_s": float(predicted.mean()),
            "seen_s": float(seen.mean()),
            "error_p50": float(np.quantile(errors, 0.5)),
            "error_p95": float(np.quantile(errors, 0.95)),
            "gap_excess_s": self._excess_s,
        }

    def _features(self, size: StepSize) -> np.ndarray:
        """[coefficients] of a size."""
        features = np.zeros(len(self._prior))
        above, share = _knot_above(size.num_tokens)
        features[above - 1], features[above] = 1 - share, share
        features[-2], features[-1] = size.context, size.num_pairs
        features *= self._prior
        return features
