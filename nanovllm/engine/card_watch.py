"""Looks after cards in processes of their own: notices lost ones, has their work done elsewhere, starts them again."""

from __future__ import annotations

import logging
import time
from collections import abc
from typing import TYPE_CHECKING

from nanovllm.engine.in_flight import InFlight, StepsInFlight
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduling.card import Card
from nanovllm.errors import DeviceError
from nanovllm.utils.process import without_interrupts

if TYPE_CHECKING:  # what it imports may not be installed
    from nanovllm.engine.distributed.remote_card import RemoteRunner

logger = logging.getLogger(__name__)

REST_MS = 1
"""How long the loop waits for a card's message before it looks at all else that it may wait for."""
CHECK_S = 0.025
"""Seconds from one look whether cards are there to the next; more than a client's own least time between two."""


class CardWatch:
    """The remote cards of an engine; does nothing if there are none.

    Args:
        runners: the remote cards' runners.
        scheduler: is told of lost cards and lost steps.
        steps: the steps in flight.
        outputs: is told of requests whose step has failed.
        agents_with_messages: gives the names of the cards' processes that have said something; waits up to `timeout_ms`
            milliseconds for the first; None without remote cards.
    """

    def __init__(
        self,
        runners: abc.Mapping[Card, RemoteRunner],
        scheduler: Scheduler,
        steps: StepsInFlight,
        outputs: OutputProcessor,
        agents_with_messages: abc.Callable[[int], set[str]] | None,
    ) -> None:
        self._runners = runners
        self._scheduler = scheduler
        self._steps = steps
        self._outputs = outputs
        self._agents_with_messages = agents_with_messages
        self._checked_s = 0.0

    def look(self) -> None:
        """Notices which cards are gone, and which are there again.

        Raises:
            DeviceError: no card can be started any more.
        """
        self._poll(0)
        for card, runner in self._runners.items():
            if card.is_up != runner.is_up or runner.is_lost:
                with without_interrupts():  # half of it done would leave the cards apart
                    self._take_note(card, runner)
        if self._runners and all(runner.is_out for runner in self._runners.values()):
            reasons = "; ".join(f"{card}: {runner.reason}" for card, runner in self._runners.items())
            raise DeviceError(f"no card of the cluster can be started: {reasons}")

    @property
    def has_cards(self) -> bool:
        """Whether the engine's cards are remote."""
        return bool(self._runners)

    @property
    def has_news(self) -> bool:
        """Whether a look would change something."""
        return any(card.is_up != runner.is_up for card, runner in self._runners.items())

    @property
    def is_starting(self) -> bool:
        """Whether a card is on its way up."""
        return any(not (runner.is_up or runner.is_out) for runner in self._runners.values())

    def rest(self) -> None:
        """Lets others run while the loop waits for devices; waits for what remote cards say."""
        if self._agents_with_messages is None:
            time.sleep(0)
        else:
            self._poll(REST_MS)

    def is_lost(self, card: Card) -> bool:
        """Whether a card is remote and not up, of which the loop may not have taken note."""
        return card in self._runners and not self._runners[card].is_up

    def gave_up(self, work: InFlight, timeout_s: float) -> bool:
        """Gives up the card if it is remote; returns whether it is."""
        runner = self._runners.get(work.step.card)
        if runner is not None:
            size = f"a {work.step.kind} step of {work.step.num_requests} requests"
            runner.give_up(f"{size} has not ended within step_timeout_s={timeout_s}")
        return runner is not None

    def step_failed(self, work: InFlight, error: Exception) -> None:
        """A step could not be run; those that were launched behind it on its card have not been, either.

        Their requests are recomputed, those of the failed step by halves until the one at fault is alone: that one ends
        with the error the second time. The card's breaker counts the step once.
        """
        runner, card = self._runners[work.step.card], work.step.card
        failed, *later = self._steps.drop_on(card)
        assert failed is work.step, "steps of a card end in the order of their launch"
        runner.forget_device_batch()
        at_fault = self._scheduler.step_failed(work.step)
        if at_fault is None:
            logger.warning("a step of %d requests on %s failed (%s)", work.step.num_requests, card, error)
        else:
            self._outputs.fail(at_fault, error, blames_card=False)
        self._scheduler.steps_lost(later)

    def _poll(self, timeout_ms: int) -> None:
        """Takes in what cards have said, and notices now and then which are gone or silent."""
        if self._agents_with_messages is None:
            return
        agents, now_s = self._agents_with_messages(timeout_ms), time.monotonic()
        checks_all = now_s - self._checked_s >= CHECK_S
        self._checked_s = now_s if checks_all else self._checked_s
        if not (checks_all or agents):
            return
        with without_interrupts():  # once for all that they say
            for runner in self._runners.values():
                if checks_all:
                    runner.poll()
                elif runner.agent in agents:
                    runner.take_in()

    def _take_note(self, card: Card, runner: RemoteRunner) -> None:
        if card.is_up and not runner.is_up:
            self._lost(card, runner)
        elif runner.is_lost:
            runner.note_loss()  # of one that was lost on its way up
        if runner.is_up and not card.is_up:
            self._came_up(card, runner)
        elif runner.may_restart:
            runner.restart()

    def _lost(self, card: Card, runner: RemoteRunner) -> None:
        logger.warning("%s is lost: its requests are recomputed on other cards", card)
        self._scheduler.card_lost(card, self._steps.drop_on(card))
        runner.note_loss()
        for other in self._runners.values():
            if other is not runner:
                other.remove_peer(runner)

    def _came_up(self, card: Card, runner: RemoteRunner) -> None:
        for other in self._runners.values():
            if other is not runner and other.is_up:
                runner.add_peer(other)
                other.add_peer(runner)
        card.is_up = True
        logger.warning("%s is up again", card)
