"""What the decode pipeline has done: counters, and times of its lanes as far as they are measured."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanovllm.engine.scheduling.pipeline_plan import Arrangement, Lane, PlanStep
from nanovllm.utils.device import Device, DeviceClock

NUM_SAMPLED_LAYERS = 2
"""Timing a step of a plan holds its lane up for two microseconds or so: unless all are asked for, these are enough."""


@dataclass
class PipelineCounters:
    """Steps and tokens that ran on the pipeline, and why others did not."""

    steps: int = 0
    tokens: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    recoveries: int = 0


@dataclass(frozen=True)
class LaneTimes:
    """Seconds of one run of a plan: how long each lane was busy, how long both were, and from beginning to end."""

    attention_s: float
    ffn_s: float
    overlap_s: float
    total_s: float


@dataclass(frozen=True)
class LaneMoments:
    """When steps of a plan began and ended, on the device: the next run of the same graph overwrites it.

    Attributes:
        steps: those that are timed.
        moments: [2, N] int64, nanoseconds.
        share: timed layers as a share of all layers.
    """

    steps: tuple[PlanStep, ...]
    moments: torch.Tensor
    share: float

    def times(self, moments: np.ndarray) -> LaneTimes:
        """Lane times, extrapolated to all layers, from `moments` as they were copied to the host."""
        return lane_times([step.lane for step in self.steps], moments, self.share)


class LaneClock:
    """Records when steps of a plan begin and end: on a GPU by its own clock, read on the lanes, in CUDA graphs too.

    Args:
        device: where the lanes are.
        every_layer: time all layers, not only some in the middle.
    """

    def __init__(self, device: torch.device, every_layer: bool) -> None:
        self._device = device
        self._every_layer = every_layer
        self._offset_of: dict[int, int] = {}
        self.last: LaneMoments | None = None
        """Moments of the last run."""

    def begin(self, plan: Sequence[PlanStep], num_layers: int) -> None:
        """Called when a run of the plan is about to be launched."""
        layers = range(num_layers)
        if not self._every_layer and num_layers > NUM_SAMPLED_LAYERS:
            first = (num_layers - NUM_SAMPLED_LAYERS) // 2
            layers = range(first, first + NUM_SAMPLED_LAYERS)
        timed = [index for index, step in enumerate(plan) if step.pieces[0][0] in layers]
        self._offset_of = {index: offset for offset, index in enumerate(timed)}
        moments = torch.zeros(2, len(timed), dtype=torch.int64, device=self._device)
        self.last = LaneMoments(tuple(plan[index] for index in timed), moments, len(layers) / num_layers)

    def stamp(self, index: int, *, ends: bool) -> None:
        """Records on the current stream that step `index` of the plan begins, or ends, now."""
        offset = self._offset_of.get(index)
        if offset is not None and self.last is not None:
            moments = self.last.moments.view(-1)
            _stamp(moments, int(ends) * len(self._offset_of) + offset)


class Anchor:
    """One moment by two clocks, that of the lanes and that of a trace: gives the offset between them.

    On a CPU they are the same clock, which is not read twice: the thread may be held up in between.
    """

    def __init__(self, clock: DeviceClock, device: Device) -> None:
        self._is_one_clock = not device.is_cuda
        if self._is_one_clock:
            return
        stamped = torch.zeros(1, dtype=torch.int64, device=device.torch_device)
        _stamp(stamped, 0)
        self._moment = clock.record_moment()
        self._stamped = stamped.to("cpu", non_blocking=True)

    def offset_s(self) -> float:
        """Seconds to add to the lanes' time to get the trace's. Called when the step has ended."""
        return 0.0 if self._is_one_clock else self._moment.seconds() - int(self._stamped) / 1e9


def _stamp(moments: torch.Tensor, offset: int) -> None:
    """Writes the time in nanoseconds to `moments[offset]` when the current stream gets there."""
    if moments.is_cuda:
        from nanovllm.kernels.triton_stamps import stamp

        stamp(moments, offset)
    else:
        moments[offset] = time.perf_counter_ns()


def lane_times(lanes: Sequence[Lane], moments: np.ndarray, share: float = 1.0) -> LaneTimes:
    """Lane times from the begins and ends of N steps, [2, N] int64 nanoseconds; divided by `share`."""
    is_attention = np.array([lane is Lane.ATTENTION for lane in lanes])
    attention, ffn = moments[:, is_attention], moments[:, ~is_attention]
    # Steps of one lane follow each other: what two lanes have in common is what their steps have, pair by pair.
    later_begin = np.maximum(attention[0][:, None], ffn[0][None, :])
    earlier_end = np.minimum(attention[1][:, None], ffn[1][None, :])
    overlap = (earlier_end - later_begin).clip(min=0).sum()
    busy = [(of_lane[1] - of_lane[0]).sum() for of_lane in (attention, ffn)]
    total = moments[1].max() - moments[0].min()
    return LaneTimes(*(float(ns) / 1e9 / share for ns in (*busy, overlap, total)))


class MeanLaneTimes:
    """Averages the lane times of timed runs."""

    def __init__(self) -> None:
        self._sums = np.zeros(4)
        self._runs = 0

    def add(self, times: LaneTimes) -> None:
        self._sums += (times.attention_s, times.ffn_s, times.overlap_s, times.total_s)
        self._runs += 1

    def mean(self) -> LaneTimes | None:
        """Mean lane times of all runs; None if there was no run."""
        return LaneTimes(*(self._sums / self._runs).tolist()) if self._runs else None


def statistics(
    counters: PipelineCounters,
    arrangements: Sequence[Arrangement],
    lanes: LaneTimes | None,
    sequential_s: float | None,
) -> dict[str, Any]:
    """Counters, and averages per step in ms where they were measured.

    `sequential_s` is the calibrated time of a plain step of the mean batch and context.
    """
    result: dict[str, Any] = {
        "steps": counters.steps,
        "total_tokens": counters.tokens,
        "attention_sm": sorted({arrangement.split[0] for arrangement in arrangements}),
        "ffn_sm": sorted({arrangement.split[1] for arrangement in arrangements}),
        "arrangements": [str(arrangement) for arrangement in arrangements],
        "sequential_ms": None if sequential_s is None else sequential_s * 1e3,
        "fallbacks": dict(counters.fallbacks),
        "recoveries": counters.recoveries,
    }
    if lanes is not None:
        result |= {
            "avg_attention_ms": lanes.attention_s * 1e3,
            "avg_ffn_ms": lanes.ffn_s * 1e3,
            "avg_total_ms": lanes.total_s * 1e3,
            "avg_overlap_ms": lanes.overlap_s * 1e3,
            "avg_attention_idle_ms": (lanes.total_s - lanes.attention_s) * 1e3,
            "avg_ffn_idle_ms": (lanes.total_s - lanes.ffn_s) * 1e3,
        }
    return result


def lines(result: dict[str, Any], device: str) -> list[str]:
    """`statistics` of the decode card `device` as a table to print."""
    rows = [("Total tokens", str(result["total_tokens"]))]
    measured = "avg_total_ms" in result
    for title, name in (("attention", "attention"), ("FFN", "ffn"), ("total", "total")):
        value = f"{result[f'avg_{name}_ms']:.3f} ms" if measured else "not measured"
        rows.append((f"Avg {title} time", value))
    for title, name in (("Attention SMs", "attention_sm"), ("FFN SMs", "ffn_sm")):
        rows.append((title, ", ".join(map(str, result[name])) or "none"))
    rows.append(("Arranged as", ", ".join(result["arrangements"]) or "plain decode"))
    if measured:
        rows += [
            ("Attention lane idle", f"{result['avg_attention_idle_ms']:.3f} ms"),
            ("FFN lane idle", f"{result['avg_ffn_idle_ms']:.3f} ms"),
            ("Overlap", f"{result['avg_overlap_ms']:.3f} ms"),
        ]
    sequential_ms = result["sequential_ms"]
    rows.append(("Sequential time", "not measured" if sequential_ms is None else f"{sequential_ms:.3f} ms"))
    reasons = ", ".join(f"{number} x {reason}" for reason, number in result["fallbacks"].items())
    rows.append(("Fallbacks", reasons or "none"))
    header = f"[M2 Pipeline Statistics - decode card {device}] (attention beside FFN on two SM partitions)"
    return [header, *(f"  {name + ':':<22}{value}" for name, value in rows)]
