"""When something that has failed is tried again: by and by. No torch."""

from __future__ import annotations

FIRST_PAUSE_S = 10.0
LONGEST_PAUSE_S = 640.0


class CircuitBreaker:
    """Whether something may be used that can fail; times are of one clock, in seconds.

    After `num_tolerated` failures in a row the next one puts it out of use. After a pause, which doubles with every
    trial that fails, it may be tried, and when that works it is in use again.
    """

    def __init__(self, num_tolerated: int = 0) -> None:
        self._num_tolerated = num_tolerated
        self._num_failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._next_trial_s = 0.0
        self._is_trying = False
        self.is_out = False

    def allows_trial(self, now: float) -> bool:
        return not self.is_out or now >= self._next_trial_s

    def begin_trial(self, now: float) -> None:
        """What may take a while, and need not end: the next trial waits for a pause."""
        self._is_trying = True
        self._next_trial_s = now + self._pause_s

    def failed(self, now: float) -> bool:
        """It did not work; whether it is out of use because of that, and was in use before."""
        self._num_failures += 1
        if not self.is_out:
            if self._num_failures > self._num_tolerated:
                self.is_out = True
                self._next_trial_s = now + self._pause_s
            return self.is_out
        if self._is_trying or now >= self._next_trial_s:  # else it was begun before
            self._is_trying = False
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._next_trial_s = now + self._pause_s
        return False

    def worked(self) -> bool:
        """It worked; whether it is in use again by that."""
        was_out, self.is_out = self.is_out, False
        self._num_failures, self._is_trying = 0, False
        if was_out:
            self._pause_s = FIRST_PAUSE_S
        return was_out
