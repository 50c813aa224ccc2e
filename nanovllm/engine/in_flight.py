"""Work that was launched on the devices and has not been collected."""

from __future__ import annotations

import math
import time
from collections import abc
from dataclasses import dataclass

from nanovllm.engine.execution.kv_transfer import TransferHandle
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.scheduling.card import Card
from nanovllm.engine.scheduling.lease import Lease
from nanovllm.engine.scheduling.step import BlockPair, Step
from nanovllm.engine.sequence import Sequence


@dataclass(frozen=True, eq=False)
class InFlight:
    """A launched step, its handle, and when its launch began and returned.

    Moments are those of `time.perf_counter()`, in seconds.
    """

    step: Step
    handle: StepHandle
    began_s: float
    launched_s: float

    @property
    def queue(self) -> abc.Hashable:
        """Card and stream: steps of one queue end in the order of their launch."""
        return self.step.card, self.handle.stream


@dataclass
class FormedStep:
    """A step that the scheduler has formed and that is about to be launched.

    Attributes:
        before: what was in flight on its card when it was formed.
        took_s: seconds that forming and preparing it have taken so far.
        is_prepared: whether its runner has done what can be done ahead of a launch.
        has_given_way: whether its launch was put off once, for tokens of another card.
    """

    step: Step
    before: list[InFlight]
    took_s: float
    is_prepared: bool = False
    has_given_way: bool = False


class StepsInFlight:
    """The launched steps of all cards, in the order of their launch.

    Attributes:
        formed: the step that is launched next, None if none is formed. Its requests and blocks are held as those of
            steps in flight are, so that it goes when these are dropped.
    """

    def __init__(self) -> None:
        self.formed: FormedStep | None = None
        self._steps: list[InFlight] = []
        self._on: dict[Card, list[InFlight]] = {}
        self._last_end_s: dict[abc.Hashable, float] = {}
        """When the last step of a queue ended that was taken out."""

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> abc.Iterator[InFlight]:
        return iter(self._steps)

    def add(self, step: Step, handle: StepHandle, began_s: float) -> None:
        """Adds a step whose launch began then and has just returned."""
        self.put(InFlight(step, handle, began_s, time.perf_counter()))

    def put(self, work: InFlight) -> None:
        """Adds a step that was launched."""
        self._steps.append(work)
        self._on.setdefault(work.step.card, []).append(work)

    def remove(self, work: InFlight, ended_s: float) -> None:
        """Takes out a step that ended then."""
        self._steps.remove(work)
        self._on[work.step.card].remove(work)
        self._last_end_s[work.queue] = ended_s

    def on(self, card: Card) -> list[InFlight]:
        return list(self._on.get(card, ()))

    def num_on(self, card: Card) -> int:
        return len(self._on.get(card, ()))

    def drop_on(self, card: Card) -> list[Step]:
        """Forgets and returns the steps of a card, one that is formed among them: nobody will collect them."""
        dropped = [work.step for work in self._on.pop(card, [])]
        self._steps = [work for work in self._steps if work.step.card is not card]
        if self.formed is not None and self.formed.step.card is card:
            dropped.append(self.formed.step)
            self.formed = None
        return dropped

    def is_any_done(self) -> bool:
        """Whether a step has ended, as of `ended`."""
        return bool(self.ended())

    def ended(self) -> list[InFlight]:
        """Steps that have ended, in the order of their launch in each queue.

        A chunk of a shared prompt ends after the one before it, whose KV it has read, though another card computed it.
        """
        ended: list[InFlight] = []
        if not any(work.handle.is_done() for work in self._steps):
            return ended
        running: set[abc.Hashable] = set()
        running_chunks: set[int] = set()
        for work in self._steps:
            chunks = work.step.shared_chunks if work.step.chunks else ()
            reads_running = any(chunk.waits_for in running_chunks for chunk in chunks)
            if work.queue not in running and work.handle.is_done() and not reads_running:
                ended.append(work)
            else:
                running.add(work.queue)
                running_chunks.update(chunk.number for chunk in chunks)
        return ended

    def began_s(self, work: InFlight) -> float:
        """When the first step of a queue began, if the host had it launched at once."""
        return max(work.launched_s, self._last_end_s.get(work.queue, 0.0))

    def late(self, timeout_s: float) -> InFlight | None:
        """A step that has been the first of its queue for `timeout_s` and has not ended; None if there is none."""
        now, seen = time.perf_counter(), set()
        for work in self._steps:
            if work.queue in seen:
                continue
            seen.add(work.queue)
            if now - self.began_s(work) > timeout_s and not work.handle.is_done():
                return work
        return None

    def drop(self) -> list[InFlight]:
        """Forgets all steps, and returns those that were launched: nobody will collect them."""
        dropped, self._steps, self.formed = self._steps, [], None
        self._on.clear()
        return dropped


@dataclass
class Handoff:
    """Blocks of one request on their way to the decode pool."""

    seq: Sequence
    lease: Lease
    step: Step
    """The step that computes the blocks; the handoff's timeout runs from its end."""
    target: Card
    """The card whose pool receives the blocks."""
    pairs: abc.Sequence[BlockPair]
    num_tokens: int
    """Tokens whose KV they are to have, the last block's places behind a prompt's end included."""
    handle: TransferHandle
    computed_s: float | None = None
    """When that step was collected; None before."""
    deadline_s: float = math.inf
    timed_out: bool = False

    @property
    def source(self) -> Card:
        return self.step.card
