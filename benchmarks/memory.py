"""Memory of an engine: how much of the GPU it takes, and whether that, or the process, grows with requests served.

A device's use is what the driver reports: weights, KV pool, workspace, graphs and what other processes hold. Requests
are short and of random lengths; use is read after the first tenth of them and at the end. On a CPU the pool's pages
become resident only as they are first written, which looks like growth.
"""

from __future__ import annotations

import random

from lib.arguments import add_device, add_model, model_options, new_parser
from lib.loads import random_prompt, vocab_size_of
from lib.meters import memory_mib
from lib.report import report
from nanovllm import LLM, SamplingParams
from nanovllm.errors import ends_with_message


def serve(llm: LLM, num_requests: int, rng: random.Random, vocab_size: int) -> None:
    """Keeps a few hundred short requests in the engine until `num_requests` have ended, aborting some."""
    num_added = 0
    running: set[int] = set()
    while num_added < num_requests or running:
        while num_added < num_requests and len(running) < 256:
            prompt = random_prompt(rng, vocab_size, rng.randint(1, 64))
            params = SamplingParams(max_tokens=rng.randint(1, 32), temperature=rng.choice([0.0, 0.8]))
            running.add(llm.add_request(prompt, params))
            num_added += 1
        if rng.random() < 0.05:
            llm.abort(rng.choice(sorted(running)))
        running -= {output.request_id for output in llm.step() if output.finished}


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_model(parser, "qwen3-0.6b")
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    add_device(parser)
    args = parser.parse_args()

    rng = random.Random(0)
    with LLM(
        **model_options(args),
        device=args.device,
        gpu_memory_utilization=args.gpu_memory_utilization,
    ) as llm:
        vocab_size = vocab_size_of(llm)
        ready = memory_mib(llm)
        serve(llm, args.num_requests // 10, rng, vocab_size)
        early = memory_mib(llm)
        serve(llm, args.num_requests - args.num_requests // 10, rng, vocab_size)
        late = memory_mib(llm)
    print(f"{'MiB':<14}{'ready':>12}{'early':>12}{'late':>12}")
    for name in ready:
        print(f"{name.replace('_', ' '):<14}{ready[name]:12.1f}{early[name]:12.1f}{late[name]:12.1f}")
    if "device" in ready:
        share = late["device"] / late["device_total"]
        print(f"{share:.1%} of the GPU in use, gpu_memory_utilization={args.gpu_memory_utilization}")
    report("memory", {"num_requests": args.num_requests, "ready": ready, "early": early, "late": late}, args.output)


if __name__ == "__main__":
    main()
