"""CUDA graphs of the decode step, one for each batch bucket. Knows nothing of what the step does."""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable

import torch

from nanovllm.layers.sampler import SampledTokens

logger = logging.getLogger(__name__)


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending: fine steps where a padded row costs much, coarser ones above."""
    sizes = [1, 2, 4, 8, *range(16, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Replays `step(size)` from a graph where there is one.

    Args:
        step: runs a decode step of `size` rows on the current stream, all of it on the device.
        sizes: the buckets, ascending.
    """

    def __init__(self, step: Callable[[int], SampledTokens], sizes: list[int]) -> None:
        self.sizes = sizes
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[int, SampledTokens] = {}
        started, free_before = time.perf_counter(), torch.cuda.mem_get_info()[0]
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(sizes):  # the largest first: the smaller ones fit into its memory
            step(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                self._outputs[size] = step(size)
            self._graphs[size] = graph
        torch.cuda.synchronize()
        self.bytes = free_before - torch.cuda.mem_get_info()[0]
        seconds = time.perf_counter() - started
        logger.info("%d decode graphs, %.0f MiB, captured in %.1f s", len(sizes), self.bytes / 2**20, seconds)

    def size_for(self, num_rows: int) -> int:
        """The smallest bucket that holds `num_rows`."""
        return self.sizes[bisect.bisect_left(self.sizes, num_rows)]

    def replay(self, size: int) -> SampledTokens:
        """Runs the step of a captured size; the result is overwritten by the next replay of that size."""
        self._graphs[size].replay()
        return self._outputs[size]
