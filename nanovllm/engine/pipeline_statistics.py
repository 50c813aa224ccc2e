"""What the decode pipeline has done: counters always, times of its lanes if they are measured."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nanovllm.engine.pipeline_plan import Arrangement, Lane, PlanStep

NS_PER_MS = 1e6
MEASURED = ("attention", "ffn", "total", "overlap")


@dataclass
class PipelineCounters:
    """Steps and tokens that went through the pipeline, and why steps did not."""

    steps: int = 0
    tokens: int = 0
    contexts: float = 0.0
    """Mean contexts of the steps, summed up."""
    fallbacks: Counter[str] = field(default_factory=Counter)

    def add(self, num_rows: int, context: float) -> None:
        """A step of so many requests, of contexts that long on average."""
        self.steps += 1
        self.tokens += num_rows
        self.contexts += context


class LaneClock:
    """Times when the steps of a plan begin and end, summed up on the device, so that nothing waits for the host.

    On a GPU it is its own clock, read on the lanes; in CUDA graphs too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._places: dict[tuple[Lane, ...], list[torch.Tensor]] = {}
        self._sums = torch.zeros(len(MEASURED) + 1, dtype=torch.int64, device=device)

    def begin(self, plan: Sequence[PlanStep]) -> torch.Tensor:
        """[2, steps] int64 for the moments of one run of a plan."""
        return torch.zeros(2, len(plan), dtype=torch.int64, device=self._device)

    def stamp(self, moments: torch.Tensor, step: int, *, ends: bool) -> None:
        """On the current stream: a step begins, or ends, now."""
        if self._device.type == "cuda":
            from nanovllm.kernels.triton_stamps import stamp

            stamp(moments, int(ends) * moments.shape[1] + step)
        else:
            moments[int(ends), step] = time.perf_counter_ns()

    def add(self, plan: Sequence[PlanStep], moments: torch.Tensor) -> None:
        """Adds a run that has ended on the current stream."""
        lanes = tuple(step.lane for step in plan)
        if lanes not in self._places:  # once, in a run that is not captured: that is a copy from the host
            places = ([place for place, of_step in enumerate(lanes) if of_step is lane] for lane in Lane)
            self._places[lanes] = [torch.tensor(of_lane, device=self._device) for of_lane in places]
        attention, ffn = (moments[:, of_lane] for of_lane in self._places[lanes])
        # Steps of one lane follow each other: what two lanes have in common is what their steps have, pair by pair.
        later_begin = torch.maximum(attention[0][:, None], ffn[0][None, :])
        earlier_end = torch.minimum(attention[1][:, None], ffn[1][None, :])
        overlap = (earlier_end - later_begin).clamp(min=0).sum()
        busy = [(of_lane[1] - of_lane[0]).sum() for of_lane in (attention, ffn)]
        total = moments[1].max() - moments[0].min()
        self._sums += torch.stack([*busy, total, overlap, torch.ones_like(overlap)])

    def averages_ms(self) -> dict[str, float]:
        """Per run, of `MEASURED`; waits for the device. Empty if there was no run."""
        *sums, runs = self._sums.tolist()
        return {name: total / runs / NS_PER_MS for name, total in zip(MEASURED, sums, strict=True)} if runs else {}

    def reset(self) -> None:
        """Forgets all runs: those that warmed up and captured, say."""
        self._sums.zero_()


def statistics(
    counters: PipelineCounters,
    arrangements: Sequence[Arrangement],
    averages_ms: dict[str, float],
    sequential_ms: float | None,
) -> dict[str, Any]:
    """Counters, and averages per step in ms where they were measured; of arrangements there may be none, or several.

    `sequential_ms` is a plain step's time, measured at the start for about the batch and contexts that these had.
    """
    result: dict[str, Any] = {
        "steps": counters.steps,
        "total_tokens": counters.tokens,
        "attention_sm": sorted({arrangement.split[0] for arrangement in arrangements}),
        "ffn_sm": sorted({arrangement.split[1] for arrangement in arrangements}),
        "arrangements": [str(arrangement) for arrangement in arrangements],
        "sequential_ms": sequential_ms,
        "fallbacks": dict(counters.fallbacks),
    }
    if averages_ms:
        result |= {f"avg_{name}_ms": averages_ms[name] for name in MEASURED}
        for lane in ("attention", "ffn"):
            result[f"avg_{lane}_idle_ms"] = averages_ms["total"] - averages_ms[lane]
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """`statistics` as a table to print."""
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
    return ["[M2 Pipeline Statistics - GPU1 Decode Card]", *(f"  {name + ':':<22}{value}" for name, value in rows)]
