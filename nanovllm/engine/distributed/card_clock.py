"""How far the clock of a card's host is ahead of the controller's, by round trips of messages."""

from __future__ import annotations

from collections import deque
from pathlib import Path

PING_S = 10.0
"""Seconds from one round trip to the next: clocks of hosts drift some 10 us in each."""
NUM_KEPT = 8


class CardClock:
    """The clock of a card: `time.perf_counter()` there minus `time.perf_counter()` here.

    Hosts have clocks of their own, and processes of one host have one. Of the last round trips the shortest counts: its
    error is at most half of it.

    Args:
        is_ours: whether the card is on this host.

    Attributes:
        num_round_trips: how many there were.
        offset_s: seconds by which the card's clock is ahead.
        round_trip_s: seconds of the shortest round trip; 0 before the first one.
    """

    def __init__(self, *, is_ours: bool) -> None:
        self.offset_s = self.round_trip_s = 0.0
        self.is_ours = is_ours
        self.num_round_trips = 0
        self._pinged_s: float | None = None
        self._kept: deque[tuple[float, float]] = deque(maxlen=NUM_KEPT)

    def wants_ping(self, now_s: float) -> bool:
        """Whether a round trip is due, which then counts as begun."""
        if self.is_ours or (self._pinged_s is not None and now_s - self._pinged_s < PING_S):
            return False
        self._pinged_s = now_s
        return True

    def learn(self, sent_s: float, card_s: float, received_s: float) -> None:
        """Takes in a round trip: when it began and ended here, and the moment on the card in between."""
        ahead_s = 0.0 if self.is_ours else card_s - (sent_s + received_s) / 2
        self.num_round_trips += 1
        self._kept.append((received_s - sent_s, ahead_s))
        self.round_trip_s, self.offset_s = min(self._kept)


def host_id() -> str:
    """A name of this host as it runs now; two processes with the same one have the same clock."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
