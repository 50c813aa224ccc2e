"""Latency and throughput of requests that arrive at random moments, as a server sees them.

Modes:

- `single`: one engine on one device;
- `pd`: one engine on two devices, prefill on one and decode on the other;
- `dp2`: two engines on two devices in two processes, which get the requests in turn.

Arrivals are Poisson at each `--rate` for `--duration` seconds, lengths are drawn from a workload:

- `chat`: lognormal, about 450 tokens in and 200 out;
- `rag`: 2,048 to 8,192 in, 64 to 256 out;
- `reason`: 128 to 1,024 in, 1,024 to 3,072 out;

or both come from `--trace`, a file of JSON lines with `timestamp` (ms), `input_length`, `output_length` and perhaps
`hash_ids`: one for each 512 tokens of a prompt, equal where these tokens are equal, so that prompts share their
beginnings. Then the prefix cache is on, and the share of prompt tokens that it held is shown. A prompt that leaves no
room for a token in `--max-model-len` is left out, and an answer ends where that is full; how many is said.

TTFT runs from the moment a request was due, whether or not the engine was ready to take it. ITL is every gap between
two tokens of a request, the first one included; TPOT a request's mean gap. A request is good if its TTFT and 99 of a
hundred of its gaps are within the limits; goodput is how many of those there are per second. The saturated throughput
is what comes out while requests keep arriving, the first tenth of that time left out: to measure it, pick a rate
beyond what the engine can serve.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.arguments import add_mode, add_model, engine_options, new_parser, parse_args
from lib.loads import WORKLOADS, Request, make_load, serve, vocab_size_of
from lib.meters import BusyMeter, HandoffMeter, freeze_garbage
from lib.report import QUANTILES, quantiles_ms, report
from lib.traces import Trace, read_trace
from nanovllm import LLM
from nanovllm.entrypoints.prometheus import Collector
from nanovllm.errors import ends_with_message

NUM_REPLICAS = 2


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


def trace_of(args: argparse.Namespace) -> Trace | None:
    """What `--trace` has for this engine and duration, None without."""
    if not args.trace:
        return None
    return read_trace(args.trace, args.max_model_len, args.duration, args.speed or 1.0)


class Engine:
    """An engine that serves load after load, with meters on its devices."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args, self._trace = args, trace_of(args)
        self.has_prefix_cache = self._trace is not None and self._trace.has_hash_ids
        self.llm = LLM(
            **{**engine_options(args), "device": device},
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            prefill_chunk_tokens=args.prefill_chunk_tokens,
            enable_prefix_caching=self.has_prefix_cache,
            **{
                name: getattr(args, name)
                for name in ("itl_target_ms", "launch_lead_ms")
                if getattr(args, name) is not None
            },
        )
        self.vocab_size = vocab_size_of(self.llm)
        runners = dict.fromkeys((self.llm.prefill_runner, self.llm.decode_runner))
        self._meters = {str(runner.device): BusyMeter(runner) for runner in runners}
        self._handoffs = HandoffMeter(self.llm)
        serve(self.llm, make_load(args.workload, 16.0, 1.0, self.vocab_size, args.max_model_len, seed=args.seed + 1))
        freeze_garbage()

    def load(self, rate: float) -> list[Request]:
        args = self.args
        if self._trace is not None:
            return self._trace.requests(self.vocab_size, args.seed)
        return make_load(args.workload, rate, args.duration, self.vocab_size, args.max_model_len, args.seed)

    def serve(self, requests: list[Request], begin_at: float | None = None) -> Served:
        for meter in self._meters.values():
            meter.take()
        self._handoffs.take()
        tokens_before = self._cache_tokens()
        serve(self.llm, requests, begin_at)
        ended_s = max((request.token_times_s[-1] for request in requests if request.token_times_s), default=math.inf)
        taken = {device: meter.take() for device, meter in self._meters.items()}
        busy = {device: busy_s / ended_s for device, (busy_s, _) in taken.items()}
        idle = {device: idle_s / max(busy_s + idle_s, 1e-9) for device, (busy_s, idle_s) in taken.items()}
        found = {name: number - tokens_before[name] for name, number in self._cache_tokens().items()}
        return Served(requests, busy, idle, self._handoffs.take(), found, self.llm.metrics()["step_time"])

    def _cache_tokens(self) -> dict[str, int]:
        """Tokens of prompts so far."""
        if not self.has_prefix_cache:
            return {}
        metrics = self.llm.metrics()
        return {name: metrics[f"prefix_cache_{name}"] for name in ("queried_tokens", "hit_tokens")}


