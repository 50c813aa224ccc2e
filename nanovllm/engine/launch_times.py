"""When a card's next step is launched: just before it can begin, so that whoever becomes ready meanwhile is in it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from nanovllm.engine.in_flight import InFlight, StepsInFlight
from nanovllm.engine.observer import Counters
from nanovllm.engine.scheduling.card import Card

AT_ONCE = 0.0
FIRST_LEAD_S = 2e-3
"""Seconds from the beginning of a launch to the predicted end of the step in flight, at the start."""
LEAST_LEAD_S = 0.3e-3
CHANGE, CHANGE_S = 0.1, 0.2e-3
"""Share of the lead, and seconds besides, that are added after a launch that came too late. So a caller that takes its
time between two `step()` soon has its steps launched at once."""
LATE_SHARE = 0.02
"""Share of launches that come too late, in the long run: each launch in time takes this share of a change off the
lead. Each late one is a longer gap for all that decode there, and requests are judged by one gap in a hundred. With
much less, a few launches that take long in any case would have all steps launched far ahead."""
GRACE_S = 0.1e-3
"""Seconds from the predicted end of another card's step to a launch that waits for no more, and how late the moment of
a launch may be noticed."""
OVERDUE_S = 0.5e-3
"""Seconds for which a launch waits for another card's step that should have ended."""
UNSURE = 0.03
"""Share of the predicted time that is added to the lead: longer steps are predicted with larger errors."""


class LaunchTimes:
    """Decides when to launch the next step of a card on which another is in flight.

    Who is in a step is fixed when it is launched. One that is queued early leaves out the requests that become ready
    while the step before it runs; one that is queued late leaves the device idle.

    Args:
        steps: the work in flight.
        counters: count the launches that were put off and had not been done when the step before ended.
        puts_off: False to launch at once. Ranks in other processes begin a step later than this one, and how much later
            cannot be seen here.
    """

    def __init__(self, steps: StepsInFlight, counters: Counters, *, puts_off: bool = True) -> None:
        self._steps = steps
        self._counters = counters
        self._puts_off = puts_off
        self._leads_s: defaultdict[Card, float] = defaultdict(lambda: FIRST_LEAD_S)
        self._launch_s: defaultdict[Card, float] = defaultdict(float)
        """How long a launch on a card may take, by the last ones."""
        self._put_off: set[Card] = set()
        """Cards whose next step could have been launched, and was not."""

    def next_on(self, card: Card) -> float:
        """The moment to launch the card's next step at, of `time.perf_counter()`; AT_ONCE where that is now.

        So it is behind a step that has ended, or whose time nothing is known of yet.
        """
        end_s = self._end_s(card)
        if end_s is None:
            return AT_ONCE
        due_s = end_s - self._leads_s[card]
        launch_at_s = self._clear_of_others(card, due_s, last_s=end_s - self._launch_s[card])
        if due_s > time.perf_counter():
            self._put_off.add(card)
        elif launch_at_s > due_s:
            self.excuse(card)
        return launch_at_s

    def due_on(self, card: Card) -> float:
        """The moment of `next_on` but for what other cards do; nothing is noted."""
        end_s = self._end_s(card)
        return AT_ONCE if end_s is None else end_s - self._leads_s[card]

    def _end_s(self, card: Card) -> float | None:
        """When the card's only step may end; None if it has another number, that one has ended, or nothing is known."""
        works = self._steps.on(card)
        if not self._puts_off or len(works) != 1 or works[0].handle.is_done():
            return None
        predicted_s = card.step_time.predict(works[0].step.size)
        return None if predicted_s is None else self._steps.began_s(works[0]) + predicted_s * (1 - UNSURE)

    def _clear_of_others(self, card: Card, launch_at_s: float, last_s: float) -> float:
        """The moment of a launch, moved if another card's step ends during it: its tokens would wait for the launch.

        It comes after that end, at the last moment that is in time, `last_s`, unless the step ends sooner; or else
        before it. If there is no time for either, it waits if its own card is then idle for less time than the tokens
        would wait. Of several other cards, only the last one's end is sure to be kept clear of.
        """
        now_s, launch_s, seen = time.perf_counter(), self._launch_s[card], {card}
        for work in self._steps:
            if work.step.card in seen:
                continue
            seen.add(work.step.card)
            others_s = work.step.card.step_time.predict(work.step.size)
            if others_s is None:
                continue
            others_end_s, began_s = self._steps.began_s(work) + others_s, max(launch_at_s, now_s)
            if not began_s - OVERDUE_S < others_end_s < began_s + launch_s:
                continue
            if others_end_s <= last_s:
                launch_at_s = last_s
            elif others_end_s - launch_s > now_s - GRACE_S:
                launch_at_s = others_end_s - launch_s
            elif others_end_s - last_s < began_s + launch_s - others_end_s:
                launch_at_s = others_end_s + GRACE_S
        return launch_at_s

    def free_in_s(self, card: Card) -> float:
        """Predicted seconds until the card has ended what was launched there; 0 if nothing is known."""
        works = self._steps.on(card)
        if not works:
            return 0.0
        steps_s = [card.step_time.predict(work.step.size) or 0.0 for work in works]
        return max(self._steps.began_s(works[0]) + steps_s[0] - time.perf_counter(), 0.0) + sum(steps_s[1:])

    def makes_late(self, card: Card, launch_at_s: float) -> bool:
        """Whether a launch on the card that begins now would last beyond the moment of another one."""
        return time.perf_counter() + self._launch_s[card] > launch_at_s

    def launched(self, card: Card, before: Sequence[InFlight], took_s: float) -> None:
        """Notes that the card's next step has been launched, which took the host so many seconds.

        `before` was in flight when that began. The launch itself takes time, so that only its end tells whether it came
        in time.
        """
        self._launch_s[card] = max(took_s, self._launch_s[card] * (1 - CHANGE))
        is_late = card in self._put_off and all(work.handle.is_done() for work in before)
        self._put_off.discard(card)
        self._counters.late_launches += is_late
        lead_s = self._leads_s[card]
        change_s = CHANGE * lead_s + CHANGE_S
        self._leads_s[card] = max(lead_s + (change_s if is_late else -LATE_SHARE * change_s), LEAST_LEAD_S)

    def excuse(self, card: Card) -> None:
        """Notes that the card's next step is not late, whenever it comes: there is none, or others' tokens go first."""
        self._put_off.discard(card)
