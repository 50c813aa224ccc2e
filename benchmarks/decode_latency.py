"""Time of a decode step by batch size and context: on the GPU, and on the host that launches it.

The step time is that between the ends of two steps of a full batch; the floor is the time in which the measured
streaming bandwidth, of as many GPUs as there are ranks, reads the weights and the batch's KV once; of experts, the
weights of as many as a batch of tokens with evenly drawn experts is expected to pass. The host time is
what the engine's loop does for a step with nothing arriving: the time between steps less that in which the loop only
waited for the device, both as a step listener is told of them (`DecodeTimer`). It is measured for requests of
`generate`, and for streamed ones, by `step()`, which take an output object per token.
"""

from __future__ import annotations

import contextlib

from lib.arguments import (
    add_kv_cache_dtype,
    add_quantization,
    add_shape,
    add_tensor_parallel,
    model_options,
    new_parser,
)
from lib.ceilings import kv_bytes_per_token, weight_bytes
from lib.loads import full_length, settle
from lib.meters import DecodeTimer, Enough
from lib.report import report
from lib.streaming import streaming_bandwidth
from nanovllm import LLM
from nanovllm.errors import ends_with_message

MAX_TOKENS = 1000
"""Tokens of each request, which has to last until enough steps of a full batch were timed."""
MAX_STEPS = MAX_TOKENS // 2
MAX_TURNS = 100_000
"""Turns of the loop, in which that many tokens come with any batch."""
NUM_UNTIMED = 10
"""Steps of `--steps` that are not timed: some, until the clock starts."""


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_shape(parser, "qwen3-0.6b")
    add_quantization(parser)
    add_kv_cache_dtype(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=60)
    add_tensor_parallel(parser)
    args = parser.parse_args()
    if not NUM_UNTIMED < args.steps <= MAX_STEPS:
        parser.error(f"--steps {args.steps} is not above {NUM_UNTIMED} and at most {MAX_STEPS}")

    num_ranks = args.tensor_parallel_size
    bandwidth = num_ranks * streaming_bandwidth()
    rows = []
    with LLM(
        **model_options(args),
        enable_prefix_caching=False,
        tensor_parallel_size=num_ranks,
    ) as llm:
        spec = llm.decode_runner.spec
        print(
            f"{'batch':>6} {'context':>8} {'step ms':>8} {'floor ms':>9} {'of floor':>9} {'host us':>8} {'streamed':>9}"
        )
        for context in args.contexts:
            for batch in args.batches:
                step_ms, host_us = measure(llm, batch, context, args.steps, streamed=False)
                _, streamed_us = measure(llm, batch, context, args.steps, streamed=True)
                kv_bytes = batch * context * num_ranks * kv_bytes_per_token(spec)
                floor_ms = (weight_bytes(spec, batch) + kv_bytes) / bandwidth * 1e3
                times = f"{step_ms:8.3f} {floor_ms:9.3f} {step_ms / floor_ms:9.2f}"
                print(f"{batch:6} {context:8} {times} {host_us:8.0f} {streamed_us:9.0f}")
                row = {"batch": batch, "context": context, "step_ms": step_ms, "floor_ms": floor_ms}
                rows.append({**row, "host_us": host_us, "host_streamed_us": streamed_us})
    report(
        "decode_latency",
        {
            "model_shape": args.model_shape,
            "quantization": args.quantization,
            "kv_cache_dtype": args.kv_cache_dtype,
            "tensor_parallel_size": num_ranks,
            "rows": rows,
        },
        args.output,
    )


def measure(llm: LLM, batch: int, context: int, num_steps: int, *, streamed: bool) -> tuple[float, float]:
    """Milliseconds between the ends of two decode steps, and microseconds of host work per step."""
    params = full_length(MAX_TOKENS, temperature=0.6)
    prompts = [[1 + i % 1000] * (context - num_steps // 2) for i in range(batch)]
    timer = DecodeTimer(llm, batch, num_steps - NUM_UNTIMED)
    llm.add_step_listener(timer)
    request_ids = [llm.add_request(prompt, params) for prompt in prompts] if streamed else []
    with contextlib.suppress(Enough):
        if streamed:
            for _ in range(MAX_TURNS):
                llm.step()
        else:
            llm.generate(prompts, params, use_tqdm=False)
        raise AssertionError("the requests have ended before so many steps of a full batch")
    llm.remove_step_listener(timer)
    for request_id in request_ids:
        llm.abort(request_id)
    settle(llm)
    host_s = timer.seconds - timer.waited_s
    return timer.seconds / timer.num_steps * 1e3, host_s / timer.num_steps * 1e6


if __name__ == "__main__":
    main()
