"""Latency and throughput of requests that arrive at random moments, as a server sees them.

Modes:

- `single`: one engine on one device;
- `pd`: one engine on two devices, prefill on one and decode on the other;
- `elastic`: one engine on two devices, each of which does both, and which compute long prompts together;
- `tp2`: one engine on two devices, tensor parallel;
- `dp2`: two engines on two devices in two processes; a request goes to the one with fewer prompt tokens to compute, or,
  where prompts share beginnings, with more of its prompt in its cache.

Arrivals are Poisson at each `--rate` for `--duration` seconds, lengths are drawn from a workload:

- `chat`: lognormal, about 450 tokens in and 200 out;
- `rag`: 2,048 to 8,192 in, 64 to 256 out;
- `reason`: 128 to 1,024 in, 1,024 to 3,072 out.

With `--streams`, so many requests of the workload are under way at a time, each due as soon as one before it has ended.
With `--drift`, loads follow each other, each at a rate of its own; a line for each says how many of its requests were
good, and how long they waited for their first token, in all and within ten seconds after the change.
Or both come from `--trace`, a file of JSON lines with `timestamp` (ms), `input_length`, `output_length` and perhaps
`hash_ids`: one for each 512 tokens of a prompt, equal where these tokens are equal, so that prompts share their
beginnings. Then the prefix cache is on, and the share of prompt tokens that it held is shown. A prompt that leaves no
room for a token in `--max-model-len` is left out, and an answer ends where that is full; how many is said.

TTFT runs from the moment a request was due, whether or not the engine was ready to take it. ITL is every gap between
two tokens of a request, the first one included; TPOT a request's mean gap. A request is good if its TTFT is within the
limit, and its gaps, but for one in a hundred (or one), none of which is three times as long; goodput is how many of
those there are per second. The saturated throughput is what comes out while requests keep arriving, the first tenth of
that time left out: to measure it, pick a rate beyond what the engine can serve, or `--streams`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from lib.arguments import new_parser
from lib.loads import Request, Router, serve, serve_streams, vocab_size_of
from lib.meters import BusyMeter, HandoffMeter, freeze_garbage
from lib.online import (
    add_service,
    load_of,
    parse_service_args,
    print_latencies,
    print_served,
    service_options,
    streams_of,
    summarize,
    trace_of,
    warm_up_load,
    what_is_missing,
    with_hit_rate,
)
from lib.replicas import Decisions, ReplicaRouter
from lib.report import report
from nanovllm import LLM
from nanovllm.entrypoints.prometheus import Collector
from nanovllm.errors import ends_with_message

NUM_REPLICAS = 2
SOME_VOCAB_SIZE = 2
"""How many requests a load has does not depend on it."""


@dataclass
class Served:
    """A load that an engine has served: its requests, and what the engine's devices did meanwhile."""

    requests: list[Request]
    busy_share: dict[str, float]
    """Share of the time until the last token, by device."""
    idle_share: dict[str, float]
    """By device: idle time between two decode steps of a request, as a share of that and of the time of its steps."""
    handoff: dict[str, float]
    """Bytes moved, sends, and the host's microseconds for each; empty where there are none."""
    prefix_cache: dict[str, int]
    """Tokens that were looked up in the prefix cache, and found; empty where it is off."""
    step_time: dict[str, Any]
    """By card, what the last steps were predicted to take, and took."""
    chunks: dict[str, float]
    """Chunks of prompts that two cards share, and others; and how long they have waited for each other's layers, as a
    share of the time of steps with prompts."""


