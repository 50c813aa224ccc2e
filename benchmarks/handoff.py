"""What handing KV over costs: bandwidth and host time by number of blocks and method, and the time a request waits.

The first table moves random blocks between the two pools, by each method that the devices allow. The second serves
single prompts with `max_tokens=2` by each `--kv-handoff` and shows how long prefill takes, and how long after the end
of its last chunk the KV was there: the exposed handoff, by the events that end the step and the copies (on GPUs).

With `--processes` each card is in a process of its own and NIXL moves the KV. Shown are then, of prompts one by one,
the time to the first token, the handoffs (one for each chunk), and how long KV was on its way after the engine knew of
the end of the step that made it; from that and the bytes, the rate.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from lib.arguments import add_device, add_model, add_pool, model_options, new_parser
from lib.loads import full_length, random_prompt, vocab_size_of
from lib.meters import BusyMeter, HandoffMeter, seconds_between
from lib.report import report
from nanovllm import LLM
from nanovllm.engine.execution.kv_copy import COPY_METHODS
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduling.step import BlockPair
from nanovllm.errors import ends_with_message
from nanovllm.utils.device import peer_access


def methods_of(llm: LLM) -> list[str]:
    source, target = llm.prefill_runner.device, llm.decode_runner.device
    if not source.is_cuda:
        return ["copy"]
    return [method for method in COPY_METHODS if method != "push" or peer_access(source, target)]


def time_copy(source: ModelRunner, target: ModelRunner, pairs: Sequence[BlockPair], method: str) -> tuple[float, float]:
    """Seconds until the blocks have arrived, and of the host until it goes on: medians of seven."""
    totals, hosts = [], []
    for _ in range(7):
        source.synchronize()
        target.synchronize()
        started = time.perf_counter()
        arrived = source.sync_kv_cache_to(target, pairs, method=method)
        hosts.append(time.perf_counter() - started)
        arrived.synchronize()
        totals.append(time.perf_counter() - started)
    return sorted(totals)[3], sorted(hosts)[3]


def measure_copies(llm: LLM, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Blocks at random places, by method and number."""
    source, target, rng = llm.prefill_runner, llm.decode_runner, random.Random(0)
    rows = []
    print(f"{'method':<8}{'blocks':>8}{'MiB':>10}{'us':>10}{'GB/s':>8}{'host us':>9}")
    for method in methods_of(llm):
        for size in sizes:
            if size > min(source.num_kv_blocks, target.num_kv_blocks):
                continue
            blocks, goals = (rng.sample(range(runner.num_kv_blocks), size) for runner in (source, target))
            seconds, host_s = time_copy(source, target, list(zip(blocks, goals, strict=True)), method)
            moved = size * source.spec.block_bytes
            row = {"method": method, "blocks": size, "bytes": moved, "seconds": seconds, "host_s": host_s}
            rows.append(row)
            print(
                f"{method:<8}{size:8}{moved / 2**20:10.1f}{seconds * 1e6:10.0f}{moved / seconds / 1e9:8.1f}"
                f"{host_s * 1e6:9.0f}"
            )
    return rows


