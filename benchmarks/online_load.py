"""Latency and throughput of requests that arrive at random moments, as a server sees them.

Arrivals are Poisson at `--rate` for `--duration` seconds, lengths are drawn from a workload:

- `chat`: lognormal, about 450 tokens in and 200 out;
- `rag`: 2,048 to 8,192 in, 64 to 256 out;
- `reason`: 128 to 1,024 in, 1,024 to 3,072 out.

TTFT runs from the moment a request was due, whether or not the engine was ready to take it. ITL is every gap between
two tokens of a request, the first one included; TPOT a request's mean gap. The saturated throughput is what comes out
while requests keep arriving, the first tenth of that time left out: to measure it, pick a rate beyond what the engine
can serve.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common import SHAPES, model_options, report

from nanovllm import LLM, SamplingParams

Lengths = Callable[[random.Random], int]


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


def make_load(workload: str, rate: float, duration_s: float, vocab_size: int, longest: int, seed: int) -> list[Request]:
    """Requests of a workload by the time they are due; prompt and output together have at most `longest` tokens."""
    rng = random.Random(seed)
    draw_input, draw_output = WORKLOADS[workload]
    requests, due_s = [], rng.expovariate(rate)
    while due_s < duration_s:
        num_output = min(draw_output(rng), longest // 2)
        num_input = min(draw_input(rng), longest - num_output)
        prompt = [rng.randrange(vocab_size) for _ in range(num_input)]
        params = SamplingParams(temperature=0.7, ignore_eos=True, max_tokens=num_output)
        requests.append(Request(due_s, prompt, params))
        due_s += rng.expovariate(rate)
    return requests


def serve(llm: LLM, requests: Sequence[Request]) -> None:
    """Adds each request when it is due and notes when its tokens come, until all have ended."""
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


def quantiles_ms(values_s: list[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    return {name: ordered[min(int(q * len(ordered)), len(ordered) - 1)] * 1e3 for name, q in QUANTILES.items()}


def summarize(requests: Sequence[Request]) -> dict[str, object]:
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
        "ttft_ms": quantiles_ms([request.ttft_s for request in answered]),
        "tpot_ms": quantiles_ms(tpot),
        "itl_ms": quantiles_ms([gap for request in answered for gap in request.gaps_s]),
    }


def print_table(summary: dict[str, object]) -> None:
    print(f"requests             {summary['num_requests']}, failed {summary['num_failed']}")
    print(f"tokens               {summary['input_tokens']} in, {summary['output_tokens']} out")
    print(f"output               {summary['tokens_per_s']:.0f} tok/s over {summary['seconds']:.1f} s")
    print(f"while arriving       {summary['saturated_tokens_per_s']:.0f} tok/s")
    print(f"{'ms':<8}" + "".join(f"{name:>10}" for name in QUANTILES))
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        quantiles = summary[name]
        assert isinstance(quantiles, dict)
        print(f"{name[:-3].upper():<8}" + "".join(f"{quantiles[quantile]:10.1f}" for quantile in QUANTILES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["single"], default="single", help="single: one engine on one device")
    parser.add_argument("--model-shape", choices=SHAPES, default="qwen3-0.6b", help="random weights of this shape")
    parser.add_argument("--model", help="folder of a checkpoint to serve instead of random weights")
    parser.add_argument("--workload", choices=WORKLOADS, default="chat")
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds in which requests arrive")
    parser.add_argument("--prefill-chunk-tokens", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=12288, help="longer requests are cut to it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="file for the JSON line")
    args = parser.parse_args()
    if not (0 < args.rate < math.inf and 0 < args.duration < math.inf):
        parser.error("--rate and --duration must be above 0 and finite")

    with LLM(
        **model_options(args.model, args.model_shape),
        device=args.device,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        prefill_chunk_tokens=args.prefill_chunk_tokens,
        enable_prefix_caching=False,
    ) as llm:
        vocab_size = llm.decode_runner.spec.model_config.vocab_size
        load = (args.workload, args.rate, args.duration, vocab_size, args.max_model_len)
        warm_up = make_load(args.workload, 16.0, 1.0, vocab_size, args.max_model_len, seed=args.seed + 1)
        serve(llm, warm_up)
        requests = make_load(*load, seed=args.seed)
        if not requests:
            parser.error(f"no request arrives in {args.duration:g} s at {args.rate:g} requests/s; raise one of them")
        # As a server would once it is ready: collecting what lives for ever takes tens of milliseconds each time.
        gc.collect()
        gc.freeze()
        serve(llm, requests)
    summary = summarize(requests)
    print(f"{args.mode}, {args.model or args.model_shape}, {args.workload}, {args.rate:g} requests/s")
    print_table(summary)
    report("online_load", {**vars(args), **summary}, args.output)


if __name__ == "__main__":
    main()
