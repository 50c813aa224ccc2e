"""What the benchmarks watch in a running engine, from outside.

How busy each runner is, what handoffs move, how long decode steps take, the memory of the process and of its GPU.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM, StepReport
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduling.decode_batch import HostDecodeBatch
from nanovllm.engine.scheduling.step import BlockPair, Step
from nanovllm.utils.device import Event, wait_event


def moment(stream: torch.cuda.Stream | None) -> Any:
    """An event after all that was launched on a stream; with none, on a CPU, the time in seconds."""
    if stream is None:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds between two moments of one device; waits for the second."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


MIB = 2**20


def memory_mib(llm: LLM) -> dict[str, float]:
    """MiB that the process has resident, and that are in use on its GPU, if it has one."""
    gc.collect()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    used = {"process": resident_pages * os.sysconf("SC_PAGE_SIZE") / MIB}
    device = llm.decode_runner.device
    if device.is_cuda:
        free, total = device.memory_info()
        used["device"] = (total - free) / MIB
        used["device_total"] = total / MIB
    return used


def freeze_garbage() -> None:
    """Lets the collector look no more at what lives now, as a server would once it is ready: tens of ms each time."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Span:
    """A step between two moments of its device."""

    start: Any
    end: Any
    decodes_on: bool
    """Whether it decodes for a request for which the decode step before it did."""
    late_s: float
    """What its launch took the host, if the device had nothing to do meanwhile."""


class BusyMeter:
    """Watches the steps of a runner, between two moments around each.

    Steps of one stream follow each other, so the time before a step's turn does not count. On a CPU, where a step ends
    before its launch returns, it is the time of the launch.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._stream, self._launch = runner.stream, runner.launch
        self.spans: list[Span] = []
        self._last_batch: HostDecodeBatch | None = None
        runner.launch = self._timed_launch  # type: ignore[method-assign]

    def take(self) -> tuple[float, float]:
        """Seconds at work since the last call, and idle before decode steps that go on with a request.

        Waits for them.
        """
        spans, self.spans = self.spans, []
        busy_s = sum(seconds_between(span.start, span.end) - span.late_s for span in spans)
        late = ((before, span) for before, span in itertools.pairwise(spans) if span.decodes_on)
        return busy_s, sum(seconds_between(before.end, span.start) + span.late_s for before, span in late)

    def _timed_launch(self, step: Step) -> StepHandle:
        decodes_on = bool(step.decode) and self._goes_on(step.decode.batch)
        is_late = self._stream is not None and (not self.spans or self.spans[-1].end.query())
        start, started_s = moment(self._stream), time.perf_counter()
        handle = self._launch(step)
        late_s = time.perf_counter() - started_s if is_late else 0.0
        self.spans.append(Span(start, moment(self._stream), decodes_on, late_s))
        return handle

    def _goes_on(self, batch: HostDecodeBatch) -> bool:
        last, self._last_batch = self._last_batch, batch
        return last is not None and (batch is last or not set(last.leases).isdisjoint(batch.leases))


class HandoffMeter:
    """Bytes that handoffs have moved, whichever way, and the host's seconds to launch each send."""

    def __init__(self, llm: LLM) -> None:
        self._block_bytes = llm.decode_runner.spec.block_bytes
        self._clear()
        for (card, _), transfer in llm._handoffs.transfers.items():
            send = functools.partial(self._timed_send, transfer.send, llm._runners[card])
            transfer.send = send  # type: ignore[method-assign]

    def take(self) -> dict[str, float]:
        """Bytes, sends and the host's microseconds for each since the last call; empty if nothing was sent."""
        num_bytes, host_s = self.num_bytes, self.host_s
        self._clear()
        if not host_s:
            return {}
        return {"bytes": num_bytes, "sends": len(host_s), "host_us_per_send": sum(host_s) / len(host_s) * 1e6}

    def _clear(self) -> None:
        self.num_bytes = 0
        self.host_s: list[float] = []
        self.sent: Any = None
        """The moment when all blocks had arrived."""

    def _timed_send(
        self, send: Callable[..., Any], source: ModelRunner, pairs: Sequence[BlockPair], after: Event
    ) -> Any:
        started = time.perf_counter()
        handle = send(pairs, after)
        self.host_s.append(time.perf_counter() - started)
        self.num_bytes += len(pairs) * self._block_bytes
        wait_event(source.copy_stream, after)  # `direct` sends nothing on it
        self.sent = moment(source.copy_stream)
        return handle


class Enough(Exception):  # noqa: N818 - not an error: what was to be measured has been
    """Ends the call that runs the loop."""


class DecodeTimer:
    """A step listener that times decode steps of a full batch and then raises Enough.

    The clock starts after some such steps, once the device has done what was launched, and runs until `num_steps` more
    were seen to have ended. Those that were launched before it started are among them: one, where the device is slower
    than the host.

    Args:
        llm: the engine.
        batch: requests of a full batch.
        num_steps: to be timed.

    Attributes:
        seconds: between the start and the end.
        waited_s: those of them in which the loop only waited for devices, `StepReport.waited_s`; the rest was its own
            work, the microsecond of a listener for each step included.
    """

    NUM_WARM_STEPS = 3

    def __init__(self, llm: LLM, batch: int, num_steps: int) -> None:
        self.seconds = self.waited_s = 0.0
        self.num_steps = num_steps
        self._runner, self._batch = llm.decode_runner, batch
        self._num_seen = 0
        self._started_s = 0.0

    def __call__(self, report: StepReport) -> None:
        if report.kind != "decode" or report.num_requests < self._batch:
            assert self._num_seen < self.NUM_WARM_STEPS, "nothing else runs while full batches are timed"
            return
        self._num_seen += 1
        num_timed = self._num_seen - self.NUM_WARM_STEPS
        if num_timed == 0:
            self._runner.synchronize()
            self._started_s = time.perf_counter()
        elif num_timed > 0:
            self.waited_s += report.waited_s
        if num_timed == self.num_steps:
            self.seconds = time.perf_counter() - self._started_s
            raise Enough
