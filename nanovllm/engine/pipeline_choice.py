"""When the decode pipeline runs, and with which split: by what was measured nearest to a batch. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Split = tuple[int, int]
"""SMs for attention and for the FFN."""

MARGIN = 0.01
"""What the pipeline must be faster by than plain decode: less is within what a measurement may be wrong by."""


@dataclass(frozen=True)
class Measured:
    """Seconds per decode step of a batch with contexts of one length: plain, and by split of the pipeline."""

    batch: int
    context: int
    plain_s: float
    pipelined_s: dict[Split, float]

    def best_split(self) -> Split | None:
        """None where plain decode is as fast."""
        if not self.pipelined_s:
            return None
        split = min(self.pipelined_s, key=self.pipelined_s.__getitem__)
        return split if self.pipelined_s[split] < self.plain_s * (1 - MARGIN) else None


class PipelineChoice:
    """Chooses for a batch what was fastest at the nearest point measured, by the logarithms of batch and context."""

    def __init__(self, points: Sequence[Measured]) -> None:
        self.points = list(points)
        self._logs = [(math.log(point.batch), math.log(point.context)) for point in points]
        self._best = [point.best_split() for point in points]

    @property
    def splits(self) -> list[Split]:
        """Those that are ever chosen."""
        return sorted({split for split in self._best if split is not None})

    def split_for(self, batch: int, context: float) -> Split | None:
        """None for plain decode. `context` is the mean of the batch."""
        if not self.points:
            return None
        log_batch, log_context = math.log(batch), math.log(max(context, 1.0))
        nearest = min(
            range(len(self._logs)),
            key=lambda index: abs(self._logs[index][0] - log_batch) + abs(self._logs[index][1] - log_context),
        )
        # Weights are read once per micro-batch: what did not pay for more requests does not for fewer.
        return self._best[nearest] if batch >= min(point.batch for point in self.points) else None
