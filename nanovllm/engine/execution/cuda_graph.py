"""CUDA graphs of steps, one for each bucket. Knows nothing of what a step does."""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from nanovllm.engine.observability.pipeline_statistics import LaneMoments
from nanovllm.layers.sampler import SampledTokens
from nanovllm.utils.cuda_driver import call_driver

logger = logging.getLogger(__name__)

MAX_PREFILL_GRAPH_TOKENS = 3072
"""A pass over more tokens takes so long that launching it without a graph costs nothing, and a graph would hold memory
for its activations."""
MAX_MIXED_GRAPH_TOKENS = 2560
"""The same for mixed steps, whose graphs are closer to each other."""

Output = TypeVar("Output")


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending: fine steps where a padded row costs much, coarser ones above."""
    sizes = [1, 2, 4, 8, *range(16, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def prefill_buckets(max_num_tokens: int) -> list[int]:
    """Tokens of prefill steps to capture, ascending, up to MAX_PREFILL_GRAPH_TOKENS: none is padded by 64 or more."""
    most = min(max_num_tokens, MAX_PREFILL_GRAPH_TOKENS)
    return [*range(64, most, 64), most]


def mixed_buckets(max_num_tokens: int) -> list[int]:
    """Tokens of mixed steps to capture, ascending, up to MAX_MIXED_GRAPH_TOKENS.

    At 64 tokens a step takes hardly longer than at 1; from some 200 on, each token costs its share of the GEMMs.
    """
    sizes = [*range(16, 512, 16), *range(512, 1024, 32), *range(1024, MAX_MIXED_GRAPH_TOKENS + 1, 64)]
    most = min(max_num_tokens, MAX_MIXED_GRAPH_TOKENS)
    return [size for size in sizes if size < most] + [most]


def bucket_for(sizes: Sequence[int], size: int) -> int:
    """The smallest of the buckets, ascending, that holds `size`; `size` itself if none does."""
    return sizes[bisect.bisect_left(sizes, size)] if size <= sizes[-1] else size


@dataclass(frozen=True)
class StepOutput:
    """What a step computed for its B rows.

    Attributes:
        logits: [B, vocab_size / ranks].
        sampled: the tokens sampled from them by temperature, seed and output index.
        lane_moments: when the lanes were busy, None for a step that did not run on lanes.
    """

    logits: torch.Tensor
    sampled: SampledTokens
    lane_moments: LaneMoments | None = None


class EagerSteps:
    """Runs `step(size)` eagerly, where there are no graphs."""

    def __init__(self, step: Callable[[int], StepOutput]) -> None:
        self.replay = step


class StepGraphs(Generic[Output]):
    """Replays `step(size)` from a graph.

    Args:
        what: the kind of step, for the log.
        step: runs a step of `size` on the current stream, all of it on the device.
        sizes: the buckets, ascending.
        pool: memory pool that the graphs share, since only one of them runs at a time.
        prepare: makes the inputs of a step of `size`, before it runs or is captured; None where they are there.
        warm_all: run every size once before it is captured, where sizes use kernels of their own.
    """

    def __init__(
        self,
        what: str,
        step: Callable[[int], Output],
        sizes: list[int],
        pool: Any,
        *,
        prepare: Callable[[int], None] | None = None,
        warm_all: bool = False,
    ) -> None:
        self.sizes = sizes
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[int, Output] = {}
        started, free_before = time.perf_counter(), torch.cuda.mem_get_info()[0]
        warmed_up = set(sizes) if warm_all else _to_warm_up(sizes)
        for size in reversed(sizes):  # the largest first: the smaller ones fit into its memory
            if prepare is not None:
                prepare(size)
            if size in warmed_up:
                step(size)
            graph = torch.cuda.CUDAGraph()
            # Thread-local: NCCL's watchdog thread queries events meanwhile.
            capturing = torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            )
            with capturing:
                self._outputs[size] = step(size)
            # Else its first launch would: a millisecond more, in which tokens of other steps wait.
            call_driver("cuGraphUpload", graph.raw_cuda_graph_exec(), torch.cuda.current_stream().cuda_stream)
            self._graphs[size] = graph
        torch.cuda.synchronize()
        taken_mib = (free_before - torch.cuda.mem_get_info()[0]) / 2**20
        seconds = time.perf_counter() - started
        logger.info("%d %s graphs, %.0f MiB, captured in %.1f s", len(sizes), what, taken_mib, seconds)

    def size_for(self, size: int) -> int:
        """The size to pad a step to: that of a graph, or its own, without a graph, above the largest."""
        return bucket_for(self.sizes, size)

    def replay(self, size: int) -> Output:
        """Runs the step of a captured size; the result is overwritten by the next replay from the same memory."""
        self._graphs[size].replay()
        return self._outputs[size]


def _to_warm_up(sizes: list[int]) -> set[int]:
    """Sizes to run once before they are captured, so that kernels are compiled: the others use the same ones.

    Large steps take too long to run them all.
    """
    return {size for size in sizes if size <= 256 or size & (size - 1) == 0 or size == sizes[-1]}
