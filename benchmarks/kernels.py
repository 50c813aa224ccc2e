"""Each decode kernel against its ceiling: attention and norms against the measured streaming bandwidth."""

from __future__ import annotations

import argparse
import random

import torch
from common import median_ms, report, streaming_bandwidth

from nanovllm.kernels import AttentionMetadata
from nanovllm.kernels.triton_attention import Backend


def decode_problem(
    context_lens: list[int], num_heads: int, num_kv_heads: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Query, one layer's pool and metadata of a decode step in random blocks; head dim 128, bfloat16."""
    counts = [-(-length // block_size) for length in context_lens]
    blocks = torch.randperm(sum(counts), dtype=torch.int32)
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = blocks[first : first + count]
        first += count
    pool = torch.randn(first, 2, num_kv_heads, block_size, 128, dtype=torch.bfloat16, device="cuda")
    query = torch.randn(len(counts), num_heads, 128, dtype=torch.bfloat16, device="cuda")
    metadata = AttentionMetadata(
        slot_mapping=torch.zeros(len(counts), dtype=torch.int64, device="cuda"),
        block_tables=tables.cuda(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device="cuda"),
        query_starts=torch.arange(len(counts) + 1, dtype=torch.int32, device="cuda"),
        max_query_len=1,
        max_context_len=max(context_lens),
    )
    return query, pool, metadata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--output", help="file for the JSON line")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    backend, bandwidth, rows = Backend(), streaming_bandwidth(), []
    print(f"streaming bandwidth {bandwidth / 1e12:.2f} TB/s")
    ragged: list[int] = []
    while sum(ragged) < 512 * 512:
        ragged.append(min(int(16 * 512 ** rng.random()), 512 * 512 - sum(ragged)))
    for name, lengths in {"512 x 512": [512] * 512, "ragged 16-8192": ragged, "1 x 8192": [8192]}.items():
        for num_heads in (32, 16):
            query, pool, metadata = decode_problem(lengths, num_heads, 8, args.block_size)
            graph = torch.cuda.CUDAGraph()
            backend.attend(query, pool, metadata, 0.09)
            with torch.cuda.graph(graph):
                backend.attend(query, pool, metadata, 0.09)
            ms = median_ms(graph.replay)
            rate = sum(lengths) * 2 * 8 * 128 * 2 / ms * 1e3
            print(f"decode attention, {name:15} GQA {num_heads // 8}: {ms * 1e3:7.1f} us {rate / 1e12:5.2f} TB/s")
            rows.append({"problem": name, "gqa": num_heads // 8, "us": ms * 1e3, "bytes_per_s": rate})
    report("kernels", {"bandwidth_bytes_per_s": bandwidth, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
