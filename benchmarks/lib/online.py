"""What the benchmarks of a service share, in one process or over HTTP: options, load, summary and table."""

from __future__ import annotations

import argparse
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.arguments import (
    add_kv_cache_dtype,
    add_mode,
    add_model,
    add_prefill_chunk_tokens,
    engine_options,
    parse_args,
)
from lib.drift import Phase, drift_load, parse_phase, print_phases, summarize_phases
from lib.loads import FLAWS, WORKLOADS, Request, make_load, make_streams
from lib.report import QUANTILES, quantiles_ms
from lib.traces import Trace, read_trace


def add_service(parser: argparse.ArgumentParser, modes: Sequence[str]) -> None:
    """Adds what is served, and which load it gets."""
    add_mode(parser, "single", modes)
    add_model(parser, "qwen3-0.6b")
    add_kv_cache_dtype(parser)
    parser.add_argument("--workload", choices=WORKLOADS, help="chat if not given")
    parser.add_argument("--trace", help="file of JSON lines to serve instead of a workload and its rates")
    parser.add_argument(
        "--speed", type=float, help="of a trace: its requests come so many times as fast; 1 if not given"
    )
    parser.add_argument("--rate", type=float, nargs="+", help="requests per second, one after another; 10 if not given")
    parser.add_argument(
        "--streams",
        type=int,
        help="so many requests under way at a time instead of a rate: the next as soon as one ends",
    )
    parser.add_argument(
        "--drift",
        nargs="+",
        metavar="LOAD:RATE",
        help="loads that follow each other, each for --duration: workloads or files of traces, with their rates",
    )
    parser.add_argument("--duration", type=float, default=30.0, help="seconds in which requests arrive")
    add_limits(parser)
    add_prefill_chunk_tokens(parser)
    add_service_size(parser)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds what makes a request good, and what the engine aims at."""
    parser.add_argument("--ttft-limit-ms", type=float, default=600.0, help="of a good request")
    parser.add_argument("--itl-limit-ms", type=float, default=10.0, help="of a good request")
    parser.add_argument("--itl-target-ms", type=float, help="no target if not given")


def add_service_size(parser: argparse.ArgumentParser) -> None:
    """Adds how many and how long requests are served, and how they are drawn."""
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=12288, help="longer requests of a workload are cut to it")
    parser.add_argument("--seed", type=int, default=0)


def parse_service_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses; ends the program if options exclude each other or there is nothing to serve."""
    args = parse_args(parser)
    if args.trace and (args.rate or args.workload):
        parser.error("--trace excludes --rate and --workload: a trace has its own arrivals and lengths")
    if args.speed is not None and not args.trace:
        parser.error("--speed is of a trace; without one, use --rate")
    if args.drift and (args.trace or args.rate or args.workload or args.streams is not None):
        parser.error("--drift excludes --rate, --workload, --trace and --streams: it has loads of its own")
    if args.streams is not None and (args.trace or args.rate):
        parser.error("--streams excludes --rate and --trace: a request is due as soon as one has ended")
    if args.streams is not None and (args.streams < 1 or args.mode == "dp2"):
        parser.error("--streams: at least one, and not of mode dp2")
    args.rate = args.rate or [10.0]
    args.workload = args.workload or "chat"  # of the warm-up, with a trace
    speed = 1.0 if args.speed is None else args.speed
    if not all(0 < number < math.inf for number in (*args.rate, args.duration, speed)):
        parser.error("--rate, --duration and --speed must be above 0 and finite")
    _check_load(parser, args)
    return args


