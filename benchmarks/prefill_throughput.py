"""Prefill speed of long prompts as a share of the GEMM rate measured in the same run.

Counted are the FLOPs of all linear layers for every token, of the output head once per prompt, and of causal attention
(half of the square); element-wise work counts as nothing.
"""

from __future__ import annotations

from lib.arguments import add_quantization, add_shape, model_options, new_parser
from lib.ceilings import gemm_rate, linear_flops
from lib.loads import full_length, generate_timed
from lib.report import report
from nanovllm import LLM
from nanovllm.errors import ends_with_message
from nanovllm.models.description import ModelDescription


def prefill_flops(config: ModelDescription, prompt_len: int) -> float:
    """Floating-point operations of one prompt's prefill."""
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * prompt_len**2 / 2
    return linear_flops(config, prompt_len, 1) + attention


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_shape(parser, "qwen3-8b")
    add_quantization(parser)
    parser.add_argument("--prompt-len", type=int, default=8192)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    args = parser.parse_args()

    rate = gemm_rate()
    with LLM(
        **model_options(args),
        max_model_len=args.prompt_len + 16,
        max_num_batched_tokens=args.max_num_batched_tokens,
        enable_prefix_caching=False,
    ) as llm:
        config = llm.prefill_runner.spec.model_config
        prompts = [[(7 * i + j) % 10_000 for j in range(args.prompt_len)] for i in range(args.num_prompts)]
        generate_timed(llm, prompts[:1], full_length(1))  # to warm up
        _, seconds = generate_timed(llm, prompts, full_length(1))
    tokens_per_s = args.num_prompts * args.prompt_len / seconds
    achieved = args.num_prompts * prefill_flops(config, args.prompt_len) / seconds
    print(f"{args.model_shape}, {args.num_prompts} prompts of {args.prompt_len} tokens: {tokens_per_s:.0f} tok/s")
    print(f"{achieved / 1e12:.0f} of {rate / 1e12:.0f} TFLOP/s, {achieved / rate:.1%} of the GEMM rate")
    report(
        "prefill_throughput",
        {
            "model_shape": args.model_shape,
            "quantization": args.quantization,
            "prompt_len": args.prompt_len,
            "num_prompts": args.num_prompts,
            "seconds": seconds,
            "tokens_per_s": tokens_per_s,
            "flop_per_s": achieved,
            "gemm_flop_per_s": rate,
            "share": achieved / rate,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
