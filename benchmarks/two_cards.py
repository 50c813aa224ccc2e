"""The same loads in each way to use two cards, in turns on the same cards.

Each mode (all of online_load.py but `single`) has an engine, or two, in processes of its own, all of which hold their
weights and pools on the cards at the same time: give `--num-kvcache-blocks` so that they fit. Only one mode serves at a
time, once all have started. A load is served in every mode before the next one is, and each time another mode is the
first.

A load is LOAD:RATE, a workload or the file of a trace, and requests per second, for `--duration`; several of them
joined by `+` follow each other. A request is good as in online_load.py. Modes that mix prompts with decode steps aim at
`--itl-target-ms`; as steps scatter, that should be a few percent below `--itl-limit-ms`.

`processes*2` and `elastic-processes*2` have twice the cards, two of each role, and twice the requests of each load.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

from lib.arguments import (
    CLUSTER_MODES,
    add_device,
    add_kv_cache_dtype,
    add_model,
    add_pool,
    add_prefill_chunk_tokens,
    add_quantization,
    new_parser,
)
from lib.drift import drift_load, parse_phase, print_phases
from lib.engines import Engines, Served
from lib.online import add_limits, add_service_size, summarize, with_hit_rate
from lib.report import report
from nanovllm.errors import ends_with_message

TWICE = "*2"
"""Behind the name of a mode: with twice the cards and requests."""
MODES = ("elastic", "pd", "dp2", "tp2", *CLUSTER_MODES, *(mode + TWICE for mode in CLUSTER_MODES))
NUM_REPLICAS = {"dp2": 2}
HEADER = (
    f"{'':<42}{'requests':>9}{'good':>7}{'TTFT p50':>10}{'p99':>8}{'ITL p50':>9}{'p99':>7}{'first gap':>11}{'p95':>6}"
    f"{'hits':>7}  not good by"
)


def read_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES[:3])
    parser.add_argument("--loads", nargs="+", required=True, metavar="LOAD:RATE[+LOAD:RATE...]")
    parser.add_argument("--rounds", type=int, default=1, help="how often all of them are served")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of a load in which requests arrive")
    add_model(parser, "qwen3-8b")
    add_quantization(parser)
    add_kv_cache_dtype(parser)
    add_device(parser)
    add_pool(parser)
    add_limits(parser)
    add_prefill_chunk_tokens(parser)
    add_service_size(parser)
    args = parser.parse_args()
    for load in args.loads:
        try:
            drift_load([parse_phase(text) for text in load.split("+")], args.duration, 2, args.max_model_len, args.seed)
        except (ValueError, OSError) as error:
            parser.error(f"--loads {load}: {error}")
    return args


def in_mode(args: argparse.Namespace, mode: str, loads: list[str]) -> argparse.Namespace:
    """The options of online_load.py that serve these loads, one after another, in a mode."""
    options = copy.copy(args)
    options.mode, options.drift, options.workload = mode.removesuffix(TWICE), loads, "rag"
    options.trace = options.streams = options.kv_handoff = options.decode_pipeline = None
    if mode.endswith(TWICE):
        options.prefill_cards = options.decode_cards = 2
        phases = [parse_phase(load) for load in loads]
        options.drift = [f"{phase.load}:{2 * phase.rate}" for phase in phases]
    return options


def summary_of(args: argparse.Namespace, load: str, mode: str, served: Served) -> dict[str, Any]:
    summary = {"mode": mode, "load": load, **summarize(in_mode(args, mode, load.split("+")), served.requests)}
    summary |= {"busy_share": served.busy_share, "idle_share": served.idle_share, "chunks": served.chunks}
    return summary | {"prefix_cache": with_hit_rate(served.prefix_cache), "step_time": served.step_time}


def print_summary(summary: dict[str, Any]) -> None:
    """A line, and one for each part of a load that has several."""
    ttft, itl, first_gap = summary["ttft_ms"], summary["itl_ms"], summary["first_gap_ms"]
    flaws = ", ".join(f"{flaw} {number}" for flaw, number in summary["flaws"].items() if number)
    hits = f"{summary['prefix_cache']['hit_rate']:.1%}" if summary["prefix_cache"] else ""
    print(
        f"{summary['mode']:<20}{summary['load'].rpartition('/')[2]:<22}{summary['num_requests']:>9}"
        f"{summary['good_share']:>7.3f}{ttft['p50']:>10.0f}{ttft['p99']:>8.0f}{itl['p50']:>9.1f}{itl['p99']:>7.1f}"
        f"{first_gap['p50']:>11.1f}{first_gap['p95']:>6.1f}{hits:>7}  {flaws}",
        flush=True,
    )
    if len(summary["phases"]) > 1:
        print_phases(summary["phases"])


def serve_in_turns(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Serves each load in each mode."""
    everything = [part for load in args.loads for part in load.split("+")]
    modes: dict[str, Engines] = {}
    summaries = []
    try:
        for mode in args.modes:
            loads = [(in_mode(args, mode, load.split("+")), 0.0) for load in args.loads]
            modes[mode] = Engines(in_mode(args, mode, everything), NUM_REPLICAS.get(mode, 1), loads)
        for started in [future for engines in modes.values() for future in engines.start()]:
            started.result()
        for engines in modes.values():
            engines.warm_up()
        print(HEADER, flush=True)
        for number, load in enumerate(args.loads * args.rounds):
            first = number % len(args.modes)
            for mode in (*args.modes[first:], *args.modes[:first]):
                served = modes[mode].serve(in_mode(args, mode, load.split("+")), 0.0)
                summaries.append(summary_of(args, load, mode, served))
                print_summary(summaries[-1])
    finally:
        for engines in modes.values():
            engines.close()
    return summaries


@ends_with_message()
def main() -> None:
    args = read_options()
    summaries = serve_in_turns(args)
    report("two_cards", {**vars(args), "loads": summaries}, args.output)


if __name__ == "__main__":
    main()
