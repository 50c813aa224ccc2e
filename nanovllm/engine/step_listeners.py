"""Reports steps that have ended to listeners. Knows nothing of requests and their tokens. No torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nanovllm.errors import ConfigError, short_repr

if TYPE_CHECKING:
    from nanovllm.engine.in_flight import InFlight


@dataclass(frozen=True)
class StepReport:
    """A step that has ended, as the loop saw it. Moments are those of `time.perf_counter()`, in seconds.

    Attributes:
        kind: which parts the step had.
        device: where it ran, such as `cuda:1`.
        num_requests: requests that were in it, those included that have ended since its launch.
        num_tokens: tokens of prompts that it computed, and decoded tokens of requests that had not ended; as many as
            `metrics()` adds to `prefill_tokens` and `decode_tokens`.
        launched_s: when its launch had returned. A CPU has run the step by then.
        ended_s: when the loop found that it had ended.
        waited_s: seconds in which the loop only waited for devices, since the report before this one, or since the
            first listener was added. The rest of the time between two reports is the host's own work.
    """

    kind: Literal["prefill", "decode", "mixed"]
    device: str
    num_requests: int
    num_tokens: int
    launched_s: float
    ended_s: float
    waited_s: float


StepListener = Callable[[StepReport], object]


class StepListeners:
    """Gathers reports during a turn of the loop and gives them out after it; does nothing while nobody listens."""

    def __init__(self) -> None:
        self._listeners: list[StepListener] = []
        self._reports: deque[StepReport] = deque()
        self._waited_s = 0.0

    def add(self, listener: StepListener) -> None:
        if not callable(listener):
            raise ConfigError(f"step listener {short_repr(listener)} is not callable; pass a function of a StepReport")
        if not self._listeners:
            self._waited_s = 0.0
        self._listeners.append(listener)

    def remove(self, listener: StepListener) -> None:
        if listener not in self._listeners:
            raise ConfigError(
                f"step listener {short_repr(listener)} is not one of this engine's; pass one that was added"
            )
        self._listeners.remove(listener)

    def time_wait(self, wait: Callable[[], None]) -> None:
        """Calls `wait` and, if anybody listens, notes how long it takes."""
        if not self._listeners:
            wait()
            return
        started_s = time.perf_counter()
        wait()
        self._waited_s += time.perf_counter() - started_s

    def step_ended(self, work: InFlight) -> None:
        """Notes a step. Called before its tokens are taken in, which may end requests of the next step."""
        if not self._listeners:
            return
        step, ended_s = work.step, time.perf_counter()
        waited_s, self._waited_s = self._waited_s, 0.0
        num_tokens = step.num_prefill_tokens + step.decode.num_live
        self._reports.append(
            StepReport(step.kind, step.card.name, step.num_requests, num_tokens, work.launched_s, ended_s, waited_s)
        )

    def tell(self) -> None:
        """Calls the listeners with all noted reports; if one raises, the rest are kept for the next call."""
        while self._reports:
            report = self._reports.popleft()
            for listener in tuple(self._listeners):
                listener(report)
