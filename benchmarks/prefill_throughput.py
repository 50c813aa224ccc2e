"""Prefill speed of long prompts as a share of the GEMM rate measured in the same run.

Counted are the FLOPs of all linear layers for every token, of the output head once per prompt, and of causal attention
(half of the square); element-wise work counts as nothing.

With `--mode elastic` two cards prefill at once, in turns of `--rounds` rounds: prompts that they do not share, so that
each is alone with its own, and prompts that they share, so that each pushes KV to the other while it attends. Shown are
the medians, and the speed with sharing over that without.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median

from lib.arguments import (
    add_kv_cache_dtype,
    add_mode,
    add_quantization,
    add_shape,
    engine_options,
    new_parser,
    parse_args,
)
from lib.ceilings import gemm_rate, linear_flops
from lib.loads import full_length, generate_timed
from lib.report import report
from nanovllm import LLM
from nanovllm.errors import ends_with_message
from nanovllm.models.description import ModelDescription


def read_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_shape(parser, "qwen3-8b")
    add_quantization(parser)
    add_kv_cache_dtype(parser)
    add_mode(parser, "single", ("single", "elastic"))
    parser.add_argument("--prompt-len", type=int, default=8192)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5, help="of mode elastic")
    args = parse_args(parser)
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    return args


def prefill_flops(config: ModelDescription, prompt_len: int) -> float:
    """Floating-point operations of one prompt's prefill."""
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * prompt_len**2 / 2
    return linear_flops(config, prompt_len, 1) + attention


def prefill_s(llm: LLM, prompts: Sequence[list[int]]) -> float:
    """Seconds to the end of all prompts."""
    return generate_timed(llm, prompts, full_length(1))[1]


def prefill_on_two_cards_s(llm: LLM, prompts: Sequence[list[int]], rounds: int) -> tuple[float, float]:
    """The same where each prompt is one card's, and where the cards share each of them."""
    placement = llm.scheduler.placement
    placement.most_other_prompts = len(prompts)
    unshared: list[float] = []
    shared: list[float] = []
    for _ in range(rounds):
        for placement.shares_prompts, seconds in ((False, unshared), (True, shared)):
            seconds.append(prefill_s(llm, prompts))
    return median(unshared), median(shared)


@ends_with_message()
def main() -> None:
    args = read_options()
    rate = gemm_rate()
    with LLM(
        **engine_options(args),
        max_model_len=args.prompt_len + 16,
        max_num_batched_tokens=args.max_num_batched_tokens,
        enable_prefix_caching=False,
    ) as llm:
        config = llm.prefill_runner.spec.model_config
        prompts = [[(7 * i + j) % 10_000 for j in range(args.prompt_len)] for i in range(args.num_prompts)]
        prefill_s(llm, prompts[:1])  # to warm up
        if args.mode == "elastic":
            unshared_s, seconds = prefill_on_two_cards_s(llm, prompts, args.rounds)
            num_cards, over_unshared = 2, unshared_s / seconds
        else:
            seconds, num_cards, over_unshared = prefill_s(llm, prompts), 1, None
    tokens_per_s = args.num_prompts * args.prompt_len / seconds
    achieved = args.num_prompts * prefill_flops(config, args.prompt_len) / seconds
    share = achieved / (num_cards * rate)
    print(f"{args.model_shape}, {args.num_prompts} prompts of {args.prompt_len} tokens: {tokens_per_s:.0f} tok/s")
    print(f"{achieved / 1e12:.0f} of {num_cards * rate / 1e12:.0f} TFLOP/s, {share:.1%} of the GEMM rate")
    if over_unshared is not None:
        print(f"{over_unshared:.3f} of the speed of cards that do not share prompts")
    report(
        "prefill_throughput",
        {
            "mode": args.mode,
            "model_shape": args.model_shape,
            "quantization": args.quantization,
            "kv_cache_dtype": args.kv_cache_dtype,
            "prompt_len": args.prompt_len,
            "num_prompts": args.num_prompts,
            "seconds": seconds,
            "tokens_per_s": tokens_per_s,
            "flop_per_s": achieved,
            "gemm_flop_per_s": rate,
            "share": share,
            "over_unshared": over_unshared,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
