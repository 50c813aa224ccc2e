"""How much shorter than `itl_target_ms` steps with prompts are formed, so that few gaps between tokens exceed it.

Steps scatter around their predicted times: clocks go up and down with power, cards wait for each other, and the host
takes tokens in late. The margin is learned from the gaps themselves, so that it covers all of that. No torch.
"""

from __future__ import annotations

LATE_SHARE = 0.001
"""Share of gaps of steps with prompts that may exceed the target. A request is often judged by the slowest of a hundred
of its gaps, and short answers have few."""
FIRST_MARGIN, MOST_MARGIN = 0.05, 0.25
CHANGE = 0.01
"""What a gap that exceeds the target adds to the margin. Each that does not takes LATE_SHARE of that off, so that in
the long run as many exceed it as may."""
TOLERANCE = 0.005
"""Predictions, and the margin, change a little between the launch of a step and its end."""
HITCH = 1.5
"""A gap so many times as long as the target was no scatter of steps, which a margin could cover."""


class ItlMargin:
    """Learns the margin of one engine.

    Args:
        target_s: `itl_target_ms`, in seconds.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self.share = FIRST_MARGIN
        """The margin as a share of the target."""

    @property
    def limit_s(self) -> float:
        """Seconds that a step with prompts may be predicted to take."""
        return self._target_s * (1 - self.share)

    def observe(self, gap_s: float, predicted_s: float) -> None:
        """The tokens of a step with prompts, of this predicted time, came so long after those of the step before it.

        A step that was formed longer than the limit, so that the oldest prompt comes to its end, teaches nothing.
        """
        if predicted_s <= self.limit_s * (1 + TOLERANCE) and gap_s < HITCH * self._target_s:
            change = CHANGE if gap_s > self._target_s else -CHANGE * LATE_SHARE
            self.share = min(max(self.share + change, 0.0), MOST_MARGIN)
