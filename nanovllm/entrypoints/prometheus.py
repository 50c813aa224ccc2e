"""`llm.metrics()` as Prometheus metrics; needs the `metrics` extra (prometheus-client)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from nanovllm.errors import EngineClosedError

PREFIX = "nanovllm"
HISTOGRAMS = {
    "ttft_s": ("time_to_first_token_seconds", "From a request's arrival to its first token"),
    "tpot_s": ("time_per_output_token_seconds", "A request's mean gap between tokens"),
    "itl_s": ("inter_token_latency_seconds", "Every gap between two tokens of a request"),
    "latency_s": ("request_latency_seconds", "From a request's arrival to its end"),
    "handoff_s": ("handoff_seconds", "From the end of a prefill step until its KV has arrived"),
}
COUNTERS = {
    "prefill_tokens": ("prefill_tokens", "Prompt tokens computed"),
    "decode_tokens": ("decode_tokens", "Tokens decoded"),
    "late_launches": ("late_launches", "Steps whose launch came too late: the step before had ended"),
    "prefix_cache_queried_tokens": ("prefix_cache_queried_tokens", "Tokens that were looked up in the prefix cache"),
    "prefix_cache_hit_tokens": ("prefix_cache_hit_tokens", "Tokens that were found there"),
    "handoff_bytes": ("handoff_bytes", "Bytes of KV handed over"),
    "layer_wait_s": ("layer_wait_seconds", "Time in which steps waited for layers that the other card computes"),
    "preemptions": ("preemptions", "Requests that lost their blocks to another"),
    "rebalances": ("rebalances", "Changes of the decode card's split"),
    "recoveries": ("recoveries", "Returns from something slower that was fallen back to"),
}
GAUGES = {
    "predicted_itl_s": (
        "predicted_inter_token_latency_seconds",
        "What a decode step will take with all requests under way; none without a target, or if unknown",
    ),
    "leases": ("leases", "Requests that hold blocks"),
    "handoff_backlog": (
        "handoff_backlog",
        "Requests between the beginning of their prefill and the arrival of their KV",
    ),
}

COUNTERS_BY = (
    ("requests_ended", "requests_ended", "Requests that have ended", "reason"),
    ("prefill_chunks", "prefill_chunks", "Chunks of prompts, of those that two cards share and others", "kind"),
    ("handoff_bytes_by_link", "handoff_bytes_by_link", "Bytes handed over", "link"),
    ("fallbacks", "fallbacks", "Falls back to something slower", "cause"),
)
"""Keys whose values are by one label; name, description, label."""
GAUGES_BY = (
    ("requests", "requests", "Requests by state", "state"),
    ("pipeline_split", "lane_sms", "SMs of a decode card's lane; none in plain decode", "lane"),
    ("stage_s", "stage_seconds", "How long a lane was busy in the last decode step that was timed", "lane"),
)


class HasMetrics(Protocol):
    """An engine, or what an engine has said."""

    def metrics(self) -> dict[str, Any]: ...


class Collector:
    """Reads an engine's metrics whenever Prometheus asks.

        from prometheus_client import REGISTRY, start_http_server

        REGISTRY.register(Collector(llm))
        start_http_server(9090)

    Raises:
        ImportError: prometheus-client is not installed; the message says how to get it.
    """

    def __init__(self, engine: HasMetrics) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise ImportError("Prometheus metrics need prometheus-client: pip install nanovllm[metrics]") from error
        self._core = core
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        core = self._core
        try:
            found = self._engine.metrics()
        except EngineClosedError:  # others may be registered beside it
            return
        for key, (name, about) in HISTOGRAMS.items():
            histogram = found[key]
            buckets = [(str(bound), count) for bound, count in histogram["buckets"]]
            buckets.append(("+Inf", histogram["count"]))
            yield core.HistogramMetricFamily(f"{PREFIX}_{name}", about, buckets=buckets, sum_value=histogram["sum"])
        for key, (name, about) in COUNTERS.items():
            yield core.CounterMetricFamily(f"{PREFIX}_{name}", about, value=found[key])
        for key, (name, about) in GAUGES.items():
            yield core.GaugeMetricFamily(f"{PREFIX}_{name}", about, value=found[key])
        steps = core.CounterMetricFamily(f"{PREFIX}_steps", "Steps that have run", labels=["kind"])
        for kind in ("prefill", "decode", "pipeline"):
            steps.add_metric([kind], found[f"{kind}_steps"])
        yield steps
        busy = core.CounterMetricFamily(f"{PREFIX}_busy_seconds", "Time in steps of a kind", labels=["card", "kind"])
        for card, kinds in found["busy_s"].items():
            for kind, seconds in kinds.items():
                busy.add_metric([card, kind], seconds)
        yield busy
        blocks = core.GaugeMetricFamily(f"{PREFIX}_kv_blocks", "Blocks of a KV pool", labels=["pool", "state"])
        for pool, numbers in found["kv_blocks"].items():
            for state, number in numbers.items():
                blocks.add_metric([pool, state], number)
        yield blocks
        for key, name, about, label in COUNTERS_BY:
            yield self._by_label(core.CounterMetricFamily(f"{PREFIX}_{name}", about, labels=[label]), found[key])
        for key, name, about, label in GAUGES_BY:
            yield self._by_label(core.GaugeMetricFamily(f"{PREFIX}_{name}", about, labels=[label]), found[key] or {})

    def _by_label(self, family: Any, found: dict[str, Any]) -> Any:
        """A family with a value for each label."""
        for label, value in found.items():
            family.add_metric([label], value)
        return family
