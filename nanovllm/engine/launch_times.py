"""When a card's next decode step is launched: as soon as there is a place, or just before it can begin."""

from __future__ import annotations

import time

from nanovllm.engine.in_flight import StepsInFlight
from nanovllm.engine.observer import Counters
from nanovllm.engine.scheduling.card import Card

AT_ONCE = 0.0


class LaunchTimes:
    """Decides when to launch the next step of a card on which others are in flight.

    Who is in a step is fixed when it is launched. One that is queued early leaves out the requests that become ready
    while the step before it runs; one that is queued late leaves the device idle.

    Args:
        steps: the work in flight.
        lead_s: seconds before the predicted end of what is in flight; None to launch at once.
        counters: count the launches that were put off and came when the step before had ended.
    """

    def __init__(self, steps: StepsInFlight, lead_s: float | None, counters: Counters) -> None:
        self._steps = steps
        self._lead_s = lead_s
        self._counters = counters
        self._put_off: set[Card] = set()
        """Cards whose next step could have been launched, and was not."""

    def next_on(self, card: Card) -> float:
        """The moment to launch the card's next step at, of `time.perf_counter()`; AT_ONCE where that is now.

        So it is for a step whose time nothing is known of yet.
        """
        works = self._steps.on(card)
        if self._lead_s is None or not works:
            return AT_ONCE
        predicted_s = [card.step_time.predict(work.step.size) for work in works]
        known_s = [seconds for seconds in predicted_s if seconds is not None]
        if len(known_s) < len(works):
            return AT_ONCE
        launch_at_s = self._steps.began_s(works[0]) + sum(known_s) - self._lead_s
        if launch_at_s > time.perf_counter():
            self._put_off.add(card)
        return launch_at_s

    def launching(self, card: Card) -> None:
        """Notes that the card's next step is launched now."""
        if card in self._put_off and all(work.handle.is_done() for work in self._steps.on(card)):
            self._counters.late_launches += 1
        self._put_off.discard(card)

    def nothing_to_launch(self, card: Card) -> None:
        """Notes that the card has no next step, so that none is late."""
        self._put_off.discard(card)
