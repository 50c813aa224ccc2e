"""Latency and throughput of requests that arrive at random moments, as a server sees them.

Modes:

- `single`: one engine on one device;
- `pd`: one engine on two devices, prefill on one and decode on the other;
- `elastic`: one engine on two devices, each of which does both, and which compute long prompts together;
- `tp2`: one engine on two devices, tensor parallel;
- `processes`: one engine on `--prefill-cards` and `--decode-cards`, each in a process of its own (`cluster="local"`);
- `elastic-processes`: the same, each of which prefills and decodes;
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
from typing import Any

from lib.arguments import CLUSTER_MODES, new_parser
from lib.engines import Engine, Engines, Served
from lib.online import (
    add_service,
    load_of,
    parse_service_args,
    print_latencies,
    print_served,
    summarize,
    trace_of,
    what_is_missing,
    with_hit_rate,
)
from lib.report import report
from nanovllm import LLM
from nanovllm.entrypoints.prometheus import Collector
from nanovllm.errors import ends_with_message

NUM_REPLICAS = 2


def serve_replicas(args: argparse.Namespace) -> list[Served]:
    """Each rate, by two engines in two processes."""
    engines = Engines(args, NUM_REPLICAS, [(args, rate) for rate in args.rate])
    try:
        for started in engines.start():
            started.result()
        engines.warm_up()
        return [engines.serve(args, rate) for rate in args.rate]
    finally:
        engines.close()


def print_meters(summary: dict[str, Any]) -> None:
    """What only a meter in the engine's process sees."""
    shares = ", ".join(f"{device} {share:.1%}" for device, share in summary["idle_share"].items())
    print(f"idle while decoding  {shares}")
    chunks = summary["chunks"]
    if chunks.get("shared"):
        waits = f"{chunks['wait_share']:.1%} of the steps with prompts waiting for layers"
        print(f"chunks               {chunks['shared']} of shared prompts, {chunks['single']} of others; {waits}")
    if handoff := summary["handoff"]:
        amounts = f"{handoff['bytes'] / 2**30:.2f} GiB"
        if "sends" in handoff:
            amounts += f" in {handoff['sends']} sends, {handoff['host_us_per_send']:.0f} us of the host each"
        print(f"handoff              {amounts}")


def read_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_service(parser, ("single", "pd", "elastic", "tp2", "dp2", *CLUSTER_MODES))
    parser.add_argument("--prefill-cards", type=int, help="of modes with processes, 1 if not given")
    parser.add_argument("--decode-cards", type=int, help="of modes with processes, 1 if not given")
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics there; not of mode dp2")
    args = parse_service_args(parser)
    if args.mode not in CLUSTER_MODES and (args.prefill_cards or args.decode_cards):
        parser.error(f"--prefill-cards and --decode-cards are of modes {', '.join(CLUSTER_MODES)}, not of {args.mode}")
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
        engine.warm_up()
        if args.metrics_port is not None:
            serve_metrics(engine.llm, args.metrics_port)
        with engine.llm:
            if args.streams is not None:
                results = [engine.serve_streams(args)]
            else:
                results = [engine.serve(load_of(args, rate, engine.vocab_size)) for rate in args.rate]
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
