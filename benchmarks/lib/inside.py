"""The one place where benchmarks reach into private parts of the package, and why.

What an engine does is otherwise seen by `metrics()`, step listeners and outputs; there is no public way to the parts
below, since nobody who serves requests has a use for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from nanovllm import LLM
from nanovllm.engine.distributed.tensor_parallel import ProcessRanks
from nanovllm.engine.execution.cuda_graph import EagerSteps, StepGraphs
from nanovllm.engine.execution.decode_paths import DecodePaths
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduling.pipeline_plan import Arrangement
from nanovllm.kernels.cuda_all_reduce import PeerAllReduce


def on_stream(runner: ModelRunner) -> contextlib.AbstractContextManager[None]:
    """Makes a runner's device and stream the current ones: single decode steps are timed without an engine."""
    return runner.on(runner.stream)


def make_steps(paths: DecodePaths, sizes: Sequence[int], arrangement: Arrangement | None) -> StepGraphs | EagerSteps:
    """Decode steps of these batches by one arrangement, which an engine would choose itself; plain ones for None."""
    return paths._make_steps(list(sizes), arrangement)


def num_in_backlog(llm: LLM) -> int:
    """Requests between the beginning of their prefill and the arrival of their KV: `handoff_backlog` of the metrics.

    These count all requests, thousands in a flood, which would take a part of every turn that is timed.
    """
    return len(llm.scheduler._prefill_backlog)


def peer_sums(ranks: ProcessRanks) -> PeerAllReduce | None:
    """What sums by stores into the other GPUs' memory, to ask which sizes it takes; None if they have no access."""
    return ranks._peers


@contextlib.contextmanager
def by_nccl(ranks: ProcessRanks) -> Iterator[None]:
    """Has all sums done by NCCL, small ones too, which an engine would leave to the peers."""
    peers, ranks._peers = ranks._peers, None
    try:
        yield
    finally:
        ranks._peers = peers