def measure_exposure(llm: LLM, prompt_lens: Sequence[int]) -> list[dict[str, Any]]:
    """Prompts one by one, each length nine times; medians."""
    prefills, meter, rng = BusyMeter(llm.prefill_runner), HandoffMeter(llm), random.Random(1)
    vocab_size = vocab_size_of(llm)
    rows = []
    method = llm.kv_transfer.name
    print(f"{'method':<8}{'prompt':>8}{'prefill us':>12}{'exposed us':>12}{'sends':>7}{'host us per send':>18}")
    for prompt_len in prompt_lens:
        prefill, exposed, host_s, num_sends = [], [], [], 0
        for _ in range(9):
            meter.take()
            prefills.take()
            llm.generate([random_prompt(rng, vocab_size, prompt_len)], full_length(2), use_tqdm=False)
            exposed.append(seconds_between(prefills.spans[-1].end, meter.sent))
            prefill.append(seconds_between(prefills.spans[0].start, prefills.spans[-1].end))
            host_s += meter.host_s
            num_sends = len(meter.host_s)
        prefill_s, exposed_s, host_s_per_send = (sorted(times)[len(times) // 2] for times in (prefill, exposed, host_s))
        row = {"method": method, "prompt_len": prompt_len, "prefill_s": prefill_s, "exposed_s": exposed_s}
        rows.append({**row, "sends": num_sends, "host_s_per_send": host_s_per_send})
        print(
            f"{method:<8}{prompt_len:8}{prefill_s * 1e6:12.0f}{exposed_s * 1e6:12.0f}{num_sends:7}"
            f"{host_s_per_send * 1e6:18.0f}"
        )
    return rows


def measure_processes(llm: LLM, prompt_lens: Sequence[int]) -> list[dict[str, Any]]:
    """Prompts one by one between two processes, each length nine times; medians."""
    rng, vocab_size = random.Random(1), vocab_size_of(llm)
    rows = []
    print(f"{'prompt':>8}{'TTFT us':>12}{'handoffs':>10}{'us each':>10}{'GB/s':>8}")
    for prompt_len in prompt_lens:
        found = []
        for _ in range(9):
            before = llm.metrics()
            llm.generate([random_prompt(rng, vocab_size, prompt_len)], full_length(2), use_tqdm=False)
            after = llm.metrics()
            ttft_s, handoff_s = (after[name]["sum"] - before[name]["sum"] for name in ("ttft_s", "handoff_s"))
            num_handoffs = after["handoff_s"]["count"] - before["handoff_s"]["count"]
            num_bytes = sum(after["handoff_bytes_by_link"].values()) - sum(before["handoff_bytes_by_link"].values())
            found.append((handoff_s, ttft_s, num_handoffs, num_bytes))
        handoff_s, ttft_s, num_handoffs, num_bytes = sorted(found)[len(found) // 2]
        row = {"method": "nixl", "prompt_len": prompt_len, "ttft_s": ttft_s, "handoffs": num_handoffs}
        rows.append({**row, "bytes": num_bytes, "handoff_s": handoff_s / num_handoffs})
        print(
            f"{prompt_len:8}{ttft_s * 1e6:12.0f}{num_handoffs:10}{handoff_s / num_handoffs * 1e6:10.0f}"
            f"{num_bytes / handoff_s / 1e9:8.1f}"
        )
    return rows


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_model(parser, "qwen3-8b")
    parser.add_argument("--blocks", type=int, nargs="+", help="of the first table, 1 to 512 if not given")
    parser.add_argument("--prompt-lens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384, help="of a prefill step")
    parser.add_argument("--kv-handoff", nargs="+", help="of the served prompts, one after another; auto if not given")
    parser.add_argument("--processes", action="store_true", help="a process for each card, KV by NIXL")
    add_device(parser)
    add_pool(parser)
    args = parser.parse_args()
    if args.processes and (args.blocks or args.kv_handoff):
        parser.error("--blocks and --kv-handoff are of cards in one process, not of --processes")
    copies: list[dict[str, Any]] = []
    exposure: list[dict[str, Any]] = []
    options = {
        **model_options(args),
        "device": args.device,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "num_kvcache_blocks": args.num_kvcache_blocks,
        "max_model_len": max(args.prompt_lens) + 8,
        "enable_prefix_caching": False,
    }
    if args.processes:
        with LLM(**options, cluster="local") as llm:
            exposure = measure_processes(llm, args.prompt_lens)
    for method in [] if args.processes else args.kv_handoff or ["auto"]:
        with LLM(**options, enable_two_gpu_pd=True, card_roles="fixed", kv_handoff=method) as llm:
            copies = copies or measure_copies(llm, args.blocks or [1, 4, 16, 64, 128, 512])
            exposure += measure_exposure(llm, args.prompt_lens)
    result = {"model_shape": args.model_shape, "max_num_batched_tokens": args.max_num_batched_tokens}
    report("handoff", {**result, "copies": copies, "exposure": exposure}, args.output)


if __name__ == "__main__":
    main()