_replica: Engine


def _start_replica(args: argparse.Namespace, index: int) -> None:
    global _replica
    _replica = Engine(args, f"cuda:{index}" if args.device in ("auto", "cuda") else args.device)


def _serve_replica(rate: float, index: int, begin_at: float) -> Served:
    return _replica.serve(_replica.load(rate)[index::NUM_REPLICAS], begin_at)


def serve_replicas(args: argparse.Namespace) -> list[Served]:
    """Each rate, by two engines in two processes."""
    context = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, mp_context=context) for _ in range(NUM_REPLICAS)]
    try:
        for started in [pool.submit(_start_replica, args, index) for index, pool in enumerate(pools)]:
            started.result()
        results = []
        for rate in args.rate:
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
            results.append(Served(requests, busy, idle, {}, dict(found), step_time))
        return results
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def summarize(requests: Sequence[Request], ttft_limit_s: float, itl_limit_s: float) -> dict[str, Any]:
    """Latencies in ms and throughput of requests that have been served."""
    answered = [request for request in requests if request.error is None]
    all_times = sorted(time_s for request in answered for time_s in request.token_times_s)
    last_due_s = requests[-1].due_s
    in_window = sum(last_due_s / 10 <= time_s <= last_due_s for time_s in all_times)
    tpot = [(r.token_times_s[-1] - r.token_times_s[0]) / len(r.gaps_s) for r in answered if r.gaps_s]
    return {
        "num_requests": len(requests),
        "num_failed": len(requests) - len(answered),
        "input_tokens": sum(len(request.prompt) for request in requests),
        "output_tokens": len(all_times),
        "seconds": all_times[-1],
        "tokens_per_s": len(all_times) / all_times[-1],
        # Requests that are all due at once leave no time in which they arrive.
        "saturated_tokens_per_s": in_window / (0.9 * last_due_s) if last_due_s else 0.0,
        "goodput_per_s": sum(r.is_good(ttft_limit_s, itl_limit_s) for r in requests) / all_times[-1],
        "ttft_ms": quantiles_ms([request.ttft_s for request in answered]),
        "tpot_ms": quantiles_ms(tpot),
        "itl_ms": quantiles_ms([gap for request in answered for gap in request.gaps_s]),
    }


def with_hit_rate(found: dict[str, int]) -> dict[str, float]:
    return {**found, "hit_rate": found["hit_tokens"] / found["queried_tokens"]} if found else {}


def what_is_missing(trace: Trace | None) -> dict[str, int]:
    """Requests of a trace that were not served, or only in part, for want of room."""
    return {} if trace is None else {"num_left_out": trace.num_left_out, "num_cut": trace.num_cut}


def print_table(summary: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"requests             {summary['num_requests']}, failed {summary['num_failed']}")
    if missing := summary["trace"]:
        print(
            f"of the trace         {missing['num_left_out']} prompts left out and {missing['num_cut']} answers cut, "
            f"which do not fit into --max-model-len {args.max_model_len}"
        )
    print(f"tokens               {summary['input_tokens']} in, {summary['output_tokens']} out")
    print(f"output               {summary['tokens_per_s']:.0f} tok/s over {summary['seconds']:.1f} s")
    print(f"while arriving       {summary['saturated_tokens_per_s']:.0f} tok/s")
    limits = f"TTFT {args.ttft_limit_ms:g} ms, ITL {args.itl_limit_ms:g} ms"
    print(f"goodput              {summary['goodput_per_s']:.2f} requests/s within {limits}")
    shares = ", ".join(f"{device} {share:.0%}" for device, share in summary["busy_share"].items())
    print(f"busy                 {shares}")
    shares = ", ".join(f"{device} {share:.1%}" for device, share in summary["idle_share"].items())
    print(f"idle while decoding  {shares}")
    if handoff := summary["handoff"]:
        amounts = f"{handoff['bytes'] / 2**30:.2f} GiB in {handoff['sends']} sends"
        print(f"handoff              {amounts}, {handoff['host_us_per_send']:.0f} us of the host each")
    if cache := summary["prefix_cache"]:
        found = f"{cache['hit_tokens']} of {cache['queried_tokens']} tokens"
        print(f"prefix cache         {found}, {cache['hit_rate']:.1%}")
    print(f"{'ms':<8}" + "".join(f"{name:>10}" for name in QUANTILES))
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        print(f"{name[:-3].upper():<8}" + "".join(f"{summary[name][quantile]:10.1f}" for quantile in QUANTILES))


