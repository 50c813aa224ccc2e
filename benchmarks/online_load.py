"""Latency and throughput of requests that arrive at random moments, as a server sees them.

Modes:

- `single`: one engine on one device;
- `pd`: one engine on two devices, prefill on one and decode on the other;
- `dp2`: two engines on two devices in two processes, which get the requests in turn.

Arrivals are Poisson at each `--rate` for `--duration` seconds, lengths are drawn from a workload:

- `chat`: lognormal, about 450 tokens in and 200 out;
- `rag`: 2,048 to 8,192 in, 64 to 256 out;
- `reason`: 128 to 1,024 in, 1,024 to 3,072 out;

or both come from `--trace`, a file of JSON lines with `timestamp` (ms), `input_length` and `output_length`.

TTFT runs from the moment a request was due, whether or not the engine was ready to take it. ITL is every gap between
two tokens of a request, the first one included; TPOT a request's mean gap. A request is good if its TTFT and 99 of a
hundred of its gaps are within the limits; goodput is how many of those there are per second. The saturated throughput
is what comes out while requests keep arriving, the first tenth of that time left out: to measure it, pick a rate
beyond what the engine can serve.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import SHAPES, mode_options, model_options, parse_pd_args, report
from meters import BusyMeter, HandoffMeter

from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints.prometheus import Collector

Lengths = Callable[[random.Random], int]
NUM_REPLICAS = 2


def lognormal(mean: float, sigma: float, lowest: int, highest: int) -> Lengths:
    """Lengths with this mean before they are cut to [lowest, highest]."""
    mu = math.log(mean) - sigma**2 / 2
    return lambda rng: min(max(round(rng.lognormvariate(mu, sigma)), lowest), highest)


def between(lowest: int, highest: int) -> Lengths:
    return lambda rng: rng.randint(lowest, highest)


WORKLOADS: dict[str, tuple[Lengths, Lengths]] = {
    "chat": (lognormal(450, 0.8, 16, 4096), lognormal(200, 0.7, 8, 1024)),
    "rag": (between(2048, 8192), between(64, 256)),
    "reason": (between(128, 1024), between(1024, 3072)),
}
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


@dataclass
class Request:
    """A request and when its tokens came; all times in seconds since the load began."""

    due_s: float
    prompt: list[int]
    params: SamplingParams
    token_times_s: list[float] = field(default_factory=list)
    error: Exception | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        times = self.token_times_s
        return [after - before for before, after in itertools.pairwise(times)]

    def is_good(self, ttft_limit_s: float, itl_limit_s: float) -> bool:
        """Whether it was answered within the limits."""
        if self.error is not None or self.ttft_s > ttft_limit_s:
            return False
        return not self.gaps_s or _quantile(sorted(self.gaps_s), 0.99) <= itl_limit_s


@dataclass
class Served:
    """A load that an engine has served: its requests, and what the engine's devices did meanwhile."""

    requests: list[Request]
    busy_share: dict[str, float]
    """Of the time until the last token, by device."""
    idle_share: dict[str, float]
    """By device: idle time between two decode steps of a request, as a share of that and of the time of its steps."""
    handoff: dict[str, float]
    """Bytes moved, sends, and the host's microseconds for each; empty where there are none."""


def make_load(workload: str, rate: float, duration_s: float, vocab_size: int, longest: int, seed: int) -> list[Request]:
    """Requests of a workload by the time they are due; prompt and output together have at most `longest` tokens."""
    rng = random.Random(seed)
    draw_input, draw_output = WORKLOADS[workload]
    requests, due_s = [], rng.expovariate(rate)
    while due_s < duration_s:
        requests.append(_make_request(due_s, draw_input(rng), draw_output(rng), vocab_size, longest, rng))
        due_s += rng.expovariate(rate)
    return requests


def read_trace(path: str, duration_s: float, vocab_size: int, longest: int, seed: int) -> list[Request]:
    """The requests of a trace's first `duration_s` seconds, with random tokens; lengths are cut as in `make_load`."""
    rng = random.Random(seed)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    first_ms = min((row["timestamp"] for row in rows), default=0.0)
    rows = [{**row, "due_s": (row["timestamp"] - first_ms) / 1e3} for row in rows]
    return [
        _make_request(row["due_s"], row["input_length"], row["output_length"], vocab_size, longest, rng)
        for row in sorted(rows, key=lambda row: row["due_s"])
        if row["due_s"] < duration_s
    ]


