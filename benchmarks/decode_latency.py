"""Time of a decode step by batch size and context: on the GPU, and on the host that launches it.

The step time is that between the ends of two steps of a full batch; the floor is the time in which the measured
streaming bandwidth, of as many GPUs as there are ranks, reads the weights and the batch's KV once. The host time is
that of one turn of the engine's loop with nothing arriving, waiting not counted: for requests of `generate`, and for
streamed ones, which take an output object per token.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import SHAPES, report, write_shape
from streaming import streaming_bandwidth

from nanovllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--output", help="file for the JSON line")
    args = parser.parse_args()

    num_ranks = args.tensor_parallel_size
    bandwidth = num_ranks * streaming_bandwidth()
    rows = []
    with LLM(
        write_shape(args.model_shape),
        load_format="dummy",
        enable_prefix_caching=False,
        tensor_parallel_size=num_ranks,
    ) as llm:
        spec = llm.decode_runner.spec
        kv_bytes_per_token = num_ranks * spec.block_bytes / spec.attention.block_size
        weight_bytes = spec.model_config.num_parameters * spec.dtype.itemsize
        print(f"{'batch':>6} {'context':>8} {'step ms':>8} {'floor ms':>9} {'host us':>8} {'streamed':>9}")
        for context in args.contexts:
            for batch in args.batches:
                step_ms, host_us = measure(llm, batch, context, args.steps, streamed=False)
                _, streamed_us = measure(llm, batch, context, args.steps, streamed=True)
                floor_ms = (weight_bytes + batch * context * kv_bytes_per_token) / bandwidth * 1e3
                print(f"{batch:6} {context:8} {step_ms:8.3f} {floor_ms:9.3f} {host_us:8.0f} {streamed_us:9.0f}")
                row = {"batch": batch, "context": context, "step_ms": step_ms, "floor_ms": floor_ms}
                rows.append({**row, "host_us": host_us, "host_streamed_us": streamed_us})
    report(
        "decode_latency",
        {"model_shape": args.model_shape, "tensor_parallel_size": num_ranks, "rows": rows},
        args.output,
    )


def measure(llm: LLM, batch: int, context: int, num_steps: int, *, streamed: bool) -> tuple[float, float]:
    """Milliseconds between the ends of two decode steps, and microseconds of host work per step."""
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=1000)
    prompts = ([1 + i % 1000] * (context - num_steps // 2) for i in range(batch))
    ids = [llm._submit(prompt, params, llm._inbox, streamed=streamed) for prompt in prompts]
    while len(llm.scheduler._batch) < batch:
        llm.step()
    for _ in range(5):
        llm.step()
    torch.cuda.synchronize()
    steps_before, waited = llm.counters.decode_steps, 0.0
    wait = llm._wait

    def timed_wait() -> None:
        nonlocal waited
        before = time.perf_counter()
        wait()
        waited += time.perf_counter() - before

    llm._wait = timed_wait  # type: ignore[method-assign] # what is left of a turn is the host's own work
    started = time.perf_counter()
    while llm.counters.decode_steps - steps_before < num_steps - 10:
        llm.step()
    seconds, steps = time.perf_counter() - started, llm.counters.decode_steps - steps_before
    llm._wait = wait  # type: ignore[method-assign]
    for request_id in ids:
        llm.abort(request_id)
    while not llm.is_finished():
        llm.step()
    return seconds / steps * 1e3, (seconds - waited) / steps * 1e6


if __name__ == "__main__":
    main()