def read_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_mode(parser, "single", ("single", "pd", "dp2"))
    add_model(parser, "qwen3-0.6b")
    parser.add_argument("--workload", choices=WORKLOADS, help="chat if not given")
    parser.add_argument("--trace", help="file of JSON lines to serve instead of a workload and its rates")
    parser.add_argument(
        "--speed", type=float, help="of a trace: its requests come so many times as fast; 1 if not given"
    )
    parser.add_argument("--rate", type=float, nargs="+", help="requests per second, one after another; 10 if not given")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds in which requests arrive")
    parser.add_argument("--ttft-limit-ms", type=float, default=600.0, help="of a good request")
    parser.add_argument("--itl-limit-ms", type=float, default=10.0, help="of a good request")
    parser.add_argument("--itl-target-ms", type=float, help="needs mode pd or --mixed-steps; no target if not given")
    parser.add_argument("--launch-lead-ms", type=float, help="launches decode steps just in time; at once if not given")
    parser.add_argument("--prefill-chunk-tokens", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=12288, help="longer requests of a workload are cut to it")
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics there; not of mode dp2")
    parser.add_argument("--seed", type=int, default=0)
    args = parse_args(parser)
    if args.trace and (args.rate or args.workload):
        parser.error("--trace excludes --rate and --workload: a trace has its own arrivals and lengths")
    if args.speed is not None and not args.trace:
        parser.error("--speed is of a trace; without one, use --rate")
    if args.metrics_port is not None and args.mode == "dp2":
        parser.error("--metrics-port: mode dp2 has two engines in processes of their own")
    args.rate = args.rate or [10.0]
    args.workload = args.workload or "chat"  # of the warm-up, with a trace
    speed = 1.0 if args.speed is None else args.speed
    if not all(0 < number < math.inf for number in (*args.rate, args.duration, speed)):
        parser.error("--rate, --duration and --speed must be above 0 and finite")
    check_load(parser, args)
    return args


def check_load(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if there is nothing to serve."""
    if args.trace:
        args.rate = [0.0]  # the trace's own
        if not Path(args.trace).is_file():
            parser.error(f"--trace {args.trace} is not a file")
        try:
            trace_of(args)
        except ValueError as error:
            parser.error(f"--trace {error}")
        return
    # The lengths and moments do not depend on the vocabulary.
    for rate in args.rate:
        if not make_load(args.workload, rate, args.duration, 1, 2, args.seed):
            parser.error(f"no request arrives in {args.duration:g} s at {rate:g} requests/s; raise one of them")


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
            results = [engine.serve(engine.load(rate)) for rate in args.rate]
    loads = []
    for rate, served in zip(args.rate, results, strict=True):
        summary = summarize(served.requests, args.ttft_limit_ms / 1e3, args.itl_limit_ms / 1e3)
        summary |= {"rate": rate, "busy_share": served.busy_share, "idle_share": served.idle_share}
        summary |= {"handoff": served.handoff, "prefix_cache": with_hit_rate(served.prefix_cache)}
        summary["step_time"] = served.step_time
        summary["trace"] = what_is_missing(trace_of(args))
        source = args.trace or f"{args.workload}, {rate:g} requests/s"
        print(f"{args.mode}, {args.model or args.model_shape}, {source}")
        print_table(summary, args)
        loads.append(summary)
    options = {name: value for name, value in vars(args).items() if name != "rate"}
    report("online_load", {**options, "loads": loads}, args.output)


if __name__ == "__main__":
    main()
