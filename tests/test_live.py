"""The page's feed: shares, rates and percentiles out of two readings of the metrics, asked for only while one looks."""

from __future__ import annotations

import asyncio
from collections import deque

import numpy as np
import pytest

from nanovllm.engine.observability.metrics import Histogram
from nanovllm.entrypoints.server import live
from nanovllm.entrypoints.server.live import Live, quantiles, sample_of

BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def metrics(seconds: float, tokens: int = 0, gaps: Histogram | None = None) -> dict:
    histogram = (gaps or Histogram(BOUNDS)).as_dict()
    return {
        "busy_s": {"cuda:0": {"prefill": seconds, "decode": 0.0, "mixed": 0.0}},
        "requests": {"waiting": 1, "decoding": 2},
        "kv_blocks": {"decode": {"held": 1, "total": 4}},
        "prefill_tokens": 0,
        "decode_tokens": tokens,
        "handoff_bytes": 0,
        "ttft_s": Histogram(BOUNDS).as_dict(),
        "itl_s": histogram,
        "preemptions": 3,
        "requests_ended": {"stop": 5},
    }


def test_a_sample_is_of_the_last_interval():
    history = deque([(0.0, metrics(0.0)), (10.0, metrics(4.0, 100)), (10.5, metrics(4.1, 150))])
    sample = sample_of(history)
    assert sample["cards"] == {"cuda:0": {"prefill": pytest.approx(0.2), "decode": 0.0, "mixed": 0.0}}
    assert sample["tokens_per_s"] == pytest.approx(100)
    assert sample["itl_s"] is None
    late = sample_of(deque([(0.0, metrics(0.0)), (0.5, metrics(2.0))]))
    assert late["cards"]["cuda:0"]["prefill"] == 1.0, "a step counts when it has ended, and may be longer than that"


def test_percentiles_are_those_of_what_came_meanwhile():
    gaps = Histogram(BOUNDS)
    gaps.observe_all(np.full(1000, 0.4))
    before = gaps.as_dict()
    values = np.random.default_rng(0).exponential(0.03, 5000)
    gaps.observe_all(values)
    found = quantiles(before, gaps.as_dict())
    for name, share in (("p50", 0.5), ("p99", 0.99)):  # as sharp as the buckets
        true = np.quantile(values, share)
        high = next(index for index, bound in enumerate(BOUNDS) if bound >= true)
        assert BOUNDS[high - 1] <= found[name] <= BOUNDS[high]
    assert quantiles(before, before) is None
    above = Histogram(BOUNDS)
    nothing = above.as_dict()
    above.observe(7.0)
    assert 0.5 < quantiles(nothing, above.as_dict())["p50"] <= 1.0


def test_the_engine_is_asked_only_while_somebody_looks(monkeypatch):
    monkeypatch.setattr(live, "INTERVAL_S", 0.01)
    asked = []

    async def ask():
        asked.append(len(asked))
        return metrics(float(len(asked)), 10 * len(asked))

    async def run():
        feed = Live(ask)
        await asyncio.sleep(0.05)
        assert asked == []
        first, second = feed.samples(), feed.samples()
        one, other = await asyncio.gather(anext(first), anext(second))
        assert one == other, "all who look see the same"
        await first.aclose()
        await anext(second)
        await second.aclose()
        await asyncio.sleep(0.05)
        num_asked = len(asked)
        await asyncio.sleep(0.05)
        assert len(asked) == num_asked
        third = feed.samples()
        assert (await anext(third))["tokens_per_s"] > 0
        await third.aclose()

    asyncio.run(run())


def test_an_engine_that_is_gone_ends_the_feed(monkeypatch):
    monkeypatch.setattr(live, "INTERVAL_S", 0.01)

    async def ask():
        raise RuntimeError("the engine's process is gone")

    async def run():
        return [sample async for sample in Live(ask).samples()]

    assert asyncio.run(run()) == [{"ended": "the engine's process is gone"}]
