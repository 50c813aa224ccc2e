"""Tokens per second of a batch of requests of random lengths, and the share of what the hardware allows.

The workload is nano-vllm's: 256 requests of 100 to 1,024 tokens in and 100 to 1,024 out. The roofline is the time in
which the measured streaming bandwidth reads the weights once per decode step and every request's KV once per token,
plus the time of the prefill's GEMM FLOPs at the measured GEMM rate; of as many GPUs as there are ranks.
"""

from __future__ import annotations

import random
import time

from lib.arguments import add_prefill_chunk_tokens, add_shape, add_tensor_parallel, model_options, new_parser
from lib.ceilings import gemm_rate, kv_bytes_per_token, linear_flops, weight_bytes
from lib.loads import full_length, generate_timed, random_prompt
from lib.report import report
from lib.streaming import streaming_bandwidth
from nanovllm import LLM
from nanovllm.errors import ends_with_message


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_shape(parser, "qwen3-0.6b")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--attention-backend", default="auto")
    add_prefill_chunk_tokens(parser)
    parser.add_argument("--enforce-eager", action="store_true")
    add_tensor_parallel(parser)
    args = parser.parse_args()

    num_ranks = args.tensor_parallel_size
    bandwidth, rate = num_ranks * streaming_bandwidth(), num_ranks * gemm_rate()
    rng = random.Random(0)
    prompts = [random_prompt(rng, 10_000, rng.randint(100, 1024)) for _ in range(args.num_requests)]
    params = [full_length(rng.randint(100, 1024), args.temperature) for _ in prompts]
    started = time.perf_counter()
    with LLM(
        **model_options(args),
        attention_backend=args.attention_backend,
        prefill_chunk_tokens=args.prefill_chunk_tokens,
        enforce_eager=args.enforce_eager,
        tensor_parallel_size=num_ranks,
        enable_prefix_caching=False,
        max_num_seqs=max(512, args.num_requests),
    ) as llm:
        startup_s = time.perf_counter() - started
        generate_timed(llm, [[1] * 100] * 8, full_length(20))  # to warm up
        steps_before = llm.counters.decode_steps
        num_output_tokens, seconds = generate_timed(llm, prompts, params)
        steps = llm.counters.decode_steps - steps_before
        spec = llm.decode_runner.spec

    # Token k of an answer is decoded from a context of prompt + k - 1 tokens; the first comes from prefill.
    contexts = sum(len(prompt) + k for prompt, p in zip(prompts, params, strict=True) for k in range(1, p.max_tokens))
    num_decoded = sum(p.max_tokens - 1 for p in params)
    weights = steps * weight_bytes(spec, num_decoded / steps)
    num_bytes = contexts * num_ranks * kv_bytes_per_token(spec) + weights
    prefill_flops = linear_flops(spec.model_config, sum(map(len, prompts)), len(prompts))
    roofline_s = num_bytes / bandwidth + prefill_flops / rate
    throughput = num_output_tokens / seconds
    print(f"model shape            {args.model_shape}, {args.num_requests} requests")
    print(f"start-up               {startup_s:.1f} s")
    print(f"output tokens          {num_output_tokens} in {seconds:.2f} s, {steps} decode steps")
    print(f"streaming bandwidth    {bandwidth / 1e12:.2f} TB/s, GEMM rate {rate / 1e12:.0f} TFLOP/s")
    print(f"roofline               {roofline_s:.2f} s, {num_output_tokens / roofline_s:.0f} tok/s")
    print(f"throughput             {throughput:.0f} tok/s, {roofline_s / seconds:.1%} of the roofline")
    report(
        "offline_throughput",
        {
            "model_shape": args.model_shape,
            "num_requests": args.num_requests,
            "prefill_chunk_tokens": args.prefill_chunk_tokens,
            "enforce_eager": args.enforce_eager,
            "tensor_parallel_size": num_ranks,
            "num_output_tokens": num_output_tokens,
            "seconds": seconds,
            "tokens_per_s": throughput,
            "decode_steps": steps,
            "startup_s": startup_s,
            "bandwidth_bytes_per_s": bandwidth,
            "gemm_flop_per_s": rate,
            "roofline_s": roofline_s,
            "roofline_share": roofline_s / seconds,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
