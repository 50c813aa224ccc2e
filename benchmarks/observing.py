"""What it costs to look: tokens per second without metrics and timelines, with them (as always), and with a trace.

The workload is that of offline_throughput.py. The three take turns, each with an engine of its own, after one that does
not count: the first in a process is faster than those after it. The median of the rounds counts.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from lib.arguments import add_mode, add_model, engine_options, new_parser, parse_args
from lib.loads import full_length, generate_timed, random_prompt
from lib.report import report
from nanovllm import LLM
from nanovllm.engine.observability.metrics import Metrics
from nanovllm.engine.scheduling.timeline import Timeline
from nanovllm.errors import ends_with_message

WAYS = ("nothing", "metrics", "metrics and trace")


def look_away(*_: object) -> None:
    """Instead of what counts and times requests."""


@contextlib.contextmanager
def blind() -> Iterator[None]:
    """Nobody counts and times requests meanwhile."""
    watching = {Metrics: ("got_token", "got_tokens", "has_ended"), Timeline: ("mark",)}
    with contextlib.ExitStack() as stack:
        for owner, names in watching.items():
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, look_away))
        yield


def run(way: str, args: argparse.Namespace, options: dict[str, Any], folder: str) -> float:
    """Tokens per second."""
    rng = random.Random(0)
    lengths = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(args.num_requests)]
    longest = args.max_model_len // 2
    prompts = [random_prompt(rng, 1000, min(num_input, longest)) for num_input, _ in lengths]
    params = [full_length(min(longest, num_output), temperature=0.6) for _, num_output in lengths]
    trace = Path(folder) / "trace.json" if way == "metrics and trace" else None
    with contextlib.ExitStack() as stack:
        if way == "nothing":
            stack.enter_context(blind())
        llm = stack.enter_context(LLM(**options, trace=trace))
        generate_timed(llm, [[1] * 32] * 8, full_length(20))  # to warm up
        num_tokens, seconds = generate_timed(llm, prompts, params)
        return num_tokens / seconds


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_mode(parser, "single")
    add_model(parser, "qwen3-0.6b")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096, help="longer requests are cut to it")
    parser.add_argument("--rounds", type=int, default=3)
    args = parse_args(parser)
    options = {**engine_options(args), "max_model_len": args.max_model_len, "enable_prefix_caching": False}
    measured: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        run(WAYS[0], args, options, folder)
        for turn in range(args.rounds):
            # None of them is always the first, on a card that is still cool.
            for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
                measured[way].append(run(way, args, options, folder))
        trace_bytes = (Path(folder) / "trace.json").stat().st_size
    rates = {way: statistics.median(of_way) for way, of_way in measured.items()}
    for way, rate in rates.items():
        print(f"{way:<18}{rate:10.0f} tok/s{rate / rates['nothing'] - 1:+10.2%}")
    print(f"the trace takes {trace_bytes / 2**20:.1f} MiB")
    report("observing", {**vars(args), "tokens_per_s": measured, "trace_bytes": trace_bytes}, args.output)


if __name__ == "__main__":
    main()
