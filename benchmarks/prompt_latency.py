"""Time from a prompt's arrival to its first token on idle cards, by its length: one card, or two in several ways.

Mode `single` is one card, `pd` prefill and decode on two, `elastic` two that share each prompt, `tp2` tensor
parallelism over two. Requests come one at a time, `--repeats` of each length after one that does not count; shown are
the median and the fastest. Where prompts are shared, `waits` is the share of the cards' steps in which they wait for
each other's layers.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median
from typing import Any

from lib.arguments import add_mode, add_model, add_prefill_chunk_tokens, engine_options, new_parser, parse_args
from lib.report import report
from nanovllm import LLM, SamplingParams
from nanovllm.errors import ends_with_message

MAX_TOKENS = 2
"""Tokens of each answer; the second one shows that the KV is where the request decodes."""


def read_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_mode(parser, "single", ("single", "pd", "elastic", "tp2"))
    add_model(parser, "qwen3-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768], help="tokens of the prompts")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    add_prefill_chunk_tokens(parser)
    args = parse_args(parser)
    if args.repeats < 1 or min(args.lengths) < 1:
        parser.error("--repeats and --lengths are at least 1")
    return args


def busy_s(llm: LLM) -> float:
    """Seconds in which the cards have run steps with prompts."""
    return sum(kinds["prefill"] + kinds["mixed"] for kinds in llm.metrics()["busy_s"].values())


def first_token_s(llm: LLM, prompt: list[int]) -> float:
    """Seconds to the first token of a prompt; returns when the request has ended."""
    began_s, first_s = time.perf_counter(), 0.0
    llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True))
    while not llm.is_finished():
        for output in llm.step():
            if output.error is not None:
                raise output.error
            if output.new_token_ids and not first_s:
                first_s = time.perf_counter() - began_s
    return first_s


def measure(llm: LLM, length: int, repeats: int, vocab_size: int) -> dict[str, Any]:
    rng = random.Random(length)
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(repeats + 1)]
    first_token_s(llm, prompts[0])
    waited_s, before_s = llm.metrics()["layer_wait_s"], busy_s(llm)
    times_s = [first_token_s(llm, prompt) for prompt in prompts[1:]]
    waits = (llm.metrics()["layer_wait_s"] - waited_s) / (busy_s(llm) - before_s)
    return {"length": length, "ttft_ms": median(times_s) * 1e3, "least_ms": min(times_s) * 1e3, "waits": waits}


@ends_with_message()
def main() -> None:
    args = read_options()
    with LLM(
        **engine_options(args),
        enable_prefix_caching=False,
        max_model_len=max(args.lengths) + MAX_TOKENS,
        max_num_batched_tokens=args.max_num_batched_tokens,
        prefill_chunk_tokens=args.prefill_chunk_tokens,
    ) as llm:
        vocab_size = llm.decode_runner.spec.model_config.vocab_size
        rows = [measure(llm, length, args.repeats, vocab_size) for length in args.lengths]
        chunks = llm.metrics()["prefill_chunks"]
    print(f"{args.mode}, {args.model or args.model_shape}")
    print(f"chunks               {chunks['shared']} of shared prompts, {chunks['single']} of others")
    print(f"{'tokens':>8} {'TTFT ms':>9} {'fastest':>9} {'waits':>7}")
    for row in rows:
        print(f"{row['length']:8} {row['ttft_ms']:9.1f} {row['least_ms']:9.1f} {row['waits']:7.1%}")
    report("prompt_latency", {**vars(args), "rows": rows}, args.output)


if __name__ == "__main__":
    main()
