"""A launched step, and what it sampled once it has been collected."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.execution.layer_exchange import NOTHING_WAITED_FOR, WaitReport
from nanovllm.layers.sampler import SampledTokens
from nanovllm.outputs import TokenLogprobs
from nanovllm.utils.device import Device, Moment


@dataclass(frozen=True)
class SampledOnHost:
    """Sampled tokens on the host: [B] int64 ids, and B log-probabilities if some request of the step asked for them."""

    token_ids: np.ndarray
    logprobs: list[TokenLogprobs] | None = None

    def logprobs_of(self, index: int) -> TokenLogprobs | None:
        return None if self.logprobs is None else self.logprobs[index]


NOTHING_SAMPLED = SampledOnHost(np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class StepTokens:
    """What a step has sampled: after the last chunk of each prompt that it completes, and for each decode row.

    `in_prompts` are the prompt tokens whose log-probabilities its chunks were asked for, chunk by chunk, and `waits` is
    how it has waited for another runner that computes the same prompts.
    """

    after_chunks: SampledOnHost
    after_decode: SampledOnHost
    in_prompts: SampledOnHost = NOTHING_SAMPLED
    waits: WaitReport = NOTHING_WAITED_FOR


class StepFailedError(Exception):
    """A step that was launched in another process could not be run there; raised by `collect`.

    Attributes:
        failure: why.
    """

    def __init__(self, failure: Exception) -> None:
        super().__init__(str(failure))
        self.failure = failure


class StepHandle:
    """A launched step. `collect` waits for it and gives what it sampled.

    Args:
        device: where it runs.
        stream: what it runs on, behind the steps launched there before; None on a CPU.
        sampled: the prompt tokens to report, what the chunks sample and what the decode rows sample, None for nothing.
            Each is being copied to the host before the next, which may overwrite it on the device, is asked for.
        began: when the step began on the device.
        report: gives how a step that has ended has waited for another runner; None for one that waits for none.
    """

    def __init__(
        self,
        device: Device,
        stream: abc.Hashable,
        sampled: abc.Iterable[SampledTokens | None],
        began: Moment,
        report: Callable[[], WaitReport] | None = None,
    ) -> None:
        self._device = device
        self.ran_in_launch = not device.is_cuda
        """Whether the step had ended when its launch returned."""
        self._report = report
        self.stream = stream
        self._host = [None if part is None else _to_host(part, device) for part in sampled]
        self._began, self._ended = began, began.clock.record_moment()
        self.event = self._ended.event
        """Done after the step."""

    def is_done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()

    def collect(self) -> StepTokens:
        """Waits for the step and returns its tokens. Called once: it frees the pinned memory."""
        self.wait()
        # Torch queries the current device when it frees pinned memory: this step's device works, others may be lost.
        with self._device.current():
            in_prompts, after_chunks, after_decode = (
                NOTHING_SAMPLED if part is None else _on_host(part) for part in self._host
            )
            self._host = [None] * 3
        waits = NOTHING_WAITED_FOR if self._report is None else self._report()
        return StepTokens(after_chunks, after_decode, in_prompts, waits)

    def moments(self) -> tuple[float, float]:
        """When the step began and ended on the device, in seconds of `time.perf_counter()`; waits for it."""
        return self._began.seconds(), self._ended.seconds()


def _to_host(sampled: SampledTokens, device: Device) -> SampledTokens:
    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor if tensor is None or not device.is_cuda else tensor.to("cpu", non_blocking=True)  # pinned

    token_ids = copy(sampled.token_ids)
    assert token_ids is not None, "a step that samples has tokens"
    return SampledTokens(token_ids, copy(sampled.logprobs), copy(sampled.top_token_ids), copy(sampled.top_logprobs))


def _on_host(sampled: SampledTokens) -> SampledOnHost:
    token_ids = sampled.token_ids.numpy().copy()
    if sampled.logprobs is None or sampled.top_token_ids is None or sampled.top_logprobs is None:
        return SampledOnHost(token_ids)
    columns = zip(
        token_ids.tolist(),
        sampled.logprobs.tolist(),
        sampled.top_token_ids.tolist(),
        sampled.top_logprobs.tolist(),
        strict=True,
    )
    logprobs = [
        TokenLogprobs(token, logprob, dict(zip(top_ids, top, strict=True))) for token, logprob, top_ids, top in columns
    ]
    return SampledOnHost(token_ids, logprobs)
