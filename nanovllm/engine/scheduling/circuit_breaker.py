"""A circuit breaker: when something that keeps failing is used again. No torch."""

from __future__ import annotations

FIRST_PAUSE_S = 10.0
LONGEST_PAUSE_S = 640.0


class CircuitBreaker:
    """Decides whether something that can fail may be used. Times are in seconds, all of one clock.

    After `num_tolerated` failures in a row the next failure opens the breaker: the thing is left out. After a pause,
    which doubles with every trial that fails, it may be tried; a trial that works closes the breaker.
    """

    def __init__(self, num_tolerated: int = 0) -> None:
        self._num_tolerated = num_tolerated
        self._num_failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._next_trial_s = 0.0
        self._is_trying = False
        self.is_open = False

    def allows_trial(self, now: float) -> bool:
        return not self.is_open or now >= self._next_trial_s

    def begin_trial(self, now: float) -> None:
        """A trial begins, which may take long or never end; the next one may begin after the pause."""
        self._is_trying = True
        self._next_trial_s = now + self._pause_s

    def failed(self, now: float) -> bool:
        """Notes a failure. Returns whether that opened the breaker."""
        self._num_failures += 1
        if not self.is_open:
            if self._num_failures > self._num_tolerated:
                self.is_open = True
                self._next_trial_s = now + self._pause_s
            return self.is_open
        if self._is_trying or now >= self._next_trial_s:  # else the work began before the breaker opened
            self._is_trying = False
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._next_trial_s = now + self._pause_s
        return False

    def worked(self) -> bool:
        """Notes a success. Returns whether that closed the breaker."""
        was_open, self.is_open = self.is_open, False
        self._num_failures, self._is_trying = 0, False
        if was_open:
            self._pause_s = FIRST_PAUSE_S
        return was_open
