"""What prefill does to the gaps between tokens: steady requests decode, alone, while prompts keep arriving, and alone.

`--num-decoding` requests are decoded throughout. In the middle third of their tokens, prompts of `--prompt-len` tokens
that ask for two tokens each are kept waiting, so that prefill is saturated; their KV is handed over, and they decode
for one step. Shown are the gaps of the steady requests in each third, as the caller of `step()` sees them, and those of
the middle third over the mean of the others: contexts grow by as much before it as after.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from typing import Any

from lib.arguments import add_mode, add_model, engine_options, new_parser, parse_args
from lib.loads import full_length, random_prompt, vocab_size_of
from lib.meters import BusyMeter, freeze_garbage
from lib.report import quantiles_ms, report
from nanovllm import LLM, RequestOutput
from nanovllm.errors import ends_with_message

MAX_WAITING_PROMPTS = 4
MAX_FIRST_TOKENS = 1024
"""Tokens of a steady request until all of them decode; they are not counted."""


class Flood:
    """Prompts that are kept waiting."""

    def __init__(self, llm: LLM, prompts: list[list[int]]) -> None:
        self._llm, self._prompts = llm, itertools.cycle(prompts)
        self._params = full_length(2)
        self._waiting: set[int] = set()

    def top_up(self) -> None:
        while len(self._waiting) < MAX_WAITING_PROMPTS:
            self._waiting.add(self._llm.add_request(next(self._prompts), self._params))

    def take(self, output: RequestOutput) -> None:
        if output.finished:
            self._waiting.remove(output.request_id)

    def end(self) -> None:
        for request_id in self._waiting:
            self._llm.abort(request_id)


def decode(llm: LLM, steady: set[int], num_steps: int, flood: Flood, *, floods: bool) -> list[float]:
    """Runs until the steady requests have got so many tokens; all gaps between them, in seconds."""
    gaps: list[float] = []
    last_token_s: dict[int, float] = {}
    steps = 0
    while steps < num_steps:
        if floods:
            flood.top_up()
        outputs = llm.step()
        now_s = time.perf_counter()
        steps += any(output.request_id in steady for output in outputs)
        for output in outputs:
            if output.request_id not in steady:
                flood.take(output)
                continue
            assert not output.finished, "a steady request has ended before the last third"
            if output.request_id in last_token_s:
                gaps.append(now_s - last_token_s[output.request_id])
            last_token_s[output.request_id] = now_s
    return gaps


def measure(llm: LLM, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Gaps in each third, and what the devices did meanwhile."""
    rng, vocab_size = random.Random(0), vocab_size_of(llm)
    params = full_length(4 * args.num_tokens + MAX_FIRST_TOKENS)
    flood = Flood(llm, [random_prompt(rng, vocab_size, args.prompt_len) for _ in range(16)])
    steady = {llm.add_request(random_prompt(rng, vocab_size, args.context), params) for _ in range(args.num_decoding)}
    meters = {runner: BusyMeter(runner) for runner in dict.fromkeys((llm.prefill_runner, llm.decode_runner))}
    not_begun = set(steady)
    while not_begun:
        not_begun -= {output.request_id for output in llm.step()}
    freeze_garbage()
    thirds = []
    for floods in (False, True, False):
        for meter in meters.values():
            meter.take()
        num_prefilled, num_steps = llm.counters.prefill_tokens, llm.counters.decode_steps
        started = time.perf_counter()
        gaps = decode(llm, steady, args.num_tokens, flood, floods=floods)
        seconds = time.perf_counter() - started
        num_prefilled = llm.counters.prefill_tokens - num_prefilled
        num_steps = llm.counters.decode_steps - num_steps
        busy_s = {runner: meter.take()[0] for runner, meter in meters.items()}
        thirds.append(
            {
                "itl_ms": quantiles_ms(gaps),
                "decode_device_ms_per_step": busy_s[llm.decode_runner] / num_steps * 1e3,
                "prefill_tokens_per_s": num_prefilled / seconds,
                "prefill_busy_share": busy_s[llm.prefill_runner] / seconds,
            }
        )
        flood.end()
        decode(llm, steady, args.num_tokens // 4, flood, floods=False)  # until nothing of it is in flight
    return thirds


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_mode(parser, "pd")
    add_model(parser, "qwen3-8b")
    parser.add_argument("--num-decoding", type=int, default=60)
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of the steady requests")
    parser.add_argument("--num-tokens", type=int, default=200, help="of each steady request in each third")
    parser.add_argument("--prompt-len", type=int, default=5000, help="of the prompts that arrive")
    args = parse_args(parser)
    with LLM(
        **engine_options(args),
        max_model_len=max(args.prompt_len, args.context + 4 * args.num_tokens + MAX_FIRST_TOKENS) + 64,
        enable_prefix_caching=False,
    ) as llm:
        thirds = measure(llm, args)
    before, flooded, after = (third["itl_ms"] for third in thirds)
    ratio = {name: 2 * flooded[name] / (before[name] + after[name]) for name in flooded}
    print(f"{args.mode}, {args.model or args.model_shape}, {args.num_decoding} requests decoding")
    print(f"{'ITL ms':<16}" + "".join(f"{name:>8}" for name in ratio) + "   decode device ms/step, prefill tok/s, busy")
    for name, third in zip(("alone", "with prefill", "alone"), thirds, strict=True):
        print(
            f"{name:<16}"
            + "".join(f"{value:8.2f}" for value in third["itl_ms"].values())
            + f"{third['decode_device_ms_per_step']:12.2f}{third['prefill_tokens_per_s']:18.0f}"
            + f"{third['prefill_busy_share']:8.0%}"
        )
    print(f"{'ratio':<16}" + "".join(f"{value:8.2f}" for value in ratio.values()))
    report("interference", {**vars(args), "thirds": thirds, "ratio": ratio}, args.output)


if __name__ == "__main__":
    main()
