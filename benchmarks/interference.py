"""What prefill does to the gaps between tokens: steady requests decode, alone, while prompts keep arriving, and alone.

`--num-decoding` requests are decoded throughout. In the middle third of their tokens, prompts of `--prompt-len` tokens
that ask for two tokens each are kept waiting, so that prefill is saturated; their KV is handed over, and they decode
for one step. Shown are the gaps of the steady requests in each third, as the caller of `step()` sees them, and those of
the middle third over the mean of the others: contexts grow by as much before it as after.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import time
from typing import Any

from common import SHAPES, mode_options, model_options, parse_pd_args, report
from meters import BusyMeter
from online_load import quantiles_ms

from nanovllm import LLM, RequestOutput, SamplingParams

MOST_WAITING_PROMPTS = 4
MOST_FIRST_TOKENS = 1024
"""Of a steady request, until all of them decode; they are not counted."""


class Flood:
    """Prompts that are kept waiting."""

    def __init__(self, llm: LLM, prompts: list[list[int]]) -> None:
        self._llm, self._prompts = llm, itertools.cycle(prompts)
        self._params = SamplingParams(temperature=0.7, max_tokens=2, ignore_eos=True)
        self._waiting: set[int] = set()

    def top_up(self) -> None:
        while len(self._waiting) < MOST_WAITING_PROMPTS:
            self._waiting.add(self._llm.add_request(next(self._prompts), self._params))

    def take(self, output: RequestOutput) -> None:
        if output.finished:
            self._waiting.remove(output.request_id)

    def end(self) -> None:
        for request_id in self._waiting:
            self._llm.abort(request_id)


def random_prompt(rng: random.Random, llm: LLM, length: int) -> list[int]:
    vocab_size = llm.decode_runner.spec.model_config.vocab_size
    return [rng.randrange(vocab_size) for _ in range(length)]


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
            if output.request_id in last_token_s:
                gaps.append(now_s - last_token_s[output.request_id])
            last_token_s[output.request_id] = now_s
    return gaps


def measure(llm: LLM, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each third: gaps, and what the devices did meanwhile."""
    rng = random.Random(0)
    params = SamplingParams(temperature=0.7, max_tokens=4 * args.num_tokens + MOST_FIRST_TOKENS, ignore_eos=True)
    flood = Flood(llm, [random_prompt(rng, llm, args.prompt_len) for _ in range(16)])
    steady = {llm.add_request(random_prompt(rng, llm, args.context), params) for _ in range(args.num_decoding)}
    meters = {runner: BusyMeter(runner) for runner in dict.fromkeys((llm.prefill_runner, llm.decode_runner))}
    not_begun = set(steady)
    while not_begun:
        not_begun -= {output.request_id for output in llm.step()}
    gc.collect()
    gc.freeze()
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
    assert steady == llm._requests.sequences.keys(), "a steady request has ended before the last third"
    return thirds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["single", "pd"], default="pd")
    parser.add_argument("--model-shape", choices=SHAPES, default="qwen3-8b", help="random weights of this shape")
    parser.add_argument("--model", help="folder of a checkpoint to serve instead of random weights")
    parser.add_argument("--num-decoding", type=int, default=60)
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of the steady requests")
    parser.add_argument("--num-tokens", type=int, default=200, help="of each steady request in each third")
    parser.add_argument("--prompt-len", type=int, default=5000, help="of the prompts that arrive")
    args = parse_pd_args(parser)
    with LLM(
        **model_options(args.model, args.model_shape),
        device=args.device,
        max_model_len=max(args.prompt_len, args.context + 4 * args.num_tokens + MOST_FIRST_TOKENS) + 64,
        enable_prefix_caching=False,
        **mode_options(args),
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
