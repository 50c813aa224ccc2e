"""What prefill does to the gaps between tokens: steady requests decode, first alone, then while prompts keep arriving.

`--num-decoding` requests are decoded throughout. In the middle third of their tokens, prompts of `--prompt-len` tokens
that ask for two tokens each are kept waiting, so that prefill is saturated; their KV is handed over, and they decode
for one step. Shown are the gaps of the steady requests without and with them, as the caller of `step()` sees them.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from typing import Any

from common import SHAPES, model_options, report
from meters import BusyMeter
from online_load import quantiles_ms

from nanovllm import LLM, SamplingParams

MOST_WAITING_PROMPTS = 4


def random_prompt(rng: random.Random, llm: LLM, length: int) -> list[int]:
    vocab_size = llm.decode_runner.spec.model_config.vocab_size
    return [rng.randrange(vocab_size) for _ in range(length)]


def measure(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Gaps of the steady requests in each third of their tokens; the busy share of the prefill device in the second."""
    rng = random.Random(0)
    steady = SamplingParams(temperature=0.7, max_tokens=3 * args.num_tokens + 32, ignore_eos=True)
    two_tokens = SamplingParams(temperature=0.7, max_tokens=2, ignore_eos=True)
    flood = [random_prompt(rng, llm, args.prompt_len) for _ in range(16)]
    last_token_s = {
        llm.add_request(random_prompt(rng, llm, args.context), steady): 0.0 for _ in range(args.num_decoding)
    }
    num_tokens = dict.fromkeys(last_token_s, 0)
    gaps: list[list[float]] = [[], [], []]
    meter, flooded_s, num_prompts, waiting = BusyMeter(llm.prefill_runner), 0.0, 0, set()
    # All of them decode before the first third begins.
    while min(num_tokens.values()) < 32:
        for output in llm.step():
            num_tokens[output.request_id] += len(output.new_token_ids)
            last_token_s[output.request_id] = time.perf_counter()
    gc.collect()
    gc.freeze()
    last_token_s = dict.fromkeys(last_token_s, time.perf_counter())
    busy_s = 0.0
    for third in range(3):
        started, num_steps = time.perf_counter(), 0
        meter.take()
        while num_steps < args.num_tokens:
            while third == 1 and len(waiting) < MOST_WAITING_PROMPTS:
                waiting.add(llm.add_request(flood[num_prompts % len(flood)], two_tokens))
                num_prompts += 1
            outputs = llm.step()
            now_s, is_steady = time.perf_counter(), False
            for output in outputs:
                if output.request_id in last_token_s:
                    is_steady = True
                    gaps[third].append(now_s - last_token_s[output.request_id])
                    last_token_s[output.request_id] = now_s
                elif output.finished:
                    waiting.remove(output.request_id)
            num_steps += is_steady
        if third == 1:
            busy_s, flooded_s = meter.take()[0], time.perf_counter() - started
            num_prompts -= len(waiting)
            for request_id in list(waiting):
                llm.abort(request_id)
    alone, flooded = gaps[0] + gaps[2], gaps[1]
    return {
        "itl_ms": quantiles_ms(alone),
        "itl_ms_with_prefill": quantiles_ms(flooded),
        "prefill_tokens_per_s": num_prompts * args.prompt_len / flooded_s,
        "prefill_busy_share": busy_s / flooded_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["single", "pd"], default="pd")
    parser.add_argument("--model-shape", choices=SHAPES, default="qwen3-8b", help="random weights of this shape")
    parser.add_argument("--model", help="folder of a checkpoint to serve instead of random weights")
    parser.add_argument("--num-decoding", type=int, default=60)
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of the steady requests")
    parser.add_argument("--num-tokens", type=int, default=200, help="of each steady request in each third")
    parser.add_argument("--prompt-len", type=int, default=5000, help="of the prompts that arrive")
    parser.add_argument("--kv-handoff", help="of mode pd, auto if not given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", help="file for the JSON line")
    args = parser.parse_args()
    if args.kv_handoff and args.mode != "pd":
        parser.error(f"--kv-handoff is of mode pd, not of {args.mode}")
    two_devices: dict[str, Any] = {"enable_two_gpu_pd": True, "kv_handoff": args.kv_handoff or "auto"}
    with LLM(
        **model_options(args.model, args.model_shape),
        device=args.device,
        max_model_len=max(args.prompt_len, args.context + 3 * args.num_tokens) + 64,
        enable_prefix_caching=False,
        **(two_devices if args.mode == "pd" else {}),
    ) as llm:
        result = measure(llm, args)
    alone, flooded = result["itl_ms"], result["itl_ms_with_prefill"]
    print(f"{args.mode}, {args.model or args.model_shape}, {args.num_decoding} requests decoding")
    print(f"{'ITL ms':<16}" + "".join(f"{name:>10}" for name in alone))
    print(f"{'alone':<16}" + "".join(f"{value:10.2f}" for value in alone.values()))
    print(f"{'with prefill':<16}" + "".join(f"{value:10.2f}" for value in flooded.values()))
    print(f"{'ratio':<16}" + "".join(f"{flooded[name] / alone[name]:10.2f}" for name in alone))
    print(f"prefill: {result['prefill_tokens_per_s']:.0f} tok/s, busy {result['prefill_busy_share']:.0%}")
    report("interference", {**vars(args), **result}, args.output)


if __name__ == "__main__":
    main()
