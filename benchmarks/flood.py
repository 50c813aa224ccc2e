"""What a flood of prompts does to requests that decode: is the backlog bounded, and does their latency hold?

First a steady load: as many requests as may hold blocks (`--batch`), each replaced when it ends, which tells the rate
that can be sustained. Then a flood: requests arrive at a multiple of that rate for some seconds. Of both are shown ITL,
the mean size of decode steps, the requests between the beginning of their prefill and the arrival of their KV (the
backlog, bounded by `--max-handoff-backlog`), and preemptions. What the flood leaves in the queue is aborted.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import math
import random
import time
from collections import defaultdict
from typing import Any

from lib import inside
from lib.arguments import add_mode, add_model, engine_options, new_parser, parse_args
from lib.loads import full_length, gaps_of, settle, vocab_size_of
from lib.meters import freeze_garbage
from lib.report import quantiles_ms, report
from nanovllm import LLM, SamplingParams
from nanovllm.errors import ends_with_message

SETTLING_S = 2.0
MAX_STEADY_PER_S = 500
"""So many requests are made for a second of the steady load."""


Request = tuple[list[int], SamplingParams]


def make_requests(num_requests: int, vocab_size: int, args: argparse.Namespace, rng: random.Random) -> list[Request]:
    """Requests of random lengths, made before anything is measured, since that takes longer than to serve them."""
    requests = []
    for _ in range(num_requests):
        prompt = rng.choices(range(vocab_size), k=rng.randint(args.input // 2, 3 * args.input // 2))
        num_output = rng.randint(args.num_output // 2, 3 * args.num_output // 2)
        requests.append((prompt, full_length(num_output)))
    return requests


def run(llm: LLM, requests: list[Request], running: set[int], dues_s: list[float] | None, args: Any) -> dict[str, Any]:
    """A load for `--seconds`: arrivals at these seconds, or always as many requests as may hold blocks."""
    token_times: defaultdict[int, list[float]] = defaultdict(list)
    before, started = llm.metrics(), time.perf_counter()
    num_ended, num_arrived, most_backlog = 0, 0, 0
    num_due = 0 if dues_s is None else bisect.bisect(dues_s, args.seconds)
    while (now_s := time.perf_counter() - started) < args.seconds or num_arrived < num_due:
        while num_arrived < len(requests) and (
            dues_s[num_arrived] <= now_s if dues_s is not None else len(running) < args.batch
        ):
            running.add(llm.add_request(*requests[num_arrived]))
            num_arrived += 1
        outputs = llm.step()
        now_s = time.perf_counter() - started
        for output in outputs:
            token_times[output.request_id] += [now_s] * len(output.new_token_ids)
            if output.finished:
                running.discard(output.request_id)
                num_ended += 1
        most_backlog = max(most_backlog, inside.num_in_backlog(llm))
    after = llm.metrics()
    gaps = [gap for times_s in token_times.values() for gap in gaps_of(times_s)]
    steps = after["decode_steps"] - before["decode_steps"]
    return {
        "arrived_per_s": num_arrived / args.seconds,
        "ended_per_s": num_ended / args.seconds,
        "itl_ms": quantiles_ms(gaps),
        "decode_batch": (after["decode_tokens"] - before["decode_tokens"]) / max(steps, 1),
        "most_backlog": most_backlog,
        "waiting": after["requests"]["waiting"],
        "preemptions": after["preemptions"] - before["preemptions"],
    }


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_mode(parser, "pd")
    add_model(parser, "qwen3-8b")
    parser.add_argument("--batch", type=int, default=128, help="requests that may hold blocks")
    parser.add_argument("--input", type=int, default=512, help="mean prompt tokens")
    parser.add_argument("--num-output", type=int, default=128, help="mean output tokens")
    parser.add_argument("--times", type=float, default=10.0, help="the sustainable rate")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--max-handoff-backlog", type=int, help="of mode pd, 32 if not given")
    parser.add_argument("--itl-target-ms", type=float, help="of mode pd")
    parser.add_argument("--seed", type=int, default=0)
    args = parse_args(parser)
    if args.mode != "pd" and (args.max_handoff_backlog, args.itl_target_ms) != (None, None):
        parser.error("--max-handoff-backlog and --itl-target-ms are of mode pd")
    if not (args.times > 0 and 0 < args.seconds < math.inf and args.input > 1 and args.num_output > 1):
        parser.error("--times and --seconds must be above 0, --input and --num-output above 1")

    options = engine_options(args)
    if args.mode == "pd":
        backlog = 32 if args.max_handoff_backlog is None else args.max_handoff_backlog
        options |= {"max_handoff_backlog": backlog, "itl_target_ms": args.itl_target_ms}
    with LLM(
        max_num_seqs=args.batch,
        max_model_len=2 * (args.input + args.num_output),
        enable_prefix_caching=False,
        **options,
    ) as llm:
        rng, vocab_size = random.Random(args.seed), vocab_size_of(llm)
        running: set[int] = set()
        requests = make_requests(MAX_STEADY_PER_S * math.ceil(args.seconds), vocab_size, args, rng)
        settling = argparse.Namespace(**{**vars(args), "seconds": SETTLING_S})
        run(llm, requests, running, None, settling)
        freeze_garbage()
        steady = run(llm, requests, running, None, args)
        rate = args.times * max(steady["ended_per_s"], 1.0)
        dues_s = list(itertools.accumulate(rng.expovariate(rate) for _ in range(math.ceil(1.2 * rate * args.seconds))))
        requests = make_requests(len(dues_s), vocab_size, args, rng)
        freeze_garbage()
        flood = run(llm, requests, running, dues_s, args)
        for request_id in running:
            llm.abort(request_id)
        settle(llm)
        llm.scheduler.check_integrity()
    titles = ("arrived/s", "ended/s", "ITL p50", "p99", "max", "decode", "backlog", "preempted")
    print(" " * 10 + "".join(f"{title:>10}" for title in titles))
    for name, result in (("steady", steady), ("flood", flood)):
        rates = [result["arrived_per_s"], result["ended_per_s"]]
        latencies = [result["itl_ms"][quantile] for quantile in ("p50", "p99", "max")]
        values = [f"{value:.2f}" for value in (*rates, *latencies, result["decode_batch"])]
        values += [str(result["most_backlog"]), str(result["preemptions"])]
        print(f"{name:<10}" + "".join(f"{value:>10}" for value in values))
    ratio = flood["itl_ms"]["p99"] / steady["itl_ms"]["p99"]
    print(f"ITL p99 in the flood: {ratio:.2f} of the steady load's; {flood['waiting']} requests left in the queue")
    report("flood", {**vars(args), "steady": steady, "flood": flood, "itl_p99_ratio": ratio}, args.output)


if __name__ == "__main__":
    main()