def _check_load(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.streams is not None:
        args.rate = [0.0]  # whatever is served
        return
    if args.drift:
        args.rate = [0.0]  # each load has its own
        try:
            drift_load(phases_of(args), args.duration, 2, args.max_model_len, args.seed)
        except ValueError as error:
            parser.error(f"--drift {error}")
        return
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


def phases_of(args: argparse.Namespace) -> list[Phase]:
    """The loads of `--drift`.

    Raises:
        ValueError: one of them is not written as it should be.
    """
    return [parse_phase(text) for text in args.drift or ()]


def trace_of(args: argparse.Namespace) -> Trace | None:
    """What `--trace` has for this engine and duration, None without."""
    if not args.trace:
        return None
    return read_trace(args.trace, args.max_model_len, args.duration, args.speed or 1.0)


def shares_beginnings(args: argparse.Namespace) -> bool:
    """Whether the prompts of a trace share their beginnings, so that a prefix cache has something to find."""
    traces = [trace_of(args)] if args.trace else [phase.trace(args.max_model_len) for phase in phases_of(args)]
    return any(trace is not None and trace.has_hash_ids for trace in traces)


def service_options(args: argparse.Namespace) -> dict[str, Any]:
    """What to serve and how, as arguments of `LLM`; the prefix cache is on where a trace gives it something to find."""
    names = ("max_model_len", "max_num_seqs", "prefill_chunk_tokens", "itl_target_ms")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return {**engine_options(args), **given, "enable_prefix_caching": shares_beginnings(args)}


def warm_up_load(args: argparse.Namespace, vocab_size: int) -> list[Request]:
    return make_load(args.workload, 16.0, 1.0, vocab_size, args.max_model_len, seed=args.seed + 1)


def load_of(args: argparse.Namespace, rate: float, vocab_size: int) -> list[Request]:
    """The requests of a trace, of `--drift`, or those that come at this rate."""
    if (trace := trace_of(args)) is not None:
        return trace.requests(vocab_size, args.seed)
    if args.drift:
        return drift_load(phases_of(args), args.duration, vocab_size, args.max_model_len, args.seed)
    return make_load(args.workload, rate, args.duration, vocab_size, args.max_model_len, args.seed)


def streams_of(args: argparse.Namespace, vocab_size: int) -> list[list[Request]]:
    """The requests of each of `--streams`."""
    return make_streams(args.workload, args.streams, vocab_size, args.max_model_len, args.seed)


def summarize(args: argparse.Namespace, requests: Sequence[Request]) -> dict[str, Any]:
    """`summarize_requests` within the limits that were asked for, and each load of `--drift`."""
    limits_s = args.ttft_limit_ms / 1e3, args.itl_limit_ms / 1e3
    phases = summarize_phases(phases_of(args), requests, args.duration, *limits_s)
    return {**summarize_requests(requests, *limits_s), "phases": phases}


def summarize_requests(requests: Sequence[Request], ttft_limit_s: float, itl_limit_s: float) -> dict[str, Any]:
    """Latencies in ms and throughput of requests that have been served, in the order in which they were due."""
    answered = [request for request in requests if request.error is None]
    all_times = sorted(time_s for request in answered for time_s in request.token_times_s)
    num_tokens = sum(request.num_tokens for request in answered)
    last_due_s = requests[-1].due_s
    in_window = sum(last_due_s / 10 <= time_s <= last_due_s for time_s in all_times) * num_tokens / len(all_times)
    tpot = [(r.token_times_s[-1] - r.token_times_s[0]) / (r.num_tokens - 1) for r in answered if r.num_tokens > 1]
    flaws_of = [request.flaws(ttft_limit_s, itl_limit_s) for request in requests]
    num_good, flaws = flaws_of.count([]), Counter(itertools.chain.from_iterable(flaws_of))
    return {
        "num_requests": len(requests),
        "num_failed": len(requests) - len(answered),
        "input_tokens": sum(len(request.prompt) for request in requests),
        "output_tokens": num_tokens,
        "seconds": all_times[-1],
        "tokens_per_s": num_tokens / all_times[-1],
        # Requests that are all due at once leave no time in which they arrive.
        "saturated_tokens_per_s": in_window / (0.9 * last_due_s) if last_due_s else 0.0,
        "goodput_per_s": num_good / all_times[-1],
        "good_share": num_good / len(requests),
        "flaws": {flaw: flaws[flaw] for flaw in FLAWS},
        "ttft_ms": quantiles_ms([request.ttft_s for request in answered]),
        "tpot_ms": quantiles_ms(tpot),
        "itl_ms": quantiles_ms([gap for request in answered for gap in request.gaps_s]),
        "first_gap_ms": quantiles_ms([request.gaps_s[0] for request in answered if request.gaps_s]),
    }


def with_hit_rate(found: dict[str, int]) -> dict[str, float]:
    return {**found, "hit_rate": found["hit_tokens"] / found["queried_tokens"]} if found else {}


def what_is_missing(trace: Trace | None) -> dict[str, int]:
    """Requests of a trace that were not served, or only in part, for want of room."""
    return {} if trace is None else {"num_left_out": trace.num_left_out, "num_cut": trace.num_cut}


def print_served(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """What was served, how much of it, and how well."""
    source = f"{args.workload}, {summary['rate']:g} requests/s"
    if args.streams is not None:
        source = f"{args.workload}, {args.streams} streams"
    if args.drift:
        source = f"{', '.join(args.drift)}, {args.duration:g} s each"
    print(f"{args.mode}, {args.model or args.model_shape}, {args.trace or source}")
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
    good = f"{summary['goodput_per_s']:.2f} requests/s, {summary['good_share']:.1%} of them,"
    print(f"goodput              {good} within {limits}")
    if flaws := {flaw: number for flaw, number in summary["flaws"].items() if number}:
        print(f"not good             {', '.join(f'{number} by {flaw}' for flaw, number in flaws.items())}")
    shares = ", ".join(f"{device} {share:.0%}" for device, share in summary["busy_share"].items())
    print(f"busy                 {shares}")
    if cache := summary["prefix_cache"]:
        found = f"{cache['hit_tokens']} of {cache['queried_tokens']} tokens"
        print(f"prefix cache         {found}, {cache['hit_rate']:.1%}")


def print_latencies(summary: dict[str, Any]) -> None:
    print(f"{'ms':<10}" + "".join(f"{name:>10}" for name in QUANTILES))
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "first_gap_ms"):
        print(
            f"{name[:-3].upper().replace('_', ' '):<10}"
            + "".join(f"{summary[name][quantile]:10.1f}" for quantile in QUANTILES)
        )
    if summary["phases"]:
        print_phases(summary["phases"])