def _make_request(
    due_s: float, num_input: int, num_output: int, vocab_size: int, longest: int, rng: random.Random
) -> Request:
    num_output = min(num_output, longest // 2)
    num_input = min(num_input, longest - num_output)
    prompt = [rng.randrange(vocab_size) for _ in range(num_input)]
    return Request(due_s, prompt, SamplingParams(temperature=0.7, ignore_eos=True, max_tokens=num_output))


def serve(llm: LLM, requests: Sequence[Request], begin_at: float | None = None) -> None:
    """Adds each request when it is due and notes when its tokens come, until all have ended.

    The load begins now, or at this `time.time()`.
    """
    if begin_at is not None:
        time.sleep(max(begin_at - time.time(), 0.0))
    running: dict[int, Request] = {}
    num_added, started = 0, time.perf_counter()
    while num_added < len(requests) or running:
        now_s = time.perf_counter() - started
        while num_added < len(requests) and requests[num_added].due_s <= now_s:
            request = requests[num_added]
            running[llm.add_request(request.prompt, request.params)] = request
            num_added += 1
        if not running:
            time.sleep(min(max(requests[num_added].due_s - now_s, 0.0), 1e-3))
            continue
        outputs = llm.step()
        now_s = time.perf_counter() - started
        for output in outputs:
            request = running[output.request_id]
            request.token_times_s += [now_s] * len(output.new_token_ids)
            if output.finished:
                request.error = output.error
                del running[output.request_id]


class Engine:
    """An engine that serves load after load, with meters on its devices."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args = args
        self.llm = LLM(
            **model_options(args.model, args.model_shape),
            device=device,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            prefill_chunk_tokens=args.prefill_chunk_tokens,
            enable_prefix_caching=False,
            **mode_options(args),
        )
        self.vocab_size = self.llm.decode_runner.spec.model_config.vocab_size
        runners = dict.fromkeys((self.llm.prefill_runner, self.llm.decode_runner))
        self._meters = {str(runner.device): BusyMeter(runner) for runner in runners}
        self._handoffs = HandoffMeter(self.llm)
        serve(self.llm, make_load(args.workload, 16.0, 1.0, self.vocab_size, args.max_model_len, seed=args.seed + 1))
        # As a server would once it is ready: collecting what lives for ever takes tens of milliseconds each time.
        gc.collect()
        gc.freeze()

    def load(self, rate: float) -> list[Request]:
        args = self.args
        if args.trace:
            return read_trace(args.trace, args.duration, self.vocab_size, args.max_model_len, args.seed)
        return make_load(args.workload, rate, args.duration, self.vocab_size, args.max_model_len, args.seed)

    def serve(self, requests: list[Request], begin_at: float | None = None) -> Served:
        for meter in self._meters.values():
            meter.take()
        self._handoffs.take()
        serve(self.llm, requests, begin_at)
        ended_s = max((request.token_times_s[-1] for request in requests if request.token_times_s), default=math.inf)
        taken = {device: meter.take() for device, meter in self._meters.items()}
        busy = {device: busy_s / ended_s for device, (busy_s, _) in taken.items()}
        idle = {device: idle_s / max(busy_s + idle_s, 1e-9) for device, (busy_s, idle_s) in taken.items()}
        return Served(requests, busy, idle, self._handoffs.take())


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
            results.append(Served(requests, busy, idle, {}))
        return results
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def quantiles_ms(values_s: list[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    return {name: _quantile(ordered, q) * 1e3 for name, q in QUANTILES.items()}


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
        "saturated_tokens_per_s": in_window / (0.9 * last_due_s),
        "goodput_per_s": sum(r.is_good(ttft_limit_s, itl_limit_s) for r in requests) / all_times[-1],
        "ttft_ms": quantiles_ms([request.ttft_s for request in answered]),
        "tpot_ms": quantiles_ms(tpot),
        "itl_ms": quantiles_ms([gap for request in answered for gap in request.gaps_s]),
    }


def print_table(summary: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"requests             {summary['num_requests']}, failed {summary['num_failed']}")
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
    print(f"{'ms':<8}" + "".join(f"{name:>10}" for name in QUANTILES))
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        print(f"{name[:-3].upper():<8}" + "".join(f"{summary[name][quantile]:10.1f}" for quantile in QUANTILES))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["single", "pd", "dp2"], default="single")
    parser.add_argument("--model-shape", choices=SHAPES, default="qwen3-0.6b", help="random weights of this shape")
    parser.add_argument("--model", help="folder of a checkpoint to serve instead of random weights")
    parser.add_argument("--workload", choices=WORKLOADS, help="chat if not given")
    parser.add_argument("--trace", help="file of JSON lines to serve instead of a workload and its rates")
    parser.add_argument("--rate", type=float, nargs="+", help="requests per second, one after another; 10 if not given")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds in which requests arrive")
    parser.add_argument("--ttft-limit-ms", type=float, default=600.0, help="of a good request")
    parser.add_argument("--itl-limit-ms", type=float, default=10.0, help="of a good request")
    parser.add_argument("--prefill-chunk-tokens", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=12288, help="longer requests are cut to it")
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics there; not of mode dp2")
    parser.add_argument("--seed", type=int, default=0)
    args = parse_pd_args(parser)
    if args.trace and (args.rate or args.workload):
        parser.error("--trace excludes --rate and --workload: a trace has its own arrivals and lengths")
    if args.metrics_port is not None and args.mode == "dp2":
        parser.error("--metrics-port: mode dp2 has two engines in processes of their own")
    args.rate = args.rate or [10.0]
    args.workload = args.workload or "chat"  # of the warm-up, with a trace
    if not all(0 < number < math.inf for number in (*args.rate, args.duration)):
        parser.error("--rate and --duration must be above 0 and finite")
    if args.trace:
        if not Path(args.trace).is_file():
            parser.error(f"--trace {args.trace} is not a file")
        args.rate = [0.0]  # the trace's own
    # The lengths and moments do not depend on the vocabulary.
    for rate in args.rate if not args.trace else []:
        if not make_load(args.workload, rate, args.duration, 1, 2, args.seed):
            parser.error(f"no request arrives in {args.duration:g} s at {rate:g} requests/s; raise one of them")
    return args


def serve_metrics(llm: LLM, port: int) -> None:
    """On a thread of its own, for as long as the process lives."""
    from prometheus_client import CollectorRegistry, start_http_server  # the `metrics` extra

    registry = CollectorRegistry()
    registry.register(Collector(llm))
    start_http_server(port, registry=registry)
    print(f"metrics: http://localhost:{port}/metrics")


def main() -> None:
    args = parse_args()
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
        summary |= {"handoff": served.handoff}
        source = args.trace or f"{args.workload}, {rate:g} requests/s"
        print(f"{args.mode}, {args.model or args.model_shape}, {source}")
        print_table(summary, args)
        loads.append(summary)
    options = {name: value for name, value in vars(args).items() if name != "rate"}
    report("online_load", {**options, "loads": loads}, args.output)


if __name__ == "__main__":
    main()
