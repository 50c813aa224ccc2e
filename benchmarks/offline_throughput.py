"""Tokens per second of a batch of requests of random lengths, and the share of what the hardware allows.

The workload is nano-vllm's: 256 requests of 100 to 1,024 tokens in and 100 to 1,024 out. The roofline is the time in
which the measured streaming bandwidth reads the weights once per decode step and every request's KV once per token,
plus the time of the prefill's GEMM FLOPs at the measured GEMM rate; of as many GPUs as there are ranks.
"""

from __future__ import annotations

import argparse
import random
import time

from common import SHAPES, gemm_rate, report, write_shape
from streaming import streaming_bandwidth

from nanovllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--prefill-chunk-tokens", type=int, default=2048)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--output", help="file for the JSON line")
    args = parser.parse_args()

    num_ranks = args.tensor_parallel_size
    bandwidth, rate = num_ranks * streaming_bandwidth(), num_ranks * gemm_rate()
    rng = random.Random(0)
    prompts = [[rng.randrange(10_000) for _ in range(rng.randint(100, 1024))] for _ in range(args.num_requests)]
    params = [
        SamplingParams(temperature=args.temperature, ignore_eos=True, max_tokens=rng.randint(100, 1024))
        for _ in prompts
    ]
    started = time.perf_counter()
    with LLM(
        write_shape(args.model_shape),
        load_format="dummy",
        attention_backend=args.attention_backend,
        prefill_chunk_tokens=args.prefill_chunk_tokens,
        enforce_eager=args.enforce_eager,
        tensor_parallel_size=num_ranks,
        enable_prefix_caching=False,
        max_num_seqs=max(512, args.num_requests),
    ) as llm:
        startup_s = time.perf_counter() - started
        llm.generate([[1] * 100] * 8, SamplingParams(ignore_eos=True, max_tokens=20), use_tqdm=False)
        steps_before = llm.counters.decode_steps
        started = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        steps = llm.counters.decode_steps - steps_before
        spec = llm.decode_runner.spec

    num_output_tokens = sum(len(answer["token_ids"]) for answer in answers)
    kv_bytes_per_token = num_ranks * spec.block_bytes / spec.attention.block_size
    # Token k of an answer is decoded from a context of prompt + k - 1 tokens; the first comes from prefill.
    contexts = sum(len(prompt) + k for prompt, p in zip(prompts, params, strict=True) for k in range(1, p.max_tokens))
    weight_bytes = spec.model_config.num_parameters * spec.dtype.itemsize
    head = spec.model_config.vocab_size * spec.model_config.hidden_size
    in_layers = spec.model_config.num_parameters - head
    prefill_flops = 2 * (in_layers * sum(map(len, prompts)) + head * len(prompts))
    roofline_s = (contexts * kv_bytes_per_token + steps * weight_bytes) / bandwidth + prefill_flops / rate
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
