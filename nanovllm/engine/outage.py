"""When something that has failed is tried again: by and by. No torch."""

from __future__ import annotations

FIRST_PAUSE_S = 10.0
LONGEST_PAUSE_S = 640.0


class Outage:
    """Whether something may be used that can fail; times are of one clock, in seconds.

    After `num_tolerated` failures in a row the next one puts it out of use. After a pause, which doubles with every
    trial that fails, whoever asks first may try it, and when that works it is in use again.
    """

    def __init__(self, num_tolerated: int = 0) -> None:
        self._num_tolerated = num_tolerated
        self._num_failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._next_trial_s = 0.0
        self.is_out = False

    def may_try(self, now: float) -> bool:
        """Whether to use it now. While it is out, that is said once per pause: a trial need not end."""
        if not self.is_out:
            return True
        if now < self._next_trial_s:
            return False
        self._next_trial_s = now + self._pause_s
        return True

    def failed(self, now: float) -> bool:
        """It did not work; whether it is out of use because of that, and was in use before."""
        self._num_failures += 1
        if self.is_out:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        elif self._num_failures <= self._num_tolerated:
            return False
        was_out, self.is_out = self.is_out, True
        self._next_trial_s = now + self._pause_s
        return not was_out

    def worked(self) -> bool:
        """It worked; whether it is in use again by that."""
        self._num_failures = 0
        was_out, self.is_out = self.is_out, False
        if was_out:
            self._pause_s = FIRST_PAUSE_S
        return was_out
