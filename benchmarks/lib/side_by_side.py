"""Works on several streams of a GPU, timed by its own clock while all of them run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nanovllm.kernels.triton_stamps import stamp

NUM_WARM = 4
"""Turns of each work before it is captured."""
BESIDE_MS = 20
LEAST_TIMES_BESIDE = 5
TIMES_ALONE = 40
Work = Callable[[int], object]
"""Is given the number of its turn."""


def captured(works: Sequence[tuple[torch.cuda.Stream, Work, int, torch.Tensor]]) -> torch.cuda.CUDAGraph:
    """Works on their streams, side by side, each several times, between stamps of the GPU's clock."""
    graph, capturing = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for stream, work, _, _ in works:
        with torch.cuda.stream(stream):
            for turn in range(NUM_WARM):
                work(turn)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=capturing):
        for stream, _, _, _ in works:
            stream.wait_stream(capturing)
        for stream, work, times, stamps in works:
            with torch.cuda.stream(stream):
                stamp(stamps, 0)
                for turn in range(times):
                    work(turn)
                    stamp(stamps, turn + 1)
        for stream, _, _, _ in works:
            capturing.wait_stream(stream)
    return graph


def measure_us(
    *works: tuple[torch.cuda.Stream, Work],
    alone_us: Sequence[float] = (),
    beside_ms: float = BESIDE_MS,
    times_alone: int = TIMES_ALONE,
) -> list[float]:
    """Microseconds of each work while all of them run.

    Args:
        works: each with its stream.
        alone_us: what each takes alone, so that all run for `beside_ms` or longer, each at least LEAST_TIMES_BESIDE
            times; none to run each `times_alone`.
        beside_ms: for how long, if each ran as fast as alone.
        times_alone: how often.
    """
    beside_us = max(beside_ms * 1e3, LEAST_TIMES_BESIDE * max(alone_us, default=0.0))
    times = [int(beside_us / us) for us in alone_us] or [times_alone] * len(works)
    stamps = [torch.zeros(count + 1, dtype=torch.int64, device="cuda") for count in times]
    graph = captured([(*work, count, of_it) for work, count, of_it in zip(works, times, stamps, strict=True)])
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    moments = [of_it.tolist() for of_it in stamps]
    all_end = min(of_it[-1] for of_it in moments)
    results = []
    for of_it in moments:
        together = [moment for moment in of_it[1:] if moment <= all_end]
        results.append((together[-1] - together[0]) / (len(together) - 1) / 1e3)
    return results