class Engine:
    """An engine that serves load after load, with meters on its devices."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args, self._trace = args, trace_of(args)
        self.has_prefix_cache = self._trace is not None and self._trace.has_hash_ids
        self.llm = LLM(**{**service_options(args, self._trace), "device": device})
        self.vocab_size = vocab_size_of(self.llm)
        runners = dict.fromkeys((self.llm.prefill_runner, self.llm.decode_runner))
        self._meters = {str(runner.device): BusyMeter(runner) for runner in runners}
        self._handoffs = HandoffMeter(self.llm)
        serve(self.llm, warm_up_load(args, self.vocab_size))
        freeze_garbage()

    def load(self, rate: float) -> list[Request]:
        return load_of(self.args, self._trace, rate, self.vocab_size)

    def serve_streams(self) -> Served:
        """Serves `--streams` for `--duration`."""
        streams = streams_of(self.args, self.vocab_size)
        return self._measure(lambda: serve_streams(self.llm, streams, self.args.duration))

    def serve(self, requests: list[Request], begin_at: float | None = None, router: Router | None = None) -> Served:
        return self._measure(lambda: serve(self.llm, requests, begin_at, router))

    def _measure(self, serve_load: Callable[[], list[Request]]) -> Served:
        for meter in self._meters.values():
            meter.take()
        self._handoffs.take()
        tokens_before, before = self._cache_tokens(), self._chunks()
        requests = serve_load()
        ended_s = max((request.token_times_s[-1] for request in requests if request.token_times_s), default=math.inf)
        taken = {device: meter.take() for device, meter in self._meters.items()}
        busy = {device: busy_s / ended_s for device, (busy_s, _) in taken.items()}
        idle = {device: idle_s / max(busy_s + idle_s, 1e-9) for device, (busy_s, idle_s) in taken.items()}
        found = {name: number - tokens_before[name] for name, number in self._cache_tokens().items()}
        chunks = {name: number - before[name] for name, number in self._chunks().items()}
        chunks["wait_share"] = chunks.pop("wait_s") / max(chunks.pop("prompt_s"), 1e-9)
        return Served(requests, busy, idle, self._handoffs.take(), found, self.llm.metrics()["step_time"], chunks)

    def _chunks(self) -> dict[str, float]:
        """Chunks of prompts so far, and the seconds of steps that had some, and in which these waited."""
        metrics = self.llm.metrics()
        prompt_s = sum(kinds["prefill"] + kinds["mixed"] for kinds in metrics["busy_s"].values())
        return {**metrics["prefill_chunks"], "wait_s": metrics["layer_wait_s"], "prompt_s": prompt_s}

    def _cache_tokens(self) -> dict[str, int]:
        """Tokens of prompts so far."""
        if not self.has_prefix_cache:
            return {}
        metrics = self.llm.metrics()
        return {name: metrics[f"prefix_cache_{name}"] for name in ("queried_tokens", "hit_tokens")}


_replica: Engine
_decisions: Decisions


def _know(decisions: Decisions) -> None:
    global _decisions
    _decisions = decisions


def _start_replica(args: argparse.Namespace, index: int) -> None:
    global _replica
    _replica = Engine(args, f"cuda:{index}" if args.device in ("auto", "cuda") else args.device)


def _serve_replica(rate: float, index: int, begin_at: float) -> Served:
    requests = _replica.load(rate)
    return _replica.serve(
        requests, begin_at, ReplicaRouter(_decisions, index, requests, by_prefix=_replica.has_prefix_cache)
    )


def serve_replicas(args: argparse.Namespace) -> list[Served]:
    """Each rate, by two engines in two processes."""
    context = multiprocessing.get_context("spawn")
    most_requests = max(len(load_of(args, trace_of(args), rate, SOME_VOCAB_SIZE)) for rate in args.rate)
    decisions = Decisions(context, NUM_REPLICAS, most_requests)
    pools = [
        ProcessPoolExecutor(1, mp_context=context, initializer=_know, initargs=(decisions,))
        for _ in range(NUM_REPLICAS)
    ]
    try:
        for started in [pool.submit(_start_replica, args, index) for index, pool in enumerate(pools)]:
            started.result()
        results = []
        for rate in args.rate:
            decisions.begin_load()
            begin_at = time.time() + 2.0  # both have made their load by then
            parts = [pool.submit(_serve_replica, rate, index, begin_at) for index, pool in enumerate(pools)]
            served = [part.result() for part in parts]
            busy, idle = (
                {f"replica {index}": share for index, shares in enumerate(by_replica) for share in shares.values()}
                for by_replica in ([part.busy_share for part in served], [part.idle_share for part in served])
            )
            requests = sorted((r for part in served for r in part.requests), key=lambda request: request.due_s)
            found: Counter[str] = Counter()
            for part in served:
                found.update(part.prefix_cache)
            step_time = {
                f"replica {index}": statistics
                for index, part in enumerate(served)
                for statistics in part.step_time.values()
            }
            # Each is alone, and shares nothing.
            results.append(Served(requests, busy, idle, {}, dict(found), step_time, {}))
        return results
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def print_meters(summary: dict[str, Any]) -> None:
    """What only a meter in the engine's process sees."""
    shares = ", ".join(f"{device} {share:.1%}" for device, share in summary["idle_share"].items())
    print(f"idle while decoding  {shares}")
    chunks = summary["chunks"]
    if chunks.get("shared"):
        waits = f"{chunks['wait_share']:.1%} of the steps with prompts waiting for layers"
        print(f"chunks               {chunks['shared']} of shared prompts, {chunks['single']} of others; {waits}")
    if handoff := summary["handoff"]:
        amounts = f"{handoff['bytes'] / 2**30:.2f} GiB in {handoff['sends']} sends"
        print(f"handoff              {amounts}, {handoff['host_us_per_send']:.0f} us of the host each")


def read_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_service(parser, ("single", "pd", "elastic", "tp2", "dp2"))
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics there; not of mode dp2")
    args = parse_service_args(parser)
    if args.metrics_port is not None and args.mode == "dp2":
        parser.error("--metrics-port: mode dp2 has two engines in processes of their own")
    return args


def serve_metrics(llm: LLM, port: int) -> None:
    """On a thread of its own, for as long as the process lives."""
    from prometheus_client import CollectorRegistry, start_http_server  # the `metrics` extra

    registry = CollectorRegistry()
    registry.register(Collector(llm))
    start_http_server(port, registry=registry)
    print(f"metrics: http://localhost:{port}/metrics")


@ends_with_message()
def main() -> None:
    args = read_options()
    if args.mode == "dp2":
        results = serve_replicas(args)
    else:
        engine = Engine(args, args.device)
        if args.metrics_port is not None:
            serve_metrics(engine.llm, args.metrics_port)
        with engine.llm:
            if args.streams is not None:
                results = [engine.serve_streams()]
            else:
                results = [engine.serve(engine.load(rate)) for rate in args.rate]
    loads = []
    for rate, served in zip(args.rate, results, strict=True):
        summary = summarize(args, served.requests)
        summary |= {"rate": rate, "busy_share": served.busy_share, "idle_share": served.idle_share}
        summary |= {"handoff": served.handoff, "prefix_cache": with_hit_rate(served.prefix_cache)}
        summary |= {"step_time": served.step_time, "chunks": served.chunks}
        summary["trace"] = what_is_missing(trace_of(args))
        print_served(args, summary)
        print_meters(summary)
        print_latencies(summary)
        loads.append(summary)
    options = {name: value for name, value in vars(args).items() if name != "rate"}
    report("online_load", {**options, "loads": loads}, args.output)


if __name__ == "__main__":
    main()
