"""Time in which a checkpoint whose files are in memory becomes weights on a GPU, beside the rate of the link.

A checkpoint of random weights of a real shape is written, so that the operating system has it in its cache, and is
then loaded several times into the same model. The floor is its bytes over the measured rate of copies from pinned
host memory.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from lib.arguments import add_shape, new_parser
from lib.checkpoint import write_checkpoint
from lib.report import report
from nanovllm import LLM
from nanovllm.errors import ends_with_message
from nanovllm.utils.loader import load_weights

NUM_COPIES, COPY_BYTES = 64, 2**26


@ends_with_message()
def main() -> None:
    parser = new_parser(__doc__)
    add_shape(parser, "qwen3-8b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", help="of torch on the host, one after another; as it is")
    args = parser.parse_args()

    folder = write_checkpoint(args.model_shape, "cuda")
    rates: list[float] = []
    loads: list[dict[str, Any]] = []
    with LLM(folder, num_kvcache_blocks=64, enforce_eager=True) as llm, torch.inference_mode():
        weights = llm.decode_runner.model.checkpoint_tensors()
        num_bytes = sum(weight.nbytes for weight in weights.values())
        for num_threads in args.threads or [torch.get_num_threads()]:
            torch.set_num_threads(num_threads)
            seconds = []
            for _ in range(args.rounds):
                rates.append(link_bytes_per_s())
                started = time.perf_counter()
                load_weights(Path(folder), weights)
                seconds.append(time.perf_counter() - started)
            loads.append({"threads": num_threads, "seconds": seconds})
    shutil.rmtree(folder)
    floor_s = num_bytes / statistics.median(rates)
    print(f"{num_bytes / 1e9:.1f} GB, {floor_s:.3f} s at the link's rate")
    for load in loads:
        load["over_floor"] = statistics.median(load["seconds"]) / floor_s
        print(f"{load['threads']} threads: {statistics.median(load['seconds']):.3f} s")
    result = {"bytes": num_bytes, "link_bytes_per_s": rates, "loads": loads}
    report("weight_load", {"model_shape": args.model_shape, **result}, args.output)


def link_bytes_per_s() -> float:
    """Rate of copies from pinned host memory to the current GPU."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(NUM_COPIES):
        target.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return NUM_COPIES * COPY_BYTES / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
