"""Times of decode steps, plain and on two lanes: measured by one engine, kept on disk for the next. No torch."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.scheduling import measurement_cache
from nanovllm.engine.scheduling.pipeline_plan import Arrangement

MARGIN = 0.01
"""An arrangement must be faster by this share to be chosen instead: less is within the error of a measurement."""


@dataclass(frozen=True)
class Measured:
    """Seconds per decode step of a batch with contexts of one length: plain, and by arrangement of the pipeline."""

    batch: int
    context: int
    plain_s: float
    pipelined_s: dict[Arrangement, float]

    def __str__(self) -> str:
        times = ", ".join(f"{arrangement} {s * 1e3:.2f}" for arrangement, s in self.pipelined_s.items())
        what = f"decode of {self.batch} requests of {self.context} tokens"
        return f"{what}: {self.best() or 'plain'}; ms per step: plain {self.plain_s * 1e3:.2f}, {times}"

    def seconds(self, arrangement: Arrangement | None) -> float:
        return self.plain_s if arrangement is None else self.pipelined_s[arrangement]

    def best(self) -> Arrangement | None:
        """The fastest arrangement; None where plain decode is about as fast."""
        if not self.pipelined_s:
            return None
        best = min(self.pipelined_s, key=self.pipelined_s.__getitem__)
        return best if self.pipelined_s[best] < self.plain_s * (1 - MARGIN) else None


class Calibration:
    """Measured points: one for every pair of some batch sizes and some context lengths, or none at all."""

    def __init__(self, points: Sequence[Measured] = ()) -> None:
        self.points = list(points)
        self._point_at = {(point.batch, point.context): point for point in points}
        self._batches = sorted({point.batch for point in points})
        self._contexts = sorted({point.context for point in points})
        assert len(self._batches) * len(self._contexts) == len(points), "every batch is measured with every context"

    def seconds(self, arrangement: Arrangement | None, batch: float, context: float) -> float | None:
        """Seconds of a step (plain for None), interpolated between the points around it.

        A step has a fixed cost, a cost per request, and a cost per token of context, so the time is linear in both
        between points and beyond the largest. None if `batch` is at most half the smallest measured batch.
        """
        if not self.points or batch <= self._batches[0] / 2:
            return None
        (low_batch, high_batch), batch_share = _around(self._batches, batch)
        (low, high), context_share = _around(self._contexts, context)
        at = [
            (1 - context_share) * self._point_at[size, low].seconds(arrangement)
            + context_share * self._point_at[size, high].seconds(arrangement)
            for size in (low_batch, high_batch)
        ]
        return (1 - batch_share) * at[0] + batch_share * at[1]

    def best_for(self, batch: int) -> list[Arrangement]:
        """Arrangements that were fastest with some context at one of the measured batches around this one.

        There are none below the smallest measured batch: weights are read once per micro-batch, and what does not pay
        for more requests does not pay for fewer.
        """
        if not self.points or batch < self._batches[0]:
            return []
        around, _ = _around(self._batches, batch)
        bests = {point.best() for point in self.points if point.batch in around}
        return sorted((best for best in bests if best is not None), key=str)

    def best_of_all(self) -> Arrangement:
        """The arrangement with the smallest mean ratio to the time of plain decode, over all points."""
        arrangements = list(self.points[0].pipelined_s)
        return min(arrangements, key=lambda one: sum(point.pipelined_s[one] / point.plain_s for point in self.points))


def _around(values: Sequence[int], value: float) -> tuple[tuple[int, int], float]:
    """The two of `values`, ascending, that `value` lies between, and how far it is from the first to the second.

    That share is above 1 beyond the last value, and 0 below the first.
    """
    if len(values) == 1 or value <= values[0]:
        return (values[0], values[0]), 0.0
    index = min(bisect.bisect_left(values, value), len(values) - 1)
    low, high = values[index - 1], values[index]
    return (low, high), (value - low) / (high - low)


def load_calibration(fingerprint: dict[str, Any]) -> Calibration | None:
    """The calibration that an earlier engine kept with this fingerprint; None if there is no usable one.

    The fingerprint has GPU, driver, model shape, versions and the measured points.
    """

    def parse(kept: dict[str, Any]) -> Calibration:
        calibration = Calibration([_checked_point(point, fingerprint["arrangements"]) for point in kept["points"]])
        points = [(point.batch, point.context) for point in calibration.points]
        if points != list(itertools.product(fingerprint["batches"], fingerprint["contexts"])):
            raise ValueError("it has other batches or contexts than it says")
        return calibration

    return measurement_cache.load(fingerprint, parse)


def _checked_point(point: dict[str, Any], arrangements: list[str]) -> Measured:
    seconds = [float(point["plain_s"]), *(float(point["pipelined_s"][name]) for name in arrangements)]
    if not all(0.0 < one < math.inf for one in seconds):
        raise ValueError(f"{seconds} are not all times")
    pipelined_s = dict(zip(map(Arrangement.parse, arrangements), seconds[1:], strict=True))
    return Measured(int(point["batch"]), int(point["context"]), seconds[0], pipelined_s)


def keep_calibration(fingerprint: dict[str, Any], calibration: Calibration) -> None:
    """Writes a calibration to disk; if that fails, the next engine measures again."""
    points = [
        {
            "batch": point.batch,
            "context": point.context,
            "plain_s": point.plain_s,
            "pipelined_s": {str(arrangement): seconds for arrangement, seconds in point.pipelined_s.items()},
        }
        for point in calibration.points
    ]
    measurement_cache.keep(fingerprint, {"points": points})
