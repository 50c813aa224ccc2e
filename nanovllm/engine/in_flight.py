"""Work that was launched on the devices and has not been collected."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from nanovllm.engine.execution.kv_transfer import TransferHandle
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import BlockPair, PrefillStep, Step
from nanovllm.engine.scheduling.decode_batch import DecodeStep
from nanovllm.engine.sequence import Lease, Sequence


@dataclass(frozen=True)
class InFlight:
    """A launched step, where it runs, the handle to collect it by, and when that was, by `time.perf_counter()`."""

    runner: ModelRunner
    step: Step
    handle: StepHandle
    launched_s: float

    @property
    def kind(self) -> str:
        return "prefill" if isinstance(self.step, PrefillStep) else "decode"


class StepsInFlight:
    """The launched steps of all devices, in the order of their launch. Those of one device end in that order."""

    def __init__(self) -> None:
        self._steps: list[InFlight] = []
        self._last_end_s: dict[ModelRunner, float] = {}
        """When a step of a runner was last seen to have ended."""

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(self._steps)

    def add(self, runner: ModelRunner, step: Step, handle: StepHandle) -> None:
        self._steps.append(InFlight(runner, step, handle, time.perf_counter()))

    def remove(self, work: InFlight) -> None:
        """Takes out a step that has ended."""
        self._steps.remove(work)
        self._last_end_s[work.runner] = time.perf_counter()

    def count(self, runner: ModelRunner, kind: type[PrefillStep] | type[DecodeStep]) -> int:
        return sum(work.runner is runner and isinstance(work.step, kind) for work in self._steps)

    def of(self, runner: ModelRunner) -> list[InFlight]:
        return [work for work in self._steps if work.runner is runner]

    def is_any_done(self) -> bool:
        return any(work.handle.is_done() for work in self._steps)

    def ended(self) -> list[InFlight]:
        """Steps that have ended, in the order of their launch on each runner."""
        ended, running = [], set()
        for work in self._steps:
            if work.runner not in running and work.handle.is_done():
                ended.append(work)
            else:
                running.add(work.runner)
        return ended

    def late(self, timeout_s: float) -> InFlight | None:
        """A step that is the first on its device and has not ended in so many seconds, None if there is none."""
        now, first_of = time.perf_counter(), set()
        for work in self._steps:
            if work.runner in first_of:
                continue
            first_of.add(work.runner)
            began_s = max(work.launched_s, self._last_end_s.get(work.runner, 0.0))
            if now - began_s > timeout_s and not work.handle.is_done():
                return work
        return None

    def drop(self) -> list[InFlight]:
        """Forgets all steps, which nobody will collect."""
        dropped, self._steps = self._steps, []
        return dropped


@dataclass
class Handoff:
    """Blocks of one request on their way to the decode pool."""

    seq: Sequence
    lease: Lease
    pairs: SequenceOf[BlockPair]
    handle: TransferHandle
    step: PrefillStep
    """The step that computes the blocks; the handoff's time runs from its end."""
    computed_s: float | None = None
    """When that step was seen to have ended."""
    deadline_s: float = math.inf
    timed_out: bool = False
