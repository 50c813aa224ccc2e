"""When the decode pipeline runs, and how: by what was measured nearest to a batch. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.engine.pipeline_plan import Arrangement

MARGIN = 0.01
"""What the pipeline must be faster by than plain decode: less is within what a measurement may be wrong by."""


@dataclass(frozen=True)
class Measured:
    """Seconds per decode step of a batch with contexts of one length: plain, and by how the pipeline is arranged."""

    batch: int
    context: int
    plain_s: float
    pipelined_s: dict[Arrangement, float]

    def __str__(self) -> str:
        times = ", ".join(f"{arrangement} {s * 1e3:.2f}" for arrangement, s in self.pipelined_s.items())
        what = f"decode of {self.batch} requests of {self.context} tokens"
        return f"{what}: {self.best() or 'plain'}; ms per step: plain {self.plain_s * 1e3:.2f}, {times}"

    def best(self) -> Arrangement | None:
        """None where plain decode is as fast."""
        if not self.pipelined_s:
            return None
        best = min(self.pipelined_s, key=self.pipelined_s.__getitem__)
        return best if self.pipelined_s[best] < self.plain_s * (1 - MARGIN) else None


class PipelineChoice:
    """Chooses for a batch what was fastest at the nearest point measured, by the logarithms of batch and context.

    Args:
        points: what was measured; there need be none.
        always: what to choose whatever was measured.
    """

    def __init__(self, points: Sequence[Measured], always: Arrangement | None = None) -> None:
        self.points = list(points)
        self.always = always
        self._logs = [(math.log(point.batch), math.log(point.context)) for point in points]
        self._best = [point.best() for point in points]

    @property
    def arrangements(self) -> list[Arrangement]:
        """Those that are ever chosen."""
        if self.always is not None:
            return [self.always]
        return sorted({best for best in self._best if best is not None}, key=str)

    def arrangement_for(self, batch: int, context: float) -> Arrangement | None:
        """None for plain decode. `context` is the mean of the batch."""
        if self.always is not None:
            return self.always
        # Weights are read once per micro-batch: what did not pay for more requests does not for fewer.
        if not self.points or batch < min(point.batch for point in self.points):
            return None
        return self._best[self._nearest(batch, context)]

    def may_choose(self, arrangement: Arrangement, batch: int) -> bool:
        """Whether it is chosen for the batch with any contexts."""
        contexts = {point.context for point in self.points} or {1}
        return any(self.arrangement_for(batch, context) == arrangement for context in contexts)

    def plain_s(self, batch: float, context: float) -> float | None:
        """Seconds of a plain step at the nearest point measured; None if that is of twice the batch, or half of it."""
        if not self.points:
            return None
        point = self.points[self._nearest(batch, context)]
        return point.plain_s if point.batch / 2 < batch < point.batch * 2 else None

    def _nearest(self, batch: float, context: float) -> int:
        log_batch, log_context = math.log(max(batch, 1.0)), math.log(max(context, 1.0))
        return min(
            range(len(self._logs)),
            key=lambda index: abs(self._logs[index][0] - log_batch) + abs(self._logs[index][1] - log_context),
        )


def best_of_all(points: Sequence[Measured]) -> Arrangement:
    """What takes the least part of the time of plain decode, on average over all points."""
    arrangements = list(points[0].pipelined_s)
    return min(arrangements, key=lambda one: sum(point.pipelined_s[one] / point.plain_s for point in points))
