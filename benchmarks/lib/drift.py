"""Several loads one after another: what an engine does when what it is asked for changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.loads import WORKLOADS, Request, make_load
from lib.report import quantiles_ms
from lib.traces import Trace, read_trace

CHANGE_S = 10.0
"""Seconds after a change that are told apart from the rest of a phase."""


@dataclass(frozen=True)
class Phase:
    """A load and its rate in requests per second. `load` is a workload or the file of a trace."""

    load: str
    rate: float

    @property
    def name(self) -> str:
        return Path(self.load).stem

    def trace(self, longest: int) -> Trace | None:
        """The trace whose requests have room in `longest` tokens; None of a workload."""
        return None if self.load in WORKLOADS else read_trace(self.load, longest)


def parse_phase(text: str) -> Phase:
    """A phase written as LOAD:RATE.

    Raises:
        ValueError: it is not written so, or there is no such workload or file.
    """
    load, colon, rate = text.rpartition(":")
    if not colon or not load:
        raise ValueError(f"{text!r} is not LOAD:RATE")
    phase = Phase(load, float(rate))
    if not 0 < phase.rate < 1e6:
        raise ValueError(f"{text!r}: the rate must be above 0")
    if load not in WORKLOADS and not Path(load).is_file():
        raise ValueError(f"{text!r}: no workload ({', '.join(WORKLOADS)}) and no file of that name")
    return phase


def drift_load(phases: Sequence[Phase], duration_s: float, vocab_size: int, longest: int, seed: int) -> list[Request]:
    """The requests of all phases, each of which lasts `duration_s`; those of a trace come evenly faster or slower than
    they once did, so that a phase has its rate.

    Raises:
        ValueError: a phase has no request.
    """
    requests = []
    for number, phase in enumerate(phases):
        if phase.load in WORKLOADS:
            part = make_load(phase.load, phase.rate, duration_s, vocab_size, longest, seed + number)
        else:
            part = _part_of_trace(phase, duration_s, vocab_size, longest, seed + number)
        if not part:
            raise ValueError(f"{phase.name}: no request comes in {duration_s:g} s at {phase.rate:g} requests/s")
        requests += [replace(request, due_s=request.due_s + number * duration_s) for request in part]
    return requests


def _part_of_trace(phase: Phase, duration_s: float, vocab_size: int, longest: int, seed: int) -> list[Request]:
    """The first requests of a trace, as many as a phase has, spread over all of the phase."""
    requests = read_trace(phase.load, longest).requests(vocab_size, seed)
    part = requests[: round(phase.rate * duration_s)]
    if not part or len(part) < phase.rate * duration_s - 1:
        raise ValueError(f"{phase.name} has {len(requests)} requests, a phase {phase.rate * duration_s:.0f}")
    scale = duration_s / max(requests[len(part)].due_s if len(part) < len(requests) else part[-1].due_s, 1e-9)
    return [replace(request, due_s=min(request.due_s * scale, duration_s)) for request in part]


def summarize_phases(
    phases: Sequence[Phase], requests: Sequence[Request], duration_s: float, ttft_limit_s: float, itl_limit_s: float
) -> list[dict[str, Any]]:
    """How many of each phase's requests were good, and their latencies in ms, those soon after the change apart."""
    summaries = []
    for number, phase in enumerate(phases):
        began_s = number * duration_s
        is_last = number == len(phases) - 1
        due = [r for r in requests if began_s <= r.due_s and (is_last or r.due_s < began_s + duration_s)]
        answered = [request for request in due if request.error is None]
        soon, later = (
            [r.ttft_s for r in answered if (r.due_s < began_s + CHANGE_S) == is_soon] for is_soon in (True, False)
        )
        num_good = sum(request.is_good(ttft_limit_s, itl_limit_s) for request in due)
        summaries.append(
            {
                "load": phase.name,
                "rate": phase.rate,
                "num_requests": len(due),
                "num_good": num_good,
                "good_share": num_good / len(due),
                "ttft_ms": _quantiles_ms([request.ttft_s for request in answered]),
                "ttft_after_change_ms": _quantiles_ms(soon),
                "ttft_later_ms": _quantiles_ms(later),
                "itl_ms": _quantiles_ms([gap for request in answered for gap in request.gaps_s]),
            }
        )
    return summaries


def _quantiles_ms(values_s: list[float]) -> dict[str, float]:
    """QUANTILES in milliseconds; NaN where there is nothing."""
    return quantiles_ms(values_s or [math.nan])


def print_phases(summaries: Sequence[dict[str, Any]]) -> None:
    """A line for each phase."""
    print(f"{'load':<24}{'rate':>6}{'good':>12}{'TTFT p50':>10}{'p99':>8}{'soon p99':>10}{'ITL p99':>9}")
    for phase in summaries:
        good = f"{phase['num_good']}/{phase['num_requests']}"
        ttft, soon = phase["ttft_ms"], phase["ttft_after_change_ms"]
        print(
            f"{phase['load']:<24}{phase['rate']:>6g}{good:>12}{ttft['p50']:>10.0f}{ttft['p99']:>8.0f}"
            f"{soon['p99']:>10.0f}{phase['itl_ms']['p99']:>9.1f}"
        )
