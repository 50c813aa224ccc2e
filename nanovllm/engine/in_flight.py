"""Work that was launched on the devices and has not been collected."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from nanovllm.engine.execution.kv_transfer import TransferHandle
from nanovllm.engine.model_runner import ModelRunner, StepHandle
from nanovllm.engine.scheduler import BlockPair, PrefillStep, Step
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
