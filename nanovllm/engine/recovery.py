"""Recovers after an interrupt, or an error of no single request, has broken off a turn of the loop.

Only the requests and their tokens are trusted then: all requests wait to be recomputed, or end if a device is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from nanovllm.engine.handoffs import Handoffs
from nanovllm.engine.in_flight import StepsInFlight
from nanovllm.engine.mailbox import Mailbox
from nanovllm.engine.observer import Observer
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.runners import Runners
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import DeviceError, WorkerError
from nanovllm.utils.device import leak_until_exit

logger = logging.getLogger(__name__)


class Recovery:
    """Keeps an engine's state consistent. Everything here may be interrupted, and then runs again.

    Args:
        runners: run the work that is under way.
        scheduler, steps, handoffs, outputs, mailbox: the state.
        observer: is told of work that nobody will collect.

    Attributes:
        device_error: why no step can run any more; None while the devices work.
    """

    def __init__(
        self,
        runners: Runners,
        scheduler: Scheduler,
        steps: StepsInFlight,
        handoffs: Handoffs,
        outputs: OutputProcessor,
        mailbox: Mailbox,
        observer: Observer,
    ) -> None:
        self.device_error: DeviceError | WorkerError | None = None
        self._runners = runners
        self._scheduler = scheduler
        self._steps = steps
        self._handoffs = handoffs
        self._outputs = outputs
        self._mailbox = mailbox
        self._observer = observer
        self._is_consistent = True
        """Whether the last turn ran to its end, or was repaired after it was broken off."""

    def guard(self, work: Callable[[], None]) -> None:
        """Runs `work`, which changes requests. If it raises, repairs the state, or ends all if a device is lost."""
        try:
            self._repair()
            self._is_consistent = False
            work()
            self._is_consistent = True
        except BaseException as error:
            lost = self._runners.lost_device(error)
            if lost is not None:
                self.end_all(lost)
                return
            try:
                self._repair()
            except (DeviceError, WorkerError) as lost_meanwhile:
                self.end_all(lost_meanwhile)
            raise

    def settle(self) -> None:
        """Waits for the devices before the engine is closed; gives up on them if one is lost."""
        try:
            for runner in self._runners:
                runner.synchronize()
                runner.take_lane_times()
        except Exception as error:
            lost = self._runners.lost_device(error)
            if lost is None:
                raise
            logger.error("%s", lost)
            self.give_up_devices(lost)

    def end_all(self, error: DeviceError | WorkerError) -> None:
        """Ends every request with this error: nothing will run any more."""
        self._is_consistent = False
        logger.error("%s; all requests end", error)
        self.give_up_devices(error)
        self._take_in_arrived()
        self._scheduler.start_over(self._outputs.unfinished(), ())
        self._outputs.fail_all(error)
        self._is_consistent = True

    def give_up_devices(self, error: DeviceError | WorkerError) -> None:
        """Leaves everything on the devices, work in flight included, allocated until the process ends."""
        self.device_error = error
        for runner in self._runners:
            if runner.arrivals is not None:
                runner.arrivals.give_up()  # the card that works waits for nothing that the lost one computes
        leak_until_exit(*self._runners, self._steps.drop(), self._handoffs, self._handoffs.drop())

    def _repair(self) -> None:
        if self._is_consistent:
            return
        if self.device_error is None:
            self._start_over()
        else:
            self.end_all(self.device_error)

    def _start_over(self) -> None:
        """Waits for the devices and has all requests recomputed."""
        is_stuck = self._handoffs.is_stuck
        for runner in self._runners:
            runner.synchronize(copies=not is_stuck)
            runner.forget_device_batch()
        self._observer.dropped(self._steps, [] if is_stuck else self._handoffs.under_way)
        stuck = self._handoffs.forget()
        self._steps.drop()
        self._take_in_arrived()
        self._scheduler.start_over(self._outputs.unfinished(), stuck)
        self._outputs.repair()
        self._is_consistent = True

    def _take_in_arrived(self) -> None:
        while self._mailbox.arrived:
            self._outputs.add(self._mailbox.arrived[0])
            self._mailbox.arrived.popleft()
        # Their requests have been taken in now: the next turn acts on the aborts.
        self._mailbox.aborts.extend(self._mailbox.early_aborts.values())
        self._mailbox.early_aborts.clear()
