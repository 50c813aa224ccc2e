"""Chooses the arrangement of the next decode steps, from the calibration and the times of recent steps. No torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanovllm.engine.scheduling.calibration import MARGIN, Calibration
from nanovllm.engine.scheduling.circuit_breaker import CircuitBreaker
from nanovllm.engine.scheduling.pipeline_plan import Arrangement

TRIAL_EVERY = 16
"""Every TRIAL_EVERYth decision tries something other than what seems best, to see whether it has become faster."""
FIRST_TRIALS = 3
"""Something that was seen fewer times than this at a batch size is tried at every other decision."""
MAX_TRIAL_LOSS = 0.1
"""Share by which a trial may be slower than the current choice, so that trials cost less than 0.7 % in all."""
MAX_FIRST_LOSS = 0.15
"""The same limit for what was seen fewer than FIRST_TRIALS times: the calibration may be wrong, and such trials end."""
WEIGHT = 1 / 8
"""Smallest weight of a newly timed step in the running means."""
BALANCED = 0.05
"""Lanes whose busy times differ by less than this share count as balanced."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a decode step, and, if it ran on lanes, how long each lane was busy."""

    step_s: float
    attention_s: float | None = None
    ffn_s: float | None = None


@dataclass
class _Seen:
    """Running means over timed steps of one batch size and arrangement.

    `ratio` is measured over calibrated time.
    """

    ratio: float
    last_decision: int = 0
    number: int = 0
    imbalance: float = 0.0
    """Busy time of the attention lane minus that of the FFN lane, as a share of the longer one."""


class Rebalancer:
    """Chooses between plain decode and the arrangements of the pipeline that are ready to run.

    The expected time of each is its calibrated time, corrected by the times that its steps have taken since. The choice
    changes only if another one is expected to be faster by MARGIN. Now and then a single step tries what seems a little
    slower: plain decode, or a split that gives SMs to the lane that is busy for longer. Such trials reveal a wrong or
    outdated calibration, at a small price (`MAX_TRIAL_LOSS`).

    An arrangement that fails is left out for a while and then tried again.

    Args:
        calibration: what was measured.
        ready: by batch size, the arrangements that can run.
        always: what to choose as long as it works, whatever was measured.
    """

    def __init__(
        self,
        calibration: Calibration,
        ready: Mapping[int, Sequence[Arrangement]],
        always: Arrangement | None = None,
    ) -> None:
        self.calibration = calibration
        self.always = always
        self.current: Arrangement | None = None
        self._ready = ready
        self._outages: defaultdict[Arrangement, CircuitBreaker] = defaultdict(CircuitBreaker)
        self._seen: dict[tuple[int, Arrangement | None], _Seen] = {}
        self._drift = 1.0
        """Mean ratio of all timed steps: the ratio to expect where no step was timed."""
        self._num_decisions = 0

    @property
    def arrangements(self) -> list[Arrangement]:
        """All arrangements that may ever be chosen."""
        return sorted({arrangement for of_size in self._ready.values() for arrangement in of_size}, key=str)

    def choose(self, batch: int, context: float, now: float) -> Arrangement | None:
        """Chooses the arrangement of the next steps; None for plain decode.

        Args:
            batch: batch size, a bucket.
            context: mean context length in tokens.
            now: seconds, on any clock.
        """
        usable = [one for one in self._ready.get(batch, ()) if self._outages[one].allows_trial(now)]
        if self.always is not None:
            self.current = self.always if self.always in usable else None
            return self.current
        expected = {path: self._expected_s(path, batch, context) for path in (None, *usable)}
        best = min(expected, key=expected.__getitem__)
        is_new = self.current not in expected or expected[best] < expected[self.current] * (1 - MARGIN)
        if is_new:
            self.current = best
        return self.current

    def trial(self, batch: int, context: float) -> Arrangement | None:
        """The arrangement of the next step alone: nearly always what `choose`, called before, has chosen."""
        self._num_decisions += 1
        if self.always is not None or self._num_decisions % 2:
            return self.current
        candidates = [path for path in self._worth_trying(batch, context) if path != self.current]
        new = [path for path in candidates if self._of(path, batch).number < FIRST_TRIALS]
        if new:
            return min(new, key=lambda path: self._expected_s(path, batch, context))
        if candidates and self._num_decisions % TRIAL_EVERY == 0:
            return min(candidates, key=lambda path: self._of(path, batch).last_decision)
        return self.current

    def observe(self, batch: int, context: float, arrangement: Arrangement | None, times: StepTimes) -> None:
        """Takes in the measured times of a step of `batch` rows with a mean context of `context` tokens."""
        calibrated_s = self.calibration.seconds(arrangement, batch, context)
        if not calibrated_s:
            return
        ratio = times.step_s / calibrated_s
        self._drift += WEIGHT * (ratio - self._drift)
        seen = self._seen[batch, arrangement] = self._of(arrangement, batch)
        # The expected ratio counts as one observation: a single step may be an outlier.
        seen.ratio += max(WEIGHT, 1 / (seen.number + 2)) * (ratio - seen.ratio)
        seen.last_decision, seen.number = self._num_decisions, seen.number + 1
        if times.attention_s and times.ffn_s:
            imbalance = (times.attention_s - times.ffn_s) / max(times.attention_s, times.ffn_s)
            seen.imbalance += max(WEIGHT, 1 / seen.number) * (imbalance - seen.imbalance)

    def failed(self, arrangement: Arrangement, now: float) -> bool:
        """Notes that an arrangement failed to run. Returns whether it is left out from now on."""
        if self.current == arrangement:
            self.current = None
        return self._outages[arrangement].failed(now)

    def worked(self, arrangement: Arrangement) -> bool:
        """Notes that an arrangement ran. Returns whether it had been left out."""
        return self._outages[arrangement].worked()

    def _expected_s(self, path: Arrangement | None, batch: int, context: float) -> float:
        calibrated_s = self.calibration.seconds(path, batch, context)
        if calibrated_s is None:
            return math.inf if path is not None else 0.0
        return calibrated_s * self._of(path, batch).ratio

    def _worth_trying(self, batch: int, context: float) -> list[Arrangement | None]:
        current_s = self._expected_s(self.current, batch, context)
        imbalance = self._of(self.current, batch).imbalance
        paths = [None, *(one for one in self._ready.get(batch, ()) if not self._outages[one].is_open)]
        return [
            path
            for path in paths
            if self._is_towards_balance(path, imbalance)
            and self._expected_s(path, batch, context) <= current_s * (1 + self._most_loss(path, batch))
        ]

    def _most_loss(self, path: Arrangement | None, batch: int) -> float:
        return MAX_TRIAL_LOSS if self._of(path, batch).number >= FIRST_TRIALS else MAX_FIRST_LOSS

    def _is_towards_balance(self, path: Arrangement | None, imbalance: float) -> bool:
        if path is None or self.current is None or abs(imbalance) < BALANCED:
            return True
        more_attention_sm = path.split[0] - self.current.split[0]
        return more_attention_sm * imbalance >= 0

    def _of(self, path: Arrangement | None, batch: int) -> _Seen:
        return self._seen.get((batch, path)) or _Seen(self._drift)
