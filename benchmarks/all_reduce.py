"""Microseconds of a sum over the ranks of a model, by its size: by peer stores, and by NCCL.

A CUDA graph of as many sums as a decode step of 36 layers asks for, replayed on all ranks at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from lib import inside
from lib.arguments import new_parser
from lib.ceilings import median_ms
from lib.report import report
from nanovllm.engine.distributed.tensor_parallel import ProcessRanks
from nanovllm.utils.device import Device

NUM_SUMS = 72
TIMEOUT_S = 60.0


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kib", type=int, nargs="+", default=[8, 64, 256, 512, 1024, 2048, 4096, 16384])
    args = parser.parse_args()
    if not 2 <= args.ranks <= torch.cuda.device_count():
        parser.error(f"--ranks {args.ranks} is not from 2 to the {torch.cuda.device_count()} GPUs that torch sees")
    if min(args.kib) < 1:
        parser.error("--kib takes positive numbers")

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        others = [context.Process(target=measure, args=(folder, r, args.ranks, args.kib)) for r in range(1, args.ranks)]
        for process in others:
            process.start()
        rows = measure(folder, 0, args.ranks, args.kib)
        for process in others:
            process.join()
    print(f"{'KiB':>6} {'peers us':>9} {'NCCL us':>8}")
    for row in rows:
        by_peers = "-" if row["peers_us"] is None else f"{row['peers_us']:.1f}"
        print(f"{row['kib']:6} {by_peers:>9} {row['nccl_us']:8.1f}")
    report("all_reduce", {"ranks": args.ranks, "sums": NUM_SUMS, "rows": rows}, args.output)


def measure(folder: str, rank: int, size: int, kibs: list[int]) -> list[dict[str, Any]]:
    """A rank's part of it."""
    torch.cuda.set_device(rank)
    with torch.cuda.stream(torch.cuda.Stream()):
        ranks = ProcessRanks(folder, rank, size, Device("cuda", rank), TIMEOUT_S)
        ranks.connect()
        peers, rows = inside.peer_sums(ranks), []
        if peers is None:
            raise SystemExit("these GPUs cannot write into each other's memory")
        for kib in kibs:
            x = torch.zeros(kib * 512, dtype=torch.bfloat16, device="cuda")
            by_peers = replay_us(ranks, x) if peers.can_serve(x) else None
            with inside.by_nccl(ranks):
                rows.append({"kib": kib, "peers_us": by_peers, "nccl_us": replay_us(ranks, x)})
        torch.cuda.synchronize()
    Path(folder, f"done {rank}").touch()
    while not all(Path(folder, f"done {other}").exists() for other in range(size)):
        os.sched_yield()
    return rows


def replay_us(ranks: ProcessRanks, x: torch.Tensor) -> float:
    """Microseconds of one of many sums."""
    ranks.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        for _ in range(NUM_SUMS):
            ranks.all_reduce(x)
    return median_ms(graph.replay) / NUM_SUMS * 1e3


if __name__ == "__main__":
    main()
