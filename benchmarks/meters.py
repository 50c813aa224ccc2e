"""What the benchmarks watch in a running engine, from outside: how busy each runner is, and what handoffs move."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nanovllm import LLM
from nanovllm.engine.model_runner import ModelRunner, StepHandle
from nanovllm.engine.scheduler import BlockPair, Step
from nanovllm.utils.device import Event


class BusyMeter:
    """Seconds in which a runner's device works at steps, between two events around each.

    Steps of one stream follow each other, so the time before a step's turn does not count. On a CPU, where a step ends
    before its launch returns, it is the time of the launch.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner, self._launch = runner, runner.launch
        self._spans: list[tuple[Any, Any]] = []
        runner.launch = self._timed_launch  # type: ignore[method-assign]

    def seconds(self) -> float:
        """Of the steps since the last call; waits for them."""
        spans, self._spans = self._spans, []
        if not self._runner.device.is_cuda:
            return float(sum(end - start for start, end in spans))
        self._runner.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1e3

    def _timed_launch(self, step: Step) -> StepHandle:
        start = self._moment()
        handle = self._launch(step)
        self._spans.append((start, self._moment()))
        return handle

    def _moment(self) -> Any:
        if not self._runner.device.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._runner.stream)
        return event


@dataclass
class HandoffMeter:
    """Bytes that handoffs have moved, and the host's seconds to launch them."""

    num_sends: int = 0
    bytes: int = 0
    host_s: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, llm: LLM) -> HandoffMeter:
        """Watches an engine's handoffs from now on."""
        meter, transfer = cls(), llm.kv_transfer
        send, block_bytes = transfer.send, llm.decode_runner.spec.block_bytes

        def timed_send(pairs: Sequence[BlockPair], after: Event, mirrored: Sequence[BlockPair] = ()) -> Any:
            started = time.perf_counter()
            handle = send(pairs, after, mirrored)
            meter.host_s.append(time.perf_counter() - started)
            meter.num_sends += 1
            meter.bytes += len(pairs) * block_bytes
            return handle

        transfer.send = timed_send  # type: ignore[method-assign]
        return meter
