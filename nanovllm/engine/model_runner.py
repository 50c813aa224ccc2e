"""One model on one device: weights, KV pool, forward passes. Runs what it is told; decides nothing."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import abc
from typing import Any

import torch

from nanovllm.engine.execution.cuda_graph import StepOutput
from nanovllm.engine.execution.decode_executor import DecodeExecutor, NoDecode
from nanovllm.engine.execution.decode_paths import DecodePaths
from nanovllm.engine.execution.forward_pass import ForwardPass
from nanovllm.engine.execution.kv_copy import COPY_METHODS, checksum_layers
from nanovllm.engine.execution.kv_pool import make_kv_pool, num_kv_blocks
from nanovllm.engine.execution.layer_push import NoPush, PushToPool
from nanovllm.engine.execution.load_model import load_model
from nanovllm.engine.execution.model_inputs import largest_step
from nanovllm.engine.execution.prefill_executor import PrefillExecutor
from nanovllm.engine.execution.runner_spec import PipelineOptions, RunnerSpec
from nanovllm.engine.execution.step_handle import StepHandle
from nanovllm.engine.execution.tasks import StepTask
from nanovllm.engine.execution.worker_group import NoWorkers, WorkerGroup
from nanovllm.engine.observability.pipeline_statistics import lines
from nanovllm.engine.scheduling.pipeline_plan import Arrangement
from nanovllm.engine.scheduling.step import MAX_CHUNKS, BlockPair, Step
from nanovllm.errors import DeviceError, HandoffError, short_repr
from nanovllm.layers.ranks import OneRank, Ranks
from nanovllm.layers.sampler import SampledTokens
from nanovllm.models.decoder import CausalLM
from nanovllm.utils.device import Device, DeviceClock, Event, Moment, enable_peer_access, wait_event

logger = logging.getLogger(__name__)


class ModelRunner:
    """A model's weights, KV pool and streams on one device, and what runs prompts and decode rows there.

    Args:
        spec: model and sizes.
        device: where everything lives; whichever device is current elsewhere does not matter.
        is_decode_runner: whether decode steps run here (they may run beside prefill steps).
        max_prefill_tokens: maximum number of prompt tokens in a step; workspace for them is kept free.
        weights_of: a runner to copy the weights from, instead of reading them.
        push_to: a runner into whose pool prefill steps push the blocks that they hand over; of the same spec.
        pipeline: how decode steps use SM partitions, None for plain decode.
        ranks: those that compute the model together; every one of them makes its runner at the same time.
        workers: on the first rank, the others.

    Attributes:
        model: the weights.
        kv_pool: [num_kv_blocks + 1, num_layers, 2, num_kv_heads, block_size, head_dim]; the last block pads steps.
        prefill, decode: what runs the two parts of a step.
        clock: times steps and copies, for a trace; None if there is none.

    Raises:
        GreenContextError: the SMs can be split, but not as `pipeline` has it.
        ModelLoadError: the weights cannot be loaded or do not fit.
        OutOfKVCacheError: the KV pool does not fit.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        device: Device,
        *,
        is_decode_runner: bool,
        max_prefill_tokens: int,
        weights_of: ModelRunner | None = None,
        push_to: ModelRunner | None = None,
        pipeline: PipelineOptions | None = None,
        ranks: Ranks | None = None,
        workers: WorkerGroup | None = None,
    ) -> None:
        self.spec = spec
        self.device = device
        self.is_decode_runner = is_decode_runner
        self.max_prefill_tokens = max_prefill_tokens
        self.clock: DeviceClock | None = None
        self._ranks = OneRank() if ranks is None else ranks
        self._workers = NoWorkers() if workers is None else workers
        with device.current():
            self.stream = torch.cuda.Stream(device.index) if device.is_cuda else None
            # What is pushed beside a layer gets SMs before the layer's own thread blocks that still wait for one.
            self.copy_stream = torch.cuda.Stream(device.index, priority=-1) if device.is_cuda else None
        with self.on(self.stream):
            their_model = None if weights_of is None else weights_of.model
            self.model: CausalLM = load_model(spec, device, self._ranks, their_model)
            # None waits in a collective, which must end in time, for one that loads longer.
            self._ranks.all_reduce_min(0)
            forward = ForwardPass(device, spec, self._ranks, self.model)
            # Lanes take memory, which the pool is to leave free.
            paths = self._make_decode_paths(pipeline) if is_decode_runner else None
            self.num_kv_blocks = self._num_kv_blocks(forward)
            # One block more than there are to give out: what pads a step is written to it.
            self.kv_pool: torch.Tensor = make_kv_pool(spec, device, self.num_kv_blocks + 1)
            push = NoPush() if push_to is None else PushToPool(push_to.kv_pool, self.copy_stream)
            if push_to is not None and device.is_cuda:
                enable_peer_access(device, push_to.device)
            self.prefill = PrefillExecutor(forward, self.kv_pool, max_prefill_tokens, push)
            self.decode = NoDecode(device) if paths is None else DecodeExecutor(forward, self.kv_pool, paths)
            self._capture(forward)
        self.synchronize()  # other streams are about to read the weights and write to the pool

    @property
    def block_size(self) -> int:
        return self.spec.attention.block_size

    # Steps

    def launch(self, step: Step) -> StepHandle:
        """Starts a step, here and on the other ranks; nothing here waits for the device."""
        with self.on(self.stream):
            began = None if self.clock is None else self.clock.record_moment()
            prefill = decode = None
            if step.chunks:
                prefill = self.prefill.make_task(step.chunks, samples_in_graph=step.chunks_sample_in_graph)
            if step.decode:
                decode = self.decode.make_task(step.decode)
            task = StepTask(prefill, decode)
            with self._workers.dispatch(task):
                return StepHandle(self.device, self.stream, self._run(task), began)

    def run(self, task: StepTask) -> None:
        """A rank's share of a step, made by the first rank. All ranks sample the same tokens; the first gives them."""
        with self.on(self.stream):
            for _ in self._run(task):
                pass

    def _run(self, task: StepTask) -> abc.Iterator[SampledTokens | None]:
        """What the chunks and the decode rows sample, on the device: the second may overwrite the first."""
        yield None if task.prefill is None else self.prefill.run(task.prefill)
        yield None if task.decode is None else self.decode.run(task.decode)

    def run_decode_core(self, size: int, arrangement: Arrangement | None = None) -> StepOutput:
        """One decode step over the first `size` rows of the batch, on the device alone: no host value is read.

        By the pipeline, arranged so, or plain.
        """
        return self.decode.run_core(size, arrangement)

    def forget_device_batch(self) -> None:
        """What a decode step that could not be launched has left of the batch on the device is not used again."""
        self.decode.forget()

    def take_lane_times(self) -> None:
        """Takes in lane times of decode steps that have ended, for metrics and the trace."""
        with self.on(self.stream):
            self.decode.take_lane_times()

    def get_pipeline_statistics(self) -> dict[str, Any]:
        """What the decode pipeline has done since the start; times of its lanes only with `decode_pipeline_profiling`.

        Waits for the device if the lanes are timed.
        """
        with self.on(self.stream):
            return self.decode.paths.get_statistics()

    def print_pipeline_statistics(self) -> None:
        """The same as a table."""
        print("\n".join(lines(self.get_pipeline_statistics(), str(self.device))))  # noqa: T201 - what it is for

    # Copies of KV blocks

    def sync_kv_cache_to(
        self, other: ModelRunner, pairs: abc.Sequence[BlockPair], *, method: str = "copy", after: Event | None = None
    ) -> Event:
        """Copies blocks of this pool into another runner's, on streams of their own; waits for nothing.

        Args:
            other: the runner whose pool receives them; of the same spec.
            pairs: (block of this pool, block of the other pool), any number.
            method: `copy` (torch's copies), `push` (one kernel, over peer access) or `staged` (through pinned host
                memory, for GPUs without peer access).
            after: an event of this device that the copies wait for, such as the step that computes the blocks.

        Returns:
            An event that is done when all blocks have arrived.

        Raises:
            HandoffError: the method or a block is unknown; nothing was copied.
        """
        if method not in COPY_METHODS:
            raise HandoffError(f"method={short_repr(method)} is not one of {', '.join(COPY_METHODS)}")
        for block, target_block in pairs:
            if not (0 <= block < self.num_kv_blocks and 0 <= target_block < other.num_kv_blocks):
                raise HandoffError(
                    f"blocks ({block}, {target_block}) are not below ({self.num_kv_blocks}, {other.num_kv_blocks}), "
                    "what the two pools have"
                )
        with other.on(other.copy_stream), self.on(self.copy_stream):
            wait_event(self.copy_stream, after)
            try:
                COPY_METHODS[method](self, other, pairs)
            except BaseException:
                # Nobody will know of the copies that were launched: they must not be left to write later.
                self.synchronize()
                other.synchronize()
                raise
            return (self if method == "push" else other).record_copy_event()

    def record_copy_event(self) -> Event:
        """An event after all copies that were launched on this device."""
        with self.on(self.copy_stream):
            return self.device.record_event()

    def record_copy_moment(self, after: Event | None = None) -> Moment | None:
        """When this device's copies have got here, and `after` is done; None if nothing is timed."""
        if self.clock is None:
            return None
        with self.on(self.copy_stream):
            wait_event(self.copy_stream, after)
            return self.clock.record_moment()

    def wait_for(self, event: Event) -> None:
        """What is launched here from now on runs after `event`, of any device."""
        wait_event(self.stream, event)

    def checksum_blocks(self, blocks: abc.Sequence[int], after: Event) -> torch.Tensor:
        """One number for each block and layer, [N, num_layers] int64 on the host, computed after `after`; waits for it.

        Any changed word shows.
        """
        with self.on(self.copy_stream):
            wait_event(self.copy_stream, after)
            return torch.stack([checksum_layers(self.kv_pool[block]) for block in blocks]).cpu()

    def synchronize(self, *, copies: bool = True) -> None:
        """Waits for all steps, and copies, that were launched here.

        Raises:
            DeviceError: they do not end within `step_timeout_s`.
        """
        step_timeout_s = self.spec.step_timeout_s
        deadline_s = time.monotonic() + step_timeout_s
        for stream in (self.stream, self.copy_stream if copies else None):
            # Not by the driver, in which an interrupt is not heard.
            while stream is not None and not stream.query():
                if time.monotonic() > deadline_s:
                    late = DeviceError(f"{self.device} is lost: its work has not ended within {step_timeout_s=}")
                    raise self._workers.diagnose(late)
                self._workers.check()
                time.sleep(0)
        self._workers.check()  # what waited for one that is gone was ended

    # Other ranks, and the end

    def check_workers(self) -> None:
        """Raises WorkerError if another rank is gone."""
        self._workers.check()

    def diagnose(self, error: DeviceError) -> BaseException:
        """What it means that this device is late: with other ranks, that one of them is."""
        return self._workers.diagnose(error)

    def close_workers(self) -> None:
        """Ends the other ranks."""
        self._workers.close()

    def close(self) -> None:
        """Gives weights and pool back, which nothing may be using; the runner is of no use afterwards."""
        with self.on(self.stream):
            self.decode.close()
            for name in ("model", "kv_pool", "prefill"):  # an interrupt may come between, and `close` once more
                vars(self).pop(name, None)
            self._ranks.close()
            if self.device.is_cuda:
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream | None) -> abc.Iterator[None]:
        """Makes this device and one of its streams, none on a CPU, the current ones; a caller's autocast is left."""
        on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
        kind = self.device.kind
        as_written = (
            torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
        )
        with torch.inference_mode(), as_written, self.device.current(), on_stream:
            yield

    # At the start

    def _make_decode_paths(self, pipeline: PipelineOptions | None) -> DecodePaths:
        wait_for_steps = functools.partial(self.synchronize, copies=False)
        return DecodePaths(self.device, self.spec, self.model, wait_for_steps, pipeline)

    def _num_kv_blocks(self, forward: ForwardPass) -> int:
        spec = self.spec
        most_rows = max(spec.max_num_seqs if self.is_decode_runner else 1, MAX_CHUNKS)
        num_tokens = (
            max(self.max_prefill_tokens, spec.max_num_seqs) if self.is_decode_runner else self.max_prefill_tokens
        )

        def run_largest_step(kv_pool: torch.Tensor) -> None:
            largest = largest_step(
                self.device.torch_device,
                num_tokens=num_tokens,
                num_rows=min(most_rows, num_tokens),
                block_size=self.block_size,
                max_model_len=spec.max_model_len,
                vocab_size=spec.model_config.vocab_size,
            )
            forward.run(largest, kv_pool)

        return num_kv_blocks(spec, self.device, self._ranks, num_tokens, run_largest_step)

    def _capture(self, forward: ForwardPass) -> None:
        """Captures graphs, if steps run from them, and makes what decode steps need."""
        graph_pool = None
        if self.spec.uses_graphs(self.device):
            graph_pool = torch.cuda.graph_pool_handle()  # the memory that all graphs share
            forward.share_logits(max(self.prefill.buffers.max_num_requests, self.decode.max_num_rows))
            self.prefill.capture(graph_pool)
        else:
            logger.info("%s: no graphs, the %s backend runs eagerly", self.device, self.spec.attention.backend.name)
        self.decode.prepare(graph_pool)
