"""What the page shows of the engine: twice a second, how each card's time was spent and how requests fare.

Takes `metrics()` as it comes and divides what has grown by the time in between. Asks only while somebody looks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

INTERVAL_S = 0.5
WINDOW_SAMPLES = 20
"""Percentiles are of what came within so many intervals: with fewer values they would jump."""

Metrics = dict[str, Any]


class Live:
    """One stream of samples for everybody who looks.

    Args:
        metrics: what `AsyncLLM.metrics` gives.
    """

    def __init__(self, metrics: Callable[[], Awaitable[Metrics]]) -> None:
        self._metrics = metrics
        self._watchers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._task: asyncio.Task[None] | None = None

    async def samples(self) -> AsyncIterator[dict[str, Any]]:
        """Yields a sample each INTERVAL_S, until the engine is gone or the iterator is closed."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(maxsize=4)
        self._watchers.add(queue)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            while True:
                sample = await queue.get()
                yield sample
                if "ended" in sample:
                    return
        finally:
            self._watchers.discard(queue)

    async def _run(self) -> None:
        history: deque[tuple[float, Metrics]] = deque(maxlen=WINDOW_SAMPLES + 1)
        while self._watchers:
            started_s = time.monotonic()
            try:
                metrics = await self._metrics()
            except Exception as error:  # noqa: BLE001 - whatever it is, those who look are told
                self._tell({"ended": str(error)})
                return
            history.append((time.monotonic(), metrics))  # the engine may have taken its time to answer
            if len(history) > 1:
                self._tell(sample_of(history))
            await asyncio.sleep(max(0.0, INTERVAL_S - (time.monotonic() - started_s)))

    def _tell(self, sample: dict[str, Any]) -> None:
        for queue in self._watchers:
            if queue.full():  # whoever reads too slowly misses the oldest
                queue.get_nowait()
            queue.put_nowait(sample)


def sample_of(history: deque[tuple[float, Metrics]]) -> dict[str, Any]:
    """The last interval, and percentiles over all of `history`, which is of times in seconds and metrics."""
    (before_s, before), (now_s, now) = history[-2], history[-1]
    passed_s = max(now_s - before_s, 1e-6)
    oldest = history[0][1]

    def rate(name: str) -> float:
        return float(now[name] - before[name]) / passed_s

    return {
        "cards": {
            card: {
                kind: min(1.0, (seconds - before["busy_s"].get(card, {}).get(kind, 0.0)) / passed_s)
                for kind, seconds in kinds.items()
            }
            for card, kinds in now["busy_s"].items()
        },
        "requests": now["requests"],
        "kv_blocks": now["kv_blocks"],
        "prompt_tokens_per_s": rate("prefill_tokens"),
        "tokens_per_s": rate("decode_tokens"),
        "handoff_bytes_per_s": rate("handoff_bytes"),
        "ttft_s": quantiles(oldest["ttft_s"], now["ttft_s"]),
        "itl_s": quantiles(oldest["itl_s"], now["itl_s"]),
        "preemptions": now["preemptions"],
        "ended_requests": now["requests_ended"],
    }


def quantiles(before: Metrics, now: Metrics) -> dict[str, float] | None:
    """The median and the 99th percentile of what a histogram has gained; None if that is nothing.

    Linear within a bucket; what is above the last bound counts as twice that.
    """
    total = now["count"] - before["count"]
    if not total:
        return None
    bounds = [0.0, *(bound for bound, _ in now["buckets"])]
    gained = [new - old for (_, new), (_, old) in zip(now["buckets"], before["buckets"], strict=True)]
    counts, bounds = [0, *gained, total], [*bounds, 2 * bounds[-1]]

    def quantile(share: float) -> float:
        wanted = share * total
        index = next(index for index, count in enumerate(counts) if count >= wanted and index)
        low, high = counts[index - 1], counts[index]
        inside = (wanted - low) / (high - low) if high > low else 1.0
        return bounds[index - 1] + inside * (bounds[index] - bounds[index - 1])

    return {"p50": quantile(0.5), "p99": quantile(0.99)}
